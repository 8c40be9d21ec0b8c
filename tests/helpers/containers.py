"""The team's server in real containers: built and started in a copy of the project, as deploy/README.md says."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import requests
from deployment import readme_commands
from execution import ROOT, free_port, git

USERS = {"ana": "anas-own-pass-phrase-4", "ben": "bens-own-pass-phrase-5"}


def why_no_engine() -> str | None:
    """Return why nothing can run in containers here, or None where a Docker engine with Compose answers."""
    if shutil.which("docker") is None:
        return "there is no Docker here"
    for command in (["docker", "version"], ["docker", "compose", "version"]):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if answer.returncode:
            return f"{' '.join(command)}: {answer.stderr.strip().splitlines()[-1]}"
    kind = subprocess.run(["docker", "version", "--format={{.Server.Os}}"], capture_output=True, text=True).stdout
    return None if kind.strip() == "linux" else f"this engine runs {kind.strip()} containers, not Linux ones"


class Containers:
    """A project of Compose's of its own: containers, networks, volumes and images have names that nobody else has.

    Attributes:
        folder: the copy of the project; `.env` is in its folder deploy.
        address: where the server is.
    """

    def __init__(self, folder: Path, profiles: list[str]):
        """Copy what git knows and make the settings; start nothing."""
        self.folder, self.port = folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.variables = os.environ | {"COMPOSE_PROJECT_NAME": f"test-{uuid.uuid4().hex[:8]}", "COMPOSE_ANSI": "never"}
        for name in git(ROOT, "ls-files").splitlines():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        settings, self.up = readme_commands("Start")
        self.run(settings)
        env = folder / "deploy/.env"
        values = {"MLFLOW_PORT": str(self.port), "EXPERIMENT_USERNAME": "ana", "EXPERIMENT_PASSWORD": USERS["ana"]}
        values |= {"MODEL_PORT": str(free_port()), "MODEL_USERNAME": "ben", "MODEL_PASSWORD": USERS["ben"]}
        values |= {"MODEL_URI": "models:/served@production", "PROTECTED_ALIASES": "production"}
        values |= {"COMPOSE_PROFILES": ",".join(profiles), "PROMETHEUS_PORT": str(free_port())}
        if "s3" in profiles:
            values["ARTIFACTS_DESTINATION"] = "s3://mlflow"
        env.write_text(re.sub(r"^(\w+)=$", lambda line: line[0] + values.get(line[1], ""), env.read_text(), flags=re.M))
        self.settings = dict(re.findall(r"^(\w+)=(.+)$", env.read_text(), flags=re.MULTILINE))
        self.secrets = [value for name, value in self.settings.items() if re.search("PASSWORD|SECRET", name)]
        self.passwords = USERS | {"admin": self.settings["MLFLOW_ADMIN_PASSWORD"]}

    def run(self, script: str, *, check: bool = True, limit: float = 600) -> subprocess.CompletedProcess:
        """Run commands as a user does, in the folder deploy; nothing that they print may hold a secret."""
        process = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=self.folder / "deploy",
            env=self.variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit,
        )
        printed = process.stdout + process.stderr
        assert process.returncode == 0 or not check, f"{script}\n{printed[-5000:]}"
        assert [secret for secret in getattr(self, "secrets", []) if secret in printed] == []
        return process

    def follow(self, section: str) -> None:
        """Run all commands of a section of the README, as one script."""
        self.run("\n".join(readme_commands(section)))

    def ids(self) -> dict[str, str]:
        """Return the id of each container that runs, by its service."""
        lines = self.run("docker compose ps --format '{{.Service}} {{.ID}}'").stdout.splitlines()
        return dict(line.split() for line in lines)

    def ask(self, user: str, method: str, path: str, **options) -> requests.Response:
        """Send a request to the server as a user."""
        return requests.request(
            method, f"{self.address}/{path}", auth=(user, self.passwords[user]), timeout=60, **options
        )

    def add_users(self) -> None:
        """Add the users who are not there yet."""
        there = [user["username"] for user in self.ask("admin", "GET", "api/2.0/mlflow/users/list").json()["users"]]
        for name, password in USERS.items():
            if name not in there:
                user = {"username": name, "password": password}
                self.ask("admin", "POST", "api/2.0/mlflow/users/create", json=user).raise_for_status()

    def as_user(self, name: str) -> dict[str, str]:
        """Return the environment variables by which MLflow's clients come as this user."""
        return {
            "MLFLOW_TRACKING_URI": self.address,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": self.passwords[name],
        }

    @contextlib.contextmanager
    def client(self, name: str) -> Iterator[mlflow.MlflowClient]:
        """Give a client of the server; to the end of the block, this process comes as the user ``name``."""
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in self.as_user(name).items():
                patch.setenv(variable, value)
            yield mlflow.MlflowClient(self.address)


@contextlib.contextmanager
def in_containers(folder: Path, profiles: list[str]) -> Iterator[Containers]:
    """Build, start and fill the containers; at the end nothing of them is left but the engine's cache of layers."""
    containers = Containers(folder, profiles)
    try:
        containers.run("docker compose --profile '*' build && " + containers.up, limit=1500)
        containers.add_users()
        yield containers
    finally:
        if sys.exc_info()[0]:
            print(containers.run("docker compose logs --tail 50", check=False).stdout)
        containers.run("docker compose --profile '*' down --volumes --rmi local --remove-orphans --timeout 2")
