"""Where and how the quickstart can be executed, and what it leaves untouched."""

import shutil
import subprocess
import sys

import mlflow
import pytest
from execution import (
    MODEL,
    NOT_REBUILT,
    ROOT,
    commit_all,
    copy_project,
    differing_outputs,
    execute,
    git,
    papermill,
    snapshot,
    tracking_server,
)

pytestmark = pytest.mark.extended  # it takes long


def test_tracking_server_gives_the_stored_outputs(tmp_path):
    # given a tracking server
    work = tmp_path / "work"
    notebook = copy_project(work)
    with tracking_server(tmp_path) as address:
        # when the notebook is executed against it
        process = execute(notebook, work, MLFLOW_TRACKING_URI=address)
        # then it prints what is stored, and the server holds the versions
        assert process.returncode == 0, process.stderr
        assert differing_outputs(work) == NOT_REBUILT
        versions = mlflow.MlflowClient(address).search_model_versions(f"name = '{MODEL}'")
        assert {str(version.version) for version in versions} == {"1", "2"}
        assert all(version.source.startswith("models:/") for version in versions)
    # and nothing was written beside the notebook
    assert not (work / "mlflow.db").exists()
    assert not (work / "mlruns").exists()


def test_papermill_gives_the_stored_outputs_and_takes_parameters(tmp_path):
    # given the name of an experiment and of a model
    notebook = copy_project(tmp_path)
    names = {"experiment_name": "an experiment", "model_name": "a_model"}
    # when papermill executes the notebook with them
    process = papermill(notebook, tmp_path, names)
    # then the versions are there under these names
    assert process.returncode == 0, process.stderr
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert {version.name for version in client.search_model_versions()} == {"a_model"}
    assert len(client.search_runs([client.get_experiment_by_name("an experiment").experiment_id])) == 2
    # and only the addresses of the versions, and the step left out, differ from what is stored
    assert [text.replace("a_model", MODEL) for text in differing_outputs(tmp_path)][-1:] == NOT_REBUILT


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are a part of Linux")
def test_no_network_is_needed(tmp_path, lacking):
    # given a process that has no network at all, so that kernel and notebook talk over files
    unshare = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        lacking("the right to make a network namespace", "sysctl kernel.unprivileged_userns_clone=1")
    notebook = copy_project(tmp_path)
    # when the notebook is executed there
    process = execute(notebook, tmp_path, prefix=(*unshare,), transport="ipc")
    # then it works
    assert process.returncode == 0, process.stderr
    assert differing_outputs(tmp_path) == NOT_REBUILT


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are a part of Linux")
def test_without_network_the_environment_step_says_what_failed(tmp_path, lacking):
    # given no network, and a package cache that is empty
    unshare = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        lacking("the right to make a network namespace", "sysctl kernel.unprivileged_userns_clone=1")
    notebook = copy_project(tmp_path)
    variables = {"REBUILD_ENVIRONMENT": "on", "UV_CACHE_DIR": str(tmp_path / "cache"), "UV_HTTP_RETRIES": "0"}
    # when the notebook is executed with the step that installs packages
    process = execute(notebook, tmp_path, prefix=(*unshare,), transport="ipc", **variables)
    # then it fails there, with uv's own words
    assert process.returncode != 0
    assert "Failed to fetch" in process.stderr[-2000:]


def installed() -> str:
    return subprocess.run(
        [sys.executable, "-m", "uv", "pip", "freeze", "--python", sys.executable], capture_output=True, text=True
    ).stdout


def uv_cache() -> str:
    command = [sys.executable, "-m", "uv", "cache", "dir"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """Give a folder where the whole notebook was executed, the step included that builds an environment.

    It was executed in ``my clone``, a git repository, with a Python environment under a path with a space, no Python of
    its version on PATH, a temporary folder with a space, and the home folder ``home``, which has one file.
    """
    if sys.platform == "win32":
        pytest.skip("making a link takes a right on Windows that users lack")
    folder = tmp_path_factory.mktemp("rebuilt")
    for name in ("home", "caches", "my python", "my tmp"):
        (folder / name).mkdir()
    (folder / "home/notes.txt").write_text("mine")
    (folder / "my python/venv").symlink_to(sys.prefix)
    notebook = copy_project(folder / "my clone")
    shutil.copy(ROOT / ".gitignore", folder / "my clone")
    commit_all(folder / "my clone")
    before = installed()
    process = execute(
        notebook,
        folder,
        python=folder / "my python/venv/bin/python",
        REBUILD_ENVIRONMENT="on",
        PATH="/usr/bin:/bin",
        HOME=str(folder / "home"),
        TMPDIR=str(folder / "my tmp"),
        UV_CACHE_DIR=uv_cache(),
        IPYTHONDIR=str(folder / "caches/ipython"),
        MPLCONFIGDIR=str(folder / "caches/matplotlib"),
        JUPYTER_RUNTIME_DIR=str(folder / "caches/jupyter"),
    )
    assert process.returncode == 0, process.stderr
    return folder, before


def test_environment_is_built_where_the_paths_have_spaces(rebuilt):
    # then it prints what is stored, to the last line
    assert differing_outputs(rebuilt[0]) == []


def test_packages_git_tree_and_home_stay_as_they_were(rebuilt):
    # then nothing of it has changed, and no temporary file is left
    folder, before = rebuilt
    assert git(folder / "my clone", "status", "--porcelain") == ""
    assert snapshot(folder / "home") == {"notes.txt": b"mine"}
    assert installed() == before
    assert list((folder / "my tmp").iterdir()) == []
