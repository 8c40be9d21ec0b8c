"""Guide 03, as stored: what the comparison, the interrupted search, the final evaluation and the candidate log."""

import contextlib
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
from execution import copy_project, differing_outputs, environment, executed, text_outputs
from kernels import execute_in
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from versions import logged_table

from mlflow_lifecycle.datasets import fingerprint
from mlflow_lifecycle.report import make_report
from mlflow_lifecycle.signing.verify import verified

pytestmark = pytest.mark.extended  # it takes long

SEARCH = "03_search_and_evaluate"
GUIDE = f"guides/{SEARCH}.ipynb"
EXPERIMENT = "iris_classification"
MODEL = "iris_classification_best_model"
RECIPES = ["LogisticRegression_squared", "RandomForest_subset"]  # two of six


@pytest.fixture(scope="module")
def folder(guides):
    """Give the folder with the store in which the guide has been executed, first of all."""
    return guides


def runs_by_name(client: mlflow.MlflowClient) -> dict:
    """Return the runs of the guide's experiment by their names; of several with one name, the newest."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"], max_results=5000)
    return {run.info.run_name: run for run in runs}


@pytest.fixture
def runs(client):
    return runs_by_name(client)


def part_of_iris(part: str):
    """Return features and target of the "train", "validation" or "test" part of Iris, split as system E does."""
    iris = load_iris(as_frame=True)
    target = iris.target_names[iris.target]
    rest, test, target_rest, target_test = train_test_split(
        iris.data, target, test_size=0.2, stratify=target, random_state=42
    )
    if part == "test":
        return test, target_test
    parts = train_test_split(rest, target_rest, test_size=0.25, stratify=target_rest, random_state=42)
    return parts[0::2] if part == "train" else parts[1::2]


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


def test_stored_outputs_are_reproduced(folder):
    assert differing_outputs(folder / SEARCH, GUIDE) == []


@pytest.mark.parametrize("name", RECIPES)
def test_run_of_a_recipe_has_tags_metrics_data_and_confusion_matrices(client, runs, name):
    run = runs[name]
    assert [run.data.tags["model"], run.data.tags["feature_set"]] == name.split("_")
    assert set(run.data.metrics) == {
        "train_accuracy",
        "train_f1",
        "validation_accuracy",
        "validation_f1",
        "cv_log_loss",
    }
    inputs = {}
    for item in run.inputs.dataset_inputs:
        inputs[item.dataset.name] = {tag.key: tag.value for tag in item.tags}["mlflow.data.context"]
    assert inputs == {
        "iris_train": "train",
        "iris_validation": "validation",
        "iris_development": "cross-validation",
    }
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"confusion_matrix_train.png", "confusion_matrix_validation.png"} <= files


@pytest.mark.parametrize("name", RECIPES)
def test_run_of_a_recipe_keeps_the_loss_of_each_fold(runs, name):
    folds = logged_table(runs[name], "fold_scores.json")
    assert list(folds) == ["repeat", "fold", "cv_log_loss"]
    assert len(folds) == 15
    assert folds["fold"].nunique() == 5
    assert runs[name].data.metrics["cv_log_loss"] == pytest.approx(folds["cv_log_loss"].mean())


def test_datasets_keep_the_sha256_of_their_rows(runs):
    features, target = part_of_iris("validation")
    (item,) = [item for item in runs[RECIPES[0]].inputs.dataset_inputs if item.dataset.name == "iris_validation"]
    assert {tag.key: tag.value for tag in item.tags}["sha256"] == fingerprint(features.assign(species=target))


@pytest.mark.parametrize("name", ["LogisticRegression_basic", "LogisticRegression_squared"])
def test_logged_scores_are_those_of_a_model_of_the_training_rows(runs, name):
    # given the same recipe, fitted anew
    features, target = part_of_iris("train")
    if name.endswith("squared"):
        squares = ("squares", FunctionTransformer(np.square))
        model = make_pipeline(FeatureUnion([("as they are", "passthrough"), squares]), StandardScaler())
    else:
        model = make_pipeline(StandardScaler())
    model = make_pipeline(model, LogisticRegression()).fit(features, target)
    # then
    features, target = part_of_iris("validation")
    answers = model.predict(features)
    assert runs[name].data.metrics["validation_accuracy"] == pytest.approx(accuracy_score(target, answers))
    assert runs[name].data.metrics["validation_f1"] == pytest.approx(f1_score(target, answers, average="macro"))


def test_candidate_takes_raw_rows_and_gives_its_model_their_squares(client):
    features, _ = part_of_iris("validation")
    model = mlflow.sklearn.load_model(f"models:/{MODEL}@candidate")
    assert (model[0].transform(features) == [[*row, *(row**2)] for row in features.to_numpy()]).all()
    assert set(model.predict(features)) == {"setosa", "versicolor", "virginica"}


def test_report_names_the_winner_of_the_guide_by_log_loss_on_the_rows_of_the_folds(folder, client):
    report = make_report(EXPERIMENT)
    assert report.metric == "cv_log_loss"
    assert report.winner == "LogisticRegression_squared"
    assert report.rows.startswith("iris_development ")
    assert len(report.groups) == 6


def test_every_trial_is_a_child_run_with_parameters_score_and_duration(client):
    (parent,) = searches(client)
    found = children(client, parent)
    assert [run.info.run_name for run in found] == [f"trial {number:03d}" for number in range(20)]
    for run in found:
        assert set(run.data.params) == {"C", "l1_ratio"}
        assert set(run.data.metrics) == {"cv_log_loss", "duration_seconds"}
        assert 0 < run.data.metrics["duration_seconds"] < 60
        assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["iris_development"]
    assert parent.data.metrics["cv_log_loss"] == min(run.data.metrics["cv_log_loss"] for run in found)
    assert parent.data.metrics["trials"] == 20


def test_search_was_interrupted_and_went_on(client):
    (parent,) = searches(client)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["resumed"] == "with 10 trials"


def test_final_run_is_marked_and_scored_on_the_test_rows(client, runs):
    (run,) = [run for run in runs.values() if "final_evaluation" in run.data.tags]
    assert run.info.run_name == "final LogisticRegression_squared"
    assert run.data.tags["final_evaluation"] == "true"
    features, target = part_of_iris("test")
    answers = mlflow.pyfunc.load_model(f"models:/{MODEL}@candidate").predict(features)
    assert run.data.metrics["test_accuracy"] == accuracy_score(target, answers)
    assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["iris_development", "iris_test"]


def test_no_other_run_saw_the_test_rows(runs):
    others = [run for run in runs.values() if "final_evaluation" not in run.data.tags]
    assert len(others) == 6 + 1 + 20
    assert not [run for run in others if "iris_test" in {item.dataset.name for item in run.inputs.dataset_inputs}]
    assert not [run for run in others if any(name.startswith("test") for name in run.data.metrics)]


def test_candidate_is_the_final_version_and_signed_and_nothing_is_in_production(folder, client, runs):
    assert set(client.get_registered_model(MODEL).aliases) == {"candidate"}
    assert client.get_model_version(MODEL, "1").run_id == runs["final LogisticRegression_squared"].info.run_id
    with verified(f"models:/{MODEL}@candidate", folder / SEARCH / "keys/signing_key.pub", purpose="candidate") as copy:
        assert copy.statement.purpose == "candidate"
        assert len(pd.read_parquet(copy.training_rows)) == 120


def test_tuned_recipe_is_not_taken_because_nested_folds_do_not_confirm_its_gain(folder, runs):
    # given a search whose best trial has a smaller loss than the winner
    best = runs["search LogisticRegression_squared"].data.metrics["cv_log_loss"]
    assert best < runs["LogisticRegression_squared"].data.metrics["cv_log_loss"] - 0.03
    # then the candidate has scikit-learn's own settings
    assert runs["final LogisticRegression_squared"].data.params["C"] == "1.0"
    assert "The untuned recipe is the candidate." in "".join(text_outputs(executed(folder / SEARCH)))


def test_final_run_names_the_earlier_uses_of_the_test_rows(tmp_path, kernel):
    # given a store in which a run has used the test rows
    features, target = part_of_iris("test")
    rows = mlflow.data.from_pandas(features.assign(species=target))
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path.as_posix()}/mlflow.db")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("earlier", tmp_path.as_uri()))
    with mlflow.start_run():
        mlflow.log_input(rows)
    mlflow.set_tracking_uri(None)
    # when
    error = execute_in(kernel, copy_project(tmp_path, GUIDE), tmp_path, {"n_trials": 2})
    # then
    assert error == ""
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path.as_posix()}/mlflow.db")
    final = runs_by_name(client)["final LogisticRegression_squared"]
    assert final.data.tags["earlier_runs_on_test_rows"] == "1"


def test_execution_that_was_killed_in_its_search_is_finished_by_the_next(tmp_path, kernel):
    # given an execution that is killed when it has gone on beyond the trial in which it interrupted its own search
    command = [sys.executable, "-m", "papermill", str(copy_project(tmp_path, GUIDE)), "executed.ipynb"]
    process = psutil.Popen(command, cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.DEVNULL)
    while logged_trials(tmp_path / "mlflow.db") < 15:
        assert process.poll() is None
        time.sleep(0.02)
    for part in [*process.children(recursive=True), process]:
        part.kill()
    process.wait()
    # when
    error = execute_in(kernel, tmp_path / GUIDE, tmp_path)
    # then it goes on with the same search, and no trial is tried twice
    assert error == ""
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path.as_posix()}/mlflow.db")
    (parent,) = searches(client)
    names = [run.info.run_name for run in children(client, parent) if run.info.status == "FINISHED"]
    assert sorted(names) == [f"trial {number:03d}" for number in range(20)]


def logged_trials(store: Path) -> int:
    """Return how many trials are in the SQLite file ``store``, which may not be there yet."""
    if not store.exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as database:
        try:
            return database.execute("SELECT COUNT(*) FROM tags WHERE key = 'trial'").fetchone()[0]
        except sqlite3.OperationalError:  # it is being made
            return 0
