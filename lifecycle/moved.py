"""Mend a SQLite store that was moved as a whole, with its models beside it in ``mlruns``.

MLflow writes the absolute path of each experiment, run, model and version into the store, and has no command that
changes them (mlflow#3144, mlflow#8226).
"""

import contextlib
import itertools
import re
import sqlite3
from pathlib import Path
from urllib.parse import unquote

from lifecycle.store import StoreUnusableError

COLUMNS = [
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
]


def moved_folders(path: Path) -> dict[str, str]:
    """Return each folder in which the store at ``path`` looks for its models in vain, and the one that they are in now.

    A folder whose ``mlruns`` is there is none of them: a store that was copied goes on using the first one's models.

    Raises:
        StoreUnusableError: what the store holds is not there, so it was not moved as a whole.
    """
    path, found = Path(path).resolve(), {}
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        places = [row[0] for table, column in COLUMNS for row in database.execute(f'SELECT "{column}" FROM "{table}"')]
    for old in sorted({written_root(place or "") for place in places} - {""}):
        if not (Path(unquote(old.removeprefix("file://"))) / "mlruns").exists():
            found[old] = path.parent.as_uri() if old.startswith("file:") else path.parent.as_posix()
    if found and not (path.parent / "mlruns").is_dir():
        remedy = f"Move {unquote(min(found).removeprefix('file://'))}/mlruns there, too."
        raise StoreUnusableError(f"There is no folder mlruns beside {path}.", remedy)
    return found


def written_root(location: str) -> str:
    """Return what stands before the last folder ``mlruns`` in a path of this machine, as it is written, or nothing."""
    found = re.fullmatch(r"((?:file://)?/.*)/mlruns(?:/.*)?", location)
    return found[1] if found else ""


def mend(path: Path, folders: dict[str, str]) -> Path:
    """Have the store at ``path`` look in the new folders, all or none, after a copy of it; return the copy.

    Raises:
        sqlite3.OperationalError: the store is locked or read-only; nothing has changed.
    """
    path = Path(path).resolve()
    names = (path.with_name(f"{path.name}.before-mend-{number}") for number in range(1, 10**6))
    copy = next(name for name in names if not name.exists())
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        with contextlib.closing(sqlite3.connect(path)) as reader, contextlib.closing(sqlite3.connect(copy)) as target:
            reader.backup(target)
        for (table, column), (old, new) in itertools.product(COLUMNS, folders.items()):
            change = f'UPDATE "{table}" SET "{column}" = ? || substr("{column}", ?)'
            start = f"{old}/mlruns/"
            where = f"""WHERE substr("{column}" || '/', 1, ?) = ?"""
            database.execute(f"{change} {where}", (new, len(old) + 1, len(start), start))
        database.execute("COMMIT")
    return copy
