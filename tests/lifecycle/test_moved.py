"""moved: a store that was moved as a whole is repaired, all or nothing, after a copy."""

import contextlib
import shutil
import sqlite3
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner
from execution import snapshot
from mlflow.pyfunc import PythonModel

from mlflow_lifecycle.cli import main
from mlflow_lifecycle.doctor import check_store_of
from mlflow_lifecycle.exceptions import StoreUnusableError
from mlflow_lifecycle.experiments import check_store, open_experiment, tracking_uri
from mlflow_lifecycle.moved import change_folders, find_moved_folders
from mlflow_lifecycle.ui import find_links

pytestmark = pytest.mark.filterwarnings("ignore")


class Echo(PythonModel):
    """A model that needs nothing."""

    def predict(self, context, model_input: list[str]) -> list[str]:
        """Return what comes in."""
        return model_input


def log_everything() -> None:
    """Log a run with a text and a model, and register the model, in the active experiment."""
    with mlflow.start_run():
        mlflow.log_text("a text", "notes.txt")
        mlflow.pyfunc.log_model(name="echo", python_model=Echo(), pip_requirements=[], registered_model_name="echo")


@pytest.fixture(scope="module")
def first_place(tmp_path_factory):
    """Give the folder that a store was moved away from; the store is now in the folder ``there`` beside it.

    It has two experiments, one of ours and one of MLflow's own making. A folder further up has a name that begins as
    that of the models' folder does.
    """
    here = tmp_path_factory.mktemp("mlruns-before") / "a folder of Zoë"
    here.mkdir()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(here):
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        open_experiment("ours", "What it is for.", here)
        for name in ("ours", "MLflow's own"):
            mlflow.set_experiment(name)
            log_everything()
        mlflow.set_tracking_uri(None)
    here.rename(here.parent / "there")
    return here


@pytest.fixture
def moved(first_place, tmp_path, monkeypatch):
    """Give the path of a store that was moved, of this test's own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    yield shutil.copytree(first_place.parent / "there", tmp_path / "mlruns-now" / "there") / "mlflow.db"
    mlflow.set_tracking_uri(None)


def test_everything_is_found_again_once_it_is_repaired_and_a_copy_is_kept(moved):
    # when
    copy = change_folders(moved)
    # then
    assert find_moved_folders(moved) == set()
    check_store(tracking_uri(moved.parent))
    mlflow.set_tracking_uri(tracking_uri(moved.parent))
    for version in (1, 2):
        assert mlflow.pyfunc.load_model(f"models:/echo/{version}").predict(["again"]) == ["again"]
    for run in mlflow.search_runs(search_all_experiments=True, output_format="list"):
        assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/notes.txt") == "a text"
    with contextlib.closing(sqlite3.connect(moved)) as database:
        assert "Zo" not in "".join(database.iterdump())
    # and the copy is the store as it was
    assert copy.name == "mlflow.db.before-fix-1"
    with contextlib.closing(sqlite3.connect(copy)) as database:
        assert "Zo" in "".join(database.iterdump())


def test_failure_half_way_changes_nothing(moved):
    # given a store that refuses the last of the changes
    with contextlib.closing(sqlite3.connect(moved)) as database:
        database.execute(
            "CREATE TRIGGER no BEFORE UPDATE ON model_versions BEGIN SELECT RAISE(ABORT, 'not this one'); END"
        )
        before = list(database.iterdump())
    # when
    with pytest.raises(sqlite3.IntegrityError, match="not this one"):
        change_folders(moved)
    # then
    with contextlib.closing(sqlite3.connect(moved)) as database:
        assert list(database.iterdump()) == before


def test_store_that_was_copied_keeps_the_first_ones_models(moved, first_place):
    # given the first store in its place, beside the copy
    shutil.copytree(moved.parent, first_place)
    # then nothing in the copy is changed
    found = find_moved_folders(moved)
    shutil.rmtree(first_place)
    assert found == set()


@pytest.fixture
def elsewhere(tmp_path, empty_store, monkeypatch):
    """Give the path of a store with a model that MLflow keeps in the working directory, which is another folder."""
    store = Path(shutil.copy(empty_store, tmp_path / "store.db"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    mlflow.set_experiment("an experiment")
    log_everything()
    return store


def test_store_elsewhere_than_its_models_was_moved_only_if_the_models_were(elsewhere):
    assert find_moved_folders(elsewhere) == set()
    assert list(check_store_of(Path.cwd())) == []
    assert find_links("http://server")[-1].startswith("http://server/#/models/echo?")
    # given models that were moved
    Path("mlruns").rename("other")
    (problem,) = check_store_of(Path.cwd())
    assert "so it was moved" in problem.what
    with pytest.raises(StoreUnusableError, match=r"Move .*/work/mlruns there, too"):
        find_moved_folders(elsewhere)
    # when they are put beside the store, and it is repaired
    Path("other").rename(elsewhere.parent / "mlruns")
    change_folders(elsewhere)
    # then
    assert list(check_store_of(Path.cwd())) == []
    assert mlflow.pyfunc.load_model("models:/echo/1").predict(["again"]) == ["again"]


def fix(folder, answer="y\n", **variables):
    """Run the command in ``folder``, with ``answer`` to its question, in this process."""
    with contextlib.chdir(folder):
        return CliRunner().invoke(main, ["doctor", "--fix"], input=answer, env=variables)


def test_command_shows_what_it_would_change_and_changes_nothing_unasked(moved, first_place):
    before = snapshot(moved.parent)
    answer = fix(moved.parent, "n\n")
    assert f"{first_place.as_posix()} -> " in answer.output
    assert answer.exit_code == 1
    assert snapshot(moved.parent) == before


def test_command_repairs_the_store_that_mlflow_tracking_uri_names_and_says_when_there_is_nothing_left(moved, tmp_path):
    answer = fix(tmp_path, MLFLOW_TRACKING_URI=tracking_uri(moved.parent))
    assert "Repaired. A copy of the store as it was: " in answer.output
    assert find_moved_folders(moved) == set()
    answer = fix(moved.parent)
    assert (answer.exit_code, answer.output[:28]) == (0, "There is nothing to repair: ")
