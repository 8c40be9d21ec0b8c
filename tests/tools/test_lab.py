"""`make lab`: JupyterLab opens the notebook, and its kernel is the Python of this environment."""

import json
import re
import shutil
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import psutil
import pytest
from execution import ROOT, copy_project, environment, free_port, make_here, running, wait_until


@pytest.fixture
def lab(tmp_path, lacking, make):
    """Give JupyterLab, started by `make lab` for a user who has other kernels called "python3"."""
    if find_spec("jupyterlab") is None:
        lacking("JupyterLab", "make browser")
    # given a copy of the project
    project = tmp_path / "the project"
    copy_project(project)
    shutil.copy(ROOT / "Makefile", project)
    # and kernels in the user's folder and in one that JUPYTER_PATH names
    places = {name: tmp_path / name for name in ("data", "more", "config", "runtime")}
    for place in ("data", "more"):
        kernel = places[place] / "kernels/python3/kernel.json"
        kernel.parent.mkdir(parents=True)
        kernel.write_text(json.dumps({"argv": ["not-ours"], "display_name": f"Not ours: {place}"}))
    # when it is started, on a port of the user's choice, with a browser that just prints the address that it is to open
    address = f"http://127.0.0.1:{free_port()}"
    variables = environment(
        tmp_path,
        BROWSER="echo opened %s",
        JUPYTER_DATA_DIR=str(places["data"]),
        JUPYTER_PATH=str(places["more"]),
        JUPYTER_CONFIG_DIR=str(places["config"]),
        JUPYTER_RUNTIME_DIR=str(places["runtime"]),
        JUPYTER_PREFER_ENV_PATH="0",
        JUPYTER_PORT_RETRIES="0",
    )
    command = make_here("lab", f"PORT={address.rpartition(':')[2]}")
    log = tmp_path / "lab.log"
    with running(command, f"{address}/api", log, cwd=project, env=variables):
        yield SimpleNamespace(runtime=places["runtime"], log=log)


def test_notebook_opens_with_the_kernel_of_this_environment_and_asks_for_nothing(lab, page):
    # given the address that `make lab` opens in the user's browser
    wait_until(lambda: "opened " in lab.log.read_text(), limit=30)
    # when
    page.goto(re.search("^opened (.+)", lab.log.read_text(), flags=re.MULTILINE)[1])
    # then the notebook's kernel is ready, with no dialogue on the page
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("tab", name="project.ipynb").wait_for()
    assert page.locator(".jp-Dialog").count() == 0
    # and it is this environment's Python, whatever else is called "python3"
    kernels = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any(part.startswith(f"{lab.runtime}/kernel-") for part in command):
            kernels.append(command[0])
    assert kernels == [sys.executable]
    # and no warning about it stands where `make lab` was started
    assert "without encryption" not in lab.log.read_text()
