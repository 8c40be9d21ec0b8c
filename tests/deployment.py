"""The team's server as deploy/compose.yaml describes it, run on this machine without containers.

What the containers would run is read from the compose file and the Dockerfile, so that what is tested and what is
deployed cannot drift apart. Only what names a container's inside is replaced: folders, host names and ports.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import mlflow
import psutil
import pytest
import yaml
from execution import ROOT, environment, free_port, running
from mlflow.server import get_app_client
from postgresql import PostgreSQL, postgresql, programs

DEPLOY = ROOT / "deploy"
SECRETS = {
    "POSTGRES_PASSWORD": "the-database's p%40ss:word/@1",
    "MLFLOW_ADMIN_PASSWORD": "the-admins-pass-phrase-2",
    "MLFLOW_SECRET_KEY": "the-key-of-the-sessions-3",
}
USERS = {"ana": "anas-own-pass-phrase-4", "ben": "bens-own-pass-phrase-5"}


def interpolated(value, settings: dict[str, str]):
    """Return ``value`` with ``${NAME:-default}`` and ``${NAME:?error}`` replaced as Docker Compose does.

    Raises:
        ValueError: a variable that must be set is not.
    """
    if isinstance(value, dict):
        return {name: interpolated(item, settings) for name, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item, settings) for item in value]

    def replaced(match: re.Match) -> str:
        name, kind, text = match.groups()
        if not settings.get(name) and kind == "?":
            raise ValueError(f"{name} is not set: {text}")
        return settings.get(name) or text

    return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", replaced, value) if isinstance(value, str) else value


def services(settings: dict[str, str] = SECRETS) -> dict:
    """Return the services of the compose file, with the values in ``settings`` for its variables."""
    return interpolated(yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8")), settings)["services"]


def entrypoint() -> list[str]:
    """Return the command that the server's image runs every other command with."""
    instructions = re.findall(r"^ENTRYPOINT (.*)$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(instructions) == 1
    return yaml.safe_load(instructions[0])


class Deployment:
    """The database and the server of the compose file, with an empty store in ``folder``.

    Attributes:
        address: where the server is when it runs.
        log: what it has printed, in all its lives.
    """

    def __init__(self, folder: Path, database: PostgreSQL):
        self.folder, self.database = folder, database
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.artifacts = folder / "artifacts"
        self.artifacts.mkdir()
        self.log = folder / "server.log"
        # As the database's image does when its volume is empty.
        database.run(["createdb", services()["database"]["environment"]["POSTGRES_USER"]])
        database.run(["psql", "--quiet", "--dbname=mlflow", f"--file={DEPLOY / 'databases.sql'}"])

    @cached_property
    def variables(self) -> dict[str, str]:
        """The server container's environment variables."""
        variables = {name: self.native(value) for name, value in services()["server"]["environment"].items()}
        return environment(self.folder, **variables) | self.database.variables

    def native(self, argument: str) -> str:
        """Return an argument of a command inside the server's container as it is on this machine."""
        places = {
            r"^python$": sys.executable,
            r"^mlflow$": str(Path(sys.executable).with_name("mlflow")),
            r"^start\.py$": str(DEPLOY / "start.py"),
            r"^move_store\.py$": str(DEPLOY / "move_store.py"),
            r"^/server\b": str(DEPLOY),
            r"(?<![\w.])/artifacts\b": str(self.artifacts),
            r"(?<=^--host=)0\.0\.0\.0$": "127.0.0.1",
            r"(?<=^--port=)5000$": str(self.port),
            r"(?<=127\.0\.0\.1:)5000\b": str(self.port),
        }
        for pattern, place in places.items():
            argument = re.sub(pattern, lambda _, place=place: place, argument)
        return argument

    def command(self, arguments: list[str]) -> list[str]:
        """Return what the server's container runs for ``arguments``, as it is on this machine."""
        return [self.native(argument) for argument in [*entrypoint(), *arguments]]

    def run(self, arguments: list[str], **options) -> subprocess.CompletedProcess:
        """Run a command as `docker compose run --rm -T server` does."""
        return subprocess.run(
            self.command(arguments),
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            **options,
        )

    @contextlib.contextmanager
    def server(self) -> Iterator[psutil.Process]:
        """Run the server until the end of the block, and give its process."""
        log = self.folder / "life.log"
        command = self.command(services()["server"]["command"])
        try:
            with running(command, f"{self.address}/health", log, cwd=self.folder, env=self.variables):
                yield next(child for child in psutil.Process().children() if str(self.port) in " ".join(child.cmdline()))
        finally:
            with self.log.open("a") as whole:
                whole.write(log.read_text())

    def admin(self):
        """Return MLflow's own client of the server's users and permissions, as user admin."""
        return get_app_client("basic-auth", self.address)

    @property
    def admins_variables(self) -> dict[str, str]:
        """The environment variables by which MLflow's clients come as user admin."""
        return self.as_user("admin", SECRETS["MLFLOW_ADMIN_PASSWORD"])

    def as_user(self, name: str, password: str | None = None) -> dict[str, str]:
        """Return the environment variables by which a client is this user."""
        return {
            "MLFLOW_TRACKING_URI": self.address,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": password or USERS[name],
        }


