"""Find problems of the set-up, each with its remedy: Python, packages, uv, pins, store and disk.

MLflow reports them in the middle of a run, in the words of the library that fails first, or not at all.
"""

import csv
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from mlflow_lifecycle.exceptions import StoreUnusableError
from mlflow_lifecycle.experiments import check_store
from mlflow_lifecycle.pins import read_pins

PYTHONS = ((3, 11), (3, 15))  # from, and up to but without
FREE_BYTES = 200_000_000  # a first run writes about 5 MB, and the environment that it builds 330 MB in uv's cache


@dataclass(frozen=True)
class Problem:
    """Something that keeps the project from working, in a sentence, and what to do about it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        """Return both as two lines."""
        return f"{self.what}\n  {self.remedy}"


def python_problems(version: tuple[int, ...] = sys.version_info[:2]) -> list[Problem]:
    """Return what is wrong with this Python: its version."""
    if PYTHONS[0] <= version < PYTHONS[1]:
        return []
    found = ".".join(map(str, version))
    what = f"This is Python {found}; the packages are pinned for 3.11 to 3.14."
    return [Problem(what, "make clean run PYTHON=python3.12")]


def package_problems(lock: Path) -> list[Problem]:
    """Return where the installed packages differ from ``lock``, a compiled list with hashes, or are only half there."""
    from packaging.requirements import Requirement

    different, incomplete = [], []
    for line in lock.read_text(encoding="utf-8").splitlines():
        if not line[:1].isalnum():
            continue
        requirement = Requirement(line.rstrip(" \\"))
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            different.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found.version, prereleases=True):
            different.append(f"{requirement.name} is {found.version}")
        elif any(not Path(found.locate_file(name)).exists() for name in recorded_files(found)):
            incomplete.append(requirement.name)
    remedy = f"Install them anew: touch {lock.name} && make run"
    problems = []
    if different:
        listed = ", ".join(different[:5]) + (
            f" and {len(different) - 5} more" if len(different) > 5 else ""
        )
        problems.append(
            Problem(f"The installed packages are not those of {lock.name}: {listed}.", remedy)
        )
    if incomplete:
        what = f"Files of installed packages are missing: {', '.join(incomplete[:5])}."
        problems.append(Problem(what, "make clean run"))
    return problems


def recorded_files(found: Distribution) -> list[str]:
    """Return the files that were installed for a package, relative to where it is, without compiled ones."""
    rows = csv.reader((found.read_text("RECORD") or "").splitlines())
    return [row[0] for row in rows if row and not row[0].endswith(".pyc")]


def uv_problems() -> list[Problem]:
    """Return a problem where uv, which builds the environments of models, is not installed beside this Python."""
    if find_spec("uv"):
        return []
    what = "uv is not installed beside this Python, so no environment of a model can be built."
    return [Problem(what, "make clean run")]


def pins_problems(path: Path) -> list[Problem]:
    """Return what is wrong with the list of pins at ``path``."""
    try:
        read_pins(path)
    except ValueError as error:
        what, _, remedy = str(error).partition(". ")
        return [Problem(f"{what}.", remedy)]
    return []


def disk_problems(folder: Path, needed_bytes: int = FREE_BYTES) -> list[Problem]:
    """Return a problem where the disk that holds ``folder`` has less than ``needed_bytes`` free."""
    free = shutil.disk_usage(folder).free
    if free >= needed_bytes:
        return []
    what = f"The disk of {folder} has {free / 1e6:.0f} MB free."
    return [Problem(what, "Make room: uv cache prune, and old runs: mlflow gc")]


def store_problems(folder: Path) -> list[Problem]:
    """Return what is wrong with the store of ``folder``, or with the one that MLFLOW_TRACKING_URI names."""
    try:
        check_store(folder)
    except StoreUnusableError as error:
        return [Problem(error.problem, error.remedy)]
    except ImportError as error:
        return [Problem(f"The store cannot be looked at: {error}.", "make clean run")]
    return []


def problems(folder: Path) -> list[Problem]:
    """Return all problems of the project in ``folder``."""
    lock = folder / "requirements.txt"
    found = python_problems() + uv_problems() + pins_problems(folder / "model_requirements.txt")
    missing = Problem(f"There is no {lock}.", "git checkout requirements.txt")
    found += package_problems(lock) if lock.exists() else [missing]
    return found + store_problems(folder) + disk_problems(folder)
