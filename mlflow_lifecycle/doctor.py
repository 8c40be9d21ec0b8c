"""Find problems of a project folder, each with its remedy: Python, packages, uv, pins, store, disk.

MLflow reports them in the middle of a run, in the words of the library that fails first.
"""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from mlflow_lifecycle.exceptions import InvalidInputError, StoreUnusableError
from mlflow_lifecycle.experiments import check_store
from mlflow_lifecycle.pins import read_pins

PYTHONS = ((3, 11), (3, 15))  # the first that is supported, and the first that is not
FREE_BYTES = 200_000_000  # a run takes 5 MB, and the environment of a model 330 MB in uv's cache


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to do about it, each in a sentence."""

    what: str
    remedy: str


def find_problems(folder: Path) -> list[Problem]:
    """Return all problems of the project in ``folder``.

    Its lock file is ``requirements.txt``, and its pins for models are ``model_requirements.txt``.
    Neither has to exist.
    """
    lock = folder / "requirements.txt"
    pins = folder / "model_requirements.txt"
    problems = [*check_python(), *check_uv(), *check_store_of(folder), *check_disk(folder)]
    if lock.exists():
        problems += check_packages(lock)
    if pins.exists():
        problems += check_pins(pins)
    return problems


def check_python(python: tuple[int, ...] = sys.version_info[:2]) -> Iterator[Problem]:
    """Yield a problem if a version of Python is not supported."""
    if not PYTHONS[0] <= python < PYTHONS[1]:
        found = ".".join(map(str, python))
        yield Problem(f"Python {found} is not supported.", "Use Python 3.11 to 3.14.")


def check_uv() -> Iterator[Problem]:
    """Yield a problem if uv, which builds the environments of models, is not installed."""
    if find_spec("uv") is None:
        yield Problem("uv is not installed beside this Python.", "Run: pip install uv")


def check_packages(lock: Path) -> Iterator[Problem]:
    """Yield a problem if installed packages differ from those of a lock file."""
    different = []
    for requirement in read_requirements(lock):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            different.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            different.append(f"{requirement.name} is {installed}")
    if different:
        remedy = f"Run: uv pip install -r {lock.name}"
        what = f"{len(different)} installed packages differ from {lock.name}"
        yield Problem(f"{what}: {', '.join(different[:5])}.", remedy)


def read_requirements(path: Path) -> Iterator[Requirement]:
    """Yield the requirements in a file that apply to this system."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            requirement = Requirement(line.partition(" #")[0].rstrip(" \\"))
        except InvalidRequirement:  # an option, a comment or an address
            continue
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def check_pins(path: Path) -> Iterator[Problem]:
    """Yield a problem if the file at ``path`` is not a list of exact pins."""
    try:
        read_pins(path)
    except InvalidInputError as error:
        what, _, remedy = str(error).partition(". ")
        yield Problem(f"{what}.", remedy)


def check_store_of(folder: Path) -> Iterator[Problem]:
    """Yield a problem if nothing can be logged in the store of ``folder``."""
    try:
        check_store(folder)
    except StoreUnusableError as error:
        yield Problem(error.problem, error.remedy)
    except ImportError as error:
        yield Problem(f"The store cannot be opened: {error}.", "Run: pip install mlflow")


def check_disk(folder: Path, needed_bytes: int = FREE_BYTES) -> Iterator[Problem]:
    """Yield a problem if the disk of ``folder`` has less than ``needed_bytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        remedy = "Free some, such as by: uv cache prune"
        yield Problem(f"The disk of {folder} has {free / 1e6:.0f} MB free.", remedy)
