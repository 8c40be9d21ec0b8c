"""Mend a SQLite store that was moved as a whole, with its models beside it in ``mlruns``.

MLflow writes the absolute path of each experiment, run, model and version into the store, and has no command that
changes them (mlflow#3144, mlflow#8226).
"""

import contextlib
import re
import sqlite3
from collections import Counter
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Change:
    """Paths in one column of the store that begin with ``old`` and have to begin with ``new``."""

    table: str
    column: str
    old: str
    new: str
    rows: int

    def __str__(self) -> str:
        """Return the change in a line."""
        return f"{self.rows} in {self.table}.{self.column}: {self.old} -> {self.new}"


def changes(path: Path) -> list[Change]:
    """Return what has to change in the store at ``path``, so that its models are found in ``mlruns`` beside it.

    A path that leads to a folder which is there stays: a store that was copied goes on using the first one's models.

    Raises:
        StoreUnusableError: what the store holds is not there, so it was not moved as a whole.
    """
    path = Path(path).resolve()
    found = []
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        for table, column in COLUMNS:
            values = (row[0] or "" for row in database.execute(f'SELECT "{column}" FROM "{table}"'))
            roots = Counter(written_root(value) for value in values)
            for old, rows in sorted(roots.items()):
                new = path.parent.as_uri() if old.startswith("file:") else path.parent.as_posix()
                if old and not (Path(unquote(old.removeprefix("file://"))) / "mlruns").exists():
                    found.append(Change(table, column, old, new, rows))
    if found and not (path.parent / "mlruns").is_dir():
        remedy = f"Move {unquote(found[0].old.removeprefix('file://'))}/mlruns there, too."
        raise StoreUnusableError(f"There is no folder mlruns beside {path}.", remedy)
    return found


def written_root(location: str) -> str:
    """Return what stands before the last folder ``mlruns`` in a path of this machine, as it is written, or nothing."""
    found = re.fullmatch(r"((?:file://)?/.*)/mlruns(?:/.*)?", location)
    return found[1] if found else ""


def mend(path: Path, wanted: list[Change]) -> Path:
    """Make the changes in the store at ``path``, all or none, after a copy of it; return the copy.

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
        for change in wanted:
            value = f'? || substr("{change.column}", ?)'
            where = f"""substr("{change.column}" || '/', 1, ?) = ?"""
            start = f"{change.old}/mlruns/"
            database.execute(
                f'UPDATE "{change.table}" SET "{change.column}" = {value} WHERE {where}',
                (change.new, len(change.old) + 1, len(start), start),
            )
        database.execute("COMMIT")
    return copy
