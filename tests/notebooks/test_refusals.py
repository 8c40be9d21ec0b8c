"""Bad input: the quickstart ends with an error that names the cause, and leaves no run behind."""

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from execution import MODEL, copy_project, edit_cells, execute
from kernels import execute_in

pytestmark = pytest.mark.extended  # it takes long


def error_of(notebook: Path, kernel) -> str:
    """Execute the notebook with a store beside it, and return the message that it ends with."""
    store = f"sqlite:///{notebook.parent}/mlflow.db"
    error = execute_in(kernel, notebook, notebook.parent, MLFLOW_TRACKING_URI=store)
    assert error
    return error


def runs(folder: Path) -> list:
    """Return the runs in the store in ``folder``, if there is one."""
    if not (folder / "mlflow.db").exists():
        assert not (folder / "mlruns").exists()
        return []
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


PINS = {
    "missing": (None, "No such file or directory: 'model_requirements.txt'"),
    "byte order mark": (b"\xef\xbb\xbfnumpy==0.1\n", "can't decode byte 0xef in position 0"),
    "not a text": (b"\xff\xfe\x00", "can't decode byte 0xff in position 0"),
    "not a requirement": (b"numpy = 0.1\n", "numpy = 0.1"),
    "version left open": (b"numpy>=0.1\npandas==0.1\n", "Pin every version exactly. Run: make lock"),
}


@pytest.mark.parametrize(("content", "message"), PINS.values(), ids=PINS)
def test_pins_that_fix_nothing_are_refused(tmp_path, kernel, content, message):
    # given a list of pins that is missing, damaged, or loose
    notebook = copy_project(tmp_path)
    (tmp_path / "model_requirements.txt").unlink()
    if content is not None:
        (tmp_path / "model_requirements.txt").write_bytes(content)
    # when, then
    assert message in error_of(notebook, kernel)
    assert runs(tmp_path) == []


def test_database_of_a_newer_mlflow_is_refused(tmp_path, kernel, empty_store):
    # given a store whose schema this MLflow does not know
    notebook = copy_project(tmp_path)
    shutil.copy(empty_store, tmp_path)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        (known,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
        database.execute("UPDATE alembic_version SET version_num = 'fedcba987654'")
    # when, then
    error = error_of(notebook, kernel)
    assert "out-of-date database schema (found version fedcba987654" in error
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (known,))
    database.close()
    assert runs(tmp_path) == []


def test_deleted_experiment_is_named(tmp_path, kernel, empty_store):
    # given a store whose experiment was deleted
    notebook = copy_project(tmp_path)
    shutil.copy(empty_store, tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.delete_experiment(client.create_experiment(MODEL, (tmp_path / "mlruns").as_uri()))
    # when, then
    error = error_of(notebook, kernel)
    assert f"Cannot set a deleted experiment '{MODEL}'" in error
    assert "You can restore the experiment" in error
    assert runs(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="read-only mounts are made with Linux's unshare")
def test_store_in_a_read_only_folder_is_refused(tmp_path, lacking, empty_store):
    # given a store in a folder that nobody can write to, not even root
    unshare = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        lacking("the right to make a mount namespace", "sysctl kernel.unprivileged_userns_clone=1")
    project = tmp_path / "project"
    notebook = copy_project(project)
    shutil.copy(empty_store, project)
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    # when
    process = execute(notebook, tmp_path, prefix=(*unshare, "sh", "-c", mount, str(project)))
    # then
    assert process.returncode != 0
    assert "attempt to write a readonly database" in process.stderr.strip()[-600:]
    assert runs(project) == []


def test_training_that_fails_leaves_no_run(tmp_path, kernel):
    # given a configuration that scikit-learn refuses, the second of the two
    notebook = copy_project(tmp_path)
    text = notebook.read_text(encoding="utf-8")
    changed = text.replace(r"\"solver\": \"newton-cg\"", r"\"solver\": \"no such solver\"")
    assert changed != text
    notebook.write_text(changed, encoding="utf-8")
    # when, then
    assert "no such solver" in error_of(notebook, kernel)
    assert runs(tmp_path) == []


TARGETS = {
    "missing values": (
        "data.loc[data.index[:3], target_name] = None",
        "'species' has missing values. Remove these rows.",
    ),
    "one class": (
        'data[target_name] = "setosa"',
        "A classifier needs two classes, and five rows of each, got {'setosa': 150}",
    ),
    "few rows of a class": (
        'data.loc[data.index[:4], target_name] = "rare"',
        "'setosa': 46, 'rare': 4}",
    ),
}


@pytest.mark.parametrize(("change", "message"), TARGETS.values(), ids=TARGETS)
def test_target_that_cannot_be_learned_is_refused(tmp_path, kernel, change, message):
    # given a target with missing values, with one class, or with a class that has too few rows
    notebook = copy_project(tmp_path)
    data = """
from sklearn.datasets import load_iris

data = load_iris(as_frame=True).frame
data[target_name] = load_iris().target_names[data.pop("target")]
"""
    edit_cells(notebook, data=data + change)
    # when, then
    assert message in error_of(notebook, kernel).splitlines()[-1]
    assert runs(tmp_path) == []


def test_types_that_are_not_trusted_are_listed_as_a_line_to_paste(tmp_path, kernel):
    # given two kinds of model, each with a type of its own that skops does not know
    notebook = copy_project(tmp_path)
    model = """
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.tree import DecisionTreeClassifier


def make_model(kind):
    return kind(random_state=0)


configurations = {"tree": {"kind": DecisionTreeClassifier}, "boosted": {"kind": HistGradientBoostingClassifier}}
trusted_types = []
"""
    edit_cells(notebook, model=model)
    # when
    error = error_of(notebook, kernel).splitlines()[-1]
    # then pasting the list is all it takes
    line = error.partition("write: ")[2]
    assert "sklearn.tree._tree.Tree" in line
    assert "TreePredictor" in line
    assert runs(tmp_path) == []
    edit_cells(notebook, model=model + line)
    assert execute_in(kernel, notebook, tmp_path) == ""
