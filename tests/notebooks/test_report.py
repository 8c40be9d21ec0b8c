"""`make report`: the command, and a page of what it wrote."""

import re
import shutil

import mlflow
import pytest
from execution import ROOT, environment, finished, make_here

pytestmark = pytest.mark.extended  # it takes long

RUN = "LogisticRegression_basic"


def write_run(folder, empty_store, experiment):
    """Write one run that can be compared into a store in ``folder``, copied from ``empty_store``."""
    shutil.copy(empty_store, folder)
    client = mlflow.MlflowClient(f"sqlite:///{folder.as_posix()}/mlflow.db")
    experiment_id = client.create_experiment(experiment, (folder / "mlruns").as_uri())
    tags = {"model": "LogisticRegression", "feature_set": "basic"}
    run_id = client.create_run(experiment_id, tags=tags, run_name=RUN).info.run_id
    client.log_metric(run_id, "validation_f1", 0.9)
    tag = mlflow.entities.InputTag("mlflow.data.context", "validation")
    dataset = mlflow.entities.Dataset("iris_validation", "c0ffee00", "code", "{}")
    client.log_inputs(run_id, [mlflow.entities.DatasetInput(dataset, [tag])])
    client.set_terminated(run_id)


@pytest.mark.usefixtures("make")
def test_page_has_report_and_charts_and_no_code(tmp_path, empty_store):
    # given the files that `make report` needs, and a store with a run
    project = tmp_path / "a project"
    for folder in ("mlflow_lifecycle", "tools"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", project)
    write_run(project, empty_store, "iris_classification")
    # when
    process = finished(make_here("report", "METRIC=validation_f1"), project, environment(tmp_path), limit=300)
    # then
    assert process.returncode == 0, process.stderr
    page = (project / "build/experiment_report.html").read_text(encoding="utf-8")
    body = page[page.index("<body") :]
    assert f"{RUN} wins with a mean validation_f1 of 0.9000" in body
    assert body.count('src="data:image/png;base64') == 1
    assert "<table>" in body
    assert "jp-CodeCell" not in body
    # and all that is said to be written is there
    told = re.findall(r"(?<!\S)\w+/\S+[.]\w+", process.stdout)
    assert told == ["reports/iris_classification/experiment_report.md", "build/experiment_report.html"]
    assert all((project / path).is_file() for path in told)
