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


@pytest.mark.skipif(sys.platform == "win32", reason="making a link takes a right on Windows that users lack")
def test_environment_is_built_where_the_paths_are_odd_and_packages_git_tree_and_home_stay_as_they_were(tmp_path):
    # given a git repository in a folder with a space, a comma and an umlaut, an environment and a temporary folder with
    # a space in their paths, no Python of its version on PATH, and a home folder with one file
    for name in ("home", "caches", "my python", "my tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "home/notes.txt").write_text("mine")
    (tmp_path / "my python/venv").symlink_to(sys.prefix)
    clone = tmp_path / "Zoë's clone, here"
    notebook = copy_project(clone)
    shutil.copy(ROOT / ".gitignore", clone)
    commit_all(clone)
    before = run_uv("pip", "freeze", "--python", sys.executable)
    # when the whole notebook is executed there
    process = execute(
        notebook,
        tmp_path,
        python=tmp_path / "my python/venv/bin/python",
        REBUILD_ENVIRONMENT="on",
        PATH="/usr/bin:/bin",
        HOME=str(tmp_path / "home"),
        TMPDIR=str(tmp_path / "my tmp"),
        UV_CACHE_DIR=run_uv("cache", "dir").strip(),
        IPYTHONDIR=str(tmp_path / "caches/ipython"),
        MPLCONFIGDIR=str(tmp_path / "caches/matplotlib"),
        JUPYTER_RUNTIME_DIR=str(tmp_path / "caches/jupyter"),
    )
    # then it prints what is stored, to the last line
    assert process.returncode == 0, process.stderr
    assert differing_outputs(tmp_path) == []
    # and nothing of it has changed, and no temporary file is left
    assert git(clone, "status", "--porcelain") == ""
    assert snapshot(tmp_path / "home") == {"notes.txt": b"mine"}
    assert run_uv("pip", "freeze", "--python", sys.executable) == before
    assert list((tmp_path / "my tmp").iterdir()) == []


def run_uv(*arguments: str) -> str:
    command = [sys.executable, "-m", "uv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
