"""Build the environment that a model recorded, with verified archives, and predict in it.

MLflow rebuilds a model's environment without verifying hashes (mlflow#4886, mlflow#12478), and uv
trusts what its cache holds. Here the hashes come from the project's lock file, and each archive is
downloaded and verified again.
"""

import contextlib
import csv
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
from mlflow.models import Model
from uv import find_uv_bin

from mlflow_lifecycle import predict_worker
from mlflow_lifecycle.exceptions import EnvironmentNotBuiltError, PredictionFailedError
from mlflow_lifecycle.experiments import printable
from mlflow_lifecycle.flavors import stored_task
from mlflow_lifecycle.scoring import Predictions

WORKER = predict_worker.__file__
# The settings of uv, pip and Python that say more than how to reach a package index.
OVERRIDES = re.compile(
    "(UV_|PIP_|PYTHON)(?!.*(INDEX|FIND_LINKS|KEYRING|HTTP|TLS|CERTS|INSECURE|TIMEOUT|RETRIES))"
)
REMEDIES = {
    "Hash mismatch for `": "The archive is not the one in the lock file. Do not use it.",
    "none were provided for": (
        "The lock file has no hash for this version. Use the one that the model was logged with."
    ),
    "network was disabled": (
        "A package is missing in the cache. Build once online with the same cache."
    ),
    "error sending request": "The package index does not answer. Check the network and the proxy.",
    "Failed to fetch": "The package index does not answer. Check the network and the proxy.",
    "incompatibilit": "The recorded list is incomplete. Log the model again with all pins.",
}


def build_environment(
    requirements: Path,
    folder: Path,
    *,
    lock: Path,
    cache: Path | None = None,
    offline: bool = False,
) -> Path:
    """Make a virtual environment with the recorded packages and no others; return its Python.

    It shares no file with this environment or with a cache. To remove it, remove ``folder``.

    Args:
        requirements: the list that the model recorded, one pin a line.
        folder: where the environment is made. It must not exist; the folder above must.
        lock: the same pins, and maybe more, with hashes.
        cache: a folder in which uv keeps what it downloads, for later builds without network. uv
            does not verify it again, so each installed file is compared with the hash in its own
            package. That finds damage, but not a forger. By default everything is downloaded.
        offline: take all packages from ``cache``.

    Raises:
        FileExistsError: ``folder`` exists.
        EnvironmentNotBuiltError: an archive is not the one in the lock file, or a package is
            missing in the lock file, in the list or in the cache, or the package index does not
            answer. Then nothing is left behind.
    """
    folder = Path(folder).resolve()
    lock = str(Path(lock).resolve())
    python = python_of(folder)
    with tempfile.TemporaryDirectory(prefix="packages-", dir=folder.parent) as own:
        packages = Path(own) / "cache" if cache is None else Path(cache).resolve() / "packages"
        settings = ["--quiet", "--cache-dir", str(packages), "--python"]
        install = ["--link-mode", "copy", "--no-deps", "--require-hashes"]
        install += ["--requirements", str(Path(requirements).resolve()), "--constraints", lock]
        # A source distribution is built with the verified packages of the lock file.
        install += ["--preview-features", "build-dependency-hashes", "--require-build-hashes"]
        install += ["--build-constraints", lock]
        if offline:
            install.append("--offline")
        folder.mkdir()
        try:
            _uv(own, "venv", str(folder), "--no-python-downloads", *settings, sys.executable)
            _uv(own, "pip", "install", *install, *settings, str(python))
            _uv(own, "pip", "check", *settings, str(python))
            if cache:
                _check_files(folder)
        except BaseException:  # an interruption, too
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return python


def python_of(folder: Path) -> Path:
    """Return the Python of the environment in a folder."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def python_note(model_folder: Path) -> str | None:
    """Return a sentence if the model was logged under another minor version of Python."""
    here = platform.python_version()
    loader = Model.load(model_folder).flavors["python_function"]
    recorded = loader["python_version"]
    if recorded.split(".")[:2] == here.split(".")[:2]:
        return None
    return f"The model was logged under Python {recorded}. Its environment has {here}."


def predict_in(python: Path, folder: Path, rows: pd.DataFrame) -> Predictions:
    """Return what a model predicts for ``rows`` in another environment.

    The rows go there as JSON, which keeps every number exact. A missing value stays what it is,
    None or NaN: scikit-learn takes None in a text for another value.

    Args:
        python: the Python of the environment.
        folder: the model.
        rows: the rows, with the columns that the model takes.

    Raises:
        PredictionFailedError: the process ended with an error; with its last line.
    """
    columns = {}
    for name, column in rows.items():
        values = []
        for value in column.tolist():
            values.append(float("nan") if value is not None and pd.isna(value) else value)
        columns[name] = values
    with tempfile.TemporaryDirectory(prefix="predictions-") as scratch:
        table = Path(scratch) / "rows.json"
        table.write_text(json.dumps(columns, default=str), encoding="utf-8")
        answer = Path(scratch) / "answer.json"
        child = subprocess.run(
            [str(python), "-I", WORKER, str(Path(folder).resolve()), str(table), str(answer)],
            cwd=scratch,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if child.returncode:
            reason = _last_lines(child.stderr, 1)
            raise PredictionFailedError(f"The model in {folder} gave no predictions. {reason}")
        found = json.loads(answer.read_text(encoding="utf-8"))
    return Predictions(
        task=stored_task(folder),
        predicted=np.asarray(found["predicted"]),
        classes=found.get("classes"),
        probabilities=np.asarray(found["probabilities"]) if "probabilities" in found else None,
    )


@contextlib.contextmanager
def own_environment(folder: Path, packages: Path, cache: Path | None = None) -> Iterator[Path]:
    """Give the Python of a model's own environment to the block.

    Args:
        folder: the model.
        packages: its pins, with hashes.
        cache: see `build_environment`. The environment is kept there, too, and used again for the
            same packages after each installed file was compared with the hash in its package.

    Raises:
        EnvironmentNotBuiltError: see `build_environment`.
    """
    requirements = folder / "requirements.txt"
    with contextlib.ExitStack() as stack:
        if cache is None:
            own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="environment-")))
            yield build_environment(requirements, own / "environment", lock=packages)
            return
        key = sha256(f"{sys.version} {packages.read_text(encoding='utf-8')}".encode()).hexdigest()
        kept = Path(cache).resolve() / "environments" / key[:16]
        if kept.exists():
            _check_files(kept)
        else:
            part = Path(f"{kept}.{os.getpid()}")  # so that a killed build leaves no incomplete one
            part.parent.mkdir(parents=True, exist_ok=True)
            build_environment(requirements, part, lock=packages, cache=cache)
            try:
                part.rename(kept)
            except OSError:
                if not kept.exists():
                    raise
                shutil.rmtree(part)  # another process was faster
        yield python_of(kept)


def run_uv(folder: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run uv in an empty folder, with no settings of the user other than those of the network."""
    variables = {}
    for name, value in os.environ.items():
        if not OVERRIDES.match(name):
            variables[name] = value
    return subprocess.run(
        [find_uv_bin(), "--no-config", *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )


def _uv(folder: str, *arguments: str) -> None:
    """Run uv for a build.

    Raises:
        EnvironmentNotBuiltError: it failed.
    """
    child = run_uv(folder, *arguments)
    if child.returncode == 0:
        return
    message = " ".join(child.stderr.split())  # uv breaks lines as wide as the terminal
    remedy = next((text for phrase, text in REMEDIES.items() if phrase in message), "")
    raise EnvironmentNotBuiltError(
        f"No environment was built. {remedy}\n{_last_lines(child.stderr, 8)}"
    )


def _last_lines(text: str, count: int) -> str:
    """Return the last lines of ``text`` that are not blank, without the passwords in addresses."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable("\n".join(lines[-count:]))


def _check_files(folder: Path) -> None:
    """Refuse an environment in which a file is not what its package says."""
    for record in folder.rglob("site-packages/*.dist-info/RECORD"):
        for name, recorded, _ in csv.reader(record.read_text(encoding="utf-8").splitlines()):
            path = record.parents[1] / name
            if not recorded:
                continue
            digest = sha256(path.read_bytes()).digest() if path.is_file() else b""
            if recorded != f"sha256={urlsafe_b64encode(digest).decode().rstrip('=')}":
                raise EnvironmentNotBuiltError(
                    f"The file {name} in the cache is damaged. Build without this cache."
                )
