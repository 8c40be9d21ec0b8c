"""The library as a package that is installed somewhere else."""

import shutil
import subprocess
import sys

from execution import ROOT, finished


def test_package_can_be_installed_elsewhere_and_has_its_command(tmp_path):
    # given the sources, and an environment that has what the command needs to answer
    source, bare = tmp_path / "a source", tmp_path / "bare"
    shutil.copytree(
        ROOT / "mlflow_lifecycle", source / "mlflow_lifecycle", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", source)
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, bare], check=True)
    python = bare / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    install = [
        *uv,
        "pip",
        "install",
        "--quiet",
        "--python",
        str(python),
        "--constraint",
        str(ROOT / "requirements.txt"),
    ]
    subprocess.run([*install, "click"], check=True)
    # when it is built as a wheel with the setuptools of the lock, and installed there
    build = [*uv, "build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable]
    subprocess.run([*build, "--out-dir", tmp_path / "wheels", source], check=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    subprocess.run([*install, "--no-deps", wheel], check=True)
    # then its command answers, from any folder
    process = finished([str(python.with_name("lifecycle")), "--help"], tmp_path, {}, limit=30)
    assert process.returncode == 0, process.stderr
    assert "doctor" in process.stdout
