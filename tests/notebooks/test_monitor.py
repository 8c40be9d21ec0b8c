"""Guide 05, as stored: its story, as the store tells it, a second execution, and that it leaves nothing behind.

What it calls is tested in tests/lifecycle: test_serving.py, test_drift.py, test_monitoring.py,
test_batches.py, test_watch.py; whether a challenger may be released: test_gate.py.
"""

import mlflow
import pandas as pd
import psutil
import pytest
from execution import copy_project, differing_outputs, executed, papermill, text_outputs
from kernels import execute_in

from mlflow_lifecycle.releases.release import history
from mlflow_lifecycle.signing.verify import verified

pytestmark = pytest.mark.extended  # it takes long

GUIDE = "guides/05_serve_and_monitor.ipynb"
MODEL = "iris_served"
VERDICTS = {"usual": "quiet", "ruler": "broken input", "garden": "drift", "labels": "performance alarm"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give a folder in which the guide has been executed once. A test executes it again; the others only read."""
    folder = tmp_path_factory.mktemp("monitor")
    process = papermill(copy_project(folder, GUIDE), folder, REBUILD_ENVIRONMENT="on")
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture
def runs(client):
    """Give the first execution's runs in the guide's experiment, by name."""
    experiment = client.get_experiment_by_name("iris_monitoring")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    return {run.info.run_name: run for run in found}


def test_stored_outputs_are_reproduced(folder):
    assert differing_outputs(folder, GUIDE) == []


def test_each_batch_is_a_run_with_its_verdict_and_rows(client, runs):
    for name, verdict in VERDICTS.items():
        run = runs[f"batch {name}"]
        assert (run.info.status, run.data.tags["verdict"]) == ("FINISHED", verdict)
        rows = pd.read_json(client.download_artifacts(run.info.run_id, "batch.json"), orient="split")
        assert {"prediction", "species"} < set(rows)
        assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"batch.json"}


def test_champion_and_challenger_were_released_and_verify(folder, client):
    assert [(made.version, made.before) for made in history(MODEL, "champion")[-2:]] == [("2", "1"), ("1", "")]
    public_key = folder / "keys" / "signing_key.pub"
    for uri in (f"models:/{MODEL}/1", f"models:/{MODEL}@champion"):
        with verified(uri, public_key, purpose="release") as version:
            assert version.statement.alias == "champion"


def test_challenger_learned_from_the_champions_rows_and_half_of_the_garden(folder, client):
    learned = []
    for number in "12":
        with verified(f"models:/{MODEL}/{number}", folder / "keys" / "signing_key.pub") as version:
            learned.append(pd.read_parquet(version.training_rows))
    pd.testing.assert_frame_equal(learned[1].head(100), learned[0])
    assert len(learned[1]) == 100 + 80


def test_challenger_passed_every_check_on_rows_that_no_model_learned_from(folder, client):
    run_id = history(MODEL, "champion")[-2].run_id
    checks = pd.read_json(client.download_artifacts(run_id, "gate.json"), orient="split")
    assert set(checks["result"]) == {"passed"}
    assert checks["detail"].str.endswith("of 200 are among the 180 training rows").any()


def test_nothing_is_left_running_or_lying_about(folder):
    left = []
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("TMPDIR", "").startswith(str(folder)):
            left.append(process)
    assert left == []
    assert [path for path in (folder / "tmp").iterdir() if path.is_dir()] == []


def test_without_its_environment_the_gate_says_so(tmp_path, kernel):
    assert execute_in(kernel, copy_project(tmp_path, GUIDE), tmp_path) == ""
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path.as_posix()}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path.as_posix()}/mlflow.db")
    try:
        for release in history(MODEL, "champion"):
            checks = pd.read_json(client.download_artifacts(release.run_id, "gate.json"), orient="split")
            results = dict(zip(checks["name"], checks["result"], strict=True))
            assert results["fresh environment"] == "not checked"
    finally:
        mlflow.set_tracking_uri(None)


def test_second_execution_goes_on_with_the_new_champion(folder, client, kernel):
    # given the store that the first one has left
    again = folder / "again"
    again.mkdir()
    error = execute_in(kernel, folder / GUIDE, again, LIFECYCLE_KEYS=str(folder / "keys"))
    # then it serves and watches version 2, and makes no champion
    assert error == ""
    assert "passed the gate" not in "\n".join(text_outputs(executed(again)))
    assert history(MODEL, "champion")[-2].version == "2"
