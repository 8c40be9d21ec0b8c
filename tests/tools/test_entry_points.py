"""Other ways to start: the development container, and `mlflow run`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from containers import why_no_engine
from execution import MODEL, ROOT, environment, finished, git


def test_command_of_the_development_container_installs_what_development_needs_in_a_clean_container(tmp_path):
    if reason := why_no_engine():
        pytest.skip(f"no containers: {reason}")  # also where CI is set: not every machine can have an engine
    # given the base image of the shared server, with what the development container adds: make, git and a user
    image = re.search(r"(?m)^FROM (python:\S+)", (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8"))[1]
    settings = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    prepare = (
        "apt-get update && apt-get install --yes --no-install-recommends make git && useradd --create-home someone"
    )
    install = (
        f"cd && tar x && {settings['postCreateCommand']} && .venv/bin/ruff --version && .venv/bin/lifecycle --help"
    )
    # when its command is run in the committed files
    with (tmp_path / "project.tar").open("wb") as archive:
        subprocess.run(["git", "-C", ROOT, "archive", "HEAD"], stdout=archive, check=True)
    command = ["docker", "run", "--rm", "--interactive", image, "bash", "-e", "-c"]
    with (tmp_path / "project.tar").open("rb") as archive:
        process = subprocess.run(
            [*command, f"({prepare}) >&2 </dev/null && su someone -c '{install}'"],
            stdin=archive,
            capture_output=True,
            text=True,
            timeout=600,
        )
    # then the environment is complete
    assert process.returncode == 0, process.stderr[-3000:]
    assert "Release, verify, serve and monitor MLflow models." in process.stdout


@pytest.fixture
def project(tmp_path):
    """Give a copy of what is committed."""
    for name in git(ROOT, "ls-files").splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.skipif(sys.platform == "win32", reason="the command is for a POSIX shell")
def test_mlflow_run_executes_the_quickstart(project):
    # given the programs of this environment first on the path
    uri = f"sqlite:///{project}/mlflow.db"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = environment(project, MLFLOW_TRACKING_URI=uri, PATH=path)
    # when
    process = finished(["mlflow", "run", ".", "--env-manager", "local"], project, variables, limit=300)
    # then
    assert process.returncode == 0, process.stderr
    assert "NOT CHECKED" in (project / "build/project.html").read_text(encoding="utf-8")
    client = mlflow.MlflowClient(uri)
    versions = client.search_model_versions(f"name = '{MODEL}'")
    assert len({version.run_id for version in versions}) == 2
