"""Read a list of exact pins, and the pins that a model recorded.

MLflow takes any list as ``pip_requirements``, loose ones included, and so logs models whose environment nobody can
build again. Here a list counts only if each line pins one package to one version.
"""

import re
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from mlflow_lifecycle.exceptions import InvalidInputError

REMEDY = "Every line must pin one package, as in numpy==1.2.3. Renew the list: make lock"


def parse_pins(text: str, source: str) -> list[str]:
    """Return the pins in ``text``, one per package, written as MLflow records them.

    Args:
        text: lines of a requirements file; comments and blank lines are left out.
        source: what the text is, for the error.

    Raises:
        ValueError: a line is no requirement or leaves the version open, or there is no pin at all.
    """
    pins = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (line := line.partition(" #")[0].strip()) or line.startswith("#"):
            continue
        name = re.match(
            r"[\w.-]*[^\s\w:/@-]?", line
        ).group()  # not more: an address may hold a password
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            raise InvalidInputError(
                f"{source}, line {number}, is not a requirement: {name!r}. {REMEDY}"
            ) from None
        versions = [*requirement.specifier]
        if (
            requirement.url
            or len(versions) != 1
            or versions[0].operator != "=="
            or "*" in versions[0].version
        ):
            raise InvalidInputError(
                f"{source}, line {number}, leaves the version open: {name!r}. {REMEDY}"
            )
        pins.append(str(requirement))
    if not pins:
        raise InvalidInputError(f"{source} pins nothing. {REMEDY}")
    return pins


def read_pins(path: Path) -> list[str]:
    """Return the pins in the file at ``path``, one per package, written as MLflow records them.

    Raises:
        ValueError: the file cannot be read, has a byte order mark, or is not a list of exact pins.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidInputError(
            f"There is no {path}. Put it there: git checkout {Path(path).name}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"{path} cannot be read: {error}. Write it anew: make lock"
        ) from None
    if text.startswith("\ufeff"):
        raise InvalidInputError(
            f"{path} begins with a byte order mark, which MLflow would record. Write it anew: make lock"
        )
    return parse_pins(text, str(path))


def locked(pins: list[str], lock: Path) -> str:
    """Return the lines of ``lock`` for these pins, with their hashes, as a list that installs them again years later.

    Args:
        pins: as ``read_pins`` returns them.
        lock: a compiled list with the hashes of every archive.

    Raises:
        ValueError: the lock has a pin at another version, not at all, or without a hash.
    """
    blocks, lines = {}, []
    for line in Path(lock).read_text(encoding="utf-8").splitlines():
        if line[:1].isalnum():
            name, _, version = line.rstrip(" \\").partition(";")[0].strip().partition("==")
            lines = blocks[canonicalize_name(name), version] = [line]
        elif line.startswith("    --hash="):
            lines.append(line)
    found = []
    for pin in pins:
        requirement = Requirement(pin)
        lines = blocks.get(
            (canonicalize_name(requirement.name), requirement.specifier.__str__()[2:]), []
        )
        if len(lines) < 2:
            raise InvalidInputError(
                f"{lock} has no hash for {pin}. Give the lock that the pins are from, or renew it: make lock"
            )
        found += lines
    return "\n".join(found) + "\n"


def find_model_requirements(folder: Path = Path()) -> Path:
    """Return the ``model_requirements.txt`` in ``folder``, by default the current one, or in the nearest folder above.

    Raises:
        ValueError: there is none, or it is not a list of exact pins.
    """
    for place in (Path(folder).resolve(), *Path(folder).resolve().parents):
        path = place / "model_requirements.txt"
        if path.is_file():
            read_pins(path)
            return path
    folder = Path(folder).resolve()
    raise InvalidInputError(
        f"There is no model_requirements.txt in {folder} or in a folder above. Put it there."
    )
