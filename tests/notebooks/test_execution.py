"""The quickstart on a tracking server, by papermill: what it prints, and what it leaves there."""

import mlflow
import nbformat
import pytest
from execution import (
    MODEL,
    NOT_REBUILT,
    ROOT,
    copy_project,
    differing_outputs,
    papermill,
    text_outputs,
    tracking_server,
)

pytestmark = pytest.mark.extended  # it takes long


NAMES = {"experiment_name": "an experiment", "model_name": "a_model"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Give the folder where papermill executed the notebook against a tracking server, and what that has afterwards.

    The experiment and the model have names of their own.
    """
    folder = tmp_path_factory.mktemp("served")
    notebook = copy_project(folder / "work")
    with tracking_server(folder) as address:
        process = papermill(notebook, folder / "work", NAMES, MLFLOW_TRACKING_URI=address)
        assert process.returncode == 0, process.stderr
        client = mlflow.MlflowClient(address)
        experiment = client.get_experiment_by_name(NAMES["experiment_name"])
        runs, versions = client.search_runs([experiment.experiment_id]), client.search_model_versions()
    return folder / "work", runs, versions


def test_tracking_server_gives_the_stored_outputs_and_holds_the_versions(served):
    # then nothing but the model's name, and the step left out, differs from what is stored
    folder, _, versions = served
    stored = text_outputs(nbformat.read(ROOT / "project.ipynb", as_version=4))
    renamed = [text.replace(NAMES["model_name"], MODEL) for text in differing_outputs(folder)]
    assert [text for text in renamed if text not in stored] == NOT_REBUILT
    assert {str(version.version) for version in versions} == {"1", "2"}
    assert all(version.source.startswith("models:/") for version in versions)


def test_tracking_server_leaves_nothing_beside_the_notebook(served):
    assert not (served[0] / "mlflow.db").exists()
    assert not (served[0] / "mlruns").exists()


def test_papermill_sets_the_names_of_experiment_and_model(served):
    _, runs, versions = served
    assert len(runs) == 2
    assert {version.name for version in versions} == {NAMES["model_name"]}
