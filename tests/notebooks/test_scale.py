"""Guide 06: predictions that no partitioning changes, data sets that it refuses, and a search that loses no trial."""

import contextlib
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import nbformat
import numpy as np
import optuna
import pandas as pd
import psutil
import pytest
from execution import ROOT, copy_project, environment, tracking_server
from jupyter_client.manager import KernelManager
from optuna.trial import TrialState
from postgresql import postgresql

GUIDE = "guides/06_scale_out.ipynb"
WORKER = "guides/06_search_worker.py"
pytestmark = [
    pytest.mark.usefixtures("spark"),
    pytest.mark.filterwarnings("ignore:Argument ``heartbeat_interval`` is an experimental feature"),
    pytest.mark.filterwarnings("ignore:XDG_RUNTIME_DIR"),
]


def running(process: psutil.Process) -> bool:
    """Tell whether a process still runs. One that has ended, and that nobody has asked about, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Kernel:
    """A kernel of its own, in which the cells of the guide and other code can be executed."""

    def __init__(self, folder: Path, **variables: str):
        """Start the kernel in ``folder``, with a copy of the guide there."""
        self.cells = nbformat.read(copy_project(folder, GUIDE), as_version=4).cells
        self.manager = KernelManager(kernel_name="python3", transport_encryption="auto")
        self.manager.shutdown_wait_time = 60  # a kernel that is killed cannot remove its temporary files
        self.manager.start_kernel(env=environment(folder, **variables), cwd=str(folder))
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.process = psutil.Process(self.manager.provisioner.pid)

    def run(self, source: str) -> tuple[str, str]:
        """Execute ``source`` and return the error, if there is one, and what was printed."""
        printed = []

        def collect(message):
            content = message["content"]
            printed.append(content.get("text") or content.get("data", {}).get("text/plain") or "")

        reply = self.client.execute_interactive(source, timeout=240, output_hook=collect)["content"]
        error = f"{reply['ename']}: {reply['evalue']}" if reply["status"] == "error" else ""
        return error, "".join(printed)

    def guide(self, until: str, **parameters) -> tuple[str, str]:
        """Execute the guide's cells before the one that has ``until``, with these parameters, or up to an error."""
        printed = ""
        for cell in self.cells:
            if cell.cell_type == "code":
                if until in cell.source:
                    break
                error, text = self.run(cell.source)
                printed += text
                if error:
                    return error, printed
                if "parameters" in cell.metadata.get("tags", []):
                    self.run("\n".join(f"{name} = {value!r}" for name, value in parameters.items()))
        return "", printed

    def stop(self) -> None:
        """End the kernel as a notebook's end does, and wait until what it started has ended too."""
        started = self.process.children(recursive=True)
        self.manager.shutdown_kernel()
        self.client.stop_channels()
        self.manager.cleanup_resources()
        deadline = time.monotonic() + 30
        while alive := [process for process in started if running(process)]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.1)


# The data set


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scale") / "a folder of Zoë"


@pytest.fixture(scope="module")
def scored(folder):
    """Give a kernel in which the guide has scored its data set, on two cores, with data and result kept."""
    folder.mkdir()
    temporary = folder.parent / "tmp"
    temporary.mkdir()
    store = f"sqlite:///{folder.as_posix()}/mlflow.db"
    kernel = Kernel(folder, MLFLOW_TRACKING_URI=store, TMPDIR=str(temporary))
    parameters = {"data": str(folder / "data"), "result": str(folder / "result"), "master": "local[2]", "rows": 2500}
    error, kernel.printed = kernel.guide("worker = project", **parameters)
    assert error == ""
    yield kernel
    kernel.stop()
    assert list(temporary.glob("*")) == []


def test_predictions_are_those_of_this_process_by_key(scored, client, folder):
    # given what Spark has written
    written = pd.read_parquet(folder / "result").set_index("id").sort_index()
    # when the same rows are scored here, by the version that the run names
    run = client.search_runs(["1"], "attributes.run_name = 'scoring'")[0]
    flowers = pd.read_parquet(folder / "data").set_index("id").sort_index()
    expected = mlflow.pyfunc.load_model(run.data.params["model_version"]).predict(flowers)
    # then
    assert len(flowers) == 2500
    assert written.index.equals(flowers.index)
    assert (written["species"] == expected).all()
    assert set(expected) == {"setosa", "versicolor", "virginica"}
    # and the run has recorded it
    counts = {f"predicted_{name}": count for name, count in written["species"].value_counts().items()}
    assert run.data.metrics == counts
    assert run.data.params["rows"] == "2500"


@pytest.mark.parametrize(("partitions", "rows"), [(1, 2500), (2, 2500), (7, 2500), (9, 4)])
def test_partitions_change_no_prediction(scored, partitions, rows):
    # given the table that the guide prints, when it is done again with rows dealt out in another way
    code = f"""
subset = flowers.orderBy("id").limit({rows}).repartition({partitions})
answers = subset.select("id", predict(features).alias("species")).toPandas().set_index("id")["species"].sort_index()
print(subset.rdd.getNumPartitions(), len(answers), (answers == expected.sort_index().loc[answers.index]).all())
"""
    # then
    assert scored.run(code) == ("", f"{partitions} {rows} True\n")


def test_partitions_change_no_prediction_in_the_models_own_environment(scored):
    # given the model in an environment that uv builds from its pins, in a folder with a space in its path
    code = """
with printing_to(scratch / "environment.log"):
    elsewhere = mlflow.pyfunc.spark_udf(spark, uri, env_manager="uv")
answers = flowers.repartition(3).select("id", elsewhere(features).alias("species")).toPandas().set_index("id")
print(answers["species"].sort_index().equals(expected.sort_index().rename("species")))
"""
    # then
    assert scored.run(code) == ("", "True\n")


def test_model_in_this_environment_is_said_to_be_unchecked(scored):
    assert "NOT CHECKED: REBUILD_ENVIRONMENT is off" in scored.printed


def test_digest_depends_on_content_alone(scored, folder, tmp_path):
    # given the same rows in another order and other files, and a set with one value changed
    flowers = pd.read_parquet(folder / "data")
    shuffled = flowers.sample(frac=1, random_state=0)
    (tmp_path / "same").mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(shuffled)), 3)):
        shuffled.iloc[part].to_parquet(tmp_path / "same" / f"{number}.parquet", index=False)
    flowers.loc[7, "petal width (cm)"] += 0.01
    flowers.to_parquet(tmp_path / "changed.parquet", index=False)
    # when, then
    code = "print(checked({!r})[2] == digest)"
    assert scored.run(code.format(str(tmp_path / "same"))) == ("", "True\n")
    assert scored.run(code.format(str(tmp_path / "changed.parquet"))) == ("", "False\n")
    # and it is the digest that was logged
    assert scored.run("print(recorded.inputs.dataset_inputs[0].dataset.digest == digest)") == ("", "True\n")


BAD_SETS = {
    "no column": (lambda rows: rows.drop(columns="petal width (cm)"), "petal width (cm) (missing)"),
    "no key": (lambda rows: rows.drop(columns="id"), "id (missing)"),
    "text": (lambda rows: rows.assign(**{"sepal width (cm)": "wide"}), "sepal width (cm) (string)"),
    "integers": (lambda rows: rows.assign(**{"sepal width (cm)": 1}), "sepal width (cm) (bigint)"),
    "null": (lambda rows: rows.assign(**{"sepal width (cm)": [None, 1.0, 1.0]}), "sepal width (cm) (1)"),
    "NaN key": (lambda rows: rows.assign(id=pd.array([0, None, 2], dtype="Int64")), "id (1)"),
    "infinite": (lambda rows: rows.assign(**{"sepal width (cm)": [1.0, np.inf, -np.inf]}), "sepal width (cm) (2)"),
    "key twice": (lambda rows: rows.assign(id=[0, 1, 1]), "of 3 rows, 2 have an id of their own"),
    "empty": (lambda rows: rows.head(0), "of 0 rows"),
}


@pytest.mark.parametrize(("change", "reason"), BAD_SETS.values(), ids=BAD_SETS)
def test_data_set_that_cannot_be_scored_is_refused(scored, tmp_path, change, reason):
    # given three good rows, in which one thing is wrong
    names = ["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]
    rows = pd.DataFrame({"id": range(3), **dict.fromkeys(names, 1.0)})
    change(rows).to_parquet(tmp_path / "bad.parquet", index=False)
    # when, then
    error, _ = scored.run(f"checked({str(tmp_path / 'bad.parquet')!r})")
    assert error.startswith(f"ValueError: Cannot score {tmp_path / 'bad.parquet'}: ")
    assert reason in error


def test_result_that_exists_is_not_overwritten(scored, folder):
    # given a result, when Spark is told to write it once more
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "result").iterdir()}
    error, _ = scored.run("scored.write.mode('error').parquet(destination)")
    # then
    assert "PATH_ALREADY_EXISTS" in error
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "result").iterdir()} == before
    assert "_SUCCESS" in before


def test_spark_listens_on_loopback_only(scored):
    (java,) = [process for process in scored.process.children(recursive=True) if "java" in process.name()]
    listening = {at.laddr.ip for at in java.net_connections("tcp") if at.status == psutil.CONN_LISTEN}
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


# What is refused before anything is written


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """Give a kernel in which the guide can be begun, and the folder where it would leave something."""
    folder = tmp_path_factory.mktemp("idle")
    kernel = Kernel(folder)
    yield kernel, folder
    kernel.stop()


REFUSALS = {
    "no rows": ({"rows": 0}, "rows, trials and workers must be at least 1"),
    "no workers": ({"workers": 0}, "rows, trials and workers must be at least 1"),
    "a result": ({"result": "guides"}, "There is a result in guides already. Name another folder"),
    "no PostgreSQL": ({"storage": "sqlite:///search.db"}, "storage is the address of a PostgreSQL"),
    "no server": ({"storage": "postgresql://me:hidden@127.0.0.1:1/x"}, "Cannot use the storage of the search: "),
}


@pytest.mark.parametrize(("parameters", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_parameters_are_refused_before_anything_is_written(idle, parameters, reason):
    kernel, folder = idle
    error, printed = kernel.guide("tracking_uri = ", **parameters)
    assert reason in error
    assert "hidden" not in error + printed
    assert not (folder / "mlflow.db").exists()
    assert list((folder / "tmp").glob("tmp*")) == []


def test_missing_java_and_spark_are_named_with_the_remedy(idle):
    kernel, _ = idle
    kernel.run("import os; path = os.environ['PATH']; os.environ['PATH'] = ''; os.environ.pop('JAVA_HOME', None)")
    error, _ = kernel.guide("tracking_uri = ")
    kernel.run("os.environ['PATH'] = path")
    assert "RuntimeError: Spark needs Java 17 or later." in error
    # and Python finds no PySpark either
    kernel.run("import sys; sys.modules['pyspark.sql'] = None")
    error, _ = kernel.guide("tracking_uri = ")
    kernel.run("del sys.modules['pyspark.sql']")
    assert "make scale, and Java 17" in error


# The search


@pytest.fixture(scope="module")
def storage(spark):
    """Give the address of a real PostgreSQL that wants a password."""
    with postgresql("hidden") as server:
        place = server.variables
        yield f"postgresql://{place['PGUSER']}:hidden@{place['PGHOST']}:{place['PGPORT']}/postgres"


@contextlib.contextmanager
def workers(count: int, run_id: str, folder: Path, **variables: str):
    """Start workers as the guide does, by the documented command, and kill those that are left at the end."""
    command = [sys.executable, str(ROOT / WORKER), run_id]
    with (folder / "workers.log").open("a") as log:
        options = {"env": environment(folder, **variables), "stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
        processes = [subprocess.Popen(command, **options) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def search(tmp_path_factory, storage):
    """Give the trials and the child runs of a search of seven trials by three workers, of which one is killed."""
    folder = tmp_path_factory.mktemp("search")
    address = storage.replace("postgresql:", "postgresql+psycopg2:", 1)
    with tracking_server(folder) as server:
        client = mlflow.MlflowClient(server)
        parent = client.create_run(client.create_experiment("search")).info
        study = optuna.create_study(storage=address, study_name=parent.run_id, direction="maximize")
        for _ in range(7):
            study.enqueue_trial({}, user_attrs={"wanted": True})
        variables = {"MLFLOW_TRACKING_URI": server, "SEARCH_STORAGE": storage}
        with workers(3, parent.run_id, folder, **variables) as (victim, *others):
            deadline = time.monotonic() + 120
            mine = []
            while not mine:
                assert time.monotonic() < deadline, (folder / "workers.log").read_text()
                runs = client.search_runs([parent.experiment_id], "attributes.status = 'RUNNING'")
                mine = [run for run in runs if run.data.tags.get("worker", "").endswith(f" {victim.pid}")]
            victim.kill()
            assert [other.wait(timeout=120) for other in others] == [0, 0], (folder / "workers.log").read_text()
        children = client.search_runs([parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
        trials = study.trials
        study._storage.remove_session()
        study._storage._backend.engine.dispose()
    return trials, children, victim.pid


def test_killed_worker_loses_its_running_trial_at_most(search):
    trials, children, victim = search
    # then all that were asked for are complete, and one that was lost has been begun again with the same settings
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 7
    lost = [run for run in children if run.info.status != "FINISHED"]
    assert {run.info.status for run in lost} <= {"KILLED"}
    assert len(lost) <= 1
    for run in lost:
        assert run.data.tags["worker"].endswith(f" {victim}")
        first = trials[int(run.data.tags["trial"])]
        assert first.state == TrialState.FAIL
        again = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.params == first.params]
        assert len(again) == 1


def test_no_trial_is_run_twice_and_no_more_than_asked_for(search):
    trials, children, _ = search
    numbers = [int(run.data.tags["trial"]) for run in children if run.info.status == "FINISHED"]
    assert sorted(numbers) == [trial.number for trial in trials if trial.state == TrialState.COMPLETE]
    assert len({run.data.tags["trial"] for run in children}) == len(children)
    for run in children:
        trial = trials[int(run.data.tags["trial"])]
        if run.info.status == "FINISHED":
            assert run.data.metrics["cv_accuracy"] == trial.value
            assert run.data.params == {name: str(value) for name, value in trial.params.items()}


def test_workers_draw_other_numbers(search):
    _, children, _ = search
    finished = [str(run.data.params) for run in children if run.info.status == "FINISHED"]
    assert len(set(finished)) == len(finished) == 7
    assert len({run.data.tags["worker"] for run in children}) >= 2


def test_trial_that_nobody_asked_for_is_not_run():
    # given an empty queue, as a worker finds it that came a moment late
    worker = runpy.run_path(str(ROOT / WORKER), run_name="worker")
    study = optuna.create_study()
    # when it asks for a trial all the same
    study.optimize(worker["objective"], n_trials=1)
    # then that is not run, and so is in no run
    assert [trial.state for trial in study.trials] == [TrialState.PRUNED]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda address: address.replace("hidden", "secret"), "password authentication failed"),
        (lambda address: "postgresql://postgres:secret@127.0.0.1:1/postgres", "Connection refused"),
        (lambda address: "postgresql://postgres:secret@[/postgres", "Cannot work on"),
        (lambda address: address, "KeyError: 'Record does not exist.'"),
    ],
    ids=["password", "address", "no address", "study"],
)
def test_storage_that_cannot_be_used_is_named_without_the_password(storage, tmp_path, change, reason):
    variables = {"SEARCH_STORAGE": change(storage), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    with workers(1, "nothing", tmp_path, **variables) as (worker,):
        assert worker.wait(timeout=60) == 1
    said = (tmp_path / "workers.log").read_text()
    assert said.startswith("Cannot work on nothing: ")
    assert reason in said
    assert not re.search("hidden|secret|Traceback", said)


def test_search_that_fails_leaves_no_process_and_says_why(idle, storage):
    # given a guide whose workers cannot start
    kernel, _ = idle
    kernel.guide("iris = load_iris", trials=1, workers=1, rehearse=False, storage=storage)
    kernel.run("import mlflow; from pathlib import Path; scratch = Path(tempfile.mkdtemp())")
    kernel.run(
        "tracking_uri = f'sqlite:///{scratch}/mlflow.db'; mlflow.set_tracking_uri(tracking_uri); source_tags = {}"
    )
    kernel.run("mlflow.set_experiment(experiment_name)")
    definitions, search = [
        cell.source for cell in kernel.cells if "def start(" in cell.source or "own = " in cell.source
    ]
    assert kernel.run(definitions)[0] == ""
    kernel.run("worker = Path('nowhere.py')")
    # when
    error, printed = kernel.run(search)
    kernel.run("shutil.rmtree(scratch)")
    # then
    assert error.startswith("RuntimeError: 0 of 1 trials succeeded. The workers said:")
    assert "nowhere.py" in error
    assert "hidden" not in error + printed
    assert not any(running(child) for child in kernel.process.children())
