"""Stores with released versions, and one with a version that learned from half of Iris, which several tests share."""

import base64
import contextlib
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from asking import NAMES, as_verified
from postgresql import postgresql, programs
from releases import make_store
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from versions import NAME, iris_rows, put_back, register, save, store_in

from mlflow_lifecycle.monitoring.judge import load_reference
from mlflow_lifecycle.serving import serve_verified
from mlflow_lifecycle.signing.keys import own_public_key
from mlflow_lifecycle.signing.verify import verified

DOT = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABAQAAAAA3bvkkAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


@contextlib.contextmanager
def without_pictures():
    """Let MLflow log a single dot in place of the four pictures that it draws of each evaluation, most of its time.

    One test in `test_gate.py`, in a kernel of its own, evaluates with them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "savefig", lambda path, **_: Path(path).write_bytes(DOT))
        yield


@pytest.fixture(scope="module")
def no_pictures():
    """Let a module's tests evaluate without pictures."""
    with without_pictures():
        yield


@pytest.fixture(scope="session")
def releases(tmp_path_factory):
    """Give a folder with a store of released versions, and its copies after the first and after the second release."""
    folder = tmp_path_factory.mktemp("releases") / "project"
    with without_pictures():
        return folder, make_store(folder)


@pytest.fixture
def folder(releases, no_pictures, monkeypatch):
    """Give the folder with the store, in which version 1 is in production."""
    folder, (once, _) = releases
    put_back(folder, once)
    with store_in(folder, monkeypatch):
        yield folder


@pytest.fixture
def twice(releases, no_pictures, monkeypatch):
    """Give the folder with the store, in which version 2 is in production, and version 1 was."""
    folder, (_, twice) = releases
    put_back(folder, twice)
    with store_in(folder, monkeypatch):
        yield folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Give the folder of a store with one signed version, of a model that learned from every second flower."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch, store_in(folder, patch):
        register(folder, rows=iris_rows()[::2].reset_index(drop=True), input_example=None)
        yield folder


@pytest.fixture(scope="module")
def version(store):
    """Give that version, verified."""
    with verified(f"models:/{NAME}/1", own_public_key()) as version:
        yield version


@pytest.fixture(scope="module")
def known(version):
    """Give what a batch is compared with."""
    return load_reference(version)


@pytest.fixture(scope="module")
def storage(lacking):
    """Give the address of a real PostgreSQL that wants a password."""
    if programs() is None:
        lacking("PostgreSQL", "make postgresql")
    with postgresql("hidden") as server:
        yield server.address


@pytest.fixture
def usual():
    """Give the flowers that it did not learn from."""
    return iris_rows()[1::2].reset_index(drop=True)


@pytest.fixture(scope="module")
def iris(tmp_path_factory):
    """Give the folder of a linear model of Iris."""
    return save(tmp_path_factory.mktemp("iris") / "model", make_pipeline(StandardScaler(), LogisticRegression()))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Give the folder of the server's record."""
    return tmp_path_factory.mktemp("record")


@pytest.fixture(scope="module")
def server(iris, record):
    """Serve that model, with limits and a record."""
    limits = dict.fromkeys(NAMES, (0.0, 100.0))
    options = {"record": record, "leave_out": ["sepal width (cm)"] * 2, "patience_seconds": 60}
    with serve_verified(as_verified(iris), python=Path(sys.executable), limits=limits, **options) as server:
        yield server


@pytest.fixture(scope="module")
def hasty(iris):
    """Serve that model so that a client must be quick."""
    with serve_verified(as_verified(iris), python=Path(sys.executable), patience_seconds=1) as server:
        yield server
