"""Find problems of a project folder, each with its remedy: packages, pins, store and disk.

MLflow reports them in the middle of a run, in the words of the library that fails first.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from mlflow_lifecycle.exceptions import InvalidInputError, StoreUnusableError
from mlflow_lifecycle.experiments import check_store, tracking_uri
from mlflow_lifecycle.pins import read_pins


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
    problems = [*check_store_of(folder), *check_disk(folder)]
    if lock.exists():
        problems += check_packages(lock)
    if pins.exists():
        problems += check_pins(pins)
    return problems


def check_packages(lock: Path) -> Iterator[Problem]:
    """Yield a problem if installed packages differ from those of a lock file."""
    different = []
    for line in lock.read_text(encoding="utf-8").splitlines():
        try:
            requirement = Requirement(line.partition(" #")[0].rstrip(" \\"))
        except InvalidRequirement:  # an option, a comment or an address
            continue
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            different.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            different.append(f"{requirement.name} is {installed}")
    if different:
        what = f"{len(different)} installed packages differ from {lock.name}"
        remedy = f"Run: uv pip install -r {lock.name}"
        yield Problem(f"{what}: {', '.join(different[:5])}.", remedy)


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
        check_store(tracking_uri(folder))
    except StoreUnusableError as error:
        yield Problem(error.problem, error.remedy)


def check_disk(folder: Path, needed_bytes: int = 200_000_000) -> Iterator[Problem]:
    """Yield a problem if the disk of ``folder`` has less than ``needed_bytes`` free.

    A run takes 5 MB, and the environment of a model 330 MB in uv's cache.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        remedy = "Free some, such as by: uv cache prune"
        yield Problem(f"The disk of {folder} has {free / 1e6:.0f} MB free.", remedy)
