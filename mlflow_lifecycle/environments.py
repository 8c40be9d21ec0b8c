"""Build the environment that a model recorded, with verified archives, and predict in it.

MLflow rebuilds a model's environment without verifying hashes (mlflow#4886, mlflow#12478), and uv
trusts what its cache holds. Here the hashes come from the project's lock file, and each archive is
downloaded and verified again.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from hashlib import sha256
from importlib.metadata import Distribution
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_lifecycle.exceptions import EnvironmentNotBuiltError, PredictionFailedError
from mlflow_lifecycle.experiments import printable
from mlflow_lifecycle.pins import read_pins

if TYPE_CHECKING:
    import pandas as pd

# With -P, Python imports nothing from the working directory. uv reads no settings.
UV = [sys.executable, "-P", "-m", "uv", "--no-config"]
# Words in the names of variables that only say how to reach a package index.
NETWORK = (
    "INDEX",
    "FIND_LINKS",
    "KEYRING",
    "HTTP",
    "TLS",
    "CERTS",
    "INSECURE",
    "TIMEOUT",
    "RETRIES",
)
REMEDIES = {
    r"Hash mismatch for `": "The archive is not the one in the lock file. Do not use it.",
    r"none were provided for": (
        "The lock file has no hash for this version. Use the one that the model was logged with."
    ),
    r"network was disabled": (
        "A package is missing in the cache. Build once online with the same cache."
    ),
    r"error sending request|Failed to fetch": (
        "The package index does not answer. Check the network and the proxy."
    ),
    r"incompatibilit": "The recorded list is incomplete. Log the model again with all pins.",
    r"No module named uv": "uv is not installed here. Run: pip install uv",
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
        InvalidInputError: ``requirements`` is not a list of exact pins.
        FileExistsError: ``folder`` exists.
        EnvironmentNotBuiltError: an archive is not the one in the lock file, or a package is
            missing in the lock file, in the list or in the cache, or the package index does not
            answer. Then nothing is left behind.
    """
    requirements = Path(requirements).resolve()
    folder = Path(folder).resolve()
    lock = Path(lock).resolve()
    read_pins(requirements)
    if not lock.is_file():
        raise EnvironmentNotBuiltError(f"There is no lock file {lock}. Name the one with hashes.")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    with tempfile.TemporaryDirectory(prefix="packages-", dir=folder.parent) as own:
        empty = Path(own) / "empty"
        empty.mkdir()
        packages = Path(own) / "cache" if cache is None else Path(cache).resolve()
        settings = ["--quiet", "--cache-dir", str(packages), "--python"]
        install = ["--link-mode", "copy", "--no-deps", "--require-hashes"]
        install += ["--requirements", str(requirements), "--constraints", str(lock)]
        # A source distribution is built with the verified packages of the lock file.
        install += ["--preview-features", "build-dependency-hashes", "--require-build-hashes"]
        install += ["--build-constraints", str(lock)]
        if offline:
            install.append("--offline")
        folder.mkdir()
        try:
            _uv(empty, "venv", str(folder), "--no-python-downloads", *settings, sys.executable)
            _uv(empty, "pip", "install", *install, *settings, str(python))
            _uv(empty, "pip", "check", *settings, str(python))
            damaged = _damaged_file(folder) if cache else None
            if damaged:
                raise EnvironmentNotBuiltError(
                    f"The file {damaged} in the cache is damaged. Build without this cache."
                )
        except BaseException:  # an interruption, too
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return python


built = build_environment


def python_version(model_folder: Path) -> str | None:
    """Return the version of Python that the model recorded, or None if it recorded none."""
    recorded = Path(model_folder) / "python_env.yaml"
    text = recorded.read_text(encoding="utf-8") if recorded.is_file() else ""
    match = re.search(r"^python:\s*['\"]?([\d.]+)", text, re.MULTILINE)
    return match[1] if match else None


def python_note(model_folder: Path) -> str | None:
    """Return a sentence if the model was logged under another minor version of Python."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    recorded = python_version(model_folder)
    if recorded is None:
        return f"The model recorded no version of Python. Its environment has {here}."
    if recorded.split(".")[:2] == here.split("."):
        return None
    return f"The model was logged under Python {recorded}. Its environment has {here}."


def predict(model_folder: Path, rows: "pd.DataFrame", python: Path) -> list:
    """Return what a model predicts for ``rows`` in another environment.

    The rows go there as JSON, which keeps every number exact. MLflow rounds the last digit in CSV.

    Args:
        model_folder: the model.
        rows: the rows, with the columns that the model takes.
        python: the Python of the environment.

    Raises:
        PredictionFailedError: the process ended with an error; with its last line.
    """
    missing = rows.isna()
    values = rows.astype(object).where(~missing, None)
    for name in rows.select_dtypes(object):
        # In text scikit-learn takes None for another value than NaN.
        values[name] = values[name].where(~missing[name], float("nan"))
    split = values.to_dict(orient="split", index=False)
    command = [str(python), "-I", "-m", "mlflow", "models", "predict", "--env-manager", "local"]
    command += ["--content-type", "json", "--model-uri", str(Path(model_folder).resolve())]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with tempfile.TemporaryDirectory(prefix="predictions-") as folder:
        answer = Path(folder) / "answer.json"
        child = subprocess.run(
            [*command, "--output-path", str(answer)],
            input=json.dumps({"dataframe_split": split}, default=str),
            env=variables,
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if child.returncode == 0 and answer.is_file():
            return json.loads(answer.read_text(encoding="utf-8"))["predictions"]
    reason = _last_lines(child.stderr, 1)
    raise PredictionFailedError(f"The model in {model_folder} gave no predictions. {reason}")


def find_overrides(variables: Iterable[str]) -> list[str]:
    """Return the names of the variables that could change what uv, pip and Python install."""
    overrides = []
    for name in variables:
        is_setting = name.startswith(("UV_", "PIP_", "PYTHON"))
        if is_setting and not any(word in name for word in NETWORK):
            overrides.append(name)
    return overrides


def _uv(empty: Path, *arguments: str) -> None:
    """Run uv in an empty folder, with no settings of the user other than those of the network."""
    variables = dict(os.environ)
    for name in find_overrides(os.environ):
        del variables[name]
    child = subprocess.run(
        [*UV, *arguments],
        cwd=empty,
        env=variables,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if child.returncode == 0:
        return
    message = " ".join(child.stderr.split())  # uv breaks lines as wide as the terminal
    remedy = ""
    for pattern, text in REMEDIES.items():
        if not remedy and re.search(pattern, message):
            remedy = text
    raise EnvironmentNotBuiltError(
        f"No environment was built. {remedy}\n{_last_lines(child.stderr, 8)}"
    )


def _last_lines(text: str, count: int) -> str:
    """Return the last lines of ``text`` that are not blank, without the passwords in addresses."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable("\n".join(lines[-count:]))


def _damaged_file(folder: Path) -> str | None:
    """Return the path of a file in the environment that is not what its package says, or None."""
    for information in folder.rglob("site-packages/*.dist-info"):
        package = Distribution.at(information)
        for name, digest, _ in csv.reader((package.read_text("RECORD") or "").splitlines()):
            path = Path(package.locate_file(name))
            expected = digest.partition("=")[2]
            if expected and not (path.is_file() and expected == _digest(path)):
                return name
    return None


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file as RECORD holds it."""
    return urlsafe_b64encode(sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
