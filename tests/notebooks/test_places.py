"""Places where the quickstart can be executed: without a network, and under odd paths, which it leaves untouched."""

import shutil
import subprocess
import sys

import mlflow
import pytest
from execution import MODEL, ROOT, commit_all, copy_project, differing_outputs, execute, git, snapshot


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are a part of Linux")
def test_only_the_environment_step_needs_a_network_and_says_what_failed(tmp_path, lacking):
    # given a process that has no network at all, so that kernel and notebook talk over files; and an empty cache of uv
    unshare = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        lacking("the right to make a network namespace", "sysctl kernel.unprivileged_userns_clone=1")
    notebook = copy_project(tmp_path)
    variables = {"REBUILD_ENVIRONMENT": "on", "UV_CACHE_DIR": str(tmp_path / "cache"), "UV_HTTP_RETRIES": "0"}
    # when the notebook is executed there
    process = execute(notebook, tmp_path, prefix=(*unshare,), transport="ipc", **variables)
    # then it gets as far as the new environment, fails with uv's own words, and names no champion
    assert process.returncode != 0
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert len(client.search_model_versions(f"name = '{MODEL}'")) == 2
    assert client.get_registered_model(MODEL).aliases == {}
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

    It was executed in ``Zoë's clone, here``, a git repository, with a Python environment under a path with a space, no
    Python of its version on PATH, a temporary folder with a space, and the home folder ``home``, which has one file.
    """
    if sys.platform == "win32":
        pytest.skip("making a link takes a right on Windows that users lack")
    folder = tmp_path_factory.mktemp("rebuilt")
    for name in ("home", "caches", "my python", "my tmp"):
        (folder / name).mkdir()
    (folder / "home/notes.txt").write_text("mine")
    (folder / "my python/venv").symlink_to(sys.prefix)
    notebook = copy_project(folder / "Zoë's clone, here")
    shutil.copy(ROOT / ".gitignore", folder / "Zoë's clone, here")
    commit_all(folder / "Zoë's clone, here")
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


def test_environment_is_built_where_the_paths_have_spaces_and_a_comma(rebuilt):
    # then it prints what is stored, to the last line
    assert differing_outputs(rebuilt[0]) == []


def test_packages_git_tree_and_home_stay_as_they_were(rebuilt):
    # then nothing of it has changed, and no temporary file is left
    folder, before = rebuilt
    assert git(folder / "Zoë's clone, here", "status", "--porcelain") == ""
    assert snapshot(folder / "home") == {"notes.txt": b"mine"}
    assert installed() == before
    assert list((folder / "my tmp").iterdir()) == []
