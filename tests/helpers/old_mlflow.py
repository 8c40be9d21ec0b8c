"""An older MLflow in an environment of its own, which writes a store with `store_content.py` or serves one."""

import contextlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import store_content
from deployment import PASSWORDS, Deployment, services
from execution import ROOT, environment, finished, running

# Each version, and what it needs that its own requirements do not say.
VERSIONS = {
    "2.22.5": ["sqlalchemy<2.1"],  # it imports a class that SQLAlchemy 2.1 has removed
    "3.10.1": [],
    "3.16.1": [],
}
SHARED = ("scikit-learn==", "pandas==", "numpy==", "skops==", "psycopg2-binary==", "flask-wtf==")
UNKNOWN = (
    "--app-name=",
    "--allowed-hosts=",
    "--cors-allowed-origins=",
    "--expose-prometheus",
)  # options that 2.22 does not have

USERS = f"""
import sys
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore
store = SqlAlchemyStore()
store.init_db("postgresql+psycopg2:///mlflow_auth")
store.create_user("admin", sys.argv[1], is_admin=True)
store.create_user("ana", sys.argv[2])
store.create_experiment_permission("1", "ana", "READ")
store.create_registered_model_permission("{store_content.NAME}", "ana", "READ")
"""


def shared_pins() -> list[str]:
    """Return the pins of what a model, a database and the authentication need, as pyproject.toml states them."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    return [line for line in groups["model"] + groups["server"] if str(line).startswith(SHARED)]


class OldMlflow:
    """MLflow of an older version, with the packages that a model needs at today's versions.

    Attributes:
        version: the version of MLflow.
        python: the Python of the environment.
    """

    def __init__(self, version: str, folder: Path):
        """Build the environment in ``folder`` with uv.

        Raises:
            subprocess.CalledProcessError: uv failed, with its message in ``stderr``.
        """
        self.version = version
        self.python = folder / version / "bin/python"
        uv = [sys.executable, "-m", "uv"]
        requirements = [f"mlflow=={version}", *VERSIONS[version], *shared_pins()]
        create = [*uv, "venv", "--no-config", "--quiet", "--python", sys.executable, str(folder / version)]
        install = [*uv, "pip", "install", "--no-config", "--quiet", "--python", str(self.python), *requirements]
        for command in (create, install):
            subprocess.run(command, check=True, capture_output=True, text=True)

    def run(self, arguments: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess:
        """Run this MLflow's Python in ``folder``."""
        return finished([str(self.python), *arguments], folder, self._variables(folder, **variables), limit=120)

    def write_store(self, folder: Path, **variables: str) -> dict:
        """Write the store that MLFLOW_TRACKING_URI names, and return its content as this MLflow reads it."""
        process = self.run([store_content.__file__, "content.json"], folder, **variables)
        assert process.returncode == 0, process.stderr
        return json.loads((folder / "content.json").read_text())

    def add_users(self, team: Deployment) -> None:
        """Make the users admin and ana, with what ana may read, as this MLflow's authentication does."""
        process = self.run(
            ["-c", USERS, *[PASSWORDS[name] for name in ("admin", "ana")]], team.folder, **team.database.variables
        )
        assert process.returncode == 0, process.stderr

    @contextlib.contextmanager
    def serving(self, team: Deployment) -> Iterator[None]:
        """Run this MLflow's server until the end of the block, on the database and the files of ``team``.

        Its options are those of the compose file that it knows. It asks for no password: before 3.16, MLflow hashes
        the password for each request, which takes minutes here.
        """
        options = [option for option in services()["server"]["command"][1:] if not option.startswith(UNKNOWN)]
        command = [str(self.python.with_name("mlflow")), *options]
        names = ("SECRETS_FOLDER", "MLFLOW_BACKEND_STORE_URI")
        settings = team.database.variables | {name: team.variables[name] for name in names}
        variables = self._variables(team.folder, **settings)
        variables["PATH"] = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        log = team.folder / "old server.log"
        with running(team.command(command), f"{team.address}/health", log, cwd=team.folder, env=variables):
            yield

    @staticmethod
    def _variables(folder: Path, **variables: str) -> dict[str, str]:
        # The environment is used several times: compiled files make the second start 10 seconds shorter.
        inherited = environment(folder, **variables)
        inherited.pop("PYTHONDONTWRITEBYTECODE", None)
        return inherited
