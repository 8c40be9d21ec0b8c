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
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mlflow_lifecycle.environments import build_environment
from mlflow_lifecycle.exceptions import InvalidInputError, ServingFailedError

if TYPE_CHECKING:
    import pandas as pd

    from mlflow_lifecycle.signing.verify import Verified

SERVER = Path(__file__).with_name("server")
NUMBERS = ("double", "float", "long", "integer")
ANSWER_COLUMNS = ("request_id", "request_time", "model_name", "model_version")
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
    uri: str
    name: str
    version: str
    key_fingerprint: str
    process: subprocess.Popen = field(repr=False)


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

    with _kept_folder() as folder:
        copy = folder / "version"
        with verified(uri, public_key, purpose="release", trusted_types=trusted_types) as version:
            shutil.copytree(version.folder.parent, copy)
        rows = version.training_rows
        version = replace(
            version,
            folder=copy / version.folder.name,
            packages=copy / version.packages.name,
            training_rows=rows and copy / rows.name,
        )
        with serve_verified(version, **options) as server:
            yield server


@contextlib.contextmanager
def serve_verified(
    version: "Verified",
    *,
    limits: dict[str, tuple[float, float]] | float | None = None,
    record: Path | None = None,
    cache: Path | None = None,
    offline: bool = False,
    python: Path | None = None,
    log: IO | None = None,
    start_seconds: float = 120,
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
        start_seconds: how long loading the model may take.
        settings: others of `mlflow_lifecycle.server.app.Settings`, such as the port.

    Raises:
        EnvironmentNotBuiltError: the environment cannot be built.
        ServingFailedError: the model cannot be loaded, its signature has no named columns, or a
            setting is invalid.
    """
    if limits is not None and not isinstance(limits, dict):
        limits = training_limits(version, limits)
    settings["limits"] = limits or {}
    settings["record"] = str(Path(record).resolve()) if record else None
    settings["model"] = str(version.folder.resolve())
    settings["name"] = version.statement.registered_model
    settings["version"] = version.statement.version
    settings["key_fingerprint"] = version.key_fingerprint
    with _kept_folder() as folder:
        python = python or build_environment(
            version.folder / "requirements.txt",
            folder / "environment",
            lock=version.packages,
            cache=cache,
            offline=offline,
        )
        path = folder / "settings.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        with (
            (folder / "log.txt").open("w+", encoding="utf-8", errors="replace") as own_log,
            _started(Path(python), path, log or own_log) as process,
        ):
            began = time.monotonic()
            address = _first_line(process, start_seconds)
            if not address:
                reason = "The log says why." if log else _last_line(own_log)
                if time.monotonic() - began >= start_seconds:
                    reason = f"Its start took longer than start_seconds={start_seconds:g}. {reason}"
                raise ServingFailedError(f"{version.uri} is not served. {reason}")
            yield Server(
                address,
                version.uri,
                settings["name"],
                settings["version"],
                version.key_fingerprint,
                process,
            )


@contextlib.contextmanager
def _started(python: Path, settings: Path, log: IO) -> Iterator[subprocess.Popen]:
    """Give the process of a server; end it at the end of the block."""
    variables = {}
    for name, value in os.environ.items():
        if not name.startswith(("MLFLOW_", "PYTHON")):
            variables[name] = value
    variables["MLFLOW_DISABLE_TELEMETRY"] = "true"
    variables["TMPDIR"] = variables["TEMP"] = str(settings.parent)
    process = subprocess.Popen(
        [str(python.absolute()), "-I", str(SERVER), str(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        cwd=settings.parent,
        env=variables,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()  # the server answers what it has read, and ends
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _first_line(process: subprocess.Popen, seconds: float) -> str:
    """Return the first line that a process prints. It is killed if it takes longer."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    line = process.stdout.readline()
    timer.cancel()
    return line.strip()


def _last_line(log: IO) -> str:
    log.seek(0)
    lines = log.read().split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "Its log is empty.")


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


def training_limits(version: "Verified", margin: float = 0.0) -> dict[str, tuple[float, float]]:
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
    rows = pd.read_parquet(version.training_rows)
    limits = {}
    for column in signature.inputs if signature and signature.inputs else ():
        if getattr(column.type, "name", "") in NUMBERS and rows[column.name].notna().any():
            low = rows[column.name].min().item()
            high = rows[column.name].max().item()
            if margin:  # without it, long integers stay exact
                extension = margin * (high - low)
                low -= extension
                high += extension
            limits[column.name] = (low, high)
    return limits


def read_record(folder: Path) -> "pd.DataFrame":
    """Return the answers in a record: a row for each row that was predicted, by time.

    The columns are ``request_id``, ``request_time`` (UTC), ``model_name``, ``model_version``, the
    recorded columns of the request, and ``prediction``. Refused requests are left out. A line that
    a killed server did not complete is left out, too: it was never answered.

    Args:
        folder: the record of one server or of several.

    Raises:
        ValueError: a column of the request has the name of one of the others.
    """
    import pandas as pd

    rows = []
    for path in sorted(Path(folder).glob("requests-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                rows.extend(_answered_rows(json.loads(line)))
    if not rows:
        return pd.DataFrame(columns=[*ANSWER_COLUMNS, "prediction"])
    table = pd.DataFrame(rows, dtype=object)
    for name in table:
        table[name] = _infer_type(table[name])
    table["prediction"] = table.pop("prediction")  # the last column
    table["request_time"] = pd.to_datetime(table["request_time"], format="ISO8601")
    return table.sort_values("request_time", kind="stable", ignore_index=True)


def _answered_rows(entry: dict) -> list[dict]:
    """Return the rows of an entry of the record."""
    if entry["status"] != 200:
        return []
    inputs = entry["inputs"]
    for name in (*ANSWER_COLUMNS, "prediction"):
        if name in inputs:
            raise InvalidInputError(
                f"The record has a column {name!r} of {entry['name']}, and read_record adds one. "
                "Serve the model with leave_out for that column."
            )
    rows = []
    for number, prediction in enumerate(entry["predictions"]):
        row = {
            "request_id": entry["id"],
            "request_time": entry["time"],
            "model_name": entry["name"],
            "model_version": entry["version"],
        }
        for name, values in inputs.items():
            row[name] = values[number]
        row["prediction"] = prediction
        rows.append(row)
    return rows


def _infer_type(values: "pd.Series") -> "pd.Series":
    """Return a column as the model got it: null is NaN, and long integers beside it stay exact."""
    missing = values.isna()
    if missing.any() and set(values[~missing].map(type)) == {int}:
        return values.astype("Int64")
    return type(values)(values.where(~missing, float("nan")).tolist())
