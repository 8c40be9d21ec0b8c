"""The action release-model: its steps as action.yml has them, run by ana on the shared server."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml
from deployment import PASSWORDS
from execution import ROOT, environment, finished
from mlflow.models import infer_signature
from releases import ROWS_TEST, ROWS_TRAIN
from sklearn.linear_model import LogisticRegression
from versions import register

from mlflow_lifecycle.signing.keys import own_key
from mlflow_lifecycle.signing.verify import verified

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the action runs on Linux and macOS")
ACTION = ".github/actions/release-model"
NAME = "iris"
INPUTS = {
    "data": "test.csv",
    "target": "species",
    "thresholds": "accuracy_score=0.8\nlog_loss=0.5\n",
    "intended-use": "To learn with.",
    "limits": "Three species only.",
    "gate-options": "--no-environment",
}
GOOD = LogisticRegression(max_iter=1000)
BAD = LogisticRegression(C=0.0001, max_iter=1000)


def run_step(number: int, folder: Path, inputs: dict[str, str], **variables: str) -> subprocess.CompletedProcess:
    """Run a step of the action as GitHub does, in the repository of a team in ``folder``.

    Args:
        number: which of the steps that are scripts.
        folder: has the repository, a copy of this project, and what the runner keeps.
        inputs: of the action.
        variables: of the step that uses the action, and of the job.
    """
    action = yaml.safe_load((folder / "project" / ACTION / "action.yml").read_text(encoding="utf-8"))
    step = [step for step in action["runs"]["steps"] if "run" in step][number]
    values = {"steps.python.outputs.python-path": sys.executable}
    for name, settings in action["inputs"].items():
        value = inputs.get(name, settings.get("default"))
        if value is not None:
            values[f"inputs.{name}"] = value

    def evaluate(match: re.Match) -> str:
        return values[match[1]]

    variables |= {name: re.sub(r"\$\{\{ (.+?) \}\}", evaluate, value) for name, value in step["env"].items()}
    variables["GITHUB_ACTION_PATH"] = str(folder / "project" / ACTION)
    variables["GITHUB_STEP_SUMMARY"] = str(folder / "summary.md")
    variables["RUNNER_TEMP"] = str(folder / "runner")
    command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]]
    return finished(command, folder / "repository", environment(folder, **variables), limit=300)


def compile_lock(repository: Path) -> subprocess.CompletedProcess:
    """Write the requirements of a team, and compile them as the page of the action says."""
    pins = (ROOT / "model_requirements.txt").read_text(encoding="utf-8")
    direct = re.findall(r"(?m)^(?:mlflow-skinny|scikit-learn|pandas|numpy|skops|pip|setuptools|wheel)==.*$", pins)
    (repository / "requirements.in").write_text("\n".join(direct) + "\n")
    page = (ROOT / "docs/release_action.md").read_text(encoding="utf-8")
    line = re.search(r"(?m)^uv (pip compile .*)$", page)[1].replace("/path/of/this/folder", "../project")
    command = [sys.executable, "-m", "uv", *line.split(), "--constraint", str(ROOT / "requirements.txt")]
    return finished(command, repository, dict(os.environ), limit=120)


@pytest.fixture(scope="module")
def installed(tmp_path_factory, lacking):
    """Give a folder with the repository of a team, and what the first step has installed."""
    folder = tmp_path_factory.mktemp("action")
    for name in ("repository", "runner"):
        (folder / name).mkdir()
    for name in (ACTION, "mlflow_lifecycle"):
        shutil.copytree(ROOT / name, folder / "project" / name)
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, folder / "project")
    ROWS_TRAIN.to_csv(folder / "repository/train.csv", index=False)
    ROWS_TEST.to_csv(folder / "repository/test.csv", index=False)
    process = compile_lock(folder / "repository")
    if re.search("error sending request|dns error", process.stderr):
        lacking("a package index", "connect this machine to one")
    assert process.returncode == 0, process.stderr
    process = run_step(0, folder, INPUTS)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture
def act(team, installed, monkeypatch):
    """Give the function that uses the action on a version of ana's, and returns its status and its summary.

    The store is empty, and the active one, as ana.
    """
    team.empty()
    monkeypatch.setenv("LIFECYCLE_KEYS", str(installed / "own keys"))
    key = own_key().read_text()

    def act(version: int, **inputs: str) -> tuple[int, str]:
        summary = installed / "summary.md"
        summary.unlink(missing_ok=True)
        inputs = INPUTS | {"version": f"models:/{NAME}/{version}"} | inputs
        process = run_step(1, installed, inputs, SIGNING_KEY=key, **team.as_user("ana"))
        text = summary.read_text(encoding="utf-8")
        printed = process.stdout + process.stderr + text
        assert PASSWORDS["ana"] not in printed
        assert key.splitlines()[1] not in printed
        assert list((installed / "tmp").rglob("*.pem")) == []
        return process.returncode, text

    with team.client("ana"):
        mlflow.set_experiment("by a team")
        yield act
    mlflow.set_tracking_uri(None)


def has_alias() -> str:
    """Return the version in production, empty if there is none."""
    return str(mlflow.MlflowClient().get_registered_model(NAME).aliases.get("production", ""))


def test_version_that_passes_is_released_with_its_figures_in_the_summary(act, tmp_path):
    register(tmp_path, GOOD, ROWS_TRAIN)
    # when
    status, summary = act(1)
    # then
    assert status == 0, summary
    assert has_alias() == "1"
    accuracy = GOOD.score(ROWS_TEST.drop(columns="species"), ROWS_TEST["species"])
    assert f"| accuracy_score | {accuracy:.4f} |" in summary
    assert "version 1 is production" in summary
    assert "Limits: Three species only." in summary  # the model card


def test_version_that_misses_a_threshold_is_not_released_and_the_summary_says_why(act, tmp_path):
    register(tmp_path, BAD, ROWS_TRAIN)
    runs = len(mlflow.search_runs(search_all_experiments=True))
    # when
    status, summary = act(1)
    # then
    assert status == 1
    assert has_alias() == ""
    assert len(mlflow.search_runs(search_all_experiments=True)) == runs
    reason = summary.partition("**Not released**: ")[2]
    assert re.search(r"thresholds failed .*log_loss 1\.\d+, at most 0\.5", reason)
    assert "The model card" not in summary


def test_version_without_a_signature_is_signed_if_its_training_data_is_stated(act):
    # given a version that plain MLflow has logged
    features, classes = ROWS_TRAIN.drop(columns="species"), ROWS_TRAIN["species"]
    options = {"signature": infer_signature(features, classes), "serialization_format": "skops"}
    options["pip_requirements"] = str(ROOT / "model_requirements.txt")
    with mlflow.start_run():
        mlflow.sklearn.log_model(BAD.fit(features, classes), name="model", registered_model_name=NAME, **options)
    # when, then
    assert "There is no signature of this version" in act(1)[1]
    # when its training data is stated, then it is signed with it, and the gate comes to look for the target
    assert "genus" in act(1, **{"training-data": "train.csv", "target": "genus"})[1]
    with verified(f"models:/{NAME}/1", own_key().with_suffix(".pub")) as copy:
        assert copy.training_rows


def test_action_without_a_key_makes_none_and_stops(tmp_path):
    (tmp_path / "repository").mkdir()
    shutil.copytree(ROOT / ACTION, tmp_path / "project" / ACTION)
    (tmp_path / "runner").mkdir()
    (tmp_path / "runner/lifecycle").symlink_to(sys.prefix)
    # when
    inputs = INPUTS | {"version": "models:/iris/1"}
    process = run_step(1, tmp_path, inputs, MLFLOW_TRACKING_URI="http://127.0.0.1:1", HOME=str(tmp_path))
    # then
    assert process.returncode == 1
    assert process.stderr == "SIGNING_KEY is missing. Set it in the step that uses this action.\n"
    assert list(tmp_path.rglob("*.pem")) == []
