"""A model behind its signature, as an application for HTTP.

- ``POST /invocations``: rows in MLflow's forms (``dataframe_split``, ``dataframe_records``,
  ``inputs``, ``instances``). The answer holds ``predictions``, and the ``id`` of its record. With
  ``?probabilities=true`` it also holds ``classes`` and, in their order, ``probabilities``.
- ``GET /ping``.
- ``GET /version``: name, version, and fingerprint of the key that it was verified with.
- ``GET /metrics``: for Prometheus; at an address of its own if ``metrics_address`` is set.

A refusal is ``{"message": ...}``. 400: the request is invalid; 408: it was not complete in time;
413: it is too large; 415: another content type; 422: the rows are valid, and the model raises
ValueError or TypeError, such as for an unknown category. 500: the model raised another exception;
503: there are too many connections, or the answer cannot be recorded. A connection that is slow
before or after a request is closed without an answer.
"""

import asyncio
import json
import logging
import os
import re
import secrets
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .metrics import Metrics
from .protocol import Connection
from .record import Record
from .schema import Columns, read_table

FLAVORS = ("sklearn", "xgboost", "lightgbm")
logger = logging.getLogger("model_server")


@dataclass(frozen=True)
class Settings:
    """The settings of a server; ``mlflow_lifecycle.serving`` writes them as JSON.

    Attributes:
        model: the model's folder, verified.
        version: its name, its number, and the fingerprint of the key that it was verified with.
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        limits: the lowest and the highest value of columns with numbers.
        record: the folder of the record, or None for no record.
        keep_days: how long requests and answers are kept.
        record_bytes: the size limit of the record, checked once a second. The oldest files are
            removed.
        leave_out: columns that are not recorded.
        metrics_address: host and port of /metrics, such as 127.0.0.1:9000. Empty: as for the rest.
        largest_body: of a request, in bytes.
        patience_seconds: how long a client may take to send a request, or to read an answer.
    """

    model: str
    version: dict[str, str]
    host: str = "127.0.0.1"
    port: int = 0
    limits: dict = field(default_factory=dict)
    record: str | None = None
    keep_days: int = 30
    record_bytes: int = 1_000_000_000
    leave_out: tuple[str, ...] = ()
    metrics_address: str = ""
    largest_body: int = 1_000_000
    patience_seconds: float = 10


class Predictor:
    """A model that answers requests, one at a time: a model need not be safe in several threads."""

    def __init__(self, settings: Settings):
        """Load the model.

        Raises:
            ValueError: its signature has no named columns, or a setting is invalid.
        """
        self.settings = settings
        self.metrics = Metrics()
        described = mlflow.models.Model.load(settings.model)
        self.columns = Columns(described.signature, settings.limits)
        for name in settings.leave_out:
            if name not in self.columns.dtypes:
                raise ValueError(f"leave_out must name columns of the signature, got {name!r}")
        self.record = None
        if settings.record:
            self.record = Record(
                settings.record,
                settings.keep_days,
                settings.record_bytes,
            )
        for flavor in FLAVORS:
            if flavor in described.flavors:
                self.model = getattr(mlflow, flavor).load_model(settings.model)
        self.classes = None
        if hasattr(self.model, "predict_proba"):
            self.classes = getattr(self.model, "classes_", None)

    def answer(self, body: bytearray, probabilities: bool) -> str:
        """Return the answer, once it is in the record.

        Raises:
            HTTPException: the request is refused. Refusals are not recorded.
            OSError: the answer cannot be recorded.
        """
        if probabilities and not isinstance(self.classes, np.ndarray):
            raise HTTPException(
                400,
                "the model has no predict_proba for the classes of one target: "
                "ask without probabilities=true",
            )
        table = self.columns.check(read_table(body))
        answer = {"id": secrets.token_hex(16)}
        try:
            rows = self.columns.frame(table)
            predictions = self.model.predict(rows)
            answer["predictions"] = np.asarray(predictions).tolist()
            if probabilities:
                probabilities = self.model.predict_proba(rows)
                answer["classes"] = self.classes.tolist()
                answer["probabilities"] = np.asarray(probabilities).tolist()
        except (ValueError, TypeError) as error:
            raise HTTPException(422, f"the model cannot predict these rows: {error}") from None
        text = json.dumps(answer, allow_nan=False)
        if self.record:
            for name in set(self.settings.leave_out):
                del table[name]
            self.record.add({**self.settings.version, **answer, "inputs": table})
        self.metrics.rows += len(rows)
        return text


def create_app(predictor: Predictor) -> Starlette:
    """Return the application.

    The model predicts in a thread of its own, so that other requests are answered meanwhile.
    """
    settings = predictor.settings
    own_address = split_address(settings.metrics_address)
    worker = ThreadPoolExecutor(1)

    async def metrics(request: Request) -> Response:
        if own_address and request.scope["server"][1] != own_address[1]:
            raise HTTPException(404, "the metrics are at another address")
        return Response(predictor.metrics.text(), media_type="text/plain; version=0.0.4")

    async def invocations(request: Request) -> Response:
        began = time.perf_counter()
        try:
            body = await read_body(request, settings)
            probabilities = request.query_params.get("probabilities") == "true"
            answered = worker.submit(predictor.answer, body, probabilities)
            text = await asyncio.wrap_future(answered)
            response = Response(text, media_type="application/json")
        except HTTPException as error:
            response = await refuse(request, error)
        except Exception as error:
            logger.exception("A request failed.")
            status = 503 if isinstance(error, OSError) else 500
            message = "the model failed, or its answer cannot be recorded"
            response = respond(status, {"message": message})
        seconds = time.perf_counter() - began
        predictor.metrics.observe(response.status_code, seconds)
        return response

    async def refuse(request: Request, error: HTTPException) -> Response:
        return respond(error.status_code, {"message": error.detail})

    routes = [
        Route("/ping", Response(), methods=["GET"]),
        Route("/version", respond(200, settings.version), methods=["GET"]),
        Route("/metrics", metrics),
        Route("/invocations", invocations, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: refuse})


def split_address(text: str) -> tuple[str, int] | None:
    """Return host and port of an address, or None if it is empty.

    Raises:
        ValueError: it is not HOST:PORT.
    """
    if not text:
        return None
    match = re.fullmatch(r"(.+):(\d{1,5})", text)
    if match is None:
        raise ValueError(f"metrics_address must be HOST:PORT, got {text!r}")
    return match[1], int(match[2])


def respond(status: int, content: dict) -> Response:
    """Return an answer in JSON."""
    return Response(json.dumps(content), status, media_type="application/json")


async def read_body(request: Request, settings: Settings) -> bytearray:
    """Return the body of a request; refuse one that is not JSON, too large or too slow."""
    content_type = request.headers.get("content-type", "")
    if not content_type.lower().startswith("application/json"):
        raise HTTPException(415, "the content type must be application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(settings.patience_seconds):
            async for part in request.stream():
                body += part
                if len(body) > settings.largest_body:
                    message = f"the body must have at most {settings.largest_body} bytes"
                    raise HTTPException(413, message)
    except (TimeoutError, ClientDisconnect):
        raise HTTPException(408, "the request was not complete in time") from None
    return body


def main(path: Path) -> None:
    """Serve with the settings in a file of JSON. The first line of the output is the address."""
    # What a model prints goes to the log: after the first line nobody reads the standard output.
    output = os.dup(1)
    os.dup2(2, 1)
    os.umask(0o077)  # only this user can read the record
    settings = Settings(**json.loads(path.read_text(encoding="utf-8")))
    try:
        metrics_address = split_address(settings.metrics_address)
        predictor = Predictor(settings)
    except (ValueError, OSError) as error:
        sys.exit(str(error))

    async def every_second() -> None:
        for connection in list(server.server_state.connections):
            connection.abort_if_slow(settings.patience_seconds)
        if predictor.record:
            predictor.record.remove_old()

    config = uvicorn.Config(
        create_app(predictor),
        host=settings.host,
        port=settings.port,
        http=Connection,
        log_level="error",
        timeout_keep_alive=settings.patience_seconds,
        limit_concurrency=500,
        callback_notify=every_second,
        timeout_notify=1,
    )
    server = uvicorn.Server(config)
    listening = config.bind_socket()
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
    listening.listen()
    sockets = [listening]
    if metrics_address:
        host, port = metrics_address
        sockets.append(uvicorn.Config(None, host=host, port=port).bind_socket())
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    os.write(output, f"http://{host}:{listening.getsockname()[1]}\n".encode())
    server.run(sockets=sockets)
