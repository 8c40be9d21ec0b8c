"""Which version of the quickstart becomes the champion: the best of all executions by the first score."""

import itertools

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


@pytest.fixture(scope="module")
def store(tmp_path_factory, kernel):
    """Give a client of a store, and its versions and the champion after each of three executions.

    The first two are of the notebook as it is. Then come the decoys, and the third has two configurations that are
    worse.
    """
    folder = tmp_path_factory.mktemp("champion")
    notebook = copy_project(folder)
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    executions = []
    for sources in ({}, {}, {"model": WORSE}):
        if sources:
            add_decoys(client)
            edit_cells(notebook, **sources)
        assert execute_in(kernel, notebook, folder) == ""
        versions = {int(version.version): version for version in client.search_model_versions()}
        executions.append((versions, client.get_model_version_by_alias(MODEL, "champion").version))
    return client, executions


def accuracy(client, version):
    return client.get_run(version.run_id).data.metrics["accuracy"]


def test_champion_is_the_most_accurate_version(store):
    client, [(versions, champion), *_] = store
    assert champion == max(versions, key=lambda number: accuracy(client, versions[number]))


def test_in_a_tie_the_oldest_stays_champion(store):
    # given the same configurations once more
    client, [_, (versions, champion), _] = store
    assert accuracy(client, versions[1]) == accuracy(client, versions[3])
    # then
    assert champion == 1


def test_worse_configurations_leave_the_champion_where_it_was(store):
    # given the third execution, whose versions follow the two of the decoys
    client, [*_, (versions, champion)] = store
    assert max(accuracy(client, versions[number]) for number in (7, 8)) < accuracy(client, versions[1])
    assert champion == 1


@pytest.mark.parametrize("number", [5, 6], ids=["failed", "other rows"])
def test_runs_that_failed_or_used_other_rows_do_not_compete(store, number):
    client, [*_, (versions, champion)] = store
    assert accuracy(client, versions[number]) == 1.0
    assert champion != number


def test_run_without_a_version_does_not_compete(store):
    client, [*_, (versions, champion)] = store
    best = client.search_runs(["1"], order_by=["metrics.accuracy DESC", "attributes.start_time DESC"])[0]
    assert best.data.metrics["accuracy"] == 1.0
    assert best.info.run_id not in {version.run_id for version in versions.values()}
    assert champion == 1


def test_each_execution_adds_two_versions_and_keeps_the_old_ones(store):
    _, executions = store
    assert [sorted(versions) for versions, _ in executions] == [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]]
    for (before, _), (after, _) in itertools.pairwise(executions):
        assert all(after[number].source == version.source for number, version in before.items())


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
