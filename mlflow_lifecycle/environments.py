"""Build the environment that a model recorded, with verified archives, and predict in it.

MLflow rebuilds a model's environment without verifying hashes (mlflow#4886, mlflow#12478), and uv
trusts what its cache holds. Here the hashes come from the project's lock file, and each archive is
downloaded and verified again.
"""

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
from hashlib import sha256
from pathlib import Path

import pandas as pd
from mlflow.models import Model
from uv import find_uv_bin

from mlflow_lifecycle.exceptions import EnvironmentNotBuiltError, PredictionFailedError
from mlflow_lifecycle.experiments import printable

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
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    with tempfile.TemporaryDirectory(prefix="packages-", dir=folder.parent) as own:
        packages = Path(own) / "cache" if cache is None else Path(cache).resolve()
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


def python_note(model_folder: Path) -> str | None:
    """Return a sentence if the model was logged under another minor version of Python."""
    here = platform.python_version()
    loader = Model.load(model_folder).flavors["python_function"]
    recorded = loader["python_version"]
    if recorded.split(".")[:2] == here.split(".")[:2]:
        return None
    return f"The model was logged under Python {recorded}. Its environment has {here}."


def predict(model_folder: Path, rows: pd.DataFrame, python: Path) -> list:
    """Return what a model predicts for ``rows`` in another environment.

    The rows go there as JSON, which keeps every number exact. MLflow rounds the last digit in CSV.

    Args:
        model_folder: the model.
        rows: the rows, with the columns that the model takes.
        python: the Python of the environment.

    Raises:
        PredictionFailedError: the process ended with an error; with its last line.
    """
    # NaN as in pandas, because scikit-learn takes None in a text for another value.
    values = rows.astype(object).where(rows.notna(), float("nan"))
    split = values.to_dict(orient="split", index=False)
    command = [str(python), "-I", "-m", "mlflow", "models", "predict", "--env-manager", "local"]
    command += ["--content-type", "json", "--model-uri", str(Path(model_folder).resolve())]
    with tempfile.TemporaryDirectory(prefix="predictions-") as folder:
        answer = Path(folder) / "answer.json"
        child = subprocess.run(
            [*command, "--output-path", str(answer)],
            input=json.dumps({"dataframe_split": split}, default=str),
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if child.returncode == 0:
            return json.loads(answer.read_text(encoding="utf-8"))["predictions"]
    reason = _last_lines(child.stderr, 1)
    raise PredictionFailedError(f"The model in {model_folder} gave no predictions. {reason}")


def _uv(folder: str, *arguments: str) -> None:
    """Run uv in an empty folder, with no settings of the user other than those of the network."""
    variables = {}
    for name, value in os.environ.items():
        if not OVERRIDES.match(name):
            variables[name] = value
    child = subprocess.run(
        [find_uv_bin(), "--no-config", *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
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
