"""Ask a server for predictions, well-behaved or not, and describe a saved model as if it were verified."""

import contextlib
import http.client
import json
import socket
import warnings
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd
from mlflow.models import infer_signature
from starlette.exceptions import HTTPException
from versions import LOCK, iris_rows

from mlflow_lifecycle.server.app import Predictor, Settings
from mlflow_lifecycle.signing.statement import Statement
from mlflow_lifecycle.signing.verify import Verified

FEATURES = iris_rows().drop(columns="species")
NAMES = [*FEATURES]
PETAL = "petal length (cm)"
THREE = iris_rows().groupby("species").head(1)[NAMES]
SPECIES = ["setosa", "versicolor", "virginica"]


def as_verified(model: Path, rows: pd.DataFrame | None = None) -> Verified:
    """Return the model in the folder ``model``, saved a moment ago, as a verified version of ``rows``."""
    training_rows = model.with_name(f"{model.name}.parquet")
    if rows is not None:
        rows.to_parquet(training_rows, index=False)
    statement = Statement("flowers", "7", "a run", "release", "a fingerprint", "champion", "2026-01-31T00:00:00Z")
    return Verified("models:/flowers/7", statement, model, LOCK, training_rows, "ab" * 32)


def predictor_of(model: Path, **options) -> Predictor:
    """Return what answers for the model in a folder, in this process."""
    return Predictor(Settings(str(model), {"name": "flowers", "version": "7"}, **options))


def answered(predictor: Predictor, payload: object, probabilities: bool = False) -> tuple[int, dict]:
    """Return the status and the content of its answer to a payload."""
    try:
        return 200, json.loads(predictor.answer(json.dumps(payload).encode(), probabilities))
    except HTTPException as error:
        return error.status_code, {"message": error.detail}


def record_entries(folder: Path) -> list[dict]:
    """Return the lines of a record."""
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def inferred(rows, *more):
    """Return the signature that MLflow infers; its advice on whole numbers is no error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return infer_signature(rows, *more)


def in_json(rows: pd.DataFrame) -> dict[str, list]:
    """Return the columns of ``rows`` as JSON has them."""
    rows = rows.astype({name: str for name in rows if rows[name].dtype.kind == "M"}).astype(object)
    return {name: [None if pd.isna(v) or v == "NaT" else v for v in rows[name]] for name in rows}


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
    lines = lines or (f"Content-Length: {len(body)}",)
    return "\r\n".join([*head, *lines, "", ""]).encode() + body


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
