"""Guide 04, the report: made from what MLflow holds, by `make report`, it names the true winner."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from execution import ROOT, copy_project, environment
from mlflow.entities import Dataset, DatasetInput

GUIDE = "guides/04_release_and_report.ipynb"
MODEL = "iris_classification_best_model"
WINNER = "LogisticRegression_basic"


def make_report(project: Path) -> subprocess.CompletedProcess:
    """Run `make report` in a copy of the project, with this environment in place of the one that it would make."""
    copy_project(project, GUIDE)
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, project)
    (project / "installed.txt").touch()
    (project / ".venv").symlink_to(sys.prefix)
    return subprocess.run(
        ["make", "report", "INSTALLED=installed.txt"],
        cwd=project,
        env=environment(project.parent),
        capture_output=True,
        text=True,
        timeout=300,
    )


class Store:
    """An experiment whose runs are written one by one, each begun a second after the one before."""

    def __init__(self, folder: Path):
        """Make the experiment in ``folder``, where the guide looks for it."""
        self.client = mlflow.MlflowClient(f"sqlite:///{folder.as_posix()}/mlflow.db")
        self.experiment = self.client.create_experiment("iris_classification", (folder / "mlruns").as_uri())
        self.time = 1_700_000_000_000

    def run(self, name: str, status: str = "FINISHED", tags: dict | None = None, **metrics: float) -> str:
        """Write a run called ``<model>_<feature set>`` and return its id."""
        self.time += 1000
        model, _, feature_set = name.partition("_")
        tags = {"model": model, "feature_set": feature_set} | (tags or {})
        tags = {key: str(value) for key, value in tags.items() if value is not None}
        run_id = self.client.create_run(self.experiment, self.time, tags, name).info.run_id
        for metric, value in metrics.items():
            self.client.log_metric(run_id, metric, value)
        if status != "RUNNING":
            self.client.set_terminated(run_id, status)
        return run_id

    def candidate(self, name: str, validation_f1: float, **others) -> str:
        """Write a run with all metrics that a candidate of the comparison has."""
        metrics = dict.fromkeys(("train_accuracy", "train_f1", "validation_accuracy"), validation_f1)
        return self.run(name, validation_f1=validation_f1, **metrics, **others)


def write_deceiving_runs(store: Store) -> None:
    """Write runs among which the obvious readings of the store name a wrong winner, each another one."""
    store.candidate("RandomForest_subset", 0.8)
    # the winner; what follows equals it, by the last bit even exceeds it, but began later
    winner = store.candidate(WINNER, 0.9)
    store.client.log_inputs(winner, [DatasetInput(Dataset("iris_train", "c0ffee00", "code", "{}"))])
    store.candidate("LogisticRegression_squared", 0.9)
    store.candidate("RandomForest_basic", 0.9 + 2e-16)
    store.candidate(WINNER, 0.9)  # once more
    # not finished, failed, deleted, without the metric or with none that is a number
    store.candidate("RandomForest_squared", 0.99, status="RUNNING")
    store.candidate("LogisticRegression_subset", 0.98, status="FAILED")
    store.client.delete_run(store.candidate("Deleted_basic", 0.97))
    store.run("Unmeasured_basic", validation_accuracy=0.96)
    store.candidate("Undefined_basic", float("nan"))
    # a search: the parent has no feature set, and its trials are better than all candidates
    search = store.run("search", tags={"search": "true", "feature_set": None})
    store.candidate("RandomForest_squared", 0.95, tags={"mlflow.parentRunId": search})
    # final evaluations: the newest says so as MLflow stores True; one is not finished, one says that it is none
    store.run("Old_basic", tags={"final_evaluation": "true"}, test_accuracy=0.7, test_f1=0.7, validation_f1=0.94)
    final = store.run("LogisticRegression_basic", tags={"final_evaluation": True}, test_accuracy=0.875, test_f1=0.85)
    store.run("Running_basic", "RUNNING", tags={"final_evaluation": True}, test_accuracy=1.0, test_f1=1.0)
    store.candidate("LogisticRegression_subset", 0.6, tags={"final_evaluation": False})
    store.client.create_registered_model(MODEL)
    store.client.create_model_version(MODEL, "nowhere", final)
    store.client.set_registered_model_alias(MODEL, "production", "1")


def content(client: mlflow.MlflowClient) -> list[str]:
    """Return all runs, deleted ones too, and all versions of a store as text."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, run_view_type=mlflow.entities.ViewType.ALL)
    versions = [(version.name, version.version, version.tags) for version in client.search_model_versions()]
    return [*sorted(str(run.to_dictionary()) for run in runs), str(versions)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Give a project in which the report has been made from the deceiving runs. No test writes there."""
    if not shutil.which("make"):
        reason = "make is missing; install it with: apt-get install make"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    project = tmp_path_factory.mktemp("report") / "project"
    project.mkdir()
    store = Store(project)
    write_deceiving_runs(store)
    before = content(store.client)
    process = make_report(project)
    assert process.returncode == 0, process.stderr
    assert content(store.client) == before, "the report wrote to the store"
    return project


@pytest.fixture
def report(project):
    return (project / "reports/iris_classification/experiment_report.md").read_text(encoding="utf-8")


def test_true_winner_is_named(report):
    assert f"**{WINNER}** wins with a validation F1 of 0.9000." in report


def test_ties_are_named_and_the_rule_that_settles_them(report):
    assert "Tied with LogisticRegression_squared, RandomForest_basic; it began first." in report
    assert "highest\nvalidation F1; among equals the one that began first" in report


def test_what_is_left_out_is_listed_with_the_reason(report):
    left_out = re.search(r"Left out: (.*)\.\n", report)[1].split("; ")
    assert left_out == [
        "RandomForest_squared (running)",
        "LogisticRegression_subset (failed)",
        "Unmeasured_basic (no validation_f1)",
        "Undefined_basic (no validation_f1)",
    ]


def test_runs_are_counted_by_kind(report):
    assert "Compared: 6 runs" in report
    assert "Not meant to be compared: final evaluations (3), searches, trials and others (2)." in report


def test_deleted_run_appears_nowhere(report):
    assert "Deleted" not in report


def test_newest_finished_final_evaluation_is_found_however_true_is_written(report):
    assert "The newest is LogisticRegression_basic: LogisticRegression on basic, which won the comparison." in report
    assert "Test F1 0.8500, test accuracy 0.8750." in report


def test_version_in_production_and_data_are_named(report):
    assert f"Version 1 of {MODEL}, made by LogisticRegression_basic, is in production." in report
    assert "Data of the winner: iris_train c0ffee00." in report


def test_table_and_summary_have_each_run_in_the_order_of_the_rule(report, project):
    with (project / "reports/iris_classification/model_summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["validation_f1"]) for row in rows] == [
        (WINNER, "0.9000"),
        ("LogisticRegression_squared", "0.9000"),
        ("RandomForest_basic", "0.9000"),
        (WINNER, "0.9000"),
        ("RandomForest_subset", "0.8000"),
        ("LogisticRegression_subset", "0.6000"),
    ]
    assert re.findall(r"^\| (\w+_\w+) \|", report, flags=re.MULTILINE) == [row["run"] for row in rows]


@pytest.mark.parametrize("name", ["model_comparison.png", "all_runs_comparison.png"])
def test_charts_are_pictures_that_the_report_shows(name, report, project):
    assert (project / "reports/iris_classification" / name).read_bytes().startswith(b"\x89PNG")
    assert f"]({name})" in report


def test_page_has_report_and_charts_and_no_code(project):
    page = (project / "build/experiment_report.html").read_text(encoding="utf-8")
    body = page[page.index("<body") :]
    assert "Experiment report: iris_classification" in body
    assert body.count('src="data:image/png;base64') == 2
    assert "import " not in re.sub('src="data:[^"]*"', "", body)
    assert "jp-CodeCell" in body  # there are cells, which show
    assert "jp-InputArea" not in body.partition("Experiment report")[2]
    assert "Release and report" not in body


def test_experiment_without_runs_to_compare_is_refused_with_the_remedy(tmp_path, project):
    # given a store that has one run, which has not finished
    empty = tmp_path / "project"
    empty.mkdir()
    store = Store(empty)
    store.candidate(WINNER, 0.9, status="RUNNING")
    # when
    process = make_report(empty)
    # then
    assert process.returncode != 0
    remedy = "iris_classification has no finished run to compare. Execute this guide, or guide 03, first."
    assert remedy in re.sub(r"\x1b\[\d+m", "", process.stderr)
    assert not (empty / "reports").exists()
    assert not (empty / "build/experiment_report.html").exists()
