"""Serve a verified version in its own environment, so that nothing outlives its caller.

`mlflow models serve` loads what the store holds, builds an environment whose packages it does not
verify (mlflow#4886), and goes on when its caller is killed. Here a version is verified, its
environment is built with the hashes that were signed, and that environment's Python runs
`mlflow_lifecycle.server`.

    with serve("models:/iris@production", own_public_key(), record=Path("record")) as server:
        requests.post(f"{server.address}/invocations", json={"inputs": [...]})
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mlflow_lifecycle.environments import build_environment
from mlflow_lifecycle.exceptions import ServingFailedError

if TYPE_CHECKING:
    import pandas as pd

    from mlflow_lifecycle.signing.verify import Verified

SERVER = Path(__file__).with_name("server")
ANSWER = {
    "id": "request_id",
    "time": "request_time",
    "name": "model_name",
    "version": "model_version",
    "prediction": "prediction",
}
# A process that makes a folder. When its standard input ends, also because its caller was killed,
# it kills every process that was started with a path in that folder, such as an installation, and
# removes the folder.
KEEPER = """
import contextlib, os, psutil, shutil, sys, tempfile, time
folder = tempfile.mkdtemp(prefix="serving-")
os.write(1, os.fsencode(folder) + b"\\n")
sys.stdin.read()
for _ in range(600):
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(folder in part for part in process.cmdline()):
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)
    if not os.path.exists(folder):
        break
    time.sleep(0.1)
"""


@dataclass(frozen=True)
class Server:
    """A server that answers at ``address``, such as http://127.0.0.1:5001."""

    address: str
    name: str
    version: str
    process: subprocess.Popen


@contextlib.contextmanager
def serve(
    uri: str, public_key: Path, *, trusted_types: tuple[str, ...] = (), **options
) -> Iterator[Server]:
    """Serve the release at ``uri`` until the end of the block.

    Args:
        uri: ``models:/name/3`` or ``models:/name@production``. It must have been released.
        public_key: the public half of the key that signed it.
        trusted_types: what skops may load beside the types that it knows.
        options: see `serve_verified`.

    Raises:
        NotVerifiedError: the version is not what was signed, or was not released.
        EnvironmentNotBuiltError: its environment cannot be built.
        ServingFailedError: it cannot be served.
    """
    from mlflow_lifecycle.signing.verify import verified

    with contextlib.ExitStack() as stack:
        with verified(uri, public_key, purpose="release", trusted_types=trusted_types) as version:
            server = stack.enter_context(serve_verified(version, **options))
        yield server  # it has loaded the model, and needs the verified copy no longer


@contextlib.contextmanager
def serve_verified(
    version: "Verified",
    *,
    limits: dict | float | None = None,
    record: Path | None = None,
    cache: Path | None = None,
    offline: bool = False,
    python: Path | None = None,
    log: IO | None = None,
    **settings,
) -> Iterator[Server]:
    """Serve a verified version from its own environment until the end of the block.

    Then nothing of it is left, also if the block raises an error or this process is killed.

    Args:
        version: from `mlflow_lifecycle.signing.verify.verified`.
        limits: the lowest and the highest value of columns with numbers; or the margin for
            `training_limits`.
        record: a folder for requests and answers, created if needed. `read_record` reads it.
        cache: a folder for downloaded packages; see `environments.build_environment`.
        offline: take all packages from ``cache``.
        python: the Python of an existing environment to use in place of a new one.
        log: where the server writes errors. By default only `ServingFailedError` shows the last.
        settings: others of `mlflow_lifecycle.server.app.Settings`, such as the port.

    Raises:
        EnvironmentNotBuiltError: the environment cannot be built.
        ServingFailedError: the model cannot be loaded, its signature has no named columns, or a
            setting is invalid.
    """
    if isinstance(limits, int | float):
        limits = training_limits(version, limits)
    name = version.statement.registered_model
    number = version.statement.version
    settings["limits"] = limits or {}
    settings["record"] = record and str(record.resolve())
    settings["model"] = str(version.folder.resolve())
    settings["version"] = {
        "name": name,
        "version": number,
        "key_fingerprint": version.key_fingerprint,
    }
    with _kept_folder() as folder:
        python = python or build_environment(
            version.folder / "requirements.txt",
            folder / "environment",
            lock=version.packages,
            cache=cache,
            offline=offline,
        )
        own_log = folder / "log.txt"
        with own_log.open("w") as file, _start(python, folder, settings, log or file) as process:
            address = process.stdout.readline().strip()
            if not address:
                text = own_log.read_text(errors="replace").strip()
                reason = text.rpartition("\n")[2] or "See its log."
                raise ServingFailedError(f"{version.uri} is not served. {reason}")
            yield Server(address, name, number, process)


@contextlib.contextmanager
def _start(python: Path, folder: Path, settings: dict, log: IO) -> Iterator[subprocess.Popen]:
    """Give the process of a server; end it at the end of the block."""
    path = folder / "settings.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    variables = {"TMPDIR": str(folder), "MLFLOW_DISABLE_TELEMETRY": "true"}
    for name, value in os.environ.items():
        if not name.startswith("MLFLOW_"):  # no password for the packages of a model
            variables.setdefault(name, value)
    with subprocess.Popen(
        [str(python.absolute()), "-I", str(SERVER), str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        cwd=folder,
        env=variables,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()  # it answers the requests that it has read, and ends
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def _kept_folder() -> Iterator[Path]:
    """Give a folder that is removed at the end of the block, or when this process is killed."""
    with subprocess.Popen(
        [sys.executable, "-I", "-c", KEEPER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as keeper:  # its end closes the pipe, and waits
        folder = os.fsdecode(keeper.stdout.readline().rstrip(b"\n"))
        if not folder:
            raise ServingFailedError("No temporary folder can be made. Is the disk full?")
        yield Path(folder).resolve()


def training_limits(version: "Verified", margin: float = 0.0) -> dict[str, list[float]]:
    """Return the training range of each column with numbers: its lowest and its highest value.

    Args:
        version: from `mlflow_lifecycle.signing.verify.verified`.
        margin: by which share of a range to extend it at both ends.

    Raises:
        ServingFailedError: no training data was signed.
    """
    import pandas as pd
    from mlflow.models import Model

    if version.training_rows is None:
        raise ServingFailedError(
            "There are no limits: no training data was signed. "
            f"Add it: lifecycle sign {version.uri} --training-data FILE"
        )
    signature = Model.load(str(version.folder)).signature
    rows = pd.read_parquet(version.training_rows, columns=signature.inputs.input_names())
    numbers = rows.select_dtypes("number").astype("float64")
    low = numbers.min()
    high = numbers.max()
    extension = margin * (high - low)
    limits = pd.DataFrame([low - extension, high + extension])
    return limits.dropna(axis="columns").to_dict("list")


def read_record(folder: Path) -> "pd.DataFrame":
    """Return the answers in a record: a row for each row that was predicted, by time.

    The columns are ``request_id``, ``request_time`` (UTC), ``model_name``, ``model_version``, the
    recorded columns of the request, and ``prediction``. A line that a killed server did not
    complete is left out: it was never answered.

    Args:
        folder: the record of one server or of several.

    Raises:
        ValueError: a column of the request has the name of one of the others.
    """
    import pandas as pd

    answers = []
    inputs = []
    for path in sorted(folder.glob("requests-*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            entry = json.loads(line)
            columns = entry.pop("inputs")
            for number, prediction in enumerate(entry.pop("predictions")):
                answers.append({**entry, "prediction": prediction})
                inputs.append({name: values[number] for name, values in columns.items()})
    inputs = pd.DataFrame(inputs, dtype=object)
    for name, values in inputs.items():
        if pd.api.types.infer_dtype(values) == "integer" and values.hasnans:
            inputs[name] = values.astype("Int64")  # long integers stay exact
        else:
            inputs[name] = values.where(values.notna(), float("nan")).infer_objects()
    answers = pd.DataFrame(answers, columns=[*ANSWER]).rename(columns=ANSWER)
    answers["request_time"] = pd.to_datetime(answers["request_time"], format="ISO8601")
    table = answers.join(inputs)
    table["prediction"] = table.pop("prediction")  # the last column
    return table.sort_values("request_time", kind="stable", ignore_index=True)
