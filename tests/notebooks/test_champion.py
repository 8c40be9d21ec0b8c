"""Which version of the quickstart becomes the champion: the best of all executions by the first score."""

import mlflow
import pytest
from execution import MODEL, copy_project, edit_cells
from kernels import execute_in

pytestmark = pytest.mark.extended  # it takes long

PIPELINE = """
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler


def make_model(**parameters):
    return make_pipeline(StandardScaler(), LogisticRegression(**parameters))


trusted_types = []
"""
WORSE = PIPELINE + 'configurations = {"strong": {"C": 1e-6}, "stronger": {"C": 1e-9}}'


def add_decoys(client):
    """Log three runs that look better: one failed, one was measured on other rows, one has no version."""
    run = client.get_run(client.get_model_version_by_alias(MODEL, "champion").run_id)
    for status, dataset, registered in (("FAILED", 1, True), ("FINISHED", 0, True), ("FINISHED", 1, False)):
        decoy = client.create_run(run.info.experiment_id).info
        client.log_inputs(decoy.run_id, datasets=[run.inputs.dataset_inputs[dataset]])
        client.log_metric(decoy.run_id, "accuracy", 1.0)
        client.set_terminated(decoy.run_id, status)
        if registered:
            client.create_model_version(MODEL, decoy.artifact_uri, decoy.run_id)


def test_champion_is_the_most_accurate_version_that_can_be_compared_and_the_oldest_in_a_tie(tmp_path, kernel):
    # given two executions of the notebook as it is, the decoys, and one with two configurations that are worse
    notebook = copy_project(tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    champions = []
    for sources in ({}, {}, {"model": WORSE}):
        if sources:
            add_decoys(client)
            edit_cells(notebook, **sources)
        assert execute_in(kernel, notebook, tmp_path) == ""
        champions.append(client.get_model_version_by_alias(MODEL, "champion").version)
    accuracies = {}
    for version in client.search_model_versions():
        accuracies[int(version.version)] = client.get_run(version.run_id).data.metrics["accuracy"]
    assert sorted(accuracies) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert accuracies[1] == accuracies[3] > max(accuracies[number] for number in (2, 4, 7, 8))
    assert accuracies[5] == accuracies[6] == 1.0  # the decoys with a version
    # then the first version is the champion after each of them
    assert champions == [1, 1, 1]


SETTINGS = """
experiment_name = model_name = "tracking_quick_start"
data_name = "iris"
target_name = "species"
description = "Another score."
scoring = ["{}", "accuracy"]
"""
NEIGHBORS = """
from sklearn.neighbors import KNeighborsClassifier


def make_model(**parameters):
    return KNeighborsClassifier(algorithm="brute", **parameters)


configurations = {"30 neighbors": {"n_neighbors": 30}, "1 neighbor": {"n_neighbors": 1}}
trusted_types = []
"""


def test_first_score_decides_where_scores_disagree(tmp_path, kernel):
    # given two configurations, of which the first has the better log loss and the second the better accuracy
    notebook = copy_project(tmp_path)
    edit_cells(notebook, parameters=SETTINGS.format("neg_log_loss"), model=NEIGHBORS)
    # when
    assert execute_in(kernel, notebook, tmp_path) == ""
    # then
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    first, second = (client.get_run(client.get_model_version(MODEL, number).run_id).data.metrics for number in "12")
    assert first["neg_log_loss"] > second["neg_log_loss"]
    assert first["accuracy"] < second["accuracy"]
    assert client.get_model_version_by_alias(MODEL, "champion").version == 1


def test_versions_without_the_first_score_are_an_error_and_the_champion_stays(tmp_path, kernel):
    # given an execution that ranks by accuracy
    notebook = copy_project(tmp_path)
    assert execute_in(kernel, notebook, tmp_path) == ""
    # when the next one ranks by a score that the first versions do not have
    edit_cells(notebook, parameters=SETTINGS.format("balanced_accuracy"), model=WORSE)
    error = execute_in(kernel, notebook, tmp_path)
    # then
    assert "A version has no balanced_accuracy: {" in error
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_model_version_by_alias(MODEL, "champion").version == 1


IN_MAIN = (
    PIPELINE.replace("make_pipeline(", "make_pipeline(FunctionTransformer(doubled), ")
    + """
def doubled(rows):
    return rows * 2


configurations = {"weak": {}}
trusted_types = ["__main__.doubled"]
"""
)


def test_model_that_no_other_program_can_load_is_not_champion(tmp_path, kernel):
    # given a model with a function of the notebook, which the user trusts
    notebook = copy_project(tmp_path)
    edit_cells(notebook, model=IN_MAIN)
    # when
    error = execute_in(kernel, notebook, tmp_path, REBUILD_ENVIRONMENT="on")
    # then the new environment cannot load it, and it has no alias
    assert "doubled" in error
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_model_version(MODEL, "1")
    assert client.get_registered_model(MODEL).aliases == {}
