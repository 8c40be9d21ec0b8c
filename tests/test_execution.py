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


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """Give a folder with a project that was executed twice, and its versions after each, by their numbers.

    First with the kernel in a folder ``below`` the notebook. Then with one in a folder ``elsewhere``, which has nothing
    to do with the notebook, but is told the notebook's path as Jupyter does.
    """
    folder = tmp_path_factory.mktemp("twice")
    notebook = copy_project(folder / "project")
    versions = []
    below = kernel_started_in(notebook, folder / "project/below")
    elsewhere = kernel_started_in(notebook, folder / "elsewhere")
    for copy, variables in ((below, {}), (elsewhere, {"JPY_SESSION_NAME": str(notebook)})):
        process = execute(copy, folder, **variables)
        assert process.returncode == 0, process.stderr
        client = mlflow.MlflowClient(f"sqlite:///{folder.as_posix()}/project/mlflow.db")
        versions.append({version.version: version for version in client.search_model_versions()})
    return folder, client, *versions


def test_kernel_started_in_a_folder_below_uses_the_store_beside_the_notebook(twice):
    folder, _, first, _ = twice
    assert len(first) == 2
    assert {path.name for path in (folder / "project").iterdir()} >= {"mlflow.db", "mlruns"}
    assert [path.name for path in (folder / "project/below").iterdir()] == ["project.ipynb"]


def test_kernel_started_elsewhere_by_jupyter_uses_the_store_beside_the_notebook(twice):
    folder, _, _, second = twice
    assert len(second) == 4
    assert [path.name for path in (folder / "elsewhere").iterdir()] == ["project.ipynb"]


def test_second_execution_in_the_same_store_adds_versions(twice):
    _, client, first, second = twice
    assert sorted(map(int, second)) == [1, 2, 3, 4]
    for number, version in first.items():
        assert second[number].source == version.source
    assert client.get_model_version_by_alias(MODEL, "champion").version == 3
    experiment = client.get_experiment_by_name(MODEL).experiment_id
    assert len(client.search_runs([experiment])) == 4


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


def uv_cache() -> str:
    command = [sys.executable, "-m", "uv", "cache", "dir"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """Give a folder where the whole notebook was executed, the step included that builds an environment.

    It was executed in ``my clone``, a git repository, with a Python environment under a path with a space, no Python of
    its version on PATH, and the home folder ``home``, which has one file.
    """
    if sys.platform == "win32":
        pytest.skip("making a link takes a right on Windows that users lack")
    folder = tmp_path_factory.mktemp("rebuilt")
    for name in ("home", "caches", "my python"):
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
        UV_CACHE_DIR=uv_cache(),
        IPYTHONDIR=str(folder / "caches/ipython"),
        MPLCONFIGDIR=str(folder / "caches/matplotlib"),
        JUPYTER_RUNTIME_DIR=str(folder / "caches/jupyter"),
    )
    assert process.returncode == 0, process.stderr
    return folder, before


def test_environment_is_rebuilt_where_the_project_has_a_space_in_its_path(rebuilt):
    # then it prints what is stored, to the last line
    assert differing_outputs(rebuilt[0]) == []


def test_packages_git_tree_and_home_stay_as_they_were(rebuilt):
    # then nothing of it has changed, and no temporary file is left
    folder, before = rebuilt
    assert git(folder / "my clone", "status", "--porcelain") == ""
    assert snapshot(folder / "home") == {"notes.txt": b"mine"}
    assert installed() == before
    assert {path.name for path in (folder / "tmp").iterdir()} == set()
