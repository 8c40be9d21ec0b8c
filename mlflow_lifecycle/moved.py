"""Repair a SQLite store that was moved together with the folder ``mlruns`` beside it.

MLflow writes the absolute path of each experiment, run, model and version into the store, and has
no command that changes them (mlflow#3144, mlflow#8226).
"""

import contextlib
import sqlite3
from pathlib import Path

from mlflow_lifecycle.exceptions import StoreUnusableError
from mlflow_lifecycle.experiments import free_name, local_path, moved_from, split_location

COLUMNS = [
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
]


def find_moved_folders(path: Path) -> set[Path]:
    """Return the folders that the store at ``path`` was moved from.

    Raises:
        StoreUnusableError: the models were not moved along with the store.
    """
    path = Path(path).resolve()
    folders = moved_from(path)
    if folders and not (path.parent / "mlruns").is_dir():
        remedy = f"Move {min(folders) / 'mlruns'} there, too."
        raise StoreUnusableError(f"There is no folder mlruns beside {path}.", remedy)
    return folders


def change_folders(path: Path) -> Path:
    """Copy the store at ``path``, change the folders in it, all or none, and return the copy.

    Raises:
        StoreUnusableError: see `find_moved_folders`.
        sqlite3.OperationalError: the store is locked or read-only. Nothing was changed.
    """
    path = Path(path).resolve()
    folders = find_moved_folders(path)
    copy = free_name(path, "before-fix")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        with contextlib.closing(sqlite3.connect(path)) as reader:
            reader.execute("VACUUM INTO ?", (str(copy),))
        for table, column in COLUMNS:
            rows = database.execute(f"SELECT rowid, {column} FROM {table}").fetchall()
            for number, location in rows:
                root, rest = split_location(location or "")
                if local_path(root) in folders:
                    is_uri = root.startswith("file:")
                    place = path.parent.as_uri() if is_uri else path.parent.as_posix()
                    update = f"UPDATE {table} SET {column} = ? WHERE rowid = ?"
                    database.execute(update, (f"{place}/{rest}", number))
        database.execute("COMMIT")
    return copy
