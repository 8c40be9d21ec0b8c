"""Which newer releases do the direct pins leave out, and what would each break?

Usage: python tools/upgrades.py [--package NAME ...] [--write] [NOTEBOOK ...]

Each direct pin of the notebooks is lifted alone. Where that brings another release, the notebooks are executed with it,
in an environment of their own, and what they print is compared with what is committed. With --write, the pins whose
newer release changes nothing are raised in pyproject.toml; then run: make lock
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import nbformat
from packaging.dependency_groups import resolve_dependency_groups
from packaging.requirements import Requirement
from reproduce import ROOT, differences, outputs

UV = [sys.executable, "-m", "uv", "--no-config"]
PYTHON = ["--python", sys.executable]
COOL_DOWN = ["--exclude-newer", "7 days"]  # a bad release is often found and withdrawn within days
TOGETHER = {"mlflow": ["mlflow-skinny"]}  # what has to be of the same release


def pins() -> dict[str, str]:
    """Return the version of each package that the group of the notebooks pins, by its name."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    stated = map(Requirement, resolve_dependency_groups(groups, "notebook"))
    found = {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in stated}
    followers = {name for names in TOGETHER.values() for name in names}
    return {name: version for name, version in found.items() if name not in followers}


def newest(name: str) -> str:
    """Return the newest release of a package, whatever else it needs, for the newest Python that this project takes."""
    alone = ["--no-deps", "--no-header", "--no-annotate", "--python-version", "3.14"]
    command = [*UV, "pip", "compile", "--quiet", *alone, "-"]
    done = subprocess.run(command, input=name, capture_output=True, text=True, check=True)
    return done.stdout.strip().partition("==")[2]


def lifted(name: str, folder: Path) -> str:
    """Compile the locks into ``folder`` with one pin lifted, and return the release that this brings.

    All other packages stay as they are, unless the newer release asks for another.

    Raises:
        RuntimeError: nothing fits together.
    """
    names = [name, *TOGETHER.get(name, [])]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = re.sub(rf'"({"|".join(map(re.escape, names))})==', r'"\1>=', text)
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    upgrade = [argument for package in names for argument in ("--upgrade-package", package)]
    for lock, group, more in (
        ("requirements.txt", "test", []),
        ("model_requirements.txt", "model", ["--constraint", "requirements.txt"]),
    ):
        shutil.copy(ROOT / lock, folder)
        hashes = ["--generate-hashes"] if group == "test" else []
        command = [
            *UV,
            "pip",
            "compile",
            "--quiet",
            "--no-sources",
            *COOL_DOWN,
            *PYTHON,
            "--group",
            group,
            *upgrade,
            *more,
            *hashes,
        ]
        done = subprocess.run([*command, "--output-file", lock], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(" ".join(done.stderr.split())[:300])
    lines = (folder / "requirements.txt").read_text(encoding="utf-8")
    return re.search(rf"^{re.escape(name)}==([^\s;]+)", lines, re.MULTILINE)[1]


def broken(notebook: str, python: Path, folder: Path) -> str:
    """Execute ``notebook`` in ``folder`` with that Python, on an empty store, and return what is not as committed."""
    results = folder / "results" / Path(notebook).stem
    results.mkdir(parents=True)
    command = [python, "-m", "nbconvert", "--execute", "--to", "notebook", "--output-dir", results, notebook]
    command += ["--KernelManager.transport_encryption=auto", "--ExecutePreprocessor.startup_timeout=600"]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "REBUILD_ENVIRONMENT": "off", "PYTHONPATH": str(folder)}
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{results.as_posix()}/mlflow.db"}
    done = subprocess.run(command, cwd=folder, env=os.environ | quiet | store, capture_output=True, text=True)
    if done.returncode:
        lines = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr).strip().splitlines() or ["without a word"]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Warning)\b", line)]
        return f"fails: {(errors or lines)[-1][:200]}"
    committed, executed = (
        outputs(nbformat.read(path, as_version=4)) for path in (ROOT / notebook, results / Path(notebook).name)
    )
    expected = {name for name, text in committed["printed"].items() if PINS_SHOWN.search(text)}
    found = [name for names in differences(committed, executed).values() for name in names if name not in expected]
    return "; ".join(found) or "nothing"


# What shows the pins themselves, or says that no environment was built, differs as it should.
PINS_SHOWN = re.compile(r"\b\d+ packages|The new environment gives")


def write(name: str, version: str) -> None:
    """Raise the pin of a package in pyproject.toml, and of those that have to be of the same release."""
    path = ROOT / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    for package in [name, *TOGETHER.get(name, [])]:
        text = re.sub(rf'"{re.escape(package)}==[^";]+', f'"{package}=={version}', text)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Print a line for each pin."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", default=["project.ipynb"])
    parser.add_argument("--package", action="append", metavar="NAME", help="default: all direct pins of the notebooks")
    parser.add_argument("--write", action="store_true", help="raise the pins whose newer release changes nothing")
    arguments = parser.parse_args()
    gives = f"what {', '.join(arguments.notebooks)} gives otherwise"
    print(f"| package | pinned | newest | newest that fits | {gives} |\n{'|---' * 5}|")
    for name, version in pins().items():
        if arguments.package and name not in arguments.package:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            try:
                fitting = lifted(name, folder)
            except RuntimeError as error:
                print(f"| {name} | {version} | {newest(name)} | none: {error} | |", flush=True)
                continue
            if fitting == version:
                print(f"| {name} | {version} | {newest(name)} | {version} | |", flush=True)
                continue
            python = folder / "environment" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
            subprocess.run([*UV, "venv", "--quiet", *PYTHON, folder / "environment"], check=True)
            sync = [*UV, "pip", "sync", "--quiet", "--require-hashes", "--python", python, "requirements.txt"]
            subprocess.run(sync, cwd=folder, check=True)
            for part in ("mlflow_lifecycle", "guides", "tests", "project.ipynb"):
                source = ROOT / part
                (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
            found = [broken(notebook, python, folder) for notebook in arguments.notebooks]
            print(f"| {name} | {version} | {newest(name)} | {fitting} | {'; '.join(found)} |", flush=True)
            if arguments.write and set(found) == {"nothing"}:
                write(name, fitting)


if __name__ == "__main__":
    main()
