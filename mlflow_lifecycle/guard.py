"""A server for one model that takes no row which does not fit the model's signature, and keeps what it answered.

`mlflow models serve` takes `true` for 1.0, reads bodies of any size, waits for slow clients without end, and answers
with stack traces (mlflow#4897, mlflow#5208). This file is run as a script, ``python -I guard.py settings.json``, by the
Python of the model's own environment. It imports only what is in every model's closure, so nothing is added to a
model's pins for being served. `mlflow_lifecycle.serving` starts it, on a model that is verified.

- ``POST /invocations``: rows in MLflow's forms (``dataframe_split``, ``dataframe_records``, ``inputs``, ``instances``).
  The answer holds ``predictions`` and the ``id`` under which both are in the record. With ``?probabilities=true`` it
  also holds ``classes`` and, in their order, ``probabilities``.
- ``GET /ping``, and ``GET /version``: name, version, fingerprint of the key that it was verified with.

A refusal is ``{"message": ...}``, in one line, with the column. 400: no table that fits the signature; 408: too slow;
413: too large; 415: another content type; 422: the rows fit, and the model cannot take them (scikit-learn's ValueError
or TypeError, such as an unknown category). 500: the model failed in another way; 503: nothing can be recorded.
"""

import asyncio
import contextlib
import itertools
import json
import math
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import h11
import mlflow.sklearn
import numpy as np
import pandas as pd
import uvicorn
from fastapi import FastAPI, Request, Response
from mlflow.models import Model
from pydantic import AfterValidator, BeforeValidator, FailFast, Field, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

FORMS = ("dataframe_split", "dataframe_records", "inputs", "instances")


@dataclass(frozen=True)
class Settings:
    """What a server is started with; `mlflow_lifecycle.serving` writes it as JSON.

    Attributes:
        model: the model's folder, verified.
        name: of the registered model.
        version: of the registered model.
        key_fingerprint: SHA-256 of the public key that the version was verified with, hexadecimal.
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        limits: for a column of numbers its lowest and highest value; columns that are not named have none.
        record: the folder of the record, or None for no record.
        keep_days: how long the record is kept.
        leave_out: columns that are not recorded.
        largest_body: of a request, in bytes.
        patience_seconds: how long a client may take to send a request, or to read an answer.
        most_connections: beyond them a request is answered with 503.
    """

    model: str
    name: str
    version: str
    key_fingerprint: str
    host: str = "127.0.0.1"
    port: int = 0
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    record: str | None = None
    keep_days: int = 30
    leave_out: tuple[str, ...] = ()
    largest_body: int = 1_000_000
    patience_seconds: float = 10
    most_connections: int = 500


class RefusedError(Exception):
    """A request is refused, with this status and message."""

    def __init__(self, status: int, message: str):
        """Keep the status and the message, without the line breaks that a client may have put into it."""
        super().__init__(" ".join(message.split())[:500])
        self.status = status


# --- What the signature says of a column


def point_in_time(value: object) -> datetime:
    """Return the time that an ISO 8601 text without a time zone names."""
    try:
        found = datetime.fromisoformat(value)
        if re.search(r"[.,]\d{7}", value):
            raise ValueError("Python would cut off what is below a microsecond")
    except (TypeError, ValueError):
        found = None
    if found is None or found.tzinfo:
        raise ValueError(
            "a text such as 2026-01-31 or 2026-01-31T23:59:59, without a time zone, is wanted"
        )
    return found


def whole_text(value: str) -> str:
    """Return the text; refuse half a surrogate pair, which JSON can hold and no file."""
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError("half a surrogate pair is no text")
    return value


def rounded(value: float) -> float:
    """Return the number as the model gets it, in 32 bits, so that limits from such numbers include themselves."""
    with np.errstate(over="ignore"):  # what is too large is refused by its limit
        return float(np.float32(value))


# MLflow's type: the type of a value in JSON, its lowest and highest value, the column's type with and without gaps.
FLOAT32 = float(np.finfo("float32").max)
TYPES = {
    "double": (float, None, None, "float64", "float64"),
    "float": (float, -FLOAT32, FLOAT32, "float32", "float32"),
    "long": (int, -(2**63), 2**63 - 1, "int64", "Int64"),
    "integer": (int, -(2**31), 2**31 - 1, "int32", "Int32"),
    "boolean": (bool, None, None, "bool", "boolean"),
    "string": (str, None, None, "object", "object"),
    "datetime": (
        datetime,
        datetime(1678, 1, 1),
        datetime(2262, 1, 1),
        "datetime64[ns]",
        "datetime64[ns]",
    ),
}


class Columns:
    """The columns of a signature: validates values, and makes the DataFrame that the model takes."""

    def __init__(self, signature, limits: dict[str, tuple[float, float]]):
        """Make a rule for each column.

        Raises:
            ValueError: there is no signature of named columns of the types that scikit-learn takes; or a limit is
                for a column that is not there, or no number.
        """
        specs = signature.inputs.inputs if signature and signature.inputs else []
        self.required = {spec.name: spec.required for spec in specs if hasattr(spec, "required")}
        kinds = {spec.name: getattr(spec.type, "name", "") for spec in specs}
        if not specs or any(
            not isinstance(name, str) or kinds[name] not in TYPES for name in kinds
        ):
            raise ValueError(
                "The model has no signature of named columns. Log it with infer_signature(rows, ...)."
            )
        if unknown := [
            name for name in limits if kinds.get(name) not in ("double", "float", "long", "integer")
        ]:
            raise ValueError(
                f"There are limits for what is no column of numbers: {', '.join(unknown)}"
            )
        if wrong := [
            name for name, (low, high) in limits.items() if not low <= high
        ]:  # no number is not
            raise ValueError(
                f"The limits are no numbers, or the lowest is above the highest: {', '.join(wrong)}"
            )
        self.dtypes = {
            name: TYPES[kind][3 if self.required[name] else 4] for name, kind in kinds.items()
        }
        self.rules = {
            name: self._rule(name, TYPES[kind], limits.get(name)) for name, kind in kinds.items()
        }
        self.alike = set(self.dtypes.values()) == {"float64"}

    def _rule(self, name: str, kind: tuple, limits: tuple[float, float] | None) -> TypeAdapter:
        """Return the rule for a list of the column's values."""
        value, low, high = kind[:3]
        if limits:
            low, high = (
                max(-math.inf if low is None else low, limits[0]),
                min(high or math.inf, limits[1]),
            )
            low, high = (math.ceil(low), math.floor(high)) if value is int else (low, high)
        inside = {"allow_inf_nan": False} if value is float else {}
        inside |= {"ge": low, "le": high} if low is not None else {}
        rule = Annotated[value, BeforeValidator(point_in_time)] if value is datetime else value
        if kind[3] == "float32":
            rule = Annotated[rule, Field(strict=True), AfterValidator(rounded)]
        rule = Annotated[rule, Field(strict=True, **inside)]
        rule = Annotated[rule, AfterValidator(whole_text)] if value is str else rule
        return TypeAdapter(
            Annotated[list[rule if self.required[name] else rule | None], FailFast()]
        )

    def checked(self, table: dict[str, list]) -> dict[str, list]:
        """Return the table's columns that the signature names, in its order; an optional one that lacks has gaps.

        Raises:
            RefusedError: a column lacks, or a value is none for its column.
        """
        rows = len(next(iter(table.values()), []))
        if not rows:
            raise RefusedError(400, "there must be at least one row")
        found = {}
        for name, rule in self.rules.items():
            if name not in table:
                if self.required[name]:
                    raise RefusedError(400, f"column {name!r}: it is missing")
                found[name] = [None] * rows
                continue
            try:
                found[name] = rule.validate_python(table[name])
            except ValidationError as error:
                first = error.errors(include_input=False, include_url=False, include_context=False)[
                    0
                ]
                where = f", row {first['loc'][0] + 1} of {rows}" if first["loc"] else ""
                reason = first["msg"].removeprefix("Value error, ")
                raise RefusedError(400, f"column {name!r}{where}: {reason}") from None
        return found

    def frame(self, table: dict[str, list]) -> pd.DataFrame:
        """Return checked columns as the DataFrame that the model takes; a gap is NaN, NA or NaT as in training."""
        if self.alike:
            return pd.DataFrame(
                np.array([*table.values()], dtype="float64").T, columns=[*table], copy=False
            )
        made = {}
        for name, values in table.items():
            kind = self.dtypes[name]
            if kind == "object":
                made[name] = np.array(
                    [np.nan if value is None else value for value in values], dtype=object
                )
            else:
                made[name] = (
                    pd.array(values, dtype=kind)
                    if kind[0] in "Ib"
                    else np.array(values, dtype=kind)
                )
        return pd.DataFrame(made)


# --- What a body says


def without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """Return a JSON object as a dictionary; refuse a key that stands there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RefusedError(
            400, f"the key {_twice(name for name, _ in pairs)!r} stands in an object twice"
        )
    return found


def _twice(names: Iterable[str]) -> str | None:
    """Return the first name that is there already, in time that grows with their number and not with its square."""
    seen = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def whole_number(digits: str) -> int | float:
    """Return the number; infinity, which every column refuses by its name, for more digits than Python reads."""
    return int(digits) if len(digits) < 4000 else float("inf")


def table_of(body: bytes) -> dict[str, list]:
    """Return the columns that a body holds in one of MLflow's forms, each as a list of equal length.

    Raises:
        RefusedError: this is no table.
    """
    try:
        text = body.decode()
        payload = json.loads(
            text,
            object_pairs_hook=without_repeats,
            parse_int=whole_number if len(text) > 4000 else None,
        )
    except RecursionError:
        raise RefusedError(400, "this is nested too deeply") from None
    except ValueError as error:
        raise RefusedError(400, f"this is no JSON in UTF-8: {error}") from None
    if not isinstance(payload, dict) or len(payload) != 1 or not payload.keys() <= set(FORMS):
        raise RefusedError(
            400, f"there must be an object with one of {', '.join(FORMS)}, and nothing else"
        )
    ((form, table),) = payload.items()
    if isinstance(table, list) and form != "dataframe_split":
        return _from_records(table)
    if not isinstance(table, dict) or form == "dataframe_records":
        raise RefusedError(400, f"{form} does not hold rows with names of columns")
    return _from_split(table) if form == "dataframe_split" else _of_one_length(table)


def _from_records(rows: list) -> dict[str, list]:
    if not all(isinstance(row, dict) for row in rows):
        raise RefusedError(400, "each row must be an object, with a value for each column's name")
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    for name in names:
        if lacking := [number for number, row in enumerate(rows, 1) if name not in row]:
            raise RefusedError(
                400, f"column {name!r}, row {lacking[0]} of {len(rows)}: it is missing"
            )
    return {name: [row[name] for row in rows] for name in names}


def _from_split(table: dict) -> dict[str, list]:
    names, rows = table.get("columns"), table.get("data")
    if (
        not isinstance(names, list)
        or not isinstance(rows, list)
        or not table.keys() <= {"columns", "data", "index"}
    ):
        raise RefusedError(
            400, "dataframe_split must hold the lists columns and data, and at most index"
        )
    if not all(isinstance(name, str) for name in names):
        raise RefusedError(400, "the names of columns must be texts")
    if len(set(names)) < len(names):
        raise RefusedError(400, f"column {_twice(names)!r}: it is there twice")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != len(names):
            raise RefusedError(
                400, f"row {number} of {len(rows)}: {len(names)} values are wanted, one a column"
            )
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}


def _of_one_length(table: dict) -> dict[str, list]:
    for name, values in table.items():
        if not isinstance(values, list):
            raise RefusedError(400, f"column {name!r}: a list of values is wanted")
        if len(values) != len(next(iter(table.values()))):
            raise RefusedError(
                400, f"column {name!r}: it has another number of rows than the first column"
            )
    return table


# --- What is kept


class Record:
    """Requests and answers, a line of JSON each, in one file a day and server: ``requests-2026-01-31-….jsonl``.

    A line is with the system before the answer leaves, so a killed server loses none. If the machine loses its
    current, what the system had not yet written is lost.
    """

    def __init__(self, folder: str, keep_days: int):
        """Keep lines in ``folder``, made if need be; only this user can read it."""
        self.folder, self.keep_days = Path(folder), keep_days
        self.mark, self.day, self.file = secrets.token_hex(4), None, None
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.forget()

    def keep(self, entry: dict) -> None:
        """Add a line.

        Raises:
            OSError: it cannot be written; then no part of it is there.
        """
        now = datetime.now(UTC)
        if (
            now.date() != self.day or not os.fstat(self.file.fileno()).st_nlink
        ):  # or somebody has removed it
            path = self.folder / f"requests-{now.date()}-{self.mark}.jsonl"
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            if self.file is not None:
                self.file.close()
            self.file, self.day = os.fdopen(descriptor, "ab", buffering=0), now.date()
        line = (
            json.dumps(
                {"time": now.isoformat(timespec="milliseconds"), **entry}, default=str
            ).encode()
            + b"\n"
        )
        end = self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(line) < len(line):
                raise OSError("the disk is full")
        except OSError:
            self.file.truncate(end)
            raise

    def forget(self) -> None:
        """Remove the files of days that are longer ago than they may be kept."""
        first = datetime.now(UTC).date() - timedelta(days=self.keep_days)
        for path in self.folder.glob("requests-*.jsonl"):
            day = re.fullmatch(r"requests-(\d{4}-\d\d-\d\d)-.*", path.name)
            if day and day[1] < first.isoformat():
                with contextlib.suppress(
                    OSError
                ):  # it is open on Windows, or not ours: it is tried again
                    path.unlink()


# --- The answer


class Guard:
    """A model behind its signature."""

    def __init__(self, settings: Settings):
        """Load the model.

        Raises:
            ValueError: its signature does not fit a table, or a column that is to be left out is not there.
        """
        described = Model.load(settings.model)
        self.columns = Columns(described.signature, dict(settings.limits))
        if unknown := set(settings.leave_out) - set(self.columns.rules):
            raise ValueError(
                f"There are no such columns to leave out: {', '.join(sorted(unknown))}"
            )
        self.model, self.untold = mlflow.sklearn.load_model(settings.model), 1000
        self.kept = [name for name in self.columns.rules if name not in settings.leave_out]
        self.record = Record(settings.record, settings.keep_days) if settings.record else None
        self.version = {
            "name": settings.name,
            "version": settings.version,
            "key_fingerprint": settings.key_fingerprint,
        }

    def answer(self, body: bytes, probabilities: bool) -> tuple[int, bytes]:
        """Return the status and the body of the answer, which are in the record by then."""
        entry = {
            "id": secrets.token_hex(16),
            "name": self.version["name"],
            "version": self.version["version"],
        }
        try:
            try:
                table = self.columns.checked(table_of(body))
                entry["inputs"] = {name: table[name] for name in self.kept}
                answer = self.answered(table, probabilities)
                text = json.dumps({"id": entry["id"], **answer}, allow_nan=False).encode()
                entry |= {"status": 200, **answer}
            except RefusedError as error:
                # What scikit-learn says may quote a value, and so what is to be left out.
                quotes = error.status == 422 and len(self.kept) < len(self.columns.rules)
                told = "the model cannot take these rows" if quotes else str(error)
                entry |= {"status": error.status, "message": told}
                text = json.dumps({"id": entry["id"], "message": str(error)}).encode()
            if self.record:
                self.record.keep(entry)
            return entry["status"], text
        except Exception as error:
            self.log_error()
            if isinstance(error, OSError):
                return 503, b'{"message": "requests cannot be recorded, so none is answered"}'
            return 500, b'{"message": "the model failed"}'

    def log_error(self) -> None:
        """Print the error at hand, unless there is no room for it; a thousand are enough for a client to cause."""
        self.untold -= 1
        if self.untold >= 0:
            with contextlib.suppress(OSError):
                traceback.print_exc()

    def answered(self, table: dict[str, list], probabilities: bool) -> dict[str, list]:
        """Return what the model says of checked columns."""
        classes = (
            getattr(self.model, "classes_", None) if hasattr(self.model, "predict_proba") else None
        )
        if probabilities and (classes is None or any(np.ndim(name) for name in classes)):
            raise RefusedError(
                400, "this model gives no probabilities of the classes of one target"
            )
        rows = self.columns.frame(table)
        try:
            answer = {"predictions": np.asarray(self.model.predict(rows)).tolist()}
            if probabilities:
                answer["classes"] = np.asarray(classes).tolist()
                answer["probabilities"] = np.asarray(self.model.predict_proba(rows)).tolist()
        except (ValueError, TypeError) as error:
            self.log_error()
            raise RefusedError(422, f"the model cannot take these rows: {error}") from None
        return answer


def application(guard: Guard, largest_body: int) -> FastAPI:
    """Return the app that answers by ``guard``."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)

    def said(status: int, message: str) -> Response:
        return Response(json.dumps({"message": message}), status, media_type="application/json")

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return said(error.status_code, error.detail)

    @app.get("/ping")
    async def ping() -> Response:
        return Response("\n", media_type="application/json")

    @app.get("/version")
    async def version() -> Response:
        return Response(json.dumps(guard.version), media_type="application/json")

    @app.post("/invocations")
    async def invocations(request: Request) -> Response:
        wanted, kind = (
            request.url.query,
            request.headers.get("content-type", "").lower().replace(" ", ""),
        )
        if (
            kind not in ("application/json", "application/json;charset=utf-8")
            or "content-encoding" in request.headers
        ):
            return said(
                415, "the content type must be application/json, in UTF-8 and not compressed"
            )
        if wanted not in ("", "probabilities=true", "probabilities=false"):
            return said(
                400, "there is no other parameter than probabilities=true or probabilities=false"
            )
        body, large = bytearray(), said(413, f"a body must have at most {largest_body} bytes")
        if int(request.headers.get("content-length", 0)) > largest_body:
            return large
        try:
            async for part in request.stream():
                body += part
                if len(body) > largest_body:
                    return large
        except ClientDisconnect:
            return said(400, "the client is gone")
        status, text = guard.answer(
            bytes(body), wanted.endswith("true")
        )  # one at a time, in the order of arrival
        return Response(text, status, media_type="application/json")

    return app


# --- The connection


class Connection(H11Protocol):
    """A connection of uvicorn that does not wait for its client without end."""

    since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to wait for a request."""
        self.since = time.monotonic()
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Take the time if a request begins here."""
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.since = time.monotonic()
        super().data_received(data)

    def on_response_complete(self) -> None:
        """Begin to wait for the client to read the answer, and for its next request."""
        self.since = time.monotonic()
        super().on_response_complete()

    def eof_received(self) -> None:
        """Refuse half a request of a client that has closed its direction; a whole one is answered by now."""
        self.end("400 Bad Request", "the request ends before it is complete")

    def end(self, status: str, message: str) -> None:
        """Close the connection; say why to a client of which a part of a request is here."""
        waits = self.conn.their_state is h11.SEND_BODY and not self.cycle.response_started
        if waits or (self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]):
            text = json.dumps({"message": message})
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n{text}".encode())
        self.transport.close()

    def end_if_slow(self, seconds: float) -> None:
        """Close the connection if it waits for its client for longer than that."""
        unread = self.transport.get_write_buffer_size()
        if (
            unread or self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        ) and time.monotonic() - self.since > seconds:
            if unread or self.transport.is_closing():
                self.transport.abort()
            else:
                self.end(
                    "408 Request Timeout", f"the request was not here within {seconds:g} seconds"
                )


def run(settings: Settings) -> None:
    """Serve until the standard input ends; the first line on the standard output is the address."""
    said = os.dup(1)
    os.dup2(
        2, 1
    )  # what a model prints goes to the log: nobody reads the standard output after the first line
    guard = Guard(settings)
    warnings.simplefilter("ignore")  # scikit-learn's, which a client could cause without end
    family, kind, protocol, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM
    )[0]
    listening = socket.socket(
        family, kind, protocol
    )  # not create_server: asyncio sends at once only if it sees TCP
    if os.name != "nt":
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(address)
    listening.listen(512)

    async def every_second() -> None:
        for connection in list(server.server_state.connections):
            connection.end_if_slow(settings.patience_seconds)
        if guard.record:
            guard.record.forget()

    server = uvicorn.Server(
        uvicorn.Config(
            application(guard, settings.largest_body), http=Connection, ws="none", lifespan="off", log_level="error",
            access_log=False, server_header=False, date_header=False, proxy_headers=False, timeout_graceful_shutdown=5,
            timeout_keep_alive=settings.patience_seconds,
            limit_concurrency=settings.most_connections, callback_notify=every_second, timeout_notify=1,
        )
    )  # fmt: skip

    def wait_for_the_end() -> None:
        while os.read(0, 1):
            pass
        server.should_exit = True

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    os.write(said, f"http://{host}:{listening.getsockname()[1]}\n".encode())
    server.run(sockets=[listening])


if __name__ == "__main__":
    try:
        run(Settings(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
