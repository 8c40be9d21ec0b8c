"""The environment that a logged model's own requirements build, on their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from execution import copy_project, environment, execute
from sklearn.datasets import load_iris
from test_locks import versions

CHAMPION = "models:/tracking_quick_start@champion"


def champion_files(folder: Path) -> str:
    """Return the address of the champion's files in the store in ``folder``."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    champion = client.get_model_version_by_alias("tracking_quick_start", "champion")
    return client.get_logged_model(champion.source.removeprefix("models:/")).artifact_location


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """Give the folder of an execution, the Python of a new environment, and what the champion predicted in that.

    MLflow's own command looks the champion up and has uv build the environment from what was recorded with it; the
    MLflow in that environment predicts all flowers.
    """
    folder = tmp_path_factory.mktemp("rebuilt")
    process = execute(copy_project(folder), folder)
    assert process.returncode == 0, process.stderr
    flowers = load_iris(as_frame=True).data
    flowers.to_csv(folder / "flowers.csv", index=False)
    variables = environment(
        folder,
        MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db",
        MLFLOW_ENV_ROOT=str(folder / "environments"),
        PATH=str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"],
    )

    def models(python: Path | str, *arguments: Path | str) -> None:
        process = subprocess.run(
            [python, "-m", "mlflow", "models", *arguments], cwd=folder, env=variables, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr

    models(sys.executable, "prepare-env", "--model-uri", CHAMPION, "--env-manager", "uv")
    (built,) = (folder / "environments").iterdir()
    python = built / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    here = ["--env-manager", "local", "--content-type", "csv", "--input-path", "flowers.csv"]
    models(python, "predict", "--model-uri", champion_files(folder), *here, "--output-path", "answer.json")
    return folder, python, json.loads((folder / "answer.json").read_text())["predictions"]


def test_champion_predicts_the_same_in_its_own_environment(rebuilt):
    # given the champion, loaded in this environment
    folder, _, predictions = rebuilt
    here = mlflow.pyfunc.load_model(champion_files(folder)).predict(load_iris(as_frame=True).data)
    # then its predictions for all flowers are those from its own
    assert len(predictions) == 150
    assert predictions == here.tolist()


def test_environment_holds_the_recorded_packages_and_no_others(rebuilt):
    _, python, _ = rebuilt
    command = [sys.executable, "-m", "uv", "pip", "list", "--format", "json", "--python", python]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = {package["name"]: package["version"] for package in listed}
    assert found == versions("model_requirements.txt", here=True)
