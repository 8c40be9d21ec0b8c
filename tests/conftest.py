"""What several test modules share. ``folder`` is a fixture of each: where it has executed its notebooks."""

import os
import shutil
import sys
from importlib.util import find_spec

# Tests run at the same time on all cores. More threads in each process would only wait for each other. This must come
# before the import of numpy.
for library in ("OMP", "OPENBLAS"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import mlflow
import pytest
import versions
from browser import installed_browser, open_page
from deployment import deployed
from execution import environment, free_port, running
from kernels import running_kernel
from postgresql import programs


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """Give the path of a store that MLflow has just made, to be copied."""
    path = tmp_path_factory.mktemp("empty store") / "mlflow.db"
    path.write_bytes(versions.empty_store())
    return path


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    """Give a kernel that executes one notebook after the other."""
    with running_kernel(tmp_path_factory.mktemp("kernel")) as kernel:
        yield kernel


@pytest.fixture
def client(folder):
    """Give a client of the store in ``folder``, which is also the one that addresses of models are looked up in."""
    uri = f"sqlite:///{folder.as_posix()}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    yield mlflow.MlflowClient(uri)
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def interface(folder):
    """Give the address of the interface, started as `make ui` does, on the store in ``folder``."""
    port = str(free_port())
    command = [sys.executable, "-m", "mlflow_lifecycle", "ui", "--port", port]
    variables = environment(folder, MLFLOW_TRACKING_URI=f"sqlite:///{folder.as_posix()}/mlflow.db")
    with running(command, f"http://127.0.0.1:{port}/health", folder / "server.log", env=variables):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def page(lacking):
    """Give an empty page of a real browser."""
    if find_spec("playwright") is None:
        lacking("Playwright, which drives the browser,", "make browser")
    browser = installed_browser()
    if browser is None:
        lacking("Chromium", "make browser (on Debian: apt-get install chromium)")
    with open_page(browser) as page:
        yield page


@pytest.fixture(scope="session")
def make(lacking):
    """End the test if make is missing."""
    if shutil.which("make") is None:
        lacking("make", "apt-get install make (on Debian)")


@pytest.fixture
def pictures(request):
    """Give the folder for pictures, or None where none are asked for."""
    return request.config.getoption("--pictures")


@pytest.fixture(scope="module")
def team(tmp_path_factory, lacking):
    """Give the server that a team shares, running."""
    if programs() is None:
        lacking("PostgreSQL", "make postgresql")
    with deployed(tmp_path_factory.mktemp("team")) as deployment:
        yield deployment
