"""Build an environment from the pins that a model recorded, every archive verified, and predict in it.

MLflow rebuilds a model's environment without verifying hashes (mlflow#4886, mlflow#12478), and uv, under it, takes
what its cache holds as it is. Here the hashes come from the project's lock, and each archive is downloaded and
verified anew.
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
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_lifecycle.exceptions import EnvironmentNotBuiltError, PredictionFailedError
from mlflow_lifecycle.experiments import printable
from mlflow_lifecycle.pins import read_pins

if TYPE_CHECKING:
    import pandas as pd

# With -P, Python imports nothing from the working directory. uv reads no settings file with --no-config.
UV = [sys.executable, "-P", "-m", "uv", "--no-config"]
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
    r"Hash mismatch for `": "The archive is not the one in the lock: do not use it. If the lock is wrong: make lock",
    r"none were provided for": "The lock has no hash for this version. Give the lock that the model was logged with.",
    r"network was disabled": "Offline, and the cache lacks a package. Build once online with the same cache.",
    r"error sending request|Failed to fetch": "The package index gives no answer. Check the network and the proxy.",
    r"incompatibilit": "The recorded list is not complete. Log the model again with a full list of pins.",
    r"No module named uv": "uv is missing here. Install the lock: make clean run",
}


def built(
    requirements: Path,
    folder: Path,
    *,
    lock: Path,
    cache: Path | None = None,
    offline: bool = False,
) -> Path:
    """Make a virtual environment with the recorded packages and no others, and return its Python.

    It shares no file with this environment or with a cache. To remove it, remove ``folder``.

    Args:
        requirements: the list that the model recorded, one pin a line.
        folder: where the environment goes. It must not exist yet; the folder above must.
        lock: the same pins, and maybe more, with hashes.
        cache: a folder in which uv keeps what it downloads, for later builds without network. uv does not verify what
            it holds again, so then each installed file is compared with the hash in its own package, which finds
            damage, but not a forger. By default a temporary folder: all is downloaded, and verified by the lock.
        offline: take all from ``cache``, without network.

    Raises:
        ValueError: ``requirements`` is not a list of exact pins.
        FileExistsError: ``folder`` is there already.
        EnvironmentNotBuiltError: an archive is not the one in the lock, or a package is missing in the lock, in the
            list or in the cache, or the package index gives no answer. Then nothing is left behind.
    """
    requirements, folder, lock = (Path(path).resolve() for path in (requirements, folder, lock))
    read_pins(requirements)
    if not lock.is_file():
        raise EnvironmentNotBuiltError(
            f"There is no lock {lock}. Give the file that holds the hashes."
        )
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    with tempfile.TemporaryDirectory(prefix="packages-", dir=folder.parent) as own:
        folder.mkdir()
        try:
            packages = Path(own) / "cache" if cache is None else Path(cache).resolve()
            settings = ["--quiet", "--cache-dir", str(packages), "--python"]
            install = [
                "--link-mode",
                "copy",
                "--require-hashes",
                "--no-deps",
                "-r",
                str(requirements),
                "-c",
                str(lock),
            ]
            build = [
                "--preview-features",
                "build-dependency-hashes",
                "--require-build-hashes",
                "-b",
                str(lock),
            ]
            source = ["--offline"] if offline else []
            empty = Path(own) / "empty"
            empty.mkdir()
            _uv(empty, "venv", str(folder), "--no-python-downloads", *settings, sys.executable)
            _uv(empty, "pip", "install", *install, *build, *source, *settings, str(python))
            _uv(empty, "pip", "check", *settings, str(python))
            if cache is not None and (damaged := _damaged_file(folder)):
                raise EnvironmentNotBuiltError(
                    f"The cache holds a damaged {damaged}. Build without this cache."
                )
        except BaseException:  # an interruption, too
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return python


def python_version(model_folder: Path) -> str | None:
    """Return the version of Python that the model recorded, or None if it recorded none."""
    recorded = Path(model_folder) / "python_env.yaml"
    text = recorded.read_text(encoding="utf-8") if recorded.is_file() else ""
    found = re.search(r"^python:\s*['\"]?([\d.]+)", text, re.MULTILINE)
    return found[1] if found else None


def python_note(model_folder: Path) -> str | None:
    """Return a sentence if the model was logged under another minor version of Python than this one, else None."""
    here, recorded = "{}.{}".format(*sys.version_info), python_version(model_folder)
    if recorded is None:
        return f"The model does not say which Python it was logged under; its environment gets this one, {here}."
    if recorded.split(".")[:2] == here.split("."):
        return None
    return f"The model was logged under Python {recorded}; its environment gets this one, {here}."


def predict(model_folder: Path, rows: "pd.DataFrame", python: Path) -> list:
    """Return what the model in ``model_folder`` predicts for ``rows``, run by ``python`` in a process of its own.

    The rows go there as JSON, which keeps every number exact. MLflow reads CSV with rounding in the last digit.

    Raises:
        PredictionFailedError: the process ended with an error; with its last line.
    """
    gaps = rows.astype(object).where(rows.notna(), None)
    texts = rows.select_dtypes(
        object
    )  # where scikit-learn takes None for another value than NaN, which is served
    rows = gaps.assign(
        **{name: gaps[name].where(rows[name].notna(), float("nan")) for name in texts}
    )
    body = json.dumps({"dataframe_split": rows.to_dict(orient="split", index=False)}, default=str)
    command = [str(python), "-I", "-m", "mlflow", "models", "predict", "--env-manager", "local"]
    command += ["--content-type", "json"]
    command += ["--model-uri", str(Path(model_folder).resolve())]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with tempfile.TemporaryDirectory(prefix="predictions-") as folder:
        answer = Path(folder) / "answer.json"
        child = subprocess.run(
            [*command, "--output-path", str(answer)],
            input=body, env=variables, cwd=folder, capture_output=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        if child.returncode == 0 and answer.is_file():
            return json.loads(answer.read_text(encoding="utf-8"))["predictions"]
    raise PredictionFailedError(
        f"The model in {model_folder} gave no predictions. {_last_lines(child.stderr, 1)}"
    )


def find_overrides(variables: Iterable[str]) -> list[str]:
    """Return the names of those variables that could change what uv, pip and Python install.

    Variables that only say how to reach a package index are not among them.
    """
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
    if child.returncode:
        words = " ".join(child.stderr.split())  # uv breaks lines as wide as the terminal
        remedy = next((text for pattern, text in REMEDIES.items() if re.search(pattern, words)), "")
        raise EnvironmentNotBuiltError(
            f"No environment was built. {remedy}\n{_last_lines(child.stderr, 8)}"
        )


def _last_lines(text: str, count: int) -> str:
    """Return the last lines of ``text`` that are not blank, without the passwords in addresses."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable("\n".join(lines[-count:]))


def _damaged_file(folder: Path) -> str | None:
    """Return the path of a file in the environment that is not what its package says, or None."""
    (packages,) = {path.parent for path in folder.rglob("site-packages/*.dist-info")} or {folder}
    for package in distributions(path=[str(packages)]):
        for name, digest, _ in csv.reader((package.read_text("RECORD") or "").splitlines()):
            path, value = Path(package.locate_file(name)), digest.partition("=")[2]
            if value and not (path.is_file() and value == _digest(path)):
                return name
    return None


def _digest(path: Path) -> str:
    return urlsafe_b64encode(sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
