"""Bad input: the quickstart ends with an error that names the cause, and leaves no run behind."""

import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from execution import MODEL, copy_project, execute
from kernels import execute_in

pytestmark = pytest.mark.extended  # it takes long


def error_of(notebook: Path, kernel, store: str = "") -> str:
    """Execute the notebook, by default with a store beside it, and return the message that it ends with."""
    store = store or f"sqlite:///{notebook.parent}/mlflow.db"
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
    "version left open": (b"numpy>=0.1\npandas==0.1\n", "A line leaves the version open. Renew the list: make lock"),
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


@pytest.fixture
def silent_server():
    """Give the address of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(("server", "message"), [("dead", "Connection refused"), ("silent", "Read timed out")])
def test_server_that_does_not_answer_is_reported_in_time(tmp_path, kernel, server, message, silent_server):
    # given a port on which nothing listens, or a server that hangs
    address = "http://127.0.0.1:9" if server == "dead" else silent_server
    notebook = copy_project(tmp_path)
    # when
    start = time.monotonic()
    error = error_of(notebook, kernel, address)
    # then the error names the server; MLflow by itself would go on asking for minutes
    assert message in error
    assert address.removeprefix("http://127.0.0.1:") in error
    assert time.monotonic() - start < 60
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
