"""Guide 03: what the comparison, the search and the release log, and that a search survives errors and kills."""

import contextlib
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter

import mlflow
import nbformat
import psutil
import pytest
from execution import ROOT, copy_project, environment, papermill, refusal
from kernels import execute_in, running_kernel
from sklearn.datasets import load_iris
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split

GUIDE = "guides/03_search_and_evaluate.ipynb"
EXPERIMENT = "iris_classification"
MODEL = "iris_classification_best_model"
COMBINATIONS = [
    f"{model}_{part}" for model in ("LogisticRegression", "RandomForest") for part in ("subset", "basic", "squared")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give a folder in which the guide has been executed once, with six trials. No test here writes to its store."""
    folder = tmp_path_factory.mktemp("search")
    process = papermill(copy_project(folder, GUIDE), folder, {"n_trials": 6})
    assert process.returncode == 0, process.stderr
    return folder


def runs_by_name(client: mlflow.MlflowClient) -> dict:
    """Return the runs of the guide's experiment by their names; of several with one name, the newest."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"], max_results=5000)
    return {run.info.run_name: run for run in runs}


@pytest.fixture
def runs(client):
    return runs_by_name(client)


def part_of_iris(part: str):
    """Return features and target of the "validation" or "test" part of Iris, 30 rows, split as system E does."""
    iris = load_iris(as_frame=True)
    target = iris.target_names[iris.target]
    rest, test, target_rest, target_test = train_test_split(
        iris.data, target, test_size=0.2, stratify=target, random_state=42
    )
    if part == "test":
        return test, target_test
    return train_test_split(rest, target_rest, test_size=0.25, stratify=target_rest, random_state=42)[1::2]


def children(client: mlflow.MlflowClient, parent) -> list:
    """Return the child runs of the run ``parent``, the oldest first."""
    condition = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    order = ["attributes.start_time ASC"]
    return list(client.search_runs([parent.info.experiment_id], condition, order_by=order, max_results=5000))


def searches(client: mlflow.MlflowClient) -> list:
    """Return the parent runs of all searches, the oldest first; none before there is an experiment."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    order = ["attributes.start_time ASC"]
    return (
        list(client.search_runs([experiment.experiment_id], "tags.search != ''", order_by=order)) if experiment else []
    )


@pytest.mark.parametrize("name", COMBINATIONS)
def test_run_of_a_combination_has_tags_metrics_data_and_confusion_matrix(client, runs, name):
    run = runs[name]
    assert [run.data.tags["model"], run.data.tags["feature_set"]] == name.split("_")
    assert set(run.data.metrics) == {"train_accuracy", "train_f1", "validation_accuracy", "validation_f1"}
    assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["iris_train", "iris_validation"]
    assert "confusion_matrix.png" in {file.path for file in client.list_artifacts(run.info.run_id)}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_logged_model_takes_raw_rows_and_has_the_logged_scores(runs, name):
    features, target = part_of_iris("validation")
    model = mlflow.pyfunc.load_model(f"models:/{runs[name].outputs.model_outputs[0].model_id}")
    answers = model.predict(features)
    assert runs[name].data.metrics["validation_accuracy"] == accuracy_score(target, answers)
    assert runs[name].data.metrics["validation_f1"] == pytest.approx(f1_score(target, answers, average="macro"))


def test_squared_feature_set_gives_the_model_squares(runs):
    features, _ = part_of_iris("validation")
    model = mlflow.sklearn.load_model(f"models:/{runs['LogisticRegression_squared'].outputs.model_outputs[0].model_id}")
    assert (model[0].transform(features) == [[*row, *(row**2)] for row in features.to_numpy()]).all()


def test_every_trial_is_a_child_run_with_parameters_score_and_duration(client):
    (parent,) = searches(client)
    found = children(client, parent)
    assert [run.info.run_name for run in found] == [f"trial {number:03d}" for number in range(6)]
    for run in found:
        assert set(run.data.params) == {"C", "l1_ratio"}
        assert set(run.data.metrics) == {"cv_log_loss", "duration_seconds"}
        assert 0 < run.data.metrics["duration_seconds"] < 60
    assert parent.data.metrics["cv_log_loss"] == min(run.data.metrics["cv_log_loss"] for run in found)
    assert parent.data.metrics["trials"] == 6
    assert "resumed" not in parent.data.tags


def test_pictures_of_the_search_are_with_its_parent(client):
    (parent,) = searches(client)
    for name in ("history.png", "importance.png"):
        assert mlflow.artifacts.load_image(f"runs:/{parent.info.run_id}/{name}").size[0] > 300


def test_final_run_is_marked_and_scored_on_the_test_rows(client, runs):
    (run,) = [run for run in runs.values() if "final_evaluation" in run.data.tags]
    assert run.info.run_name == "final LogisticRegression_subset"
    assert run.data.tags["final_evaluation"] == "true"
    features, target = part_of_iris("test")
    answers = mlflow.pyfunc.load_model(f"models:/{MODEL}@production").predict(features)
    assert run.data.metrics["test_accuracy"] == accuracy_score(target, answers)
    assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["iris_development", "iris_test"]


def test_no_other_run_saw_the_test_rows(runs):
    others = [run for run in runs.values() if "final_evaluation" not in run.data.tags]
    assert len(others) == 6 + 1 + 6
    assert not [run for run in others if "iris_test" in {item.dataset.name for item in run.inputs.dataset_inputs}]
    assert not [run for run in others if any(name.startswith("test") for name in run.data.metrics)]


def test_production_is_the_final_version_and_the_older_one_is_still_there(client, runs):
    assert str(client.get_model_version_by_alias(MODEL, "production").version) == "2"
    assert client.get_model_version(MODEL, "1").run_id == runs["LogisticRegression_subset"].info.run_id
    assert client.get_model_version(MODEL, "2").run_id == runs["final LogisticRegression_subset"].info.run_id


@contextlib.contextmanager
def begun(notebook, folder, **parameters):
    """Execute ``notebook`` by papermill in the background; at the end of the block it and its kernel are killed."""
    command = [sys.executable, "-m", "papermill", str(notebook), "begun.ipynb", "--no-progress-bar"]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    options = {"cwd": folder, "env": environment(folder), "stdin": subprocess.DEVNULL}
    with (folder / "begun.log").open("w") as log:
        process = psutil.Popen(command, stdout=log, stderr=log, **options)
        try:
            yield process
        finally:
            family = [*process.children(recursive=True), process]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family)


def test_killed_search_goes_on_with_its_trials(tmp_path):
    # given a search that is killed when it has some of its forty trials
    notebook = copy_project(tmp_path, GUIDE)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path.as_posix()}/mlflow.db")
    with begun(notebook, tmp_path, n_trials=40) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "mlruns").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        while not (searches(client) and len(children(client, searches(client)[0])) >= 4):
            assert process.is_running() and time.monotonic() < deadline, (tmp_path / "begun.log").read_text()
            time.sleep(0.05)
    (parent,) = searches(client)
    assert parent.info.status == "RUNNING"
    before = [run.info.run_id for run in children(client, parent) if run.info.status == "FINISHED"]
    assert 3 <= len(before) < 40
    # when the guide is started again
    process = papermill(notebook, tmp_path, {"n_trials": 40})
    # then the same search is finished: it tells so, has its old trials, and every number once
    assert process.returncode == 0, process.stderr
    (parent,) = searches(client)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["resumed"] == f"with {len(before)} trials"
    finished = [run for run in children(client, parent) if run.info.status == "FINISHED"]
    assert set(before) <= {run.info.run_id for run in finished}
    assert Counter(run.info.run_name for run in finished) == Counter(f"trial {number:03d}" for number in range(40))
    assert len({str(run.data.params) for run in finished}) == 40


def process_tag() -> str:
    """Return the name that the guide would give to this very process, which is alive."""
    process = psutil.Process()
    return f"{platform.node()} {process.pid} {process.create_time():.0f}"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    with running_kernel(tmp_path_factory.mktemp("kernel")) as kernel:
        yield kernel


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """Give a database that has its tables, which take a second or two to make, and nothing in them."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path.as_posix()}")
    return path


@pytest.fixture
def search(kernel, empty_database, tmp_path):
    """Give a function that executes the guide as far as its search, in a store of the test's own.

    It takes the parameters, the condition under which a trial is to fail, and environment variables; it returns the
    error, a client of the store, and the kinds of output that there were.
    """
    copy_project(tmp_path, GUIDE)
    shutil.copy(empty_database, tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path.as_posix()}/mlflow.db")

    def run(fails_if: str = "False", variables: dict | None = None, **parameters) -> tuple[str, object, set]:
        notebook = nbformat.read(ROOT / GUIDE, as_version=4)
        last = next(i for i, cell in enumerate(notebook.cells) if "study.optimize(" in cell.source)
        notebook.cells = notebook.cells[: last + 1]
        (cell,) = [cell for cell in notebook.cells if "def objective(trial):" in cell.source]
        line = "        candidate = pipeline("
        assert line in cell.source
        raising = f'        if {fails_if}:\n            raise MemoryError("no memory left")\n'
        cell.source = cell.source.replace(line, raising + line)
        error = execute_in(kernel, notebook, tmp_path, variables, parameters)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        return error, client, {kind for output in outputs for kind in output.get("data", {})}

    return run


def test_search_that_is_finished_or_in_progress_elsewhere_is_left_alone(search):
    # given a finished search, and one like it that a living process is at
    error, client, _ = search(n_trials=2)
    assert error == ""
    (finished,) = searches(client)
    tags = {"search": finished.data.tags["search"], "process": process_tag()}
    other = client.create_run(finished.info.experiment_id, tags=tags).info.run_id
    # when the guide is executed again, then it makes a search of its own
    assert search(n_trials=2)[0] == ""
    (own,) = [run for run in searches(client) if run.info.run_id not in (finished.info.run_id, other)]
    assert len(children(client, own)) == 2
    assert len(children(client, finished)) == 2
    assert client.get_run(other).info.status == "RUNNING"
    assert "resumed" not in client.get_run(other).data.tags


def test_trial_that_raises_is_recorded_and_the_search_goes_on(search):
    error, client, _ = search("trial.number == 1", n_trials=4)
    assert error == ""
    found = children(client, searches(client)[0])
    assert [run.info.status for run in found] == ["FINISHED", "FAILED", "FINISHED", "FINISHED"]
    assert found[1].data.tags["error"] == "MemoryError('no memory left')"
    assert "cv_log_loss" not in found[1].data.metrics


def test_search_in_which_all_trials_fail_says_why(search):
    error, client, _ = search("True", n_trials=2)
    assert error == "RuntimeError: No trial succeeded. The first failed with MemoryError('no memory left')"
    assert [run.info.status for run in children(client, searches(client)[0])] == ["FAILED", "FAILED"]


def test_grid_is_tried_point_by_point_by_two_jobs(search):
    error, client, _ = search(sampler="grid", n_trials=100, n_jobs=2)
    assert error == ""
    found = children(client, searches(client)[0])
    points = Counter((float(run.data.params["C"]), float(run.data.params["l1_ratio"])) for run in found)
    assert points == Counter((c, ratio) for c in (0.01, 0.1, 1, 10, 100) for ratio in (0, 0.5, 1))
    assert {run.info.status for run in found} == {"FINISHED"}


WIDGET = "application/vnd.jupyter.widget-view+json"


def test_timeout_ends_the_search(search):
    error, client, kinds = search(n_trials=100_000, timeout=1)
    assert error == ""
    assert 0 < len(children(client, searches(client)[0])) < 1000
    assert WIDGET not in kinds


def test_person_sees_a_progress_bar(search):
    # given a frontend with a person before it, as Jupyter tells its kernels
    error, _, kinds = search(variables={"JPY_SESSION_NAME": "a notebook"}, n_trials=1)
    assert error == ""
    assert WIDGET in kinds


IMPOSSIBLE = "sampler is tpe or grid; n_trials is at least 1, n_jobs not 0, timeout positive seconds"


@pytest.mark.parametrize("parameters", [{"sampler": "best"}, {"n_trials": 0}, {"n_jobs": 0}, {"timeout": -1}], ids=str)
def test_impossible_parameter_is_refused(parameters):
    assert refusal(GUIDE, **parameters).startswith(IMPOSSIBLE)
