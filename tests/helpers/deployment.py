"""The team's server as deploy/compose.yaml describes it, run on this machine without containers.

What the containers would run is read from the compose file and the Dockerfile, so that what is tested and what is
deployed cannot drift apart. Only what names a container's inside is replaced: folders, host names and ports.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import mlflow
import psutil
import pytest
import requests
import yaml
from execution import MODEL, ROOT, environment, finished, free_port, running
from mlflow.entities import ViewType
from postgresql import PostgreSQL, postgresql, programs
from sklearn.datasets import load_iris

DEPLOY = ROOT / "deploy"
SECRETS = {
    "POSTGRES_PASSWORD": "7Kd'2 x%40B:w9/@Tq4Rz1Lm8vN3cY6hJ5",  # with what an address or a shell would misread
    "MLFLOW_ADMIN_PASSWORD": "pQ3-vX8_kL2-mT7_zB4-wR9_hN5-cF6_dJ",
    "MLFLOW_SECRET_KEY": "4f9a1c7e2b8d3a6f5c0e9b7d1a4f8c2e",
}
SETTINGS = SECRETS | {"PUBLIC_HOST": "mlflow.example.org"}
PASSWORDS = {
    "admin": SECRETS["MLFLOW_ADMIN_PASSWORD"],
    "ana": "anas-own-pass-phrase-4",
    "ben": "bens-own-pass-phrase-5",
    "cleo": "cleos-own-pass-phrase-6",
}


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

    if not isinstance(value, str):
        return value
    return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", replaced, value).replace("$$", "$")


def services(settings: dict[str, str] = SECRETS) -> dict:
    """Return the services of the compose file, with the values in ``settings`` for its variables."""
    return interpolated(yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8")), settings)["services"]


def entrypoint() -> list[str]:
    """Return the command that the server's image runs every other command with."""
    instructions = re.findall(r"^ENTRYPOINT (.*)$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(instructions) == 1
    return yaml.safe_load(instructions[0])


def readme_commands(section: str) -> list[str]:
    """Return the command lines of a section of deploy/README.md, without comments."""
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", readme, flags=re.MULTILINE | re.DOTALL)[1]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    commands = [block for language, block in blocks if not language]  # ```text is a file
    return [re.sub(r"\s+# .*", "", line) for block in commands for line in block.splitlines()]


class Deployment:
    """The database and the server of the compose file, with an empty store in ``folder``.

    Attributes:
        address: where the server is when it runs.
        artifacts: the folder that is the volume of that name.
        variables: the environment variables of the server's container.
    """

    def __init__(self, folder: Path, database: PostgreSQL, settings: dict[str, str] | None = None):
        """Prepare the database and the folders of the volumes; start nothing."""
        self.folder, self.database, self.settings = folder, database, SETTINGS | (settings or {})
        self.port, self.metrics_port = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.artifacts = folder / "artifacts"
        self.artifacts.mkdir()
        self.public_keys = folder / "public keys"
        self.public_keys.mkdir()
        (folder / "secrets").mkdir(mode=0o700)
        service = services(self.settings)["server"]
        for name in service["secrets"]:
            (folder / "secrets" / name).write_text(self.settings.get(name, ""))
        container = service["environment"]
        variables = {name: self.native(value) for name, value in container.items()} | database.variables
        self.variables = environment(folder, **variables, PYTHONWARNINGS="ignore")
        self.variables.pop("PYTEST_CURRENT_TEST", None)  # MLflow looks at it
        self.life = contextlib.ExitStack()
        self.prepare_database()

    def prepare_database(self) -> None:
        """Do what the database's image does when its volume is empty."""
        self.database.run(["createdb", services()["database"]["environment"]["POSTGRES_USER"]])
        self.database.run(["psql", "--quiet", "--dbname=mlflow", f"--file={DEPLOY / 'databases.sql'}"])

    def native(self, argument: str) -> str:
        """Return an argument of a command in the server's container as it is on this machine."""
        places = {
            r"^(start|move_store|artifacts)\.py$": rf"{DEPLOY}/\1.py",
            r"^/server\b": str(DEPLOY),
            r"^/public_keys\b": str(self.public_keys),
            r"^server-metrics:9000$": f"127.0.0.1:{self.metrics_port}",
            r"/tmp/metrics\b": str(self.folder / "metrics"),
            r"^/run/secrets\b": str(self.folder / "secrets"),
            r"(?<![\w.])/artifacts\b": str(self.artifacts),
            r"(?<=^--host=)0\.0\.0\.0$": "127.0.0.1",
            r"(?<=^--port=)5000$": str(self.port),
            r"\b127\.0\.0\.1:5000\b": f"127.0.0.1:{self.port}",
        }
        for pattern, place in places.items():
            argument = re.sub(pattern, place, argument)
        return argument

    def command(self, arguments: list[str]) -> list[str]:
        """Return what the server's container runs for ``arguments``, as it is on this machine."""
        programs = {"python": sys.executable, "mlflow": str(Path(sys.executable).with_name("mlflow"))}
        return [programs.get(argument) or self.native(argument) for argument in [*entrypoint(), *arguments]]

    def run(self, arguments: list[str], **variables: str) -> subprocess.CompletedProcess:
        """Run a command as `docker compose run --rm -T server` does."""
        return finished(self.command(arguments), self.folder, self.variables | variables, limit=120)

    def start(self) -> psutil.Popen:
        """Start the server, wait until it answers, and give its process."""
        log = self.folder / f"server{len(list(self.folder.glob('server*.log')))}.log"
        command = self.command(services(self.settings)["server"]["command"])
        server = running(command, f"{self.address}/health", log, cwd=self.folder, env=self.variables)
        return self.life.enter_context(server)

    def kill(self) -> None:
        """Kill the server and all its children. What all its lives have printed must hold no secret."""
        self.life.close()
        printed = "".join(log.read_text() for log in self.folder.glob("server*.log"))
        assert secrets_in(printed + self.database.log.read_text(errors="replace")) == []

    def remember_empty(self) -> None:
        """Keep a copy of the database as it is, for ``empty``."""
        copy = self.folder / "empty.dump"
        self.database.run(["pg_dump", "--format=custom", "--dbname=mlflow", f"--file={copy}"])
        self.database.run(["createdb", "empty"])
        self.database.run(["pg_restore", "--dbname=empty", str(copy)])

    def empty(self) -> None:
        """Empty the store, while the server goes on running."""
        self.database.run(["dropdb", "--force", "mlflow"])
        self.database.run(["createdb", "--template=empty", "mlflow"])

    def ask(self, user: str, endpoint: str, **fields: str) -> None:
        """Ask the server for what concerns users, as one of them; MLflow's own client would load the whole server.

        Raises:
            requests.HTTPError: the server refused.
        """
        address = f"{self.address}/api/{endpoint}"
        requests.post(address, json=fields, auth=(user, PASSWORDS[user]), timeout=30).raise_for_status()

    def send(self, user: str, method: str, path: str, **options) -> requests.Response:
        """Send a request as a user, with its path as it is: `requests` alone would take away the dots."""
        prepared = requests.Request(method, self.address, auth=(user, PASSWORDS[user]), **options).prepare()
        prepared.url = f"{self.address}/{path}"
        with requests.Session() as session:
            return session.send(prepared, timeout=150)

    def as_user(self, name: str, password: str | None = None) -> dict[str, str]:
        """Return the environment variables by which MLflow's clients come as this user."""
        return {
            "MLFLOW_TRACKING_URI": self.address,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": password or PASSWORDS[name],
        }

    @contextlib.contextmanager
    def client(self, name: str) -> Iterator[mlflow.MlflowClient]:
        """Give a client of the server; to the end of the block, this process comes as the user ``name``."""
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in self.as_user(name).items():
                patch.setenv(variable, value)
            yield mlflow.MlflowClient(self.address)


def follow(section: str, team: Deployment, folder: Path) -> list[str]:
    """Run the commands of a section of the README in ``folder``, without containers.

    Return those that are Compose's own. Of these, the ones that stop or start the server do so.
    """
    of_compose, settings = [], ""
    for line in readme_commands(section):
        if re.match(r"umask |\w+=", line):  # for the lines below
            settings += f"{line}\n"
            continue
        _, database, inside = line.rpartition("docker compose exec -T database ")
        run = re.fullmatch(r'docker compose run --rm(?: -T)?( --volume "[^"]+")? server (.*?)( [<>] \S+)?', line)
        if run:
            arguments = [argument.replace("/store", str(folder)) for argument in shlex.split(run[2])]
            line = shlex.join(team.command(arguments)) + (run[3] or "")
        elif database:
            line = inside
        elif line.startswith("docker"):
            of_compose.append(line)
            if line == "docker compose stop server":
                team.kill()
            elif line == "docker compose up --detach --wait":
                team.start()
            continue
        variables = team.variables | {"PATH": f"{programs()}{os.pathsep}{os.environ['PATH']}"}
        process = finished(["bash", "-c", settings + line], folder, variables, limit=120)
        assert process.returncode == 0, f"{line}\n{process.stdout}{process.stderr}"
        assert secrets_in(process.stdout + process.stderr) == []
    return of_compose


# Logs one value after the other, and prints the number of each that the server has acknowledged.
WRITER = """
import mlflow
client = mlflow.MlflowClient()
run = client.create_run("0")
print(run.info.run_id, flush=True)
for number in range(1_000_000):
    client.log_metric(run.info.run_id, "number", number, step=number)
    print(number, flush=True)
"""


@contextlib.contextmanager
def writing(user: dict[str, str], folder: Path) -> Iterator[Callable[[], list[str]]]:
    """Run the writer as a user until the end of the block; what it prints to stderr is in ``folder / "errors.txt"``.

    Give a function that returns the id of its run and the numbers that were acknowledged.
    """
    printed, errors = folder / "acknowledged.txt", folder / "errors.txt"
    variables = environment(folder, **user, MLFLOW_HTTP_REQUEST_MAX_RETRIES="9")
    with printed.open("w") as output, errors.open("w") as log:
        writer = subprocess.Popen([sys.executable, "-c", WRITER], cwd=folder, env=variables, stdout=output, stderr=log)
    try:
        yield lambda: printed.read_text().rpartition("\n")[0].splitlines()
    finally:
        writer.kill()
        writer.wait()


def predict(team: Deployment, user: str, numbers: str = "1") -> list:
    """Return what versions of the quickstart's model and its champion predict, loaded from the server by a user."""
    features = load_iris(as_frame=True).data
    addresses = [*(f"models:/{MODEL}/{number}" for number in numbers), f"models:/{MODEL}@champion"]
    with team.client(user):
        mlflow.set_tracking_uri(team.address)
        try:
            return [mlflow.pyfunc.load_model(address).predict(features).tolist() for address in addresses]
        finally:
            mlflow.set_tracking_uri(None)


def secrets_in(text: str) -> list[str]:
    """Return the secrets that ``text`` holds, as they are or as an address would have them."""
    secrets = [*SECRETS.values(), *PASSWORDS.values()]
    return [secret for secret in secrets if secret in text or quote(secret, safe="") in text]


@contextlib.contextmanager
def deployed(folder: Path, settings: dict[str, str] | None = None) -> Iterator[Deployment]:
    """Run database and server in ``folder`` until the end of the block, with the users ana, ben and cleo."""
    with postgresql(SECRETS["POSTGRES_PASSWORD"]) as database:
        deployment = Deployment(folder, database, settings)
        with contextlib.ExitStack() as stack:
            stack.callback(deployment.kill)
            deployment.start()
            for name in ("ana", "ben", "cleo"):
                deployment.ask("admin", "2.0/mlflow/users/create", username=name, password=PASSWORDS[name])
            deployment.remember_empty()
            yield deployment


def logged(client: mlflow.MlflowClient) -> dict:
    """Return all that is in a store, wherever its files are."""
    experiments = client.search_experiments(view_type=ViewType.ALL)
    numbers = [experiment.experiment_id for experiment in experiments]
    runs = client.search_runs(numbers, run_view_type=ViewType.ALL)
    everything = {
        "experiments": [dict(experiment) for experiment in experiments],
        "runs": [run.to_dictionary() for run in runs],
        "histories": [
            [dict(metric) for metric in client.get_metric_history(run.info.run_id, name)]
            for run in runs
            for name in sorted(run.data.metrics)
        ],
        "logged models": [model.to_dictionary() for model in client.search_logged_models(numbers)],
        "registered models": [
            {"name": model.name, "tags": model.tags, "aliases": {name: str(at) for name, at in model.aliases.items()}}
            for model in client.search_registered_models()
        ],
        "versions": sorted(
            [dict(version) | {"version": str(version.version)} for version in client.search_model_versions()],
            key=lambda version: (version["name"], int(version["version"])),
        ),
    }
    return comparable(json.loads(json.dumps(everything, default=vars), parse_constant=str))


def comparable(value):
    """Return ``value`` without places of files, its lists in order, and nothing as "", as which it comes over HTTP."""
    if isinstance(value, dict):
        return {name: comparable(item) for name, item in value.items()}
    if isinstance(value, list):
        return sorted((comparable(item) for item in value), key=str)
    return "a place" if re.match("(file|mlflow-artifacts):|/", str(value)) else "" if value is None else value
