"""The library as a wheel, installed where nothing else is."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from execution import ROOT

UV = [sys.executable, "-P", "-m", "uv", "--no-config"]


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the sources, with the setuptools of the lock, and return its path."""
    source = folder / "a source"
    shutil.copytree(ROOT / "mlflow_lifecycle", source / "mlflow_lifecycle")
    shutil.copy(ROOT / "pyproject.toml", source)
    build = [*UV, "build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable]
    subprocess.run([*build, "--out-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def locked_versions() -> str:
    """Return the lines of the largest lock, without their hashes."""
    lock = (ROOT / "requirements-scale.txt").read_text(encoding="utf-8")
    return re.sub(r" *\\\n    --hash=\S+", "", lock)


def install(folder: Path, *packages: str) -> Path:
    """Install packages at the versions of the lock in a new environment, and return the folder of its programs."""
    subprocess.run([*UV, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    versions = folder / "versions.txt"
    versions.write_text(locked_versions(), encoding="utf-8")
    command = [*UV, "pip", "install", "--quiet", "--compile-bytecode", "--python", programs / "python"]
    subprocess.run([*command, "--constraints", versions, *packages], check=True)
    return programs
