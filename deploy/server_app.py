"""MLflow's server with authentication, and what is missing in version 3.17: refusals, limits and retries.

`basic-auth` lets every user choose where an experiment's files go, which may be another user's folder; it lets every
user list all users; and it verifies as many wrong passwords as somebody sends, faster for a name that does not exist.
A user who makes an experiment or a registered model gets the permission for it a moment later. In that moment MLflow
refuses the user's other programs. If two programs log the same dataset, or set the same new tag of an experiment, or
the same new alias or tag of a registered model, at the same moment, one fails. The limits are in limits.py, protected
aliases in aliases.py, and what Prometheus reads in figures.py.
`mlflow server --app-name=team` starts this app; the name is known to MLflow by `server_app-1.dist-info`, beside this
file.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import secrets
from pathlib import Path
from weakref import WeakValueDictionary

from aliases import ProtectedAliases, Store, asked, reason_against_change
from cachetools import TTLCache
from figures import FAILED_LOGINS, RESPONSES, serve_figures
from flask import Response, jsonify, request
from limits import CREDENTIALS, TooLargeError, closing, limit_heads, read_body, repeat, serve_stranger, serve_user
from mlflow.protos.service_pb2 import CreateExperiment
from mlflow.server import app, auth
from mlflow.server.handlers import build_server_info_payload
from starlette.responses import JSONResponse, PlainTextResponse
from werkzeug.datastructures import Authorization
from werkzeug.security import check_password_hash, generate_password_hash

WRONG_PASSWORDS = 5  # for one name, in each process of the server, before it waits
WAIT = 60  # seconds
# One at a time, over all processes: what is made together with its maker's right to it, and what MLflow adds after it
# has looked that it is not there.
IN_TURN = (
    "/mlflow/experiments/create",
    "/mlflow/experiments/set-experiment-tag",
    "/mlflow/registered-models/create",
    "/mlflow/registered-models/alias",
    "/mlflow/registered-models/set-tag",
    "/mlflow/runs/log-inputs",
)
DIRECT = ("/mlflow-artifacts/presigned/", "/mlflow-artifacts/mpu/", "/artifacts/presigned-")  # ways around the server
# Bytes of a body. What is larger is an upload, and handed on as it comes. A body that has a turn waits for it whole,
# however large: MLflow, too, reads it whole.
SMALL = 100_000
NOT_AUTHENTICATED = "You are not authenticated. Please see https://mlflow.org/docs/latest/auth/index.html"


def refuse(store: Store) -> Response | None:
    """Refuse who is not an admin what MLflow allows everybody, and all what would take away a protected version.

    Flask calls it once the user is known.
    """
    route = str(request.url_rule)
    reason = reason_against_change(store)
    if reason is None:
        if route.endswith("/mlflow/experiments/create") and asked(CreateExperiment()).artifact_location:
            reason = "Only an admin may choose an artifact_location. Leave it out, and the server chooses one."
        elif route.endswith("/mlflow/users/list"):
            reason = "Only an admin may list the users."
        if reason is None or auth.sender_is_admin():
            return None
    return app.make_response((jsonify(error_code="PERMISSION_DENIED", message=reason), 403))


class Turns:
    """Let requests that must not meet be answered one at a time, and ask again where MLflow forbids something.

    By then, the user who made something has the permission for it.
    """

    def __init__(self, served):
        """Wrap an ASGI app."""
        self.served, self.queue = served, asyncio.Lock()

    async def __call__(self, scope, receive, send):
        """Hand on a request."""
        headers = dict(scope.get("headers", []))
        in_turn = scope.get("method") == "POST" and scope["path"].endswith(IN_TURN)
        upload = b"transfer-encoding" in headers or int(headers.get(b"content-length", 0)) > SMALL
        if scope["type"] != "http" or (upload and not in_turn):
            await self.served(scope, receive, send)
            return
        body = await read_body(receive)
        if body is None:
            return
        if in_turn:
            async with self.turn():
                await self.served(scope, repeat(body, receive), send)
        elif await self.is_forbidden(scope, repeat(body, receive), send):
            async with self.turn():
                pass
            await self.served(scope, repeat(body, receive), send)

    @contextlib.asynccontextmanager
    async def turn(self):
        """Wait until no other request has its turn, in this process or in another one of the server."""
        async with self.queue:
            with Path(__file__).open() as file:
                await asyncio.to_thread(fcntl.flock, file, fcntl.LOCK_EX)
                yield

    async def is_forbidden(self, scope, receive, send) -> bool:
        """Answer a request, or return that it is forbidden."""
        forbidden = False

        async def answer(message):
            nonlocal forbidden
            forbidden |= message.get("status") == 403
            if not forbidden:
                await send(message)

        await self.served(dict(scope), receive, answer)
        return forbidden


class ThroughTheServer:
    """Let files of a bucket go through the server alone.

    MLflow offers its clients addresses in the bucket that are signed for a while. They are of no use to a client that
    cannot reach the bucket, which then fails, and no rule of the server holds there.
    """

    def __init__(self, served):
        """Wrap an ASGI app."""
        self.served = served

    async def __call__(self, scope, receive, send):
        """Answer a request, or hand it on."""
        answer = self.served
        path = scope.get("path", "")
        if path.endswith("/mlflow/server-info"):
            payload = await asyncio.to_thread(build_server_info_payload)
            answer = JSONResponse(payload | {"multipart_uploads_enabled": False, "multipart_downloads_enabled": False})
        elif any(direct in path for direct in DIRECT):
            # MLflow's client looks at how the message begins, and sends the file to the server.
            message = (
                "Multipart upload is not supported for the current artifact repository: files go through the server."
            )
            answer = JSONResponse({"error_code": "NOT_IMPLEMENTED", "message": message}, 501)
        await answer(scope, receive, send)


class PasswordGuard:
    """Read no more than a little of a request before its password was verified, and slow down guesses.

    Requests without credentials are for MLflow to answer: it has pages that need none.

    After `WRONG_PASSWORDS` wrong ones, a name waits `WAIT` seconds. Passwords of one name are verified one at a time,
    so that many guesses at the same moment gain nothing. A password that was right before is let pass meanwhile, so
    nobody can shut out a user who works. A name that does not exist costs the same work and gets the same answers.
    """

    def __init__(self, served):
        """Wrap an ASGI app."""
        self.served = served
        self.key = secrets.token_bytes(32)
        self.right = TTLCache(maxsize=10_000, ttl=3600)  # by a keyed digest of the header
        self.wrong = TTLCache(maxsize=100_000, ttl=WAIT)  # how many, by name
        self.turns = WeakValueDictionary()
        self.nobody = generate_password_hash(secrets.token_urlsafe())

    async def __call__(self, scope, receive, send):
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self.served(scope, receive, send)
            return

        async def count(message):
            if message["type"] == "http.response.start":
                RESPONSES.labels(str(message["status"])).inc()
            await send(message)

        if scope["path"].rstrip("/") == "/metrics":  # for Prometheus, at another address
            await closing(404, "Not found.")(scope, receive, count)
            return
        serve = serve_stranger
        for name, value in scope["headers"]:
            if name in CREDENTIALS:
                serve = serve_user
                if refusal := await self.refusal(value):
                    FAILED_LOGINS.inc()
                    await refusal(scope, receive, count)
                    return
        try:
            await serve(self.served, scope, receive, count)
        except TooLargeError:
            await closing(413, "The request is too large.")(scope, receive, count)

    async def refusal(self, header: bytes) -> PlainTextResponse | None:
        """Return the answer to wrong credentials; None where they are right."""
        credentials = Authorization.from_header(header.decode("latin-1"))
        if credentials is None or credentials.type != "basic":
            return self.not_authenticated()
        name, mark = credentials.username, hashlib.blake2b(header, key=self.key).digest()
        turn = self.turns.setdefault(name, asyncio.Lock())
        if mark not in self.right:
            async with turn:
                if mark not in self.right:
                    if self.wrong.get(name, 0) >= WRONG_PASSWORDS:
                        reason = f"Too many wrong passwords for this user. Wait {WAIT} seconds."
                        return closing(429, reason, **{"Retry-After": str(WAIT)})
                    if not await asyncio.to_thread(self.is_right, name, credentials.password):
                        self.wrong[name] = self.wrong.get(name, 0) + 1
                        return self.not_authenticated()
        self.right[mark] = True
        return None

    def is_right(self, name: str, password: str) -> bool:
        """Verify a password, with the same work whether or not there is a user of this name."""
        if auth.store.authenticate_user(name, password):
            return True
        if not auth.store.has_user(name):
            check_password_hash(self.nobody, password)
        return False

    @staticmethod
    def not_authenticated() -> PlainTextResponse:
        """Return what MLflow answers, so that a browser asks for a password."""
        return closing(401, NOT_AUTHENTICATED, **{"WWW-Authenticate": 'Basic realm="mlflow"'})


def create_app() -> PasswordGuard:
    """Return the app. The server's processes make it one after the other: the first makes tables and admin."""
    limit_heads()
    with Path(__file__).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        served = auth.create_app()
        store = Store(os.environ["MLFLOW_BACKEND_STORE_URI"])
        serve_figures()
    app.before_request(lambda: refuse(store))
    return PasswordGuard(ProtectedAliases(Turns(ThroughTheServer(served)), store))
