"""Repair a SQLite store that was moved together with the folder ``mlruns`` beside it.

MLflow writes the absolute path of each experiment, run, model and version into the store, and has
no command that changes them (mlflow#3144, mlflow#8226).
"""

import contextlib
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


def find_moved_folders(path: Path) -> dict[str, str]:
    """Return the folders that the store at ``path`` was moved from, each with the new one.

    Both are written as the store records them.

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
            for (location,) in database.execute(f"SELECT {column} FROM {table}"):
                root, _ = split_location(location or "")
                if not root or local_path(root) not in old_folders:
                    continue
                is_uri = root.startswith("file:")
                folders[root] = path.parent.as_uri() if is_uri else path.parent.as_posix()
    return folders


def change_folders(path: Path, folders: dict[str, str]) -> Path:
    """Copy the store at ``path``, change the folders in it, all or none, and return the copy.

    Raises:
        sqlite3.OperationalError: the store is locked or read-only. Nothing was changed.
    """
    path = Path(path).resolve()
    number = 1
    while path.with_name(f"{path.name}.before-fix-{number}").exists():
        number += 1
    copy = path.with_name(f"{path.name}.before-fix-{number}")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        with (
            contextlib.closing(sqlite3.connect(path)) as reader,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            reader.backup(target)
        for table, column in COLUMNS:
            for old, new in folders.items():
                start = f"{old}/mlruns/"
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE substr({column} || '/', 1, ?) = ?",
                    (new, len(old) + 1, len(start), start),
                )
        database.execute("COMMIT")
    return copy
