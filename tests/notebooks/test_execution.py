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


def test_tracking_server_gives_the_stored_outputs_and_has_all_under_the_names_of_the_user(tmp_path):
    # given names for experiment and model
    names = {"experiment_name": "an experiment", "model_name": "a_model"}
    folder = tmp_path / "work"
    # when papermill executes the notebook against a tracking server
    with tracking_server(tmp_path) as address:
        process = papermill(copy_project(folder), folder, names, MLFLOW_TRACKING_URI=address)
        assert process.returncode == 0, process.stderr
        client = mlflow.MlflowClient(address)
        runs = client.search_runs([client.get_experiment_by_name("an experiment").experiment_id])
        versions = client.search_model_versions()
    # then nothing but the model's name, and the step left out, differs from what is stored
    stored = text_outputs(nbformat.read(ROOT / "project.ipynb", as_version=4))
    renamed = [text.replace("a_model", MODEL) for text in differing_outputs(folder)]
    assert [text for text in renamed if text not in stored] == NOT_REBUILT
    # and the server has all, and nothing is beside the notebook
    assert len(runs) == 2
    assert {(version.name, str(version.version)) for version in versions} == {("a_model", "1"), ("a_model", "2")}
    assert not (folder / "mlflow.db").exists()
    assert not (folder / "mlruns").exists()
