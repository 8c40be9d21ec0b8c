"""lifecycle.moved: a store that was moved as a whole is mended, all or nothing, after a copy."""

import contextlib
import shutil
import sqlite3
import sys

import mlflow
import pytest
from execution import environment, finished, snapshot
from mlflow.pyfunc import PythonModel

from lifecycle.moved import changes, mend
from lifecycle.store import StoreUnusableError, check_store, open_experiment, tracking_uri


class Echo(PythonModel):
    """A model that needs nothing."""

    def predict(self, context, model_input: list[str]) -> list[str]:
        """Return what comes in."""
        return model_input


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """Give the path of a store that was moved, with two experiments, one of ours and one of MLflow's own making."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    here = tmp_path / "a folder of Zoë"
    here.mkdir()
    monkeypatch.chdir(here)
    open_experiment("ours", "What it is for.", here)
    for name in ("ours", "MLflow's own"):
        mlflow.set_experiment(name)
        with mlflow.start_run():
            mlflow.log_text("a text", "notes.txt")
            mlflow.pyfunc.log_model(name="echo", python_model=Echo(), pip_requirements=[], registered_model_name="echo")
    mlflow.set_tracking_uri(None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    yield here.rename(tmp_path / "there") / "mlflow.db"
    mlflow.set_tracking_uri(None)


@pytest.mark.filterwarnings("ignore")
def test_everything_is_found_again_once_it_is_mended(moved):
    with pytest.raises(StoreUnusableError, match="so it was moved"):
        check_store(moved.parent)
    # when
    mend(moved, changes(moved))
    # then
    assert changes(moved) == []
    check_store(moved.parent)
    mlflow.set_tracking_uri(tracking_uri(moved.parent))
    for version in (1, 2):
        assert mlflow.pyfunc.load_model(f"models:/echo/{version}").predict(["again"]) == ["again"]
    for run in mlflow.search_runs(search_all_experiments=True, output_format="list"):
        assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/notes.txt") == "a text"
    with contextlib.closing(sqlite3.connect(moved)) as database:
        assert "Zo" not in "".join(database.iterdump())


@pytest.mark.filterwarnings("ignore")
def test_copy_is_the_store_as_it_was(moved):
    before = moved.read_bytes()
    copy = mend(moved, changes(moved))
    assert copy.name == "mlflow.db.before-mend-1"
    with contextlib.closing(sqlite3.connect(copy)) as database:
        assert "Zo" in "".join(database.iterdump())
    assert moved.read_bytes() != before


@pytest.mark.filterwarnings("ignore")
def test_failure_half_way_changes_nothing(moved):
    # given a store that refuses the last of the changes
    with contextlib.closing(sqlite3.connect(moved)) as database:
        database.execute(
            "CREATE TRIGGER no BEFORE UPDATE ON model_versions BEGIN SELECT RAISE(ABORT, 'not this one'); END"
        )
        before = list(database.iterdump())
    # when
    with pytest.raises(sqlite3.IntegrityError, match="not this one"):
        mend(moved, changes(moved))
    # then
    with contextlib.closing(sqlite3.connect(moved)) as database:
        assert list(database.iterdump()) == before


@pytest.mark.filterwarnings("ignore")
def test_store_without_its_models_is_refused_with_the_remedy(moved):
    (moved.parent / "mlruns").rename(moved.parent / "elsewhere")
    with pytest.raises(StoreUnusableError, match=r"There is no folder mlruns beside .* Move .*/a folder of Zoë/mlruns"):
        changes(moved)


def mended(moved, tmp_path, answer: str, folder=None, **variables: str):
    """Run the command in ``folder``, by default the store's."""
    command = [sys.executable, "-m", "lifecycle", "check", "--mend", *([answer] if answer else [])]
    return finished(command, folder or moved.parent, environment(tmp_path, **variables), limit=60)


@pytest.mark.filterwarnings("ignore")
def test_command_shows_what_it_would_change_and_changes_nothing_unasked(moved, tmp_path):
    before = snapshot(moved.parent)
    process = mended(moved, tmp_path, "")
    assert f" in experiments.artifact_location: {(tmp_path / 'a folder of Zoë').as_posix()} -> " in process.stdout
    assert process.returncode == 1
    assert snapshot(moved.parent) == before


@pytest.mark.filterwarnings("ignore")
def test_command_mends_the_store_that_mlflow_tracking_uri_names_when_told_to(moved, tmp_path):
    process = mended(moved, tmp_path, "--yes", folder=tmp_path, MLFLOW_TRACKING_URI=tracking_uri(moved.parent))
    assert "Mended. The store as it was: " in process.stdout, process.stderr
    assert changes(moved) == []


@pytest.mark.filterwarnings("ignore")
def test_store_that_was_copied_keeps_the_first_ones_models(moved, tmp_path):
    # given the folder back in its first place, and a copy of it in another
    there = shutil.copytree(moved.parent, tmp_path / "copy")
    moved.parent.rename(tmp_path / "a folder of Zoë")
    # then nothing in the copy is changed
    assert changes(there / "mlflow.db") == []
