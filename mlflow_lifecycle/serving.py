"""Serve a verified version in its own environment, so that nothing outlives whoever started it.

`mlflow models serve` loads what the store holds, builds an environment whose packages it does not verify (mlflow#4886),
and goes on when its starter is killed. Here a version is verified, its environment is built with the hashes that were
signed, and `mlflow_lifecycle.guard` answers for it, run by that environment's Python.

    with serve("models:/iris@champion", own_public_key(), record=Path("record")) as server:
        requests.post(f"{server.address}/invocations", json={"inputs": [...]}).json()["predictions"]
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

from mlflow_lifecycle.environments import built
from mlflow_lifecycle.exceptions import InvalidInputError, ServingFailedError

if TYPE_CHECKING:
    import pandas as pd

    from mlflow_lifecycle.signing.verify import Verified

GUARD = Path(__file__).with_name("guard.py")
NUMBERS = {"double", "float", "long", "integer"}
ABOUT = ("request_id", "request_time", "model_name", "model_version")
# A process that makes a folder. When its standard input ends, also because its starter was killed, it ends whatever was
# started with a path in that folder, such as an installation under way, and removes the folder.
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
    """A server that answers. `process` ends when the block does."""

    address: str  # as in http://127.0.0.1:5001; POST to {address}/invocations
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
        uri: ``models:/name/3`` or ``models:/name@champion``. It must have been released.
        public_key: the public half of the key that signed it.
        trusted_types: what the model may hold beyond what skops knows to be harmless.
        options: see `serve_verified`.

    Raises:
        NotVerifiedError: the version is not what was signed, or was not released.
        EnvironmentNotBuiltError: its environment cannot be built.
        ServingFailedError: it cannot be served.
    """
    from mlflow_lifecycle.signing.verify import verified

    with _kept_folder() as folder:
        with verified(uri, public_key, purpose="release", trusted_types=trusted_types) as version:
            files = {"folder": folder / "model", "packages": folder / "packages.txt"}
            shutil.copytree(version.folder, files["folder"])
            shutil.copy(version.packages, files["packages"])
            if version.training_rows:
                files["training_rows"] = folder / "training_rows.parquet"
                shutil.copy(version.training_rows, files["training_rows"])
        with serve_verified(replace(version, **files), **options) as server:
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
    """Serve a verified version from its own environment until the end of the block; then nothing of it is left.

    That holds for an error in the block and for a SIGKILL of this process, too. What the server answers and refuses
    stands in `mlflow_lifecycle.guard`.

    Args:
        version: what `mlflow_lifecycle.signing.verify.verified` has given.
        limits: for a column of numbers its lowest and highest value; or the margin for `training_limits`.
        record: a folder, made if need be, in which requests and answers are kept. `read_record` reads it.
        cache: where packages that were downloaded are kept; see `mlflow_lifecycle.environments.built`.
        offline: take all packages from ``cache``.
        python: the Python of an environment that is there already; then none is built.
        log: where the server writes what went wrong; by default it is kept for `ServingFailedError` only.
        start_seconds: how long loading the model may take.
        settings: the others of `mlflow_lifecycle.guard.Settings`, such as the port.

    Raises:
        EnvironmentNotBuiltError: the environment cannot be built.
        ServingFailedError: the model cannot be loaded, has no signature of named columns, or a setting does not fit.
    """
    limits = (
        limits if limits is None or isinstance(limits, dict) else training_limits(version, limits)
    )
    name, number, key = (
        version.statement.registered_model,
        version.statement.version,
        version.key_fingerprint,
    )
    settings |= {
        "model": str(version.folder.resolve()),
        "name": name,
        "version": number,
        "key_fingerprint": key,
    }
    settings |= {"limits": limits or {}, "record": str(Path(record).resolve()) if record else None}
    with _kept_folder() as folder, contextlib.ExitStack() as stack:
        if python is None:
            requirements = version.folder / "requirements.txt"
            python = built(
                requirements,
                folder / "environment",
                lock=version.packages,
                cache=cache,
                offline=offline,
            )
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        errors = log or stack.enter_context(
            (folder / "log.txt").open("w+", encoding="utf-8", errors="replace")
        )
        variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MLFLOW_", "PYTHON"))
        }
        variables |= {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "TMPDIR": str(folder),
            "TEMP": str(folder),
        }
        process = subprocess.Popen(
            [str(Path(python).absolute()), "-I", str(GUARD), str(folder / "settings.json")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=folder, env=variables, text=True,
            start_new_session=True,
        )  # fmt: skip
        stack.callback(_end, process)
        began = time.monotonic()
        address = _first_line(process, start_seconds)
        if not address:
            late = time.monotonic() - began >= start_seconds
            said = f"Its start took longer than start_seconds={start_seconds:g}. " if late else ""
            said += "The log says why." if log else _last_line(errors) or "Its log is empty."
            raise ServingFailedError(f"{version.uri} is not served. {said}")
        yield Server(address, version.uri, name, number, key, process)


def training_limits(version: "Verified", margin: float = 0.0) -> dict[str, tuple[float, float]]:
    """Return for each column of numbers the lowest and highest value that the version learned from.

    Args:
        version: what `mlflow_lifecycle.signing.verify.verified` has given.
        margin: by how much a value may be beyond, as a share of the difference of the two.

    Raises:
        ServingFailedError: no training data was signed.
    """
    import pandas as pd
    from mlflow.models import Model

    if version.training_rows is None:
        remedy = f"Add it: lifecycle sign {version.uri} --training-data FILE"
        raise ServingFailedError(f"There are no limits: no training data was signed. {remedy}")
    signature, rows = (
        Model.load(str(version.folder)).signature,
        pd.read_parquet(version.training_rows),
    )
    limits = {}
    for column in (
        signature.inputs if signature and signature.inputs else ()
    ):  # the server refuses to be without
        if getattr(column.type, "name", "") in NUMBERS and rows[column.name].notna().any():
            low, high = rows[column.name].min().item(), rows[column.name].max().item()
            beyond = margin * (high - low)
            limits[column.name] = (
                (low - beyond, high + beyond) if beyond else (low, high)
            )  # a long number as it is
    return limits


def read_record(folder: Path) -> "pd.DataFrame":
    """Return what was answered: a row for each row that was asked, in the order of the answers.

    Columns: ``request_id``, ``request_time`` (UTC), ``model_name``, ``model_version``, the recorded columns of the
    request, ``prediction``. Refused requests are left out, and so is a line that a killed server had only begun: it was
    never answered.

    Args:
        folder: the record of one server or of several.

    Raises:
        ValueError: a column of the request is called like one of the others.
    """
    import pandas as pd

    rows = []
    for path in sorted(Path(folder).glob("requests-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            entry = json.loads(line) if line.endswith("\n") else {"status": 0}
            if entry["status"] == 200:
                if taken := [name for name in (*ABOUT, "prediction") if name in entry["inputs"]]:
                    told = f"{path} holds a column {taken[0]!r} of {entry['name']}, as read_record itself has one"
                    raise InvalidInputError(
                        f"{told}. Read the file by itself, or leave that column out."
                    )
                about = (entry["id"], pd.Timestamp(entry["time"]), entry["name"], entry["version"])
                for number, prediction in enumerate(entry["predictions"]):
                    asked = {name: values[number] for name, values in entry["inputs"].items()}
                    rows.append(
                        asked | dict(zip(ABOUT, about, strict=True)) | {"prediction": prediction}
                    )
    if not rows:
        return pd.DataFrame(columns=[*ABOUT, "prediction"])
    found = pd.DataFrame(rows, dtype=object)
    found = pd.DataFrame({name: _column(found[name]) for name in found})
    found = found.sort_values("request_time", kind="stable", ignore_index=True)
    asked = [name for name in found if name not in (*ABOUT, "prediction")]
    return found[[*ABOUT, *asked, "prediction"]]


def _column(values: "pd.Series") -> "pd.Series":
    """Return a column of the record as the model got it: a gap is NaN, and long whole numbers beside one stay exact."""
    gaps = values.isna()
    if gaps.any() and set(values[~gaps].map(type)) == {int}:
        return values.astype("Int64")
    return type(values)(values.where(~gaps, float("nan")).tolist())


@contextlib.contextmanager
def _kept_folder() -> Iterator[Path]:
    """Give a folder that is gone at the end of the block, and also once this process is killed."""
    command = [sys.executable, "-I", "-c", KEEPER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen(command, **pipes) as keeper:  # its end closes the pipe, and waits
        folder = os.fsdecode(keeper.stdout.readline().rstrip(b"\n"))
        if not folder:  # an empty path would be the present folder
            raise ServingFailedError("No temporary folder can be made. Is the disk full?")
        yield Path(folder).resolve()


def _first_line(process: subprocess.Popen, seconds: float) -> str:
    """Return the first line that the process prints, or nothing if it ends or does not print one in time."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        return process.stdout.readline().strip()
    finally:
        timer.cancel()


def _last_line(log: IO) -> str:
    log.seek(0)
    return next((line.strip() for line in reversed(log.read().splitlines()) if line.strip()), "")


def _end(process: subprocess.Popen) -> None:
    """End the server: it answers what it is asked already, for a few seconds."""
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
