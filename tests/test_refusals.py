"""Bad input: the quickstart answers with a clear error, before anything is written."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from execution import MODEL, copy_project, execute, snapshot


def refused(process: subprocess.CompletedProcess, folder: Path, *fragments: str) -> bool:
    """Tell whether the execution stopped with a message that has all ``fragments``, and no run was made."""
    message = process.stderr.strip()
    assert process.returncode != 0
    for fragment in fragments:
        assert fragment in message[-2000:], message
    if (folder / "mlflow.db").exists():
        found = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return [experiment.name for experiment in found] == ["Default"]
    return not (folder / "mlruns").exists()


def test_missing_requirements_are_refused(tmp_path):
    notebook = copy_project(tmp_path)
    (tmp_path / "model_requirements.txt").unlink()
    assert refused(execute(notebook, tmp_path), tmp_path, "No model_requirements.txt", str(tmp_path), "git checkout")


def test_unreadable_requirements_are_refused(tmp_path):
    notebook = copy_project(tmp_path)
    (tmp_path / "model_requirements.txt").write_bytes(b"\xff\xfe\x00")
    assert refused(execute(notebook, tmp_path), tmp_path, "model_requirements.txt", "make lock")


@pytest.mark.parametrize("text", ["", "scikit-learn\n", "scikit-learn>=1.9\n"])
def test_requirements_without_versions_are_refused(tmp_path, text):
    notebook = copy_project(tmp_path)
    (tmp_path / "model_requirements.txt").write_text(text)
    assert refused(execute(notebook, tmp_path), tmp_path, "must pin every package", "make lock")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://user:secret@127.0.0.1:9"])
def test_unreachable_server_is_named_and_its_password_is_not(tmp_path, address):
    # given a port on which nothing listens
    notebook = copy_project(tmp_path)
    # when the notebook is executed; the limit tells seconds from minutes of retries, also on a slow machine
    process = execute(notebook, tmp_path, MLFLOW_TRACKING_URI=address, limit=60)
    # then the error names the server and the remedy
    assert refused(process, tmp_path, "http://127.0.0.1:9", "Start the server")
    assert "secret" not in process.stderr


def test_database_of_a_newer_mlflow_is_refused_and_unchanged(tmp_path):
    # given a store whose schema this MLflow does not know
    notebook = copy_project(tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.search_experiments()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'fedcba987654'")
    database.close()
    before = (tmp_path / "mlflow.db").read_bytes()
    # when, then
    process = execute(notebook, tmp_path)
    assert process.returncode != 0
    assert "Cannot use the MLflow store" in process.stderr
    assert "fedcba987654" in process.stderr
    assert (tmp_path / "mlflow.db").read_bytes() == before


def test_moved_store_is_refused_and_unchanged(tmp_path):
    # given a folder that was moved after an execution
    assert execute(copy_project(tmp_path / "here"), tmp_path).returncode == 0
    there = (tmp_path / "here").rename(tmp_path / "there")
    before = snapshot(there)
    # when the notebook is executed in its new place
    process = execute(there / "project.ipynb", tmp_path)
    # then the error says where the models were, and nothing was written in either place
    assert process.returncode != 0
    assert f"its models are in {(tmp_path / 'here').as_uri()}/mlruns, so it was moved" in process.stderr
    assert snapshot(there) == before
    assert not (tmp_path / "here").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="read-only mounts are made with Linux's unshare")
def test_read_only_folder_is_refused(tmp_path, lacking):
    # given a folder that nobody can write to, not even root
    unshare = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        lacking("the right to make a mount namespace", "sysctl kernel.unprivileged_userns_clone=1")
    project = tmp_path / "project"
    notebook = copy_project(project)
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    # when
    process = execute(notebook, tmp_path, prefix=(*unshare, "sh", "-c", mount, str(project)))
    # then
    assert refused(process, project, "Cannot use the MLflow store", "Read-only file system", "where you may write")


def test_failed_training_leaves_no_run(tmp_path):
    # given a configuration that scikit-learn refuses
    notebook = copy_project(tmp_path)
    text = notebook.read_text(encoding="utf-8")
    changed = text.replace(r"\"solver\": \"lbfgs\"", r"\"solver\": \"no such solver\"")
    assert changed != text
    notebook.write_text(changed, encoding="utf-8")
    # when
    process = execute(notebook, tmp_path)
    # then
    assert process.returncode != 0
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.search_runs([client.get_experiment_by_name(MODEL).experiment_id]) == []
