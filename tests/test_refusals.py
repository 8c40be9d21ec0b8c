"""Bad input: the quickstart answers with a clear error, before anything is written."""

import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import mlflow
import nbformat
import pytest
from execution import MODEL, ROOT, copy_project, execute, snapshot


@pytest.fixture
def refusal(monkeypatch):
    """Give a function that runs the quickstart's code in this process, as far as it writes nothing.

    It takes the working directory and environment variables, and returns the error that the code ends with. That the
    error ends a real execution, too, is shown by the tests that use ``execute``.
    """

    def run(folder: Path, **variables: str) -> str:
        monkeypatch.chdir(folder)
        for name in ("MLFLOW_TRACKING_URI", "JPY_SESSION_NAME"):
            monkeypatch.delenv(name, raising=False)
        names, before = {}, snapshot(folder)
        with (
            patch.dict(os.environ, {"REBUILD_ENVIRONMENT": "off"} | variables),
            pytest.raises((ValueError, RuntimeError)) as error,
        ):
            for cell in nbformat.read(ROOT / "project.ipynb", as_version=4).cells:
                assert "create_experiment" not in cell.source, "the quickstart took it"
                if cell.cell_type == "code":
                    exec(cell.source, names)
        assert snapshot(folder) == before
        return str(error.value)

    yield run
    mlflow.set_tracking_uri(None)


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


def test_unreadable_requirements_are_refused(tmp_path, refusal):
    (tmp_path / "model_requirements.txt").write_bytes(b"\xff\xfe\x00")
    error = refusal(tmp_path)
    assert error.startswith(str(tmp_path / "model_requirements.txt"))
    assert "make lock" in error


MLFLOW = "mlflow-skinny==0.1\n"
LOOSE = {
    "empty": "",
    "no version": MLFLOW + "scikit-learn\n",
    "range": MLFLOW + "scikit-learn>=1.9\n",
    "wildcard": MLFLOW + "scikit-learn==1.*\n",
    "address": MLFLOW + "scikit-learn @ https://user:hunter2@example.org/x==1.whl\n",
    "option": MLFLOW + "--index-url https://user:hunter2@example.org/simple\n",
    "no mlflow": "joblib==1.6.0\n",
}


@pytest.mark.parametrize("text", LOOSE.values(), ids=LOOSE)
def test_requirements_that_leave_a_version_open_are_refused(tmp_path, text, refusal):
    (tmp_path / "model_requirements.txt").write_text(text)
    error = refusal(tmp_path)
    assert "no exact version in the line of" in error
    assert error.endswith("It must pin every package with ==. Renew it: make lock")
    assert "hunter2" not in error


def test_temporary_folder_with_a_space_is_refused_where_an_environment_is_to_be_built(tmp_path, monkeypatch, refusal):
    copy_project(tmp_path)
    (tmp_path / "a space").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    error = refusal(tmp_path, TMPDIR=str(tmp_path / "a space"), REBUILD_ENVIRONMENT="on")
    assert error.startswith("Set TMPDIR to a folder without a space")
    assert error.endswith("or REBUILD_ENVIRONMENT=off")


@pytest.mark.parametrize("name", ["50%20off", "why?"])
def test_folder_whose_name_mlflow_would_misread_is_refused(tmp_path, name, refusal):
    copy_project(tmp_path / name)
    error = refusal(tmp_path / name)
    assert "Cannot use the MLflow store" in error
    assert "rename the folder" in error
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_deleted_experiment_is_named_with_the_remedy(tmp_path, refusal):
    # given a store whose experiment was deleted
    copy_project(tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment(MODEL, (tmp_path / "mlruns").as_uri())
    client.delete_experiment(experiment)
    # when, then
    assert f"experiment {experiment} was deleted; restore it" in refusal(tmp_path)


@pytest.mark.parametrize("user", ["", "user:p@hunter2@"])
def test_unreachable_server_is_named_and_its_password_is_not(tmp_path, user, refusal):
    # given a port on which nothing listens
    copy_project(tmp_path)
    # when, then the error names the server and the remedy
    error = refusal(tmp_path, MLFLOW_TRACKING_URI=f"http://{user}127.0.0.1:9")
    assert error.startswith("Cannot use the MLflow store http://127.0.0.1:9: ")
    assert "Start the server" in error
    assert "hunter2" not in error


def test_unreachable_server_ends_an_execution_in_time_and_no_traceback_has_the_password(tmp_path):
    # given a port on which nothing listens
    notebook = copy_project(tmp_path)
    # when the notebook is executed; the limit tells seconds from minutes of retries, also on a slow machine
    process = execute(notebook, tmp_path, MLFLOW_TRACKING_URI="http://user:p/hunter2@127.0.0.1:9", limit=60)
    # then
    assert refused(process, tmp_path, "http://127.0.0.1:9", "Start the server")
    assert "hunter2" not in process.stderr


def test_database_of_a_newer_mlflow_is_refused_and_unchanged(tmp_path, refusal):
    # given a store whose schema this MLflow does not know, made under another address, or MLflow would not look again
    copy_project(tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/./mlflow.db")
    client.search_experiments()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'fedcba987654'")
    database.close()
    # when, then it is refused, and nothing written
    error = refusal(tmp_path)
    assert "Cannot use the MLflow store" in error
    assert "fedcba987654" in error


def test_moved_store_is_refused_and_unchanged(tmp_path, refusal):
    # given a folder that was moved after something was logged there
    copy_project(tmp_path / "here")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/here/mlflow.db")
    client.create_experiment(MODEL, (tmp_path / "here/mlruns").as_uri())
    there = (tmp_path / "here").rename(tmp_path / "there")
    # when, then the error says where the models were, and nothing was written in either place
    assert f"its models are in {(tmp_path / 'here').as_uri()}/mlruns, so it was moved" in refusal(there)
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
