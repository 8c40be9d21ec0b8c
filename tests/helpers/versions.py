"""Model versions to test with: saved, registered and signed as a guide does it, in a store in a folder of their own."""

import contextlib
import functools
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pandas as pd
from execution import ROOT
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import infer_signature
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

from mlflow_lifecycle.experiments import make_sqlite_store, open_experiment
from mlflow_lifecycle.signing.keys import own_key
from mlflow_lifecycle.signing.statement import register_candidate

LOCK = ROOT / "requirements.txt"
NAME = "iris"


@functools.cache
def empty_store() -> bytes:
    """Return the SQLite file of a store that was just made; it is made once in a process, since that takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        make_sqlite_store(path)
        return path.read_bytes()


def iris_rows() -> pd.DataFrame:
    """Return Iris: 150 rows, four columns of measurements in centimetres, and the column ``species``."""
    iris = load_iris(as_frame=True)
    return iris.data.assign(species=iris.target_names[iris.target])


def save(folder: Path, model=None, rows: pd.DataFrame | None = None, target: str = "species", **options) -> Path:
    """Fit ``model`` on ``rows``, by default a linear one on Iris, save it in ``folder``, and return the folder."""
    rows = iris_rows() if rows is None else rows
    features, classes = rows.drop(columns=target), rows[target]
    model = (LogisticRegression(max_iter=1000) if model is None else model).fit(features, classes)
    settings = {"signature": infer_signature(features, classes), "input_example": features.head(3)}
    settings["pip_requirements"] = str(ROOT / "model_requirements.txt")
    mlflow.sklearn.save_model(model, folder, **settings | options)
    return folder


def register(folder: Path, model=None, rows: pd.DataFrame | None = None, name: str = NAME, **options) -> ModelVersion:
    """Register a candidate in the active store, signed with the key beside the store in ``folder``."""
    rows = iris_rows() if rows is None else rows
    with mlflow.start_run() as run:
        saved = save(Path(folder) / f"saved-{run.info.run_id}", model, rows, **options)
        return register_candidate(saved, name, key=own_key(), lock=LOCK, training_rows=rows)


@contextlib.contextmanager
def store_in(folder: Path, monkeypatch) -> Iterator[mlflow.MlflowClient]:
    """Make a SQLite store in ``folder`` the active one in the block, with one experiment; give its client."""
    database = Path(folder) / "mlflow.db"
    if not database.exists():
        database.write_bytes(empty_store())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database.as_posix()}")
    monkeypatch.setenv("LIFECYCLE_KEYS", str(Path(folder) / "keys"))
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    open_experiment("versions", "Versions to test with.", folder)
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(None)


def put_back(folder: Path, copy: Path) -> None:
    """Make the store in ``folder`` and the keys beside it what they were when ``copy`` was made of the folder."""
    for name in ("mlruns", "keys"):
        shutil.rmtree(folder / name)
        shutil.copytree(copy / name, folder / name)
    databases = [sqlite3.connect(place / "mlflow.db") for place in (copy, folder)]
    databases[0].backup(databases[1])  # MLflow keeps the file open
    for database in databases:
        database.close()


@contextlib.contextmanager
def restored(folder: Path) -> Iterator[None]:
    """Put the store in ``folder`` and the keys beside it back, at the end of the block, to what they were."""
    copy = Path(f"{folder} before")
    if not copy.exists():
        shutil.copytree(folder, copy)
    yield
    put_back(folder, copy)


def files_of(number: int) -> Path:
    """Return the folder of the model of a version of iris in the active store."""
    model_id = mlflow.MlflowClient().get_model_version(NAME, number).source.rpartition("/")[2]
    return Path(mlflow.get_logged_model(model_id).artifact_location.removeprefix("file://"))


def logged_table(run, name: str) -> pd.DataFrame:
    """Return the table ``name`` that ``mlflow.log_table`` put among the artifacts of ``run``."""
    content = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/{name}")
    return pd.DataFrame(content["data"], columns=content["columns"])
