"""Move a SQLite store of the quickstart, with its models, to the team's server, which must be empty.

Usage: python move_store.py STORE ARTIFACTS

STORE is the folder with mlflow.db and mlruns; nothing in it is changed. ARTIFACTS is the folder that the server's
--artifacts-destination names. The database is the one that PostgreSQL's variables (PGHOST, PGUSER, PGPASSWORD) lead to:
unless PGDATABASE says otherwise, that is the one with the user's name.
Files are copied first, then all rows in one transaction: what fails leaves the server empty, and can be repeated.
"""

import re
import shutil
import sqlite3
import sys
from pathlib import Path

from mlflow.store.db.base_sql_model import Base
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion
from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlLoggedModel, SqlRun
from sqlalchemy import Connection, create_engine, delete, func, select, text
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
LOCAL = re.compile("file:|/|[A-Za-z]:")
BATCH = 1000


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


def new_locations(source: Connection) -> dict[str, str]:
    """Return the place of each run's and each model's files by its old one: where the server would have put them."""
    locations = {}
    for old, experiment, run in source.execute(select(SqlRun.artifact_uri, SqlRun.experiment_id, SqlRun.run_uuid)):
        locations[old] = f"{SERVED}/{experiment}/{run}/artifacts"
    columns = SqlLoggedModel.artifact_location, SqlLoggedModel.experiment_id, SqlLoggedModel.model_id
    for old, experiment, model in source.execute(select(*columns)):
        locations[old] = f"{SERVED}/{experiment}/models/{model}/artifacts"
    return locations


def copy_files(locations: dict[str, str], store: Path, artifacts: Path) -> None:
    """Copy the files of all runs and models to where the server will look for them.

    Raises:
        ValueError: the files of a model are not in the store.
    """
    for old, new in locations.items():
        files = store / "mlruns" / old.rpartition("/mlruns/")[2]
        if files.is_dir():
            shutil.copytree(files, artifacts / new.removeprefix(f"{SERVED}/"), dirs_exist_ok=True)
        elif "/models/" in new:  # a run need not have files
            raise ValueError(f"there are no files of the model in {files}")


def moved(table: str, row: dict, locations: dict[str, str]) -> dict:
    """Return ``row`` with the new places of files in place of the old ones.

    Raises:
        ValueError: a file's place is neither that of a run nor of a model.
    """
    if table == SqlExperiment.__tablename__:
        return row | {"artifact_location": f"{SERVED}/{row['experiment_id']}"}
    places = {
        SqlRun.__tablename__: ["artifact_uri"],
        SqlLoggedModel.__tablename__: ["artifact_location"],
        SqlModelVersion.__tablename__: ["source", "storage_location"],
    }
    for column in places.get(table, []):
        old = row[column] or ""
        prefix = next((place for place in locations if old == place or old.startswith(f"{place}/")), None)
        if prefix:
            row = row | {column: locations[prefix] + old.removeprefix(prefix)}
        elif LOCAL.match(old):
            raise ValueError(f"{old}, in {table}, belongs to no run and no model")
    return row


def move(store: Path, artifacts: Path) -> None:
    """Move all, and print how much of each there is.

    Raises:
        ValueError: with the reason for which nothing was moved.
    """
    if not (store / "mlflow.db").is_file() or not artifacts.is_dir():
        raise ValueError(f"there must be {store / 'mlflow.db'}, and the folder {artifacts}")
    address = f"{(store / 'mlflow.db').resolve().as_uri()}?mode=ro"
    origin = create_engine("sqlite://", creator=lambda: sqlite3.connect(address, uri=True), poolclass=NullPool)
    with origin.connect() as source, create_engine(DATABASE, poolclass=NullPool).begin() as target:
        check(source, target)
        locations = new_locations(source)
        copy_files(locations, store, artifacts)
        target.execute(delete(SqlExperiment))  # the one that every new database has
        for name in TABLES:
            table, count = Base.metadata.tables[name], 0
            for rows in source.execute(select(table)).mappings().partitions(BATCH):
                target.execute(table.insert(), [moved(name, dict(row), locations) for row in rows])
                count += len(rows)
            print(f"{name}: {count}")
        target.execute(
            text(
                "SELECT setval(pg_get_serial_sequence('experiments', 'experiment_id'), max(experiment_id) + 1, false)"
                " FROM experiments"
            )
        )


def main(arguments: list[str]) -> None:
    """Move the store that the arguments name, or end with the reason why not."""
    if len(arguments) != 2:
        sys.exit(__doc__)
    try:
        move(*map(Path, arguments))
    except ValueError as error:
        sys.exit(f"Nothing was moved: {error}.")


if __name__ == "__main__":
    main(sys.argv[1:])
