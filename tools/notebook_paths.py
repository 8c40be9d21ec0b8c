"""Find paths of a machine in notebooks, such as those of a home folder, in cells and in outputs.

Usage: python tools/notebook_paths.py NOTEBOOK [NOTEBOOK ...]

The exit status is 1 if a notebook has one.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PATH = re.compile(r"(?<![\w:/.])(?:/(?:home|root|tmp|usr|opt|work|var|private|Users)/|[A-Z]:\\)\S*")
PICTURES = ("image/png", "image/jpeg")  # in base64, which contains any short text by chance


def texts(value: object) -> Iterator[str]:
    """Give each text in a value that JSON can hold, except pictures."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in PICTURES:
                yield from texts(item)


def find_paths(notebook: Path) -> list[str]:
    """Return the paths of a machine in the cells and the outputs of a notebook, in order."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    found = []
    for text in texts(content["cells"]):
        found += PATH.findall(text)
    return found


def main(names: list[str]) -> None:
    """Print the paths in the notebooks with these names."""
    if not names:
        sys.exit(__doc__)
    has_paths = False
    for name in names:
        for path in find_paths(Path(name)):
            has_paths = True
            print(f"{name} contains a path of a machine: {path}")
    if has_paths:
        sys.exit("Use relative paths, and execute the notebook again: make notebooks")


if __name__ == "__main__":
    main(sys.argv[1:])
