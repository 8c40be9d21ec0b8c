"""Where and how the quickstart can be executed, and what it leaves untouched."""

import shutil
import subprocess
import sys
from pathlib import Path

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
    snapshot,
    tracking_server,
)


def test_second_execution_in_the_same_store_adds_versions(tmp_path):
    # given a store with two versions
    notebook = copy_project(tmp_path)
    assert execute(notebook, tmp_path).returncode == 0
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    before = {version.version: version for version in client.search_model_versions()}
    # when the notebook is executed again
    process = execute(notebook, tmp_path)
    # then it works, there are four versions, and what was there is unchanged
    assert process.returncode == 0, process.stderr
    after = {version.version: version for version in client.search_model_versions(order_by=["version_number"])}
    assert sorted(map(int, after)) == [1, 2, 3, 4]
    for number, version in before.items():
        assert after[number].source == version.source
    assert client.get_model_version_by_alias(MODEL, "champion").version == 3
    experiment = client.get_experiment_by_name(MODEL).experiment_id
    assert len(client.search_runs([experiment])) == 4


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


def kernel_started_in(notebook: Path, folder: Path) -> Path:
    """Return a copy of ``notebook`` whose kernel nbconvert starts in ``folder``."""
    folder.mkdir()
    return Path(shutil.copy(notebook, folder))


def test_kernel_started_in_a_folder_below_uses_the_store_beside_the_notebook(tmp_path):
    notebook = copy_project(tmp_path)
    process = execute(kernel_started_in(notebook, tmp_path / "below"), tmp_path)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "mlflow.db").exists()
    assert (tmp_path / "mlruns").exists()
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["project.ipynb"]


def test_kernel_started_elsewhere_by_jupyter_uses_the_store_beside_the_notebook(tmp_path):
    # given a kernel in a folder that has nothing to do with the notebook, told the notebook's path as Jupyter does
    notebook = copy_project(tmp_path / "project")
    elsewhere = kernel_started_in(notebook, tmp_path / "elsewhere")
    process = execute(elsewhere, tmp_path, JPY_SESSION_NAME=str(notebook))
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "project" / "mlflow.db").exists()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["project.ipynb"]


@pytest.mark.skipif(sys.platform == "win32", reason="making a link takes a right on Windows that users lack")
def test_environment_is_rebuilt_where_the_project_has_a_space_in_its_path(tmp_path):
    # given the Python environment under a path with a space, and no Python of its version on PATH
    project = tmp_path / "my project"
    notebook = copy_project(project)
    (project / "venv").symlink_to(sys.prefix)
    # when the whole notebook is executed with it
    python = project / "venv/bin/python"
    process = execute(notebook, tmp_path, python=python, REBUILD_ENVIRONMENT="on", PATH="/usr/bin:/bin")
    # then it prints what is stored, to the last line
    assert process.returncode == 0, process.stderr
    assert differing_outputs(tmp_path) == []


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


def installed() -> str:
    return subprocess.run(
        [sys.executable, "-m", "uv", "pip", "freeze", "--python", sys.executable], capture_output=True, text=True
    ).stdout


def test_packages_git_tree_and_home_stay_as_they_were(tmp_path):
    # given a repository, a home folder with something in it, and all that is installed
    clone, home, caches = tmp_path / "clone", tmp_path / "home", tmp_path / "caches"
    home.mkdir()
    caches.mkdir()
    (home / "notes.txt").write_text("mine")
    notebook = copy_project(clone)
    shutil.copy(ROOT / ".gitignore", clone)
    commit_all(clone)
    packages = installed()
    # when the whole notebook is executed, the step included that builds an environment
    process = execute(
        notebook,
        tmp_path,
        REBUILD_ENVIRONMENT="on",
        HOME=str(home),
        UV_CACHE_DIR=uv_cache(),
        IPYTHONDIR=str(caches / "ipython"),
        MPLCONFIGDIR=str(caches / "matplotlib"),
        JUPYTER_RUNTIME_DIR=str(caches / "jupyter"),
    )
    assert process.returncode == 0, process.stderr
    # then nothing of it has changed, and no temporary file is left
    assert git(clone, "status", "--porcelain") == ""
    assert snapshot(home) == {"notes.txt": b"mine"}
    assert installed() == packages
    assert {path.name for path in (tmp_path / "tmp").iterdir()} == set()


def uv_cache() -> str:
    command = [sys.executable, "-m", "uv", "cache", "dir"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
