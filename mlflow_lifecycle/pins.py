"""Read a list of exact pins, and find their hashes in a lock file.

MLflow takes any list as ``pip_requirements``, and so logs models whose environment nobody can build
again. Here a list counts only if each line pins one package to one version.
"""

import re
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from mlflow_lifecycle.exceptions import InvalidInputError

REMEDY = (
    "Each line must pin one package, such as numpy==1.2.3. Compile the list with uv pip compile."
)


def parse_pins(text: str, source: str) -> list[str]:
    """Return the pins in a text, one per package, written as MLflow records them.

    Args:
        text: lines of a requirements file. Comments and blank lines are left out.
        source: the name of the text, for the error.

    Raises:
        InvalidInputError: a line is not a requirement or not exact, or there is no pin at all.
    """
    pins = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        # Only the beginning of the line is printed, because an address may contain a password.
        start = re.match(r"[\w.-]*[^\s\w:/@-]?", line).group()
        place = f"{source}, line {number}"
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            raise InvalidInputError(f"{place}, is not a requirement: {start!r}. {REMEDY}") from None
        versions = list(requirement.specifier)
        is_exact = len(versions) == 1 and versions[0].operator == "=="
        if requirement.url or not is_exact or "*" in versions[0].version:
            raise InvalidInputError(f"{place}, leaves the version open: {start!r}. {REMEDY}")
        pins.append(str(requirement))
    if not pins:
        raise InvalidInputError(f"{source} pins nothing. {REMEDY}")
    return pins


def read_pins(path: Path) -> list[str]:
    """Return the pins in a file, one per package, written as MLflow records them.

    Raises:
        InvalidInputError: the file cannot be read, has a byte order mark, or is not a list of exact
            pins.
    """
    text = _read(path)
    if text.startswith("\ufeff"):
        raise InvalidInputError(
            f"{path} begins with a byte order mark, which MLflow would record. Save it without."
        )
    return parse_pins(text, str(path))


def _read(path: Path) -> str:
    """Return the text in a file.

    Raises:
        InvalidInputError: there is no such file, or it is not text in UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidInputError(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path} cannot be read: {error}.") from None


def names_and_versions(pins: list[str]) -> list[str]:
    """Return ``name==version`` of each pin, without the marker that says where it is needed."""
    return [pin.partition(";")[0].strip() for pin in pins]


def locked(pins: list[str], lock: Path) -> str:
    """Return the lines of a lock file for these pins, with their hashes.

    Args:
        pins: as `read_pins` returns them.
        lock: a compiled list with the hashes of all archives.

    Raises:
        InvalidInputError: there is no such file, or a pin is missing in it, has another version or
            has no hash.
    """
    lock = Path(lock)
    if not lock.is_file():
        raise InvalidInputError(
            f"There is no lock file {lock}. Compile it: uv pip compile --generate-hashes"
        )
    blocks = {}
    lines = []
    for line in _read(lock).splitlines():
        if line[:1].isalnum():
            pin = line.rstrip(" \\").partition(";")[0].strip()
            name, _, version = pin.partition("==")
            lines = [line]
            blocks[canonicalize_name(name.partition("[")[0]), version] = lines
        elif line.startswith("    --hash="):
            lines.append(line)
    found = []
    for pin in pins:
        requirement = Requirement(pin)
        version = str(requirement.specifier).removeprefix("==")
        lines = blocks.get((canonicalize_name(requirement.name), version), [])
        if len(lines) < 2:
            raise InvalidInputError(
                f"{lock} has no hash for {pin}. Use the lock file that the pins are from, compiled "
                "with --generate-hashes."
            )
        found += lines
    return "\n".join(found) + "\n"


def find_model_requirements(folder: Path = Path()) -> Path:
    """Return the ``model_requirements.txt`` in a folder or in the nearest folder above it.

    Args:
        folder: by default the current one.

    Raises:
        InvalidInputError: there is none, or it is not a list of exact pins.
    """
    folder = Path(folder).resolve()
    for place in (folder, *folder.parents):
        path = place / "model_requirements.txt"
        if path.is_file():
            read_pins(path)
            return path
    raise InvalidInputError(f"There is no model_requirements.txt in {folder} or in a folder above.")
