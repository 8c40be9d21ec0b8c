"""Mend a SQLite store that was moved as a whole, with its models beside it in ``mlruns``.

MLflow writes the absolute path of each experiment, run, model and version into the store, and has no command that
changes them (mlflow#3144, mlflow#8226).
"""

import contextlib
import itertools
import sqlite3
from pathlib import Path

from mlflow_lifecycle.exceptions import StoreUnusableError
from mlflow_lifecycle.experiments import local_path, moved_from, split_location

COLUMNS = [
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
]


def moved_folders(path: Path) -> dict[str, str]:
    """Return the folders that the store at ``path`` was moved from, as it records them, each with the new one.

    Raises:
        StoreUnusableError: the models were not moved along with the store.
    """
    path = Path(path).resolve()
    old_folders = moved_from(path)
    if old_folders and not (path.parent / "mlruns").is_dir():
        remedy = f"Move {min(old_folders) / 'mlruns'} there, too."
        raise StoreUnusableError(f"There is no folder mlruns beside {path}.", remedy)
    folders = {}
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        for table, column in COLUMNS:
            for (location,) in database.execute(f'SELECT "{column}" FROM "{table}"'):
                root, _ = split_location(location or "")
                if root and local_path(root) in old_folders:
                    folders[root] = (
                        path.parent.as_uri() if root.startswith("file:") else path.parent.as_posix()
                    )
    return folders


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
        with (
            contextlib.closing(sqlite3.connect(path)) as reader,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            reader.backup(target)
        for (table, column), (old, new) in itertools.product(COLUMNS, folders.items()):
            change = f'UPDATE "{table}" SET "{column}" = ? || substr("{column}", ?)'
            start = f"{old}/mlruns/"
            where = f"""WHERE substr("{column}" || '/', 1, ?) = ?"""
            database.execute(f"{change} {where}", (new, len(old) + 1, len(start), start))
        database.execute("COMMIT")
    return copy
