"""A model behind its signature, as an application for HTTP.

- ``POST /invocations``: rows in MLflow's forms (``dataframe_split``, ``dataframe_records``,
  ``inputs``, ``instances``). The answer holds ``predictions``, and the ``id`` of its record. With
  ``?probabilities=true`` it also holds ``classes`` and, in their order, ``probabilities``.
- ``GET /ping``.
- ``GET /version``: name, version, and fingerprint of the key that it was verified with.
- ``GET /metrics``: for Prometheus.

A refusal is ``{"message": ...}``. 400: the request is invalid; 408: it was not complete in time;
413: it is too large; 415: another content type; 422: the rows are valid, and the model raises
ValueError or TypeError, such as for an unknown category. 500: the model raised another exception;
503: there are too many connections, or the answer cannot be recorded.
"""

import asyncio
import importlib
import json
import logging
import os
import secrets
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import uvicorn
from mlflow.models import Model
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .metrics import Metrics
from .protocol import Connection
from .record import Record
from .schema import Columns, Limits, RefusedError, Table, read_table

FLAVORS = ("sklearn", "xgboost", "lightgbm")
CONTENT_TYPES = ("application/json", "application/json;charset=utf-8")
QUERIES = {"": False, "probabilities=false": False, "probabilities=true": True}
ERRORS_LOGGED = 1000
logger = logging.getLogger("model_server")


@dataclass(frozen=True)
class Settings:
    """The settings of a server; ``mlflow_lifecycle.serving`` writes them as JSON.

    Attributes:
        model: the model's folder, verified.
        name: of the registered model.
        version: of the registered model.
        key_fingerprint: SHA-256 of the public key that the version was verified with, hexadecimal.
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        limits: the lowest and the highest value of columns with numbers.
        record: the folder of the record, or None for no record.
        keep_days: how long requests and answers are kept.
        record_bytes: the size limit of the record, checked once a second. The oldest files are
            removed.
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
    limits: Limits = field(default_factory=dict)
    record: str | None = None
    keep_days: int = 30
    record_bytes: int = 1_000_000_000
    leave_out: tuple[str, ...] = ()
    largest_body: int = 1_000_000
    patience_seconds: float = 10
    most_connections: int = 500


class Predictor:
    """A model that answers requests, one at a time: a model need not be safe in several threads."""

    def __init__(self, settings: Settings):
        """Load the model.

        Raises:
            ValueError: its signature has no named columns, or a setting is invalid.
        """
        self.settings = settings
        self.version = {
            "name": settings.name,
            "version": settings.version,
            "key_fingerprint": settings.key_fingerprint,
        }
        self.metrics = Metrics()
        self.errors = 0
        described = Model.load(settings.model)
        self.columns = Columns(described.signature, settings.limits)
        for name in settings.leave_out:
            if name not in self.columns.dtypes:
                raise ValueError(f"leave_out must name columns of the signature, got {name!r}")
        self.record = None
        if settings.record:
            self.record = Record(settings.record, settings.keep_days, settings.record_bytes)
        flavor = next(name for name in FLAVORS if name in described.flavors)
        self.model = importlib.import_module(f"mlflow.{flavor}").load_model(settings.model)
        self.classes = None
        if hasattr(self.model, "predict_proba"):
            self.classes = getattr(self.model, "classes_", None)

    def answer(self, body: bytes, probabilities: bool) -> tuple[int, str]:
        """Return the status and the body of the answer, once both are in the record."""
        try:
            return self._answer(body, probabilities)
        except OSError:
            self._log_error()
            return 503, '{"message": "the answer cannot be recorded, so there is none"}'
        except Exception:
            self._log_error()
            return 500, '{"message": "the model failed"}'

    def _answer(self, body: bytes, probabilities: bool) -> tuple[int, str]:
        entry = {
            "id": secrets.token_hex(16),
            "name": self.version["name"],
            "version": self.version["version"],
            "status": 200,
        }
        try:
            table = self.columns.check(read_table(body))
            entry["inputs"] = table.copy()
            for name in self.settings.leave_out:
                entry["inputs"].pop(name, None)
            answer = self._predict(table, probabilities)
        except RefusedError as error:
            entry["status"] = error.status
            answer = {"message": str(error)}
        text = json.dumps({"id": entry["id"], **answer}, allow_nan=False)
        if entry["status"] == 422:  # the model may repeat a value that must not be recorded
            answer = {"message": "the model cannot predict these rows"}
        if self.record:
            self.record.add({**entry, **answer})
        return entry["status"], text

    def _predict(self, table: Table, probabilities: bool) -> Table:
        """Return what the model predicts for a checked table."""
        if probabilities and not isinstance(self.classes, np.ndarray):
            reason = "the model has no predict_proba for the classes of one target"
            raise RefusedError(400, f"{reason}: ask without probabilities=true")
        rows = self.columns.frame(table)
        try:
            answer = {"predictions": np.asarray(self.model.predict(rows)).tolist()}
            if probabilities:
                answer["classes"] = self.classes.tolist()
                answer["probabilities"] = np.asarray(self.model.predict_proba(rows)).tolist()
        except (ValueError, TypeError) as error:
            self._log_error()
            raise RefusedError(422, f"the model cannot predict these rows: {error}") from None
        self.metrics.rows += len(rows)
        return answer

    def _log_error(self) -> None:
        """Log the current error. The number is limited, because clients can cause errors."""
        self.errors += 1
        if self.errors <= ERRORS_LOGGED:
            logger.exception("A request failed.")


def create_app(predictor: Predictor) -> Starlette:
    """Return the application.

    The model predicts in a thread of its own, so that other requests are answered meanwhile.
    """
    worker = ThreadPoolExecutor(1)

    async def ping(request: Request) -> Response:
        return respond(200, "\n")

    async def version(request: Request) -> Response:
        return respond(200, json.dumps(predictor.version))

    async def metrics(request: Request) -> Response:
        return Response(predictor.metrics.text(), media_type="text/plain; version=0.0.4")

    async def invocations(request: Request) -> Response:
        began = time.perf_counter()
        try:
            probabilities = read_head(request)
            body = await read_body(request, predictor.settings.largest_body)
            loop = asyncio.get_running_loop()
            status, text = await loop.run_in_executor(worker, predictor.answer, body, probabilities)
        except RefusedError as error:
            status = error.status
            text = json.dumps({"message": str(error)})
        predictor.metrics.observe(status, time.perf_counter() - began)
        return respond(status, text)

    async def refuse(request: Request, error: HTTPException) -> Response:
        return respond(error.status_code, json.dumps({"message": error.detail}))

    routes = [
        Route("/ping", ping),
        Route("/version", version),
        Route("/metrics", metrics),
        Route("/invocations", invocations, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: refuse})
    app.router.redirect_slashes = False
    return app


def respond(status: int, text: str) -> Response:
    """Return an answer in JSON."""
    return Response(text, status, media_type="application/json")


def read_head(request: Request) -> bool:
    """Return whether probabilities are wanted; refuse another query or content type."""
    content_type = request.headers.get("content-type", "").lower().replace(" ", "")
    if content_type not in CONTENT_TYPES or "content-encoding" in request.headers:
        raise RefusedError(415, "the content type must be application/json, not compressed")
    if request.url.query not in QUERIES:
        raise RefusedError(400, "the only parameter is probabilities=true or probabilities=false")
    return QUERIES[request.url.query]


async def read_body(request: Request, largest: int) -> bytes:
    """Return the body of a request; refuse one that is larger than ``largest`` bytes."""
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > largest:
                raise RefusedError(413, f"the body must have at most {largest} bytes")
    except ClientDisconnect:
        raise RefusedError(400, "the client has closed the connection") from None
    return bytes(body)


def run(settings: Settings) -> None:
    """Serve until the standard input ends. The first line of the standard output is the address."""
    # What a model prints goes to the log: after the first line nobody reads the standard output.
    output = os.dup(1)
    os.dup2(2, 1)
    predictor = Predictor(settings)
    warnings.simplefilter("ignore")  # clients can cause warnings, too

    async def every_second() -> None:
        for connection in list(server.server_state.connections):
            connection.end_if_slow(settings.patience_seconds)
        if predictor.record:
            predictor.record.remove_old()

    def watch_input() -> None:
        while os.read(0, 1):
            pass
        server.should_exit = True

    config = uvicorn.Config(
        create_app(predictor),
        host=settings.host,
        port=settings.port,
        http=Connection,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=settings.patience_seconds,
        limit_concurrency=settings.most_connections,
        callback_notify=every_second,
        timeout_notify=1,
    )
    server = uvicorn.Server(config)
    listening = config.bind_socket()
    listening.listen()
    threading.Thread(target=watch_input, daemon=True).start()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    os.write(output, f"http://{host}:{listening.getsockname()[1]}\n".encode())
    server.run(sockets=[listening])


def main(path: Path) -> None:
    """Serve with the settings in a file of JSON."""
    try:
        run(Settings(**json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
