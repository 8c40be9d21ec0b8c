"""Protected aliases: the server moves a protected alias only to a release, and keeps what it points to.

In MLflow, anybody who may change a registered model moves each of its aliases by hand (mlflow#24742, #7762), and
nothing records it (mlflow#2169). PROTECTED_ALIASES names aliases, separated by commas. Such an alias moves only to a
version that was released as it by `lifecycle release` or `lifecycle rollback`, which verify_release.py verifies with
the keys in the folder PUBLIC_KEYS. A version that has such an alias stays, and so do its run and its files. Only an
admin deletes the alias itself.

Every move of any alias is a row of the table alias_log: see alias_log.sql.
"""

import asyncio
import contextlib
import os
import posixpath
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import flask
import sqlalchemy
from flask import request
from google.protobuf.json_format import ParseError
from google.protobuf.message import Message
from limits import CREDENTIALS, FILES, read_body, repeat
from mlflow.protos.model_registry_pb2 import (
    DeleteModelVersion,
    DeleteRegisteredModel,
    DeleteRegisteredModelAlias,
    RenameRegisteredModel,
    SetRegisteredModelAlias,
)
from mlflow.protos.service_pb2 import DeleteExperiment, DeleteRun
from mlflow.server import auth
from mlflow.utils.proto_json_utils import parse_dict
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse
from werkzeug.datastructures import Authorization

HERE = Path(__file__).parent
PROTECTED = [alias.strip() for alias in os.environ.get("PROTECTED_ALIASES", "").split(",") if alias.strip()]
VERIFICATION_SECONDS = 120
HELD = sqlalchemy.text("""
    SELECT a.name, a.alias, a.version, v.source, v.run_id, r.artifact_uri, m.model_id, m.artifact_location,
        r.experiment_id AS run_experiment, m.experiment_id AS model_experiment
    FROM registered_model_aliases a
    JOIN model_versions v USING (workspace, name, version)
    LEFT JOIN runs r ON r.run_uuid = v.run_id
    LEFT JOIN logged_models m ON 'models:/' || m.model_id = v.source
    WHERE a.alias = ANY(:aliases)
""")


@dataclass(frozen=True)
class Held:
    """A version with a protected alias, and all that belongs to it; ids and addresses as MLflow stores them."""

    name: str
    alias: str
    version: int
    source: str
    run_id: str | None
    artifact_uri: str | None
    model_id: str | None
    artifact_location: str | None
    run_experiment: int | None
    model_experiment: int | None

    def reason(self, what: str) -> str:
        """Return why something is refused."""
        return (
            f"{what} version {self.version} of {self.name}, which has the protected alias {self.alias}. "
            "Release another version first, or ask an admin to delete the alias."
        )


class Store:
    """The database of runs and models, beside MLflow's own connections to it."""

    def __init__(self, uri: str):
        """Make the log of aliases if it is missing, and tell the database who moves an alias."""
        self.engine = sqlalchemy.create_engine(uri, pool_size=2, pool_pre_ping=True)
        with self.engine.begin() as connection:
            connection.exec_driver_sql((HERE / "alias_log.sql").read_text(encoding="utf-8"))
        sqlalchemy.event.listen(Session, "after_begin", name_user)

    def held(self) -> list[Held]:
        """Return the versions that have a protected alias."""
        if not PROTECTED:
            return []
        with self.engine.connect() as connection:
            return [Held(**row._mapping) for row in connection.execute(HELD, {"aliases": PROTECTED})]


def name_user(session: Session, transaction: object, connection: sqlalchemy.Connection) -> None:
    """Tell the database, to the end of this transaction, which user asked for it."""
    if flask.has_request_context() and "user" in flask.g:
        setting = sqlalchemy.text("SELECT set_config('mlflow.user', :user, true)")
        connection.execute(setting, {"user": flask.g.user})


def parse(body: object, message: Message) -> Message:
    """Return a message with what the JSON of a body says, read as MLflow reads it."""
    if isinstance(body, str):  # some clients encode it twice
        body = flask.json.loads(body)
    with contextlib.suppress(ParseError):  # MLflow goes on with what it has read up to there
        parse_dict(body or {}, message)
    return message


def asked(message: Message) -> Message:
    """Return what Flask's current request asks for."""
    return parse(request.get_json(force=True, silent=True), message)


def reason_against_change(store: Store) -> str | None:
    """Return why Flask's current request may not delete or rename something that is held, or None."""
    route = str(request.url_rule).rpartition("/mlflow/")[2]
    if route.startswith(("registered-models/", "model-versions/")) and request.method != "GET":
        flask.g.user = auth.authenticate_request().username
    if route == "registered-models/alias" and request.method == "DELETE":
        alias = asked(DeleteRegisteredModelAlias()).alias
        if alias in PROTECTED and not auth.sender_is_admin():
            return f"{alias} is a protected alias, and only an admin may delete it."
    if route in ("registered-models/delete", "registered-models/rename"):
        message = DeleteRegisteredModel() if route.endswith("delete") else RenameRegisteredModel()
        name = asked(message).name
        return reason_if(store, "It would take away", lambda held: held.name == name)
    if route == "model-versions/delete":
        version = asked(DeleteModelVersion())
        meant = (version.name, as_number(version.version))
        return reason_if(store, "This is", lambda held: (held.name, held.version) == meant)
    if route == "runs/delete":
        run_id = asked(DeleteRun()).run_id
        return reason_if(store, "This run has made", lambda held: held.run_id == run_id)
    if route == "experiments/delete":
        number = as_number(asked(DeleteExperiment()).experiment_id)
        return reason_if(
            store, "This experiment has", lambda held: number in (held.run_experiment, held.model_experiment)
        )
    if route == "logged-models/<model_id>" and request.method == "DELETE":
        model_id = request.view_args["model_id"]
        return reason_if(store, "This model is", lambda held: held.model_id == model_id)
    if route == "upload-artifact":
        run_id, path = request.args.get("run_uuid"), request.args.get("path")
        for held in store.held():
            if held.run_id == run_id:
                return reason_against_file(store, "PUT", f"{file_path(held.artifact_uri)}/{path}")
    return None


def as_number(text: str) -> int | None:
    """Return a number as MLflow reads it, or None."""
    with contextlib.suppress(ValueError):
        return int(text)
    return None


def file_path(place: str) -> str:
    """Return the path of files on the server, from their address as MLflow stores it."""
    return posixpath.normpath(f"/{place.removeprefix('mlflow-artifacts:').lstrip('/')}")


def reason_if(store: Store, what: str, is_meant) -> str | None:
    """Return why something is refused if it is of a version that is held, or None."""
    for held in store.held():
        if is_meant(held):
            return held.reason(what)
    return None


def reason_against_file(store: Store, method: str, path: str) -> str | None:
    """Return why a file may not be written or deleted, or None.

    Evidence of a new release is added to the run of a version that is held, so writing to a run is allowed.

    Args:
        store: the store.
        method: the request's method. DELETE removes all that is below a path.
        path: what follows the address of all files.
    """
    while path != unquote(path):
        path = unquote(path)
    path = posixpath.normpath(f"/{path}")
    for held in store.held():
        for place in (held.source, held.artifact_location, held.artifact_uri):
            if not place or not place.startswith("mlflow-artifacts:"):
                continue
            folder = file_path(place)
            is_inside = f"{path}/".startswith(f"{folder}/")
            if method == "DELETE" and (is_inside or f"{folder}/".startswith(f"{path}/")):
                return held.reason("It would delete files of")
            if is_inside and place != held.artifact_uri:
                return held.reason("It would change files of")
    return None


class ProtectedAliases:
    """Hand on no request that moves a protected alias to what was not released, or changes its files.

    Requests without a password are for MLflow to refuse: verifying a release costs seconds.
    """

    def __init__(self, served, store: Store):
        """Wrap an ASGI app."""
        self.served, self.store = served, store
        self.turn = asyncio.Lock()  # each verification is a process of some 300 MB

    async def __call__(self, scope, receive, send):
        """Refuse a request, or hand it on."""
        reason = None
        is_change = scope["type"] == "http" and scope["method"] in ("POST", "PUT", "DELETE")
        if PROTECTED and is_change and any(name in CREDENTIALS for name, _ in scope["headers"]):
            path = scope["path"]
            if scope["method"] == "POST" and path.endswith("/mlflow/registered-models/alias"):
                body = await read_body(receive)
                if body is None:
                    return
                receive = repeat(body, receive)
                reason = await self.reason_against_move(scope, body)
            if FILES in path:
                place = path.partition(FILES)[2]
                reason = await asyncio.to_thread(reason_against_file, self.store, scope["method"], place)
        if reason:
            await refusal(reason)(scope, receive, send)
        else:
            await self.served(scope, receive, send)

    async def reason_against_move(self, scope, body: bytes) -> str | None:
        """Return why a request may not move an alias, or None."""
        try:
            move = parse(flask.json.loads(body), SetRegisteredModelAlias())
        except ValueError:
            return None  # MLflow refuses it, too
        if move.alias not in PROTECTED:
            return None
        variables = {name: os.environ[name] for name in ("HOME", "PATH", "PUBLIC_KEYS", "TMPDIR") if name in os.environ}
        variables["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{scope['server'][1]}"
        # With the user's credentials, so it reads only what the user may read.
        for name, value in scope["headers"]:
            if name in CREDENTIALS:
                credentials = Authorization.from_header(value.decode("latin-1"))
                variables["MLFLOW_TRACKING_USERNAME"] = credentials.username
                variables["MLFLOW_TRACKING_PASSWORD"] = credentials.password
        command = [sys.executable, HERE / "verify_release.py", move.name, move.version, move.alias]
        async with self.turn:
            reason = await asyncio.to_thread(reason_of, command, variables)
        if reason is None:
            return None
        return (
            f"{move.alias} is a protected alias. It moves only to a version that was released as {move.alias}. {reason}"
        )


def reason_of(command: list, variables: dict[str, str]) -> str | None:
    """Run a command, and return the last line of its errors, or None if it succeeds."""
    try:
        subprocess.run(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
            timeout=VERIFICATION_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"It was not verified within {VERIFICATION_SECONDS} seconds. Try again."
    except subprocess.CalledProcessError as error:
        return error.stderr.strip().rpartition("\n")[2]
    return None


def refusal(reason: str) -> JSONResponse:
    """Return the answer to what is refused, as MLflow's clients and its interface show it."""
    return JSONResponse({"error_code": "PERMISSION_DENIED", "message": reason}, 403)
