"""`make lab`: JupyterLab opens the notebook, and its kernel is the Python of this environment."""

import contextlib
import json
import re
import shutil
import sys
import time
import urllib.request
from importlib.util import find_spec
from types import SimpleNamespace

import psutil
import pytest
from execution import ROOT, copy_project, environment, free_port, running

TOKEN = "known-to-the-test"


@pytest.fixture(scope="module")
def lab(tmp_path_factory, lacking):
    """Give JupyterLab, started by `make lab` for a user who has other kernels called "python3"."""
    if find_spec("jupyterlab") is None:
        lacking("JupyterLab", "make browser")
    if shutil.which("make") is None:
        lacking("make", "apt-get install make (on Debian)")
    # given a copy of the project with this environment in place of its own, complete as far as make can tell
    folder = tmp_path_factory.mktemp("lab")
    project = folder / "the project"
    copy_project(project)
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, project)
    (project / ".venv").symlink_to(sys.prefix)
    for stamp in ("installed.txt", "development.txt"):
        (project / stamp).touch()
    # and kernels in the user's folder and in one that JUPYTER_PATH names
    places = {name: folder / name for name in ("data", "more", "config", "runtime")}
    for place in ("data", "more"):
        kernel = places[place] / "kernels/python3/kernel.json"
        kernel.parent.mkdir(parents=True)
        kernel.write_text(json.dumps({"argv": ["not-ours"], "display_name": f"Not ours: {place}"}))
    # when it is started, on a port of the user's choice, with a browser that just prints the address that it is to open
    address = f"http://127.0.0.1:{free_port()}"
    variables = environment(
        folder,
        BROWSER="echo opened %s",
        JUPYTER_DATA_DIR=str(places["data"]),
        JUPYTER_PATH=str(places["more"]),
        JUPYTER_CONFIG_DIR=str(places["config"]),
        JUPYTER_RUNTIME_DIR=str(places["runtime"]),
        JUPYTER_PREFER_ENV_PATH="0",
        JUPYTER_TOKEN=TOKEN,
        JUPYTER_PORT_RETRIES="0",
    )
    # UV and PYTHON, so that make can change nothing in this environment
    command = ["make", "lab", "INSTALLED=installed.txt", "DEVELOPMENT=development.txt", "UV=false", "PYTHON=false"]
    command.append(f"PORT={address.rpartition(':')[2]}")
    log = folder / "lab.log"
    with running(command, f"{address}/api", log, cwd=project, env=variables):
        yield SimpleNamespace(address=address, project=project, runtime=places["runtime"], log=log)


def ask(lab: SimpleNamespace, method: str, path: str, body: dict | None = None) -> dict | list | None:
    """Return the answer of JupyterLab's interface for programs."""
    request = urllib.request.Request(
        f"{lab.address}/api/{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"token {TOKEN}"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        content = answer.read()
    return json.loads(content) if content else None


def kernel_process(lab: SimpleNamespace, kernel: str) -> psutil.Process:
    """Return the process of the kernel with this id."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # another has just ended
            if str(lab.runtime / f"kernel-{kernel}.json") in process.cmdline():
                return process
    raise AssertionError(f"No process has the kernel {kernel}.")


def test_kernel_is_this_environments_python_whatever_else_is_called_python3(lab):
    # when
    kernel = ask(lab, "POST", "kernels", {"name": "python3"})["id"]
    process = kernel_process(lab, kernel)
    # then
    assert process.cmdline()[0] == str(lab.project / ".venv/bin/python")
    # and it ends when it is told to
    ask(lab, "DELETE", f"kernels/{kernel}")
    assert psutil.wait_procs([process], timeout=10)[1] == []


def test_notebook_opens_with_its_kernel_and_asks_for_nothing(lab, page):
    # given the address that `make lab` opens in the user's browser
    deadline = time.monotonic() + 30
    while not (opened := re.search("^opened (.+)", lab.log.read_text(), flags=re.MULTILINE)):
        assert time.monotonic() < deadline, lab.log.read_text()
        time.sleep(0.1)
    # when
    page.goto(opened[1])
    # then its kernel is ready, with no dialogue on the page
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    assert page.locator(".jp-Dialog").count() == 0
    (session,) = ask(lab, "GET", "sessions")
    assert session["path"] == "project.ipynb"
    process = kernel_process(lab, session["kernel"]["id"])
    assert process.cmdline()[0] == str(lab.project / ".venv/bin/python")
    # and no warning about it stands where `make lab` was started
    assert "without encryption" not in lab.log.read_text()
