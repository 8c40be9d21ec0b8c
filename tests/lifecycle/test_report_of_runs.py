"""report and ranking: the true winner, from stores that are written run by run."""

import csv
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
from execution import environment, finished, snapshot
from matplotlib.container import BarContainer
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

from mlflow_lifecycle.cli import main
from mlflow_lifecycle.comparison import folds_interval
from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.report import charts, make_report, markdown, write

EXPERIMENT = "iris_classification"
MODEL = "iris_classification_best_model"
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
        model, _, feature_set = name.partition("_")
        tags = {"model": model, "feature_set": feature_set} | (tags or {})
        tags = {key: str(value) for key, value in tags.items() if value is not None}
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
    return [item.name for item in report.combinations]


def content(store):
    """Return all rows of the store, and all files beside it."""
    with closing(sqlite3.connect(store.folder / "mlflow.db")) as database:
        return list(database.iterdump()), snapshot(store.folder / "mlruns")


# Who is compared


def test_what_was_not_made_to_be_compared_is_counted_and_cannot_win(store):
    # given a candidate, a search whose trial is better, and final evaluations that have its metric, too
    store.candidate(WINNER, 0.9)
    search = store.run("search", tags={"search": "true", "feature_set": None})
    store.candidate("RandomForest_squared", 0.95, tags={"mlflow.parentRunId": search})
    store.candidate("Old_basic", 0.94, tags={"final_evaluation": "true"})
    # when
    report = make_report(EXPERIMENT)
    # then
    assert names(report) == [WINNER]
    assert report.left_out == {}
    assert "Not meant to be compared: final evaluations (1), searches, trials and others (2)." in markdown(report)


@pytest.mark.parametrize("value", ["true", "True", "TRUE"])
def test_final_evaluation_is_known_however_true_is_written(store, value):
    store.candidate(WINNER, 0.9)
    store.candidate("RandomForest_basic", 0.95, tags={"final_evaluation": value})
    assert names(make_report(EXPERIMENT)) == [WINNER]


def test_final_evaluation_is_known_when_mlflow_was_given_a_truth_value(store):
    # given a candidate, and a better run whose tag is True and not a text
    store.candidate(WINNER, 0.9)
    tags = {"model": "RandomForest", "feature_set": "basic", "final_evaluation": True}
    with mlflow.start_run(experiment_id=store.experiment, tags=tags) as run:
        mlflow.log_metric("validation_f1", 0.95)
    store.data(run.info.run_id, "c0ffee00")
    # then
    assert names(make_report(EXPERIMENT)) == [WINNER]


def test_run_that_says_it_is_no_final_evaluation_is_compared(store):
    store.candidate(WINNER, 0.9, tags={"final_evaluation": False})
    assert names(make_report(EXPERIMENT)) == [WINNER]


def test_runs_without_result_are_left_out_with_the_reason(store):
    # given a run to compare, and others that are better and not finished, failed, or without a number
    store.candidate(WINNER, 0.9)
    store.candidate("RandomForest_squared", 0.99, status="RUNNING")
    store.candidate("LogisticRegression_subset", 0.98, status="FAILED")
    store.candidate("LogisticRegression_subset", 0.97, status="FAILED")
    store.run("Unmeasured_basic", validation_accuracy=0.96)
    store.candidate("Undefined_basic", float("nan"))
    # when
    report = make_report(EXPERIMENT)
    # then
    assert names(report) == [WINNER]
    assert re.findall("^- (.*)", markdown(report), re.MULTILINE) == [
        "running: RandomForest_squared",
        "failed: LogisticRegression_subset (2 runs)",
        "no validation_f1: Unmeasured_basic",
        "validation_f1 is not a number: Undefined_basic",
    ]


def test_deleted_run_appears_nowhere(store):
    store.candidate(WINNER, 0.9)
    store.client.delete_run(store.candidate("Deleted_basic", 0.97))
    assert "Deleted" not in markdown(make_report(EXPERIMENT))


# On the same rows


def test_runs_on_other_rows_are_left_out_with_the_reason(store):
    # given two runs on the same rows, and a better one on others
    store.candidate(WINNER, 0.9)
    store.candidate("RandomForest_basic", 0.8)
    store.candidate("RandomForest_squared", 0.99, digest="badc0de")
    # when
    report = make_report(EXPERIMENT)
    # then
    assert names(report) == [WINNER, "RandomForest_basic"]
    assert report.rows == "iris_validation (digest c0ffee00)"
    assert report.left_out == {"scored on other rows: iris_validation (digest badc0de)": ["RandomForest_squared"]}


def test_run_that_did_not_record_its_rows_is_left_out_with_the_reason(store):
    store.candidate(WINNER, 0.9)
    run_id = store.run("RandomForest_basic", validation_f1=0.95)
    store.data(run_id, "c0ffee00", context="train")
    assert make_report(EXPERIMENT).left_out == {"no record of the rows that it was scored on": ["RandomForest_basic"]}


def test_sha256_goes_before_the_digest(store):
    # given three runs with one digest, of which one has another SHA-256, and one the same in capitals
    store.candidate(WINNER, 0.9, sha256="ab" * 32)
    store.candidate("RandomForest_squared", 0.99, sha256="cd" * 32)
    store.candidate("RandomForest_basic", 0.8, sha256="AB" * 32)
    # when
    report = make_report(EXPERIMENT)
    # then
    assert names(report) == [WINNER, "RandomForest_basic"]
    assert report.rows == "iris_validation (SHA-256 abababababab)"
    assert list(report.left_out) == ["scored on other rows: iris_validation (SHA-256 cdcdcdcdcdcd)"]


def test_runs_with_the_same_sha256_and_other_digests_are_compared(store):
    store.candidate(WINNER, 0.9, sha256="ab" * 32)
    store.candidate("RandomForest_basic", 0.8, sha256="ab" * 32, digest="badc0de")
    assert names(make_report(EXPERIMENT)) == [WINNER, "RandomForest_basic"]


def test_of_groups_of_the_same_size_the_one_with_the_newest_run_is_compared(store):
    # given two runs on each of two sets of rows, in turns
    for digest in ("c0ffee00", "badc0de", "badc0de", "c0ffee00"):
        store.candidate(f"Model_{digest}", 0.9, digest=digest)
    # then
    assert names(make_report(EXPERIMENT)) == ["Model_c0ffee00"]


@pytest.mark.parametrize("contexts", [("test", "evaluation"), ("evaluation",), ("validation", "test")])
def test_rows_are_those_of_the_first_context_that_a_run_has(store, contexts):
    # given two runs that share the rows of the first of their contexts and no others
    for name, others in [(WINNER, "0ther"), ("RandomForest_basic", "an0ther")]:
        run_id = store.run(name, validation_f1=0.9)
        for context in contexts:
            store.data(run_id, "c0ffee00" if context == contexts[0] else others, context)
    # then
    report = make_report(EXPERIMENT)
    assert names(report) == [WINNER, "RandomForest_basic"]
    assert report.rows == f"iris_{contexts[0]} (digest c0ffee00)"


# The order: by means


def test_highest_mean_wins_where_no_folds_are_recorded(store):
    store.candidate("RandomForest_subset", 0.8)
    store.candidate(WINNER, 0.9)
    report = make_report(EXPERIMENT)
    assert f"**{WINNER}** wins with a validation_f1 of 0.9000. No other combination is tied" in markdown(report)
    assert "The rule: the highest mean wins" in markdown(report)


def test_equals_are_tied_and_the_one_that_began_first_wins(store):
    # given three combinations that are equal, the last by its last bit even better
    store.candidate("RandomForest_subset", 0.8)
    store.candidate(WINNER, 0.9)
    store.candidate("LogisticRegression_squared", 0.9)
    store.candidate("RandomForest_basic", 0.9 + 2e-16)
    # when
    report = make_report(EXPERIMENT)
    # then
    assert "Tied with LogisticRegression_squared, RandomForest_basic." in markdown(report)
    assert names(report) == [WINNER, "LogisticRegression_squared", "RandomForest_basic", "RandomForest_subset"]


def test_repeated_runs_count_by_their_mean_and_not_by_the_best_of_them(store):
    # given a combination whose best run is better than all others, and whose mean is not
    for value in (0.99, 0.70, 0.80):
        store.candidate("RandomForest_basic", value)
    store.candidate(WINNER, 0.9)
    # when
    report = make_report(EXPERIMENT)
    # then
    assert report.winner == WINNER
    assert "| RandomForest_basic | 3 | 0.8300 (0.7000 to 0.9900) |" in markdown(report)
    assert "Compared: 4 runs of 2 combinations" in markdown(report)


def test_winner_of_several_runs_is_named_with_mean_range_and_their_number(store):
    store.candidate(WINNER, 0.8)
    store.candidate(WINNER, 0.9)
    assert "wins with a validation_f1 of 0.8500 (0.8000 to 0.9000), the mean of 2 runs." in markdown(
        make_report(EXPERIMENT)
    )


def test_combinations_with_one_name_in_two_ways_are_kept_apart(store):
    store.candidate("A_b_c", 0.9)
    store.candidate("A_b_c", 0.8, tags={"model": "A_b", "feature_set": "c"})
    assert [(item.model, item.feature_set) for item in make_report(EXPERIMENT).combinations] == [
        ("A", "b_c"),
        ("A_b", "c"),
    ]


def test_other_metric_is_compared_by_if_asked_for(store):
    for name, f1, recall in [(WINNER, 0.9, 0.1), ("RandomForest_basic", 0.8, 0.7)]:
        store.data(store.run(name, validation_f1=f1, recall=recall), "c0ffee00")
    report = make_report(EXPERIMENT, metric="recall")
    assert report.winner == "RandomForest_basic"
    assert list(report.combinations[0].scores) == ["recall", "validation_f1"]


# The order: by folds


def test_difference_that_folds_do_not_confirm_does_not_count(store):
    # given a combination with a higher mean, which varies from fold to fold more than it is better
    store.candidate(WINNER, STEADY.mean(), folds=STEADY)
    store.candidate("RandomForest_basic", RESTLESS.mean(), folds=RESTLESS)
    # when
    report = make_report(EXPERIMENT)
    # then the simpler one wins, the other is tied with it, and the interval is shown
    interval = folds_interval(RESTLESS, STEADY, test_share=0.2)
    assert (report.winner, report.tied) == (WINNER, ["RandomForest_basic"])
    found = report.combinations[1].against_winner
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert f"| {interval} |" in markdown(report)
    assert "The rule: a difference counts when its 95 % interval" in markdown(report)


def test_difference_that_folds_confirm_decides_against_the_simpler_one(store):
    store.candidate("LogisticRegression_subset", STEADY.mean(), folds=STEADY)
    better = STEADY + 0.01 + 0.001 * np.tile([-1, 0, 1, 0, 0], 2)
    store.candidate(WINNER, better.mean(), folds=better)
    report = make_report(EXPERIMENT)
    assert (report.winner, report.tied) == (WINNER, [])
    assert names(report) == [WINNER, "LogisticRegression_subset"]


def test_folds_of_repeated_runs_count_by_their_mean(store):
    # given two runs of one combination, which together equal the other in each fold
    store.candidate(WINNER, STEADY.mean(), folds=STEADY)
    for change in (0.1, -0.1):
        store.candidate("RandomForest_basic", STEADY.mean() + change, folds=STEADY + change)
    # then
    (_, other) = make_report(EXPERIMENT).combinations
    assert (other.against_winner.difference, other.against_winner.counts) == (pytest.approx(0, abs=1e-12), False)


@pytest.mark.parametrize("folds", [None, STEADY[:5], [0.1] * 9 + [float("nan")]], ids=["none", "fewer", "NaN"])
def test_means_decide_where_not_all_recorded_scores_of_the_same_folds(store, folds):
    # given a simpler combination with folds, and a better one without them, with fewer, or with a gap
    store.candidate("LogisticRegression_subset", 0.9, folds=STEADY)
    store.candidate(WINNER, 0.91, folds=folds)
    # when
    report = make_report(EXPERIMENT)
    # then
    assert report.winner == WINNER
    assert "Not every run recorded scores of the same folds" in markdown(report)
    assert "minus the winner" not in markdown(report)


@pytest.mark.parametrize("learned", ["0ther", None], ids=["other rows", "no record"])
def test_means_decide_where_not_all_recorded_the_same_training_rows(store, learned):
    # given two combinations with scores of as many folds, which are not known to divide the same rows
    store.candidate("LogisticRegression_subset", STEADY.mean(), folds=STEADY)
    store.candidate(WINNER, RESTLESS.mean(), folds=RESTLESS, learned=learned)
    # when
    report = make_report(EXPERIMENT)
    # then
    assert (report.winner, report.tied) == (WINNER, [])
    assert "Not every run recorded scores of the same folds" in report.rule


@pytest.mark.parametrize("columns", [{"repeat": [0, 1], "fold": [0, 0]}, {"fold": [0, 1]}], ids=["one", "no repeat"])
def test_means_decide_where_the_table_has_no_two_folds(store, columns):
    run_id = store.candidate(WINNER, 0.9)
    store.client.log_table(run_id, pd.DataFrame(columns | {"f1": [0.9, 0.9]}), "fold_scores.json")
    assert "the highest mean wins" in make_report(EXPERIMENT).rule


# Final evaluation, production, data


def test_newest_finished_final_evaluation_with_scores_is_told(store):
    # given final evaluations, of which the newest have no score or are not finished
    store.candidate(WINNER, 0.9)
    store.run("Old_basic", tags={"final_evaluation": "true"}, test_accuracy=0.7, test_f1=0.7)
    final = store.run(WINNER, tags={"final_evaluation": True}, test_accuracy=0.875, test_f1=0.85)
    store.data(final, "7e57", context="test")
    store.run("Unscored_basic", tags={"final_evaluation": True}, test_f1=float("nan"))
    store.run("Running_basic", "RUNNING", tags={"final_evaluation": True}, test_accuracy=1.0, test_f1=1.0)
    # then
    assert make_report(EXPERIMENT).final_evaluation == (
        "The newest is LogisticRegression_basic: LogisticRegression on basic, which won the comparison. "
        "On the test rows: test_accuracy 0.8750, test_f1 0.8500. Data: iris_test 7e57."
    )


def test_final_evaluation_of_another_combination_is_told_to_be_one(store):
    store.candidate(WINNER, 0.9)
    store.run("RandomForest_basic", tags={"final_evaluation": True}, test_f1=0.8)
    assert "on basic, which did not win the comparison." in make_report(EXPERIMENT).final_evaluation
    assert make_report(EXPERIMENT).final_evaluation.endswith("Data: not recorded.")


def test_missing_final_evaluation_is_told(store):
    store.candidate(WINNER, 0.9)
    assert make_report(EXPERIMENT).final_evaluation == "There is none yet."


def test_version_in_production_and_its_run_are_named(store):
    final = store.candidate(WINNER, 0.9)
    store.client.create_registered_model(MODEL)
    for _ in range(2):
        store.client.create_model_version(MODEL, "nowhere", final)
    store.client.set_registered_model_alias(MODEL, "production", "1")
    assert make_report(EXPERIMENT).production == f"Version 1 of {MODEL}, made by {WINNER}, is in production."


def test_version_without_a_run_is_named_without_one(store):
    store.candidate(WINNER, 0.9)
    store.client.create_registered_model("other")
    store.client.create_model_version("other", "nowhere")
    store.client.set_registered_model_alias("other", "production", "1")
    report = make_report(EXPERIMENT, registered_model="other")
    assert report.production == "Version 1 of other, made by a run that is not on record, is in production."


@pytest.mark.parametrize("registered", [True, False])
def test_model_without_the_alias_is_told_not_to_be_in_production(store, registered):
    store.candidate(WINNER, 0.9)
    if registered:
        store.client.create_registered_model(MODEL)
    assert make_report(EXPERIMENT).production == f"No version of {MODEL} is in production."


def test_failure_of_the_store_is_not_taken_for_a_missing_version(store, monkeypatch):
    # given a registry that is elsewhere and gives no answer
    store.candidate(WINNER, 0.9)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
    # then
    with pytest.raises(mlflow.MlflowException, match=r"127\.0\.0\.1"):
        make_report(EXPERIMENT)


def test_data_of_the_winner_are_named(store):
    store.data(store.candidate(WINNER, 0.9), "7ea1", context="train")
    store.candidate("RandomForest_basic", 0.8)
    assert "Data of the winner: iris_train 7ea1, iris_validation c0ffee00." in markdown(make_report(EXPERIMENT))


# What is written


def test_table_and_summary_have_each_combination_in_the_order_of_the_rule(store, tmp_path):
    # given
    for name, value in [("RandomForest_subset", 0.8), (WINNER, 0.9), ("RandomForest_basic", 0.6), (WINNER, 1.0)]:
        store.candidate(name, value)
    report = make_report(EXPERIMENT)
    # when
    write(report, tmp_path / "there/is/none")
    # then
    with (tmp_path / "there/is/none/model_summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("combination", "runs", "validation_f1", "validation_f1_lowest", "validation_f1_highest")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        (WINNER, "2", "0.9500", "0.9000", "1.0000"),
        ("RandomForest_subset", "1", "0.8000", "0.8000", "0.8000"),
        ("RandomForest_basic", "1", "0.6000", "0.6000", "0.6000"),
    ]
    text = (tmp_path / "there/is/none/experiment_report.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\w+_\w+) \|", text, flags=re.MULTILINE) == [row["combination"] for row in rows]


def test_summary_has_the_intervals(store, tmp_path):
    store.candidate(WINNER, STEADY.mean(), folds=STEADY)
    store.candidate("RandomForest_basic", RESTLESS.mean(), folds=RESTLESS)
    write(make_report(EXPERIMENT), tmp_path)
    rows = pd.read_csv(tmp_path / "model_summary.csv")
    interval = folds_interval(RESTLESS, STEADY, test_share=0.2)
    ends = rows.loc[1, ["minus_winner_low", "minus_winner_high"]].astype(float)
    assert [*ends] == pytest.approx([interval.low, interval.high], abs=1e-4)


def test_charts_show_means_with_their_range(store):
    # given a combination with two runs, one with one, and feature sets that only one of the models has
    for name, value in [("B_basic", 0.7), ("B_basic", 0.9), ("A_basic", 0.6), ("A_subset", 0.5)]:
        store.candidate(name, value)
    # when
    drawn = charts(make_report(EXPERIMENT))
    # then the bars are grouped by feature set, and the one range is a line
    (axes,) = drawn["all_runs_comparison.png"].axes
    assert axes.get_title() == "validation_f1 of all combinations, by feature set"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["basic", "subset"]
    bars = [container for container in axes.containers if isinstance(container, BarContainer)]
    heights = {each.get_label(): [bar.get_height() for bar in each] for each in bars}
    assert heights == {"A": [0.6, 0.5], "B": [0.8]}
    lines = [part[:, 1].tolist() for each in bars for part in each.errorbar.lines[2][0].get_segments()]
    assert [line for line in lines if line[0] < line[1]] == [pytest.approx([0.7, 0.9])]
    # and each model stands once, on its best feature set, with all of its scores
    (axes,) = drawn["model_comparison.png"].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["B\non basic", "A\non basic"]
    assert len([container for container in axes.containers if isinstance(container, BarContainer)]) == 4


@pytest.mark.parametrize("name", ["model_comparison.png", "all_runs_comparison.png"])
def test_charts_are_pictures_that_the_report_shows(store, tmp_path, name):
    store.candidate(WINNER, 0.9)
    write(make_report(EXPERIMENT), tmp_path)
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert f"]({name})" in (tmp_path / "experiment_report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", ["a_$_b_$", "price in $, cost in $", "_base", "a^b"])
def test_charts_show_each_name_as_it_stands_in_the_store(store, tmp_path, model):
    # given a model, and a feature set, with a name that matplotlib would read as a formula, or leave out
    tags = {"model": model, "feature_set": model}
    store.candidate(WINNER, 0.9)
    store.candidate("other", 0.8, tags=tags)
    # when
    drawn = charts(make_report(EXPERIMENT))
    write(make_report(EXPERIMENT), tmp_path)
    # then
    figure = drawn["all_runs_comparison.png"]
    named = figure.legends[0].get_texts(), figure.axes[0].get_xticklabels()
    for texts in named:
        assert model in [text.get_text() for text in texts]
        assert not any(text.get_parse_math() for text in texts)


def test_names_in_the_store_cannot_change_the_form_of_the_report(store):
    store.candidate("A|B_<script>\nx", 0.9)
    text = markdown(make_report(EXPERIMENT))
    assert r"| A\|B_&lt;script> x | 1 |" in text
    assert "<script" not in text


def test_nothing_is_written_to_the_store(store, tmp_path):
    # given
    store.candidate(WINNER, STEADY.mean(), folds=STEADY)
    store.candidate("RandomForest_basic", RESTLESS.mean(), folds=RESTLESS)
    before = content(store)
    # when
    write(make_report(EXPERIMENT), tmp_path / "reports")
    # then
    assert content(store) == before


# Refusals


def test_experiment_without_a_run_is_refused_with_the_remedy(store):
    with pytest.raises(InvalidInputError, match=r"no finished run to compare\. Execute guide 03 first\."):
        make_report(EXPERIMENT)


def test_experiment_with_nothing_to_compare_is_refused_with_the_reasons(store):
    store.candidate(WINNER, 0.9, status="RUNNING")
    store.run("RandomForest_basic", validation_f1=0.9)
    with pytest.raises(InvalidInputError) as refusal:
        make_report(EXPERIMENT)
    causes = "running: LogisticRegression_basic; no record of the rows that it was scored on: RandomForest_basic"
    assert str(refusal.value) == (
        f"iris_classification has no finished run to compare. Left out: {causes}. Execute guide 03 first."
    )


def test_unknown_experiment_is_refused_with_those_that_are_there(store):
    with pytest.raises(InvalidInputError, match=r"'iris' is not in this store.*: Default, iris_classification"):
        make_report("iris")


def test_deleted_experiment_is_refused(store):
    store.candidate(WINNER, 0.9)
    store.client.delete_experiment(store.experiment)
    with pytest.raises(InvalidInputError, match="'iris_classification' is deleted"):
        make_report(EXPERIMENT)


# The command


def lifecycle(*arguments):
    """Run the command in this process and in the current folder."""
    return CliRunner().invoke(main, ["report", *arguments])


def test_command_writes_the_report_below_the_current_folder(store):
    store.candidate(WINNER, 0.9)
    result = lifecycle(EXPERIMENT)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        f"{WINNER} wins with a validation_f1 of 0.9000. No other combination is tied with it.\n"
        "The report: reports/iris_classification/experiment_report.md\n"
    )
    files = ["all_runs_comparison.png", "experiment_report.md", "model_comparison.png", "model_summary.csv"]
    assert sorted(path.name for path in (store.folder / "reports" / EXPERIMENT).iterdir()) == files


def test_command_takes_metric_model_and_folder(store):
    store.data(store.run(WINNER, recall=0.9), "c0ffee00")
    result = lifecycle(EXPERIMENT, "--metric", "recall", "--registered-model", "mine", "--output", "here")
    assert result.exit_code == 0, result.stderr
    text = (store.folder / "here/experiment_report.md").read_text(encoding="utf-8")
    assert "a recall of 0.9000" in text
    assert "No version of mine is in production." in text


@pytest.mark.extended  # it takes long
def test_command_prints_json_and_nothing_else(store):
    # given two combinations with folds, one of which has two runs
    store.candidate(WINNER, STEADY.mean(), folds=STEADY)
    for change in (0.1, -0.1):
        store.candidate("RandomForest_basic", STEADY.mean() + change, folds=STEADY + change)
    # when
    command = [sys.executable, "-m", "mlflow_lifecycle", "report", EXPERIMENT, "--json"]
    process = finished(command, store.folder, environment(store.folder), limit=120)
    # then
    assert process.stderr == ""
    said = json.loads(process.stdout)
    assert (said["winner"], said["tied"]) == (WINNER, ["RandomForest_basic"])
    assert said["combinations"][1]["scores"]["validation_f1"] == pytest.approx(
        {"mean": 0.94, "lowest": 0.84, "highest": 1.04}
    )
    assert said["combinations"][1]["against_winner"]["low"] < 0


@pytest.mark.parametrize("experiment", ["../../elsewhere", "/elsewhere", ".."])
def test_command_stays_below_the_current_folder_whatever_the_name(store, experiment):
    store.client.rename_experiment(store.experiment, experiment)
    store.candidate(WINNER, 0.9)
    assert lifecycle(experiment).exit_code == 0
    (written,) = (store.folder / "reports").iterdir()
    assert (written / "experiment_report.md").is_file()


def test_command_refuses_in_one_line_what_cannot_be_compared(store):
    store.candidate(WINNER, 0.9, status="RUNNING")
    result = lifecycle(EXPERIMENT)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("Error: iris_classification has no finished run to compare.")
    assert not (store.folder / "reports").exists()


def test_command_makes_no_store_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    result = lifecycle(EXPERIMENT)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert re.search("There is no store at sqlite:.* yet. Make one first: make run", result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_command_reads_the_store_that_the_variable_names(store, tmp_path, monkeypatch):
    store.candidate(WINNER, 0.9)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert lifecycle(EXPERIMENT).exit_code == 0
    assert (tmp_path / "elsewhere/reports" / EXPERIMENT / "experiment_report.md").is_file()


def test_command_refuses_a_server_that_is_down_in_one_line_without_the_password(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    result = lifecycle(EXPERIMENT)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "Start the server" in result.stderr
    assert "secret" not in result.stderr


def test_command_refuses_a_folder_that_cannot_be_made_in_one_line(store):
    store.candidate(WINNER, 0.9)
    (store.folder / "taken").touch()
    result = lifecycle(EXPERIMENT, "--output", "taken/here")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "taken" in result.stderr
