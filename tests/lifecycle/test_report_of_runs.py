"""report: the true winner, from stores that are written run by run."""

import json
import re
import shutil
import sqlite3
import sys
from contextlib import closing

import mlflow
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from execution import ROOT, environment, finished, snapshot
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

from mlflow_lifecycle.cli import main
from mlflow_lifecycle.comparison import folds_interval
from mlflow_lifecycle.datasets import in_markdown
from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.report import chart, make_report, markdown, verdict, write_report

EXPERIMENT = "iris_classification"
METRIC = "validation_f1"
WINNER = "LogisticRegression_basic"
STEADY = np.array([0.90, 0.92, 0.94, 0.96, 0.98] * 2)
RESTLESS = STEADY + np.array([0.05, -0.04] * 5)  # better on the whole, by less than the folds vary


class Store:
    """A store with an experiment whose runs are written one by one, each begun a second after the one before."""

    def __init__(self, folder):
        """Make the experiment in the store that is in ``folder``."""
        self.folder = folder
        self.uri = f"sqlite:///{folder.as_posix()}/mlflow.db"
        self.client = mlflow.MlflowClient(self.uri)
        self.experiment = self.client.create_experiment(EXPERIMENT, (folder / "mlruns").as_uri())
        self.time = 1_700_000_000_000

    def run(self, name, status="FINISHED", tags=None, **metrics):
        """Write a run called ``<model>_<feature set>`` and return its id."""
        self.time += 1000
        tags = {"model": name.partition("_")[0]} | (tags or {})
        run_id = self.client.create_run(self.experiment, self.time, tags, name).info.run_id
        self.client.log_batch(run_id, [Metric(key, value, self.time, 0) for key, value in metrics.items()])
        if status != "RUNNING":
            self.client.set_terminated(run_id, status)
        return run_id

    def data(self, run_id, digest, context="validation", sha256=None):
        """Note that a run used the dataset ``iris_<context>``."""
        tags = {"mlflow.data.context": context} | ({"sha256": sha256} if sha256 else {})
        dataset = Dataset(f"iris_{context}", digest, "code", "{}")
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag(*tag) for tag in tags.items()])])

    def candidate(self, name, validation_f1, *, digest="c0ffee00", sha256=None, folds=None, learned="7ea1", **others):
        """Write a run with all that one of the comparison has.

        ``folds`` are its scores in five folds, repeated; ``learned`` is the SHA-256 of the rows that it learned from.
        """
        metrics = dict.fromkeys(("train_accuracy", "train_f1", "validation_accuracy"), validation_f1)
        run_id = self.run(name, validation_f1=validation_f1, **metrics, **others)
        self.data(run_id, digest, sha256=sha256)
        if folds is not None:
            if learned:
                self.data(run_id, "1ea54ed", context="train", sha256=learned)
            numbers = np.arange(len(folds))
            table = pd.DataFrame({"repeat": numbers // 5, "fold": numbers % 5, "f1": folds})
            self.client.log_table(run_id, table, "fold_scores.json")
        return run_id


@pytest.fixture
def store(empty_store, tmp_path, monkeypatch):
    """Give a store without runs in the current folder, which is also the active one."""
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path)
    mlflow.set_tracking_uri(store.uri)
    yield store
    mlflow.set_tracking_uri(None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def names(report):
    return list(report.groups.index)


def content(store):
    """Return all rows of the store, and all files beside it."""
    with closing(sqlite3.connect(store.folder / "mlflow.db")) as database:
        return list(database.iterdump()), snapshot(store.folder / "mlruns")


# Who is compared


def test_trials_and_final_evaluations_cannot_win(store):
    # given a candidate, a trial of a search and a final evaluation, which are better
    store.candidate(WINNER, 0.9)
    store.candidate("RandomForest_squared", 0.95, tags={"mlflow.parentRunId": "abc"})
    store.candidate("Old_basic", 0.94, tags={"final_evaluation": "true"})
    # when
    report = make_report(EXPERIMENT, METRIC)
    # then
    assert names(report) == [WINNER]
    assert report.left_out == {}


def test_search_is_left_out_because_its_score_is_that_of_its_best_trial(store):
    # given a recipe, and a search on the same rows whose best trial is better
    for name, loss, tags in (("LogisticRegression_basic", 0.2, {}), ("search", 0.1, {"search": "TPE, seed 42"})):
        store.data(store.run(name, tags=tags, cv_log_loss=loss), "c0ffee00", context="training")
    # when
    report = make_report(EXPERIMENT)
    # then
    assert names(report) == ["LogisticRegression_basic"]
    assert list(report.left_out.values()) == ["search"]


def test_rows_of_a_cross_validated_score_are_those_of_the_cross_validation(store):
    # given a run that was cross-validated on all rows, and also fitted on a part of them and scored on another
    run = store.run("LogisticRegression_basic", cv_log_loss=0.2, validation_f1=0.9)
    for context in ("train", "validation", "cross-validation"):
        store.data(run, "c0ffee00", context=context)
    # then each metric is reported with its own rows
    assert make_report(EXPERIMENT).rows == "iris_cross-validation (digest c0ffee00)"
    assert make_report(EXPERIMENT, METRIC).rows == "iris_validation (digest c0ffee00)"


def test_runs_without_result_are_left_out_with_the_reason(store):
    # given a run to compare, and others that are better and not finished, failed, or without a number
    store.candidate(WINNER, 0.9)
    store.candidate("RandomForest_squared", 0.99, status="RUNNING")
    store.candidate("LogisticRegression_subset", 0.98, status="FAILED")
    store.candidate("LogisticRegression_subset", 0.97, status="FAILED")
    store.run("Unmeasured_basic", validation_accuracy=0.96)
    store.candidate("Undefined_basic", float("nan"))
    # when
    report = make_report(EXPERIMENT, METRIC)
    # then
    assert names(report) == [WINNER]
    assert re.findall("^- (.*)", markdown(report), re.MULTILINE) == [
        "running: RandomForest_squared",
        "failed: LogisticRegression_subset, LogisticRegression_subset",
        "no finite validation_f1: Unmeasured_basic, Undefined_basic",
    ]


# On the same rows


def test_runs_on_other_rows_are_left_out_with_the_reason(store):
    # given two runs on the same rows, and better ones on others and on rows that were not recorded
    store.candidate(WINNER, 0.9)
    store.candidate("RandomForest_basic", 0.8)
    store.candidate("RandomForest_squared", 0.99, digest="badc0de")
    store.run("RandomForest_subset", validation_f1=0.95)
    # when
    report = make_report(EXPERIMENT, METRIC)
    # then
    assert names(report) == [WINNER, "RandomForest_basic"]
    assert report.rows == "iris_validation (digest c0ffee00)"
    assert report.left_out == {
        "scored on iris_validation (digest badc0de)": "RandomForest_squared",
        "scored on rows that were not recorded": "RandomForest_subset",
    }


def test_runs_that_did_not_record_their_rows_are_compared_and_the_report_says_so(store):
    for value in (0.8, 0.9):
        store.run(WINNER, validation_f1=value)
    report = make_report(EXPERIMENT, METRIC)
    assert names(report) == [WINNER]
    assert "on rows that were not recorded." in verdict(report)


def test_sha256_goes_before_the_digest(store):
    # given three runs with one digest, of which one has another SHA-256
    store.candidate(WINNER, 0.9, sha256="ab" * 32)
    store.candidate("RandomForest_squared", 0.99, sha256="cd" * 32)
    store.candidate("RandomForest_basic", 0.8, sha256="ab" * 32)
    # when
    report = make_report(EXPERIMENT, METRIC)
    # then
    assert names(report) == [WINNER, "RandomForest_basic"]
    assert report.rows == "iris_validation (SHA-256 abababababab)"
    assert list(report.left_out) == ["scored on iris_validation (SHA-256 cdcdcdcdcdcd)"]


def test_of_groups_of_the_same_size_the_one_with_the_newest_run_is_compared(store):
    # given two runs on each of two sets of rows, in turns
    for digest in ("c0ffee00", "badc0de", "badc0de", "c0ffee00"):
        store.candidate(f"Model_{digest}", 0.9, digest=digest)
    # then
    assert names(make_report(EXPERIMENT, METRIC)) == ["Model_c0ffee00"]


def test_rows_are_those_that_a_run_did_not_learn_from_or_else_the_training_rows(store):
    for name in (WINNER, "RandomForest_basic"):
        store.data(store.run(name, validation_f1=0.9), "1ea54ed", "training")
    assert make_report(EXPERIMENT, METRIC).rows == "iris_training (digest 1ea54ed)"
    for name, learned in {"A": "one", "B": "another", "C": "third"}.items():
        run_id = store.run(name, validation_f1=0.9)
        store.data(run_id, learned, "train")
        store.data(run_id, "c0ffee00", "evaluation")
    report = make_report(EXPERIMENT, METRIC)
    assert (names(report), report.rows) == (["A", "B", "C"], "iris_evaluation (digest c0ffee00)")


# The order: by means


@pytest.mark.parametrize(
    ("metric", "winner"), [("mean_absolute_error", "low"), ("rmse", "low"), ("neg_log_loss", "high")]
)
def test_metric_of_which_less_is_better_is_known_by_its_name(store, metric, winner):
    for name, value in (("low", 0.1), ("high", 0.2)):
        store.data(store.run(name, **{metric: value}), "c0ffee00")
    report = make_report(EXPERIMENT, metric)
    assert report.winner == names(report)[0] == winner


def test_equals_are_tied_and_the_one_that_began_first_wins(store):
    # given three combinations that are equal, the last by its last bit even better
    store.candidate("RandomForest_subset", 0.8)
    store.candidate(WINNER, 0.9)
    store.candidate("LogisticRegression_squared", 0.9)
    store.candidate("RandomForest_basic", 0.9 + 2e-16)
    # when
    report = make_report(EXPERIMENT, METRIC)
    # then
    assert report.tied == ["LogisticRegression_squared", "RandomForest_basic"]
    assert names(report) == [WINNER, "LogisticRegression_squared", "RandomForest_basic", "RandomForest_subset"]


def test_repeated_runs_count_by_their_mean_and_not_by_the_best_of_them(store):
    # given a combination whose best run is better than all others, and whose mean is not
    for value in (0.99, 0.70, 0.80):
        store.candidate("RandomForest_basic", value)
    store.candidate(WINNER, 0.9)
    # when
    report = make_report(EXPERIMENT, METRIC)
    # then
    assert report.winner == WINNER
    assert report.groups.loc["RandomForest_basic"].tolist() == [3, 0.83, 0.7, 0.99]


def test_tag_groups_the_runs_if_asked_for(store):
    # given two runs of one model, and one without the tag
    store.candidate("A_basic", 0.9)
    store.candidate("A_squared", 0.8)
    run_id = store.candidate("B_basic", 0.7)
    store.client.delete_tag(run_id, "model")
    # then
    report = make_report(EXPERIMENT, METRIC, by="model")
    assert report.groups["runs"].to_dict() == {"A": 2}
    assert report.left_out == {"no tag model": "B_basic"}


def test_default_metric_is_the_only_proper_score(store):
    losses = {"train_log_loss": 0.3, "validation_log_loss": 0.4, "validation_accuracy": 0.9}
    store.data(store.run(WINNER, **losses), "c0ffee00")
    assert make_report(EXPERIMENT).metric == "validation_log_loss"


@pytest.mark.parametrize("metrics", [{"f1": 0.9, "accuracy": 0.9}, {"a_log_loss": 0.3, "b_log_loss": 0.4}])
def test_other_metric_has_to_be_named(store, metrics):
    store.data(store.run(WINNER, **metrics), "c0ffee00")
    with pytest.raises(InvalidInputError, match=f"--metric: {', '.join(sorted(metrics))}$"):
        make_report(EXPERIMENT)


# The order: by folds


def test_difference_that_folds_do_not_confirm_does_not_count(store):
    # given a combination with a higher mean, which varies from fold to fold more than it is better
    store.candidate(WINNER, STEADY.mean(), folds=STEADY)
    store.candidate("RandomForest_basic", RESTLESS.mean(), folds=RESTLESS)
    # when
    report = make_report(EXPERIMENT, METRIC)
    # then the simpler one wins, the other is tied with it, and the interval is shown
    interval = folds_interval(RESTLESS, STEADY, test_share=0.2)
    assert (report.winner, report.tied) == (WINNER, ["RandomForest_basic"])
    found = report.groups.loc["RandomForest_basic", ["better_by", "low", "high"]]
    assert found.tolist() == pytest.approx([interval.difference, interval.low, interval.high])
    assert "over the same 10 folds" in report.rule


def test_difference_that_folds_confirm_decides_against_the_simpler_one(store):
    store.candidate("LogisticRegression_subset", STEADY.mean(), folds=STEADY)
    better = STEADY + 0.01 + 0.001 * np.tile([-1, 0, 1, 0, 0], 2)
    store.candidate(WINNER, better.mean(), folds=better)
    report = make_report(EXPERIMENT, METRIC)
    assert (report.winner, report.tied) == (WINNER, [])
    assert names(report) == [WINNER, "LogisticRegression_subset"]


def test_smaller_loss_in_the_folds_is_better(store):
    # given losses, and folds that confirm the difference
    for name, losses in {"first": STEADY, "better": STEADY - 0.1}.items():
        run_id = store.run(name, validation_log_loss=losses.mean())
        store.data(run_id, "c0ffee00")
        store.data(run_id, "1ea54ed", context="train")
        table = pd.DataFrame({"repeat": np.arange(10) // 5, "fold": np.arange(10) % 5, "log_loss": losses})
        store.client.log_table(run_id, table, "fold_scores.json")
    # then
    report = make_report(EXPERIMENT)
    assert (report.winner, names(report)) == ("better", ["better", "first"])
    assert report.groups.loc["first", "better_by"] == pytest.approx(-0.1)


@pytest.mark.parametrize("folds", [None, [0.1] * 9 + [float("nan")]], ids=["none", "NaN"])
def test_means_decide_where_not_all_recorded_scores_of_the_same_folds(store, folds):
    # given a simpler combination with folds, and a better one without them, or with a gap
    store.candidate("LogisticRegression_subset", 0.9, folds=STEADY)
    store.candidate(WINNER, 0.91, folds=folds)
    # when
    report = make_report(EXPERIMENT, METRIC)
    # then
    assert report.winner == WINNER
    assert "Not every run recorded scores of the same folds" in report.rule
    assert "better_by" not in report.groups


@pytest.mark.parametrize("learned", ["0ther", None], ids=["other rows", "no record"])
def test_means_decide_where_not_all_recorded_the_same_training_rows(store, learned):
    # given two combinations with scores of as many folds, which are not known to divide the same rows
    store.candidate("LogisticRegression_subset", STEADY.mean(), folds=STEADY)
    store.candidate(WINNER, RESTLESS.mean(), folds=RESTLESS, learned=learned)
    # when
    report = make_report(EXPERIMENT, METRIC)
    # then
    assert (report.winner, report.tied) == (WINNER, [])
    assert "Not every run recorded scores of the same folds" in report.rule


def test_means_decide_where_the_table_has_no_repetitions(store):
    run_id = store.candidate(WINNER, 0.9)
    store.client.log_table(run_id, pd.DataFrame({"fold": [0, 1], "f1": [0.9, 0.9]}), "fold_scores.json")
    assert "the best mean wins" in make_report(EXPERIMENT, METRIC).rule


# What is written


def test_report_has_each_group_in_the_order_of_the_rule(store, tmp_path):
    # given
    for name, value in [("RandomForest_subset", 0.8), (WINNER, 0.9), ("RandomForest_basic", 0.6), (WINNER, 1.0)]:
        store.candidate(name, value)
    # when
    write_report(make_report(EXPERIMENT, METRIC), tmp_path / "there/is/none")
    # then
    text = (tmp_path / "there/is/none/experiment_report.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    rows = [re.split(r" *\| *", line)[1:-1] for line in lines]
    assert rows == [
        ["group", "runs", "mean", "lowest", "highest"],
        [WINNER, "2", "0.9500", "0.9000", "1.0000"],
        ["RandomForest_subset", "1", "0.8000", "0.8000", "0.8000"],
        ["RandomForest_basic", "1", "0.6000", "0.6000", "0.6000"],
    ]
    assert r"Scores: validation_f1 on iris_validation \(digest c0ffee00\)." in text
    assert (tmp_path / "there/is/none/comparison.png").read_bytes().startswith(b"\x89PNG")


def test_chart_shows_means_and_ranges_with_names_as_they_are(store):
    # given a group of two runs, and a name that matplotlib would read as a formula
    for name, value in [("B", 0.7), ("B", 0.9), ("price in $, cost in $", 0.6)]:
        store.candidate(name, value)
    # when
    (axes,) = chart(make_report(EXPERIMENT, METRIC)).axes
    # then
    assert [label.get_text() for label in axes.get_yticklabels()] == ["price in $, cost in $", "B"]
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())
    assert axes.lines[0].get_xdata().tolist() == [0.6, 0.8]
    (ranges,) = axes.collections
    assert [part[:, 0].tolist() for part in ranges.get_segments()] == [[0.6, 0.6], [0.7, 0.9]]


HOSTILE = {
    "[x](javascript:alert(1)) a|b\n# c": r"\[x\]\(javascript:alert\(1\)\) a\|b \# c",
    "![x](http://127.0.0.1/x) <script>&": r"\!\[x\]\(http://127.0.0.1/x\) &lt;script>&amp;",
    r"\[x\](y) `z` *a* __b__ c_d ~e~ $f$": r"\\\[x\\\]\(y\) \`z\` \*a\* \_\_b\_\_ c_d \~e\~ \$f\$",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_escaped_for_markdown(text):
    """Attack 38."""
    assert in_markdown(text) == HOSTILE[text]


@pytest.mark.extended  # it takes long
def test_markdown_in_the_store_does_not_live_in_the_page_of_the_report(store, tmp_path):
    """Attack 38. The page is that of `make report`."""
    # given names, tags and datasets of a stranger
    for text in HOSTILE:
        store.candidate("A", 0.9, digest=text, tags={"model": text})
    store.candidate("A", 0.9, status="FAILED", tags={"model": "[x](javascript:alert(2))"})
    store.client.rename_experiment(store.experiment, "[x](javascript:alert(3))")
    # when
    write_report(make_report("[x](javascript:alert(3))", METRIC, by="model"), tmp_path / "reports")
    command = [sys.executable, str(ROOT / "tools/report_page.py"), str(tmp_path / "reports"), "page.html"]
    process = finished(command, tmp_path, environment(tmp_path), limit=60)
    # then
    assert process.returncode == 0, process.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    body = page[page.index("<body") :]
    assert 'href="javascript' not in body
    assert '127.0.0.1/x"' not in body
    assert "<script>&" not in body


def test_nothing_is_written_to_the_store(store, tmp_path):
    # given
    store.candidate(WINNER, STEADY.mean(), folds=STEADY)
    store.candidate("RandomForest_basic", RESTLESS.mean(), folds=RESTLESS)
    before = content(store)
    # when
    write_report(make_report(EXPERIMENT, METRIC), tmp_path / "reports")
    # then
    assert content(store) == before


# Refusals


def test_experiment_with_nothing_to_compare_is_refused_with_the_reasons(store):
    store.candidate(WINNER, 0.9, status="RUNNING")
    with pytest.raises(InvalidInputError, match=f"no finished run to compare. running: {WINNER}$"):
        make_report(EXPERIMENT, METRIC)


def test_experiment_without_metrics_is_refused(store):
    store.run(WINNER)
    with pytest.raises(InvalidInputError, match="No run has logged a metric"):
        make_report(EXPERIMENT)


@pytest.mark.parametrize("name", ["iris", EXPERIMENT])
def test_unknown_or_deleted_experiment_is_refused(store, name):
    store.client.delete_experiment(store.experiment)
    with pytest.raises(InvalidInputError, match=f"no active experiment '{name}'"):
        make_report(name)


# The command


def lifecycle(*arguments):
    """Run the command in this process and in the current folder."""
    return CliRunner().invoke(main, ["report", *arguments])


def test_command_takes_tag_and_folder_and_prints_json(store):
    # given two groups with folds, one of which has two runs
    store.candidate("A", STEADY.mean(), folds=STEADY)
    for change in (0.1, -0.1):
        store.candidate("B_basic", STEADY.mean() + change, folds=STEADY + change)
    # when
    result = lifecycle(EXPERIMENT, "--metric", METRIC, "--by", "model", "--output", "here", "--json")
    # then
    assert (result.exit_code, result.stderr) == (0, "")
    said = json.loads(result.stdout)
    assert (said["winner"], said["tied"]) == ("A", ["B"])
    assert [(group["group"], group["runs"]) for group in said["groups"]] == [("A", 1), ("B", 2)]
    assert (store.folder / "here/experiment_report.md").is_file()


@pytest.mark.parametrize("experiment", ["/elsewhere", ".."])
def test_command_stays_below_the_current_folder_whatever_the_name(store, experiment):
    store.client.rename_experiment(store.experiment, experiment)
    store.candidate(WINNER, 0.9)
    assert lifecycle(experiment, "--metric", METRIC).exit_code == 0
    (written,) = (store.folder / "reports").iterdir()
    assert (written / "experiment_report.md").is_file()


def test_folds_of_repeated_runs_count_by_their_mean(store):
    # given two runs of one combination, which together equal the other in each fold
    store.candidate(WINNER, STEADY.mean(), folds=STEADY)
    for change in (0.1, -0.1):
        store.candidate("RandomForest_basic", STEADY.mean() + change, folds=STEADY + change)
    # then
    report = make_report(EXPERIMENT, METRIC)
    assert report.groups.loc["RandomForest_basic", "better_by"] == pytest.approx(0, abs=1e-12)
    assert report.tied == ["RandomForest_basic"]
