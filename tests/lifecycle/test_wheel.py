"""The wheel with each extra, in an environment with nothing else: every command of the extra works.

The commands of the extra ``sign`` are those of `test_road.py`.
"""

import json
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import mlflow
import optuna
import pandas as pd
import pytest
from execution import ROOT, environment, free_port, running
from releases import ROWS_TEST
from wheels import build_wheel, install

from mlflow_lifecycle.workers import make_queue

pytestmark = pytest.mark.extended  # it builds environments


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def lifecycle(wheel, folder, tmp_path):
    """Give the function that installs the wheel with an extra, and returns one that runs its command.

    The store is the one in ``folder``, in which version 1 of iris is in production.
    """

    def installed(extra: str, *packages: str):
        programs = install(tmp_path / "environment", f"{wheel}[{extra}]" if extra else str(wheel), *packages)
        variables = environment(folder, MLFLOW_TRACKING_URI=mlflow.get_tracking_uri())

        def run(*arguments: str, status: int = 0, **more: str) -> str:
            command = [programs / "lifecycle", *arguments]
            process = subprocess.run(command, cwd=tmp_path, env=variables | more, capture_output=True, text=True)
            assert process.returncode == status, process.stdout + process.stderr
            return process.stdout + process.stderr

        run.program = str(programs / "lifecycle")
        run.variables = variables
        return run

    return installed


def test_wheel_without_an_extra_names_the_extra_of_a_command(lifecycle):
    run = lifecycle("")
    assert "Release, verify, serve and monitor" in run("--help")
    assert "No problem was found" in run("doctor")
    refusal = run("verify", "models:/iris/1", status=1)
    assert "Run: pip install 'mlflow-quickstart-lifecycle[sign]'" in refusal


def test_extra_report_writes_a_report(lifecycle, tmp_path):
    # given two runs
    mlflow.set_experiment("compared")
    for loss in (0.1, 0.2):
        with mlflow.start_run(run_name=f"loss {loss}"):
            mlflow.log_metric("validation_log_loss", loss)
    # when, then
    assert "loss 0.1 wins" in lifecycle("report")("report", "compared")
    assert (tmp_path / "reports/compared/experiment_report.md").is_file()


def test_extra_ui_starts_the_interface(lifecycle, tmp_path):
    run = lifecycle("ui")
    port = str(free_port())
    command = [run.program, "ui", "--port", port]
    address = f"http://127.0.0.1:{port}/health"
    with running(command, address, tmp_path / "server.log", cwd=tmp_path, env=run.variables):
        pass


def test_extra_search_runs_the_trials_of_a_search(lifecycle, tmp_path, storage):
    # given a queue with one trial
    (tmp_path / "objective.py").write_text("def score(trial):\n    return trial.suggest_float('x', 0, 1)\n")
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    run = lifecycle("search")
    client = mlflow.MlflowClient()
    parent = client.create_run(mlflow.set_experiment("searched").experiment_id).info
    study = make_queue(storage, parent.run_id, [{"x": 0.5}], "score")
    # when
    run("search-worker", parent.run_id, "--objective", "objective.py:score", SEARCH_STORAGE=storage)
    study._storage.remove_session()
    study._storage._backend.engine.dispose()
    # then
    (trial,) = mlflow.search_runs(
        [parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'", output_format="list"
    )
    assert trial.data.metrics["score"] == 0.5


@pytest.mark.parametrize("engine", ["local", "spark"])
def test_extra_spark_scores_a_data_set(lifecycle, tmp_path, engine, lacking):
    if engine == "spark" and not shutil.which("java"):
        lacking("Java 17 or later", "apt-get install openjdk-17-jre-headless")
    ROWS_TEST.drop(columns="species").assign(id=range(len(ROWS_TEST))).to_parquet(tmp_path / "rows.parquet")
    run = lifecycle("spark" if engine == "spark" else "sign")
    # when
    told = run(
        "score", "models:/iris@production", "--data", "rows.parquet", "--output", "result", "--engine", engine, "--json"
    )
    # then
    assert json.loads(told.splitlines()[-1])["rows"] == len(ROWS_TEST)
    assert set(pd.read_parquet(Path(tmp_path / "result"))["prediction"]) <= {"setosa", "versicolor", "virginica"}


def test_wheel_carries_the_version_of_the_project(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        assert f"\nVersion: {project['version']}\n" in archive.read(metadata).decode()
