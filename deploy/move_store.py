"""Move a SQLite store of the quickstart, with its models, to the team's server, which must be empty.

Usage: python move_store.py STORE ARTIFACTS

STORE is the folder with mlflow.db and mlruns; nothing in it is changed. ARTIFACTS is the folder that the server's
--artifacts-destination names. The database is the one that PostgreSQL's variables (PGHOST, PGUSER, PGPASSWORD) lead to:
unless PGDATABASE says otherwise, that is the one with the user's name.
All ids stay, except the number of an experiment that is too large for PostgreSQL, as MLflow's file store makes them.
Files are copied first, then all rows in one transaction: what fails leaves the server empty, and can be repeated.

The store may come from somebody else, so nothing in it is believed: it may hold no links, an id must look like one, and
every place that a row names must be that of a run or a model in this store. Until all is read, a lock keeps others from
writing to the database; a store that changes meanwhile is not moved.
"""

import re
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow.store.db.base_sql_model import Base
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion
from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlLoggedModel, SqlRun
from sqlalchemy import Connection, create_engine, delete, func, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

DATABASE = "postgresql+psycopg2://"
# In an order in which each row finds those that it refers to.
TABLES = [
    "experiments",
    "experiment_tags",
    "datasets",
    "runs",
    "params",
    "tags",
    "metrics",
    "latest_metrics",
    "inputs",
    "input_tags",
    "logged_models",
    "logged_model_params",
    "logged_model_tags",
    "logged_model_metrics",
    "registered_models",
    "registered_model_tags",
    "model_versions",
    "model_version_tags",
    "registered_model_aliases",
]
AS_MADE = {"workspaces": 1}  # rows that every new database has, and that stay
SERVED = "mlflow-artifacts:"
RUN, MODEL = re.compile("[0-9a-f]{32}"), re.compile("m-[0-9a-f]{32}")
IN_USE = "the store is in use; stop what logs to it, and try again"
LARGEST = 2**31 - 1  # what PostgreSQL has room for in an experiment's number
BATCH = 1000
PAUSE = 1  # seconds in which those who waited for the lock go on, and are noticed


def rows_of(connection: Connection) -> dict[str, int]:
    """Return how many rows each table of MLflow has, where there are any."""
    counts = {
        name: connection.scalar(select(func.count()).select_from(table)) for name, table in Base.metadata.tables.items()
    }
    return {name: count for name, count in counts.items() if count}


def check(source: Connection, target: Connection) -> None:
    """Refuse what cannot be moved as a whole.

    Raises:
        ValueError: with the reason, and what to do.
    """
    schemas = [connection.scalar(text("SELECT version_num FROM alembic_version")) for connection in (source, target)]
    if schemas[0] != schemas[1]:
        raise ValueError(f"the store has schema {schemas[0]}, the server {schemas[1]}: mlflow db upgrade the older one")
    others = [name for name, count in rows_of(source).items() if name not in TABLES and count != AS_MADE.get(name)]
    if others:
        raise ValueError(f"the store has rows that this script does not know how to move, in {', '.join(others)}")
    made = {name: count for name, count in rows_of(target).items() if name not in AS_MADE}
    if made != {"experiments": 1} or target.scalar(select(SqlExperiment.experiment_id)) != 0:
        raise ValueError(f"the server is not empty, it has rows in {', '.join(made)}; move to a new one")


def has_no_way_out(path: str) -> bool:
    """Return whether each part of ``path`` names a file or a folder below, however often it is decoded."""
    return not {"", ".", ".."}.intersection(re.split(r"[/\\]", path)) and not re.search(r"%|\?|#", path)


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of each file below ``folder``.

    Raises:
        ValueError: there is something else, such as a link, which could lead out of the folder.
    """
    found = {}
    for path in [folder, *folder.rglob("*")]:
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise ValueError(f"{path} is a link or no file; copy what it leads to in its place")
        if path.is_file():
            found[str(path.relative_to(folder))] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


def new_numbers(source: Connection) -> dict[int, int]:
    """Return a new number for each experiment whose number is too large for PostgreSQL, by the old one.

    Raises:
        ValueError: a number is not one that MLflow makes.
    """
    numbers = source.scalars(select(SqlExperiment.experiment_id).order_by(SqlExperiment.experiment_id)).all()
    for number in numbers:
        if not isinstance(number, int):
            raise ValueError(f"the experiment {number!r} has no number that MLflow makes")
    large = [number for number in numbers if number > LARGEST]
    first = max(set(numbers).difference(large), default=0) + 1
    return dict(zip(large, range(first, first + len(large)), strict=True))


def new_locations(source: Connection, numbers: dict[int, int]) -> dict[str, str]:
    """Return the place of each run's and each model's files, where the server would have put them, by its old one.

    Their addresses by id, `runs:/...` and `models:/...`, stay as they are.

    Raises:
        ValueError: an id or a place is not one that MLflow makes.
    """
    columns = SqlLoggedModel.artifact_location, SqlLoggedModel.experiment_id, SqlLoggedModel.model_id
    rows = [
        *(
            (*row, RUN, "")
            for row in source.execute(select(SqlRun.artifact_uri, SqlRun.experiment_id, SqlRun.run_uuid))
        ),
        *((*row, MODEL, "models/") for row in source.execute(select(*columns))),
    ]
    locations = {}
    for old, experiment, number, pattern, folder in rows:
        if not isinstance(experiment, int) or not pattern.fullmatch(str(number)):
            raise ValueError(f"{number!r} in experiment {experiment!r} is no id that MLflow makes")
        rest = str(old).rpartition("/mlruns/")[2]
        if rest == old or not f"/{rest}".endswith(f"/{folder}{number}/artifacts") or not has_no_way_out(rest):
            raise ValueError(f"the files of {number} are said to be in {old!r}, which is not its place below mlruns")
        locations[old] = f"{SERVED}/{numbers.get(experiment, experiment)}/{folder}{number}/artifacts"
        uri = f"{'models' if folder else 'runs'}:/{number}"
        locations[uri] = uri  # names the files wherever they are
    return locations


def copy_files(locations: dict[str, str], store: Path, artifacts: Path) -> None:
    """Copy the files of all runs and models to where the server will look for them.

    Raises:
        ValueError: the files of a model are not in the store.
    """
    for old, new in locations.items():
        if not new.startswith(SERVED):
            continue
        files = store / "mlruns" / old.rpartition("/mlruns/")[2]
        if files.is_dir():
            target = artifacts / new.removeprefix(f"{SERVED}/")
            shutil.copytree(files, target, symlinks=True, dirs_exist_ok=True)  # a link that comes now is not followed
        elif "/models/" in new:  # a run need not have files
            raise ValueError(f"there are no files of the model in {files}")


def new_place(old: str, locations: dict[str, str]) -> str | None:
    """Return the new place of ``old``, or None where that is of no run and no model."""
    for known, new in locations.items():
        rest = old.removeprefix(known)
        if old == known or (rest != old and rest[0] == "/" and has_no_way_out(rest[1:])):
            return new + rest
    return None


def moved(table: str, row: dict, locations: dict[str, str], numbers: dict[int, int]) -> dict:
    """Return ``row`` with the new places of files and the new numbers of experiments in place of the old ones.

    Raises:
        ValueError: a file's place is neither that of a run nor of a model.
    """
    if "experiment_id" in row:
        row = row | {"experiment_id": numbers.get(row["experiment_id"], row["experiment_id"])}
    if table == SqlExperiment.__tablename__:
        return row | {"artifact_location": f"{SERVED}/{row['experiment_id']}"}
    places = {
        SqlRun.__tablename__: ["artifact_uri"],
        SqlLoggedModel.__tablename__: ["artifact_location"],
        SqlModelVersion.__tablename__: ["source", "storage_location"],
    }
    for column in places.get(table, []):
        old = row[column]
        if old:
            new = new_place(str(old), locations)
            if new is None:
                raise ValueError(f"{old}, in {table}, belongs to no run and no model")
            row = row | {column: new}
    return row


@contextmanager
def locked(store: Path) -> Iterator[Connection]:
    """Give a connection to the store that reads one state, while nobody else can write to it.

    Raises:
        ValueError: at the end, others have written to the store, or would have.
    """
    address = f"{(store / 'mlflow.db').resolve().as_uri()}?mode=ro"
    engine = create_engine(
        "sqlite://", creator=lambda: sqlite3.connect(address, uri=True, isolation_level=None), poolclass=NullPool
    )
    before = files_in(store / "mlruns")
    with engine.connect() as source:
        version = source.exec_driver_sql("PRAGMA data_version").scalar()
        source.exec_driver_sql("BEGIN")
        source.exec_driver_sql("SELECT count(*) FROM sqlite_master")  # from here on, the lock holds
        yield source
        source.exec_driver_sql("COMMIT")
        time.sleep(PAUSE)
        changed = source.exec_driver_sql("PRAGMA data_version").scalar() != version
    if changed or files_in(store / "mlruns") != before:
        raise ValueError(IN_USE)


def move(store: Path, artifacts: Path) -> None:
    """Move all, and print how much of each there is.

    Raises:
        ValueError: with the reason for which nothing was moved.
    """
    if not (store / "mlflow.db").is_file() or (store / "mlflow.db").is_symlink():
        raise ValueError(f"there must be a file {store / 'mlflow.db'}, and no link")
    if not (store / "mlruns").is_dir() or not artifacts.is_dir():
        raise ValueError(f"there must be the folders {store / 'mlruns'} and {artifacts}")
    with create_engine(DATABASE, poolclass=NullPool).begin() as target, locked(store) as source:
        check(source, target)
        numbers = new_numbers(source)
        locations = new_locations(source, numbers)
        copy_files(locations, store, artifacts)
        target.execute(delete(SqlExperiment))  # the one that every new database has
        for name in TABLES:
            table, count = Base.metadata.tables[name], 0
            for rows in source.execute(select(table)).mappings().partitions(BATCH):
                target.execute(table.insert(), [moved(name, dict(row), locations, numbers) for row in rows])
                count += len(rows)
            print(f"{name}: {count}")
        target.execute(
            text(
                "SELECT setval(pg_get_serial_sequence('experiments', 'experiment_id'), max(experiment_id) + 1, false)"
                " FROM experiments"
            )
        )


def reason(error: Exception) -> str:
    """Return one line on what was in the way."""
    line = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
    return IN_USE if "database is locked" in line else line


def main(arguments: list[str]) -> None:
    """Move the store that the arguments name, or end with the reason why not."""
    if len(arguments) != 2:
        sys.exit(__doc__)
    try:
        move(*map(Path, arguments))
    except (ValueError, OSError, SQLAlchemyError) as error:
        sys.exit(f"Nothing was moved: {reason(error)}.")


if __name__ == "__main__":
    main(sys.argv[1:])
