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


def test_stored_outputs_are_reproduced(folder):
    assert differing_outputs(folder, GUIDE) == []


def test_each_batch_is_a_run_with_its_verdict_and_rows(client):
    experiment = client.get_experiment_by_name("iris_monitoring").experiment_id
    for name, verdict in VERDICTS.items():
        run = client.search_runs([experiment], f"run_name = 'batch {name}'", order_by=["start_time ASC"])[0]
        assert run.data.tags["verdict"] == verdict
        rows = pd.read_json(client.download_artifacts(run.info.run_id, "batch.json"), orient="split")
        assert {"prediction", "species"} < set(rows)


def test_challenger_learned_from_the_champions_rows_and_half_of_the_garden(folder, client):
    learned = []
    for number in "12":
        with verified(f"models:/{MODEL}/{number}", folder / "keys/signing_key.pub", purpose="release") as version:
            learned.append(pd.read_parquet(version.training_rows))
    pd.testing.assert_frame_equal(learned[1].head(100), learned[0])
    assert len(learned[1]) == 100 + 80


def test_nothing_is_left_running_or_lying_about(folder):
    left = []
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("TMPDIR", "").startswith(str(folder)):
            left.append(process)
    assert left == []
    assert [path for path in (folder / "tmp").iterdir() if path.is_dir()] == []


def test_without_its_environment_the_gate_says_so(tmp_path, kernel, monkeypatch):
    assert execute_in(kernel, copy_project(tmp_path, GUIDE), tmp_path) == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path.as_posix()}/mlflow.db")
    for release in history(MODEL, "champion"):
        checks = mlflow.artifacts.load_dict(f"runs:/{release.run_id}/gate.json")["data"]
        assert ["fresh environment", "not checked"] in [check[:2] for check in checks]


def test_second_execution_goes_on_with_the_new_champion(folder, client, kernel):
    # given the store that the first one has left
    again = folder / "again"
    again.mkdir()
    error = execute_in(kernel, folder / GUIDE, again, LIFECYCLE_KEYS=str(folder / "keys"))
    # then it serves and watches version 2, and makes no champion
    assert error == ""
    assert "passed the gate" not in "\n".join(text_outputs(executed(again)))
    assert history(MODEL, "champion")[-2].version == "2"
