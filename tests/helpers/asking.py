"""Ask a server for predictions, well-behaved or not, and describe a saved model as if it were verified."""

import contextlib
import http.client
import json
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd
from versions import LOCK

from mlflow_lifecycle.signing.statement import Statement
from mlflow_lifecycle.signing.verify import Verified


def as_verified(model: Path, rows: pd.DataFrame | None = None) -> Verified:
    """Return the model in the folder ``model``, saved a moment ago, as a verified version of ``rows``."""
    training_rows = model.with_name(f"{model.name}.parquet")
    if rows is not None:
        rows.to_parquet(training_rows, index=False)
    statement = Statement("flowers", "7", "a run", "release", "a fingerprint", "champion", "2026-01-31T00:00:00Z")
    return Verified("models:/flowers/7", statement, model, LOCK, training_rows, "ab" * 32)


def ask(
    address: str, body=None, kind: str | None = "application/json", path: str = "/invocations", method: str = ""
) -> tuple[int, str]:
    """Send one request on a connection of its own; return the status and the body of the answer."""
    with contextlib.closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)) as connection:
        headers = {"Content-Type": kind} if kind else {}
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def split(rows: pd.DataFrame) -> str:
    """Return rows as the body of a request."""
    return json.dumps({"dataframe_split": rows.to_dict("split", index=False)})


def message(body: bytes | str, *lines: str) -> bytes:
    """Return the bytes of a request, with the right length unless ``lines`` of its head say something else."""
    body = body.encode() if isinstance(body, str) else body
    head = ["POST /invocations HTTP/1.1", "Host: here", "Content-Type: application/json"]
    length = [] if any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines) else [
        f"Content-Length: {len(body)}"
    ]  # fmt: skip
    return "\r\n".join([*head, *length, *lines, "", ""]).encode() + body


def connected(address: str) -> socket.socket:
    """Return a connection, to be closed by the caller."""
    where = urlsplit(address)
    return socket.create_connection((where.hostname, where.port), timeout=60)


def answer_on(connection: socket.socket) -> tuple[int, str]:
    """Return the status and the body of the next answer on a connection; the status 0 if it is closed without one."""
    with contextlib.closing(http.client.HTTPResponse(connection, method="POST")) as answer:
        try:
            answer.begin()
            return answer.status, answer.read().decode()
        except (http.client.RemoteDisconnected, ConnectionError):
            return 0, ""
