"""What all tests share: settings for nbval, and how a part that this machine lacks is reported."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from nbval.plugin import IPyNbFile

HERE = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption(
        "--pictures",
        type=Path,
        help="folder in which the tests of the interface leave their pictures",
    )


def pytest_configure(config):
    # The notebooks are tests: each is executed in a store of its own, and every stored output compared.
    config.option.nbval = True
    config.option.nbval_current_env = True
    config.option.nbval_sanitize_with = str(HERE / "tests" / "sanitize.cfg")
    config.stash[STORE] = tempfile.mkdtemp()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["REBUILD_ENVIRONMENT"] = "on"


@pytest.hookimpl(tryfirst=True)  # the notebook's kernel starts after this
def pytest_runtest_setup(item):
    if isinstance(item.parent, IPyNbFile):
        store = Path(item.config.stash[STORE]) / item.path.stem
        store.mkdir(exist_ok=True)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store.as_posix()}/mlflow.db"


def pytest_unconfigure(config):
    shutil.rmtree(config.stash[STORE], ignore_errors=True)


STORE = pytest.StashKey[str]()


@pytest.fixture
def lacking():
    """Return a function that ends the test because this machine lacks a part.

    It skips, with the reason and the command that installs the part. Where `CI` is set, everything has been installed,
    so there it fails.
    """

    def end(part: str, command: str):
        reason = f"{part} is missing; install it with: {command}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)

    return end
