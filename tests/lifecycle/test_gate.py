"""The gate: each check, failing for its own reason."""

import re
import shutil
import sys
from dataclasses import replace

import matplotlib.pyplot as plt
import mlflow
import pytest
from execution import ROOT
from kernels import running_kernel
from mlflow.models import infer_signature
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from sklearn.datasets import load_diabetes
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import log_loss, mean_absolute_error
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from versions import LOCK, iris_rows, save, store_in

from mlflow_lifecycle.datasets import fingerprint, read_table
from mlflow_lifecycle.exceptions import GateClosedError
from mlflow_lifecycle.pins import locked, read_pins
from mlflow_lifecycle.releases.gate import (
    DEFAULT_CHECKS,
    CheckResult,
    GateContext,
    GateSettings,
    Verdict,
    check_exact_pins,
    check_fresh_environment,
    check_input_example,
    check_signature,
    check_test_rows,
    gate,
    gate_context,
)
from mlflow_lifecycle.signing.verify import Statement, Verified

ROWS_TRAIN, ROWS_TEST = train_test_split(iris_rows(), test_size=0.2, stratify=iris_rows()["species"], random_state=42)
THRESHOLDS = {"accuracy_score": 0.8}


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    """Give the function that makes a version, as it is handed out once it is verified."""
    packages = tmp_path_factory.mktemp("packages") / "packages.txt"
    packages.write_text(locked(read_pins(ROOT / "model_requirements.txt"), LOCK))

    def make(model=None, number: str = "2", rows=ROWS_TRAIN, **options) -> Verified:
        root = tmp_path_factory.mktemp("version")
        rows.to_parquet(root / "training_rows.parquet", index=False)
        statement = Statement("iris", number, "0", "candidate", fingerprint(rows))
        folder = save(root / "model", model, rows, **options)
        return Verified(f"models:/iris/{number}", statement, folder, packages, root / "training_rows.parquet", "0")

    return make


@pytest.fixture(scope="module")
def good(version):
    """Give a version that is good."""
    return version()


@pytest.fixture(scope="module")
def cautious(version):
    """Give a version that is right as often, nearly, and much less sure of it."""
    return version(LogisticRegression(C=0.01, max_iter=1000), "1")


def context_of(
    candidate, baseline=None, rows=ROWS_TEST, target="species", thresholds=THRESHOLDS, rebuild=False, **settings
) -> GateContext:
    return gate_context(candidate, baseline, rows, target, GateSettings(thresholds, rebuild=rebuild, **settings))


@pytest.fixture(scope="module")
def judge(tmp_path_factory, no_pictures):
    """Give the function that takes a version through the gate in a run, without building its environment."""

    def check(*arguments, **options) -> Verdict:
        context = context_of(*arguments, **options)
        with mlflow.start_run():
            return gate(context)

    with pytest.MonkeyPatch.context() as monkeypatch, store_in(tmp_path_factory.mktemp("store"), monkeypatch):
        yield check


def results(verdict: Verdict) -> dict[str, str]:
    return {check.name: check.result for check in verdict.checks}


def detail(verdict: Verdict, name: str) -> str:
    return {check.name: check.detail for check in verdict.checks}[name]


def test_good_version_passes_every_check_but_the_one_left_out(judge, good, cautious):
    verdict = judge(good, cautious)
    assert results(verdict).pop("fresh environment") == "not checked"
    assert list(results(verdict).values()).count("passed") == len(verdict.checks) - 1 == 6


def test_scores_are_those_of_mlflow_and_in_the_run(judge, good, cautious):
    verdict = judge(good, cautious)
    model = mlflow.sklearn.load_model(str(good.folder))
    features, target = ROWS_TEST.drop(columns="species"), ROWS_TEST["species"]
    assert verdict.metrics["accuracy_score"] == (model.predict(features) == target).mean()
    assert verdict.metrics["log_loss"] == pytest.approx(log_loss(target, model.predict_proba(features)))
    assert plt.get_fignums() == []
    (run,) = mlflow.search_runs(output_format="list", max_results=1)
    assert run.data.metrics["accuracy_score"] == verdict.metrics["accuracy_score"]


def test_difference_is_that_of_the_log_losses(judge, good, cautious):
    difference = judge(good, cautious).difference
    losses = [
        log_loss(ROWS_TEST["species"], mlflow.sklearn.load_model(str(at.folder)).predict_proba(ROWS_TEST.iloc[:, :4]))
        for at in (cautious, good)
    ]
    assert difference.difference == pytest.approx(losses[0] - losses[1])
    assert difference.low > 0


def test_model_without_probabilities_is_compared_by_accuracy(judge, version):
    dummy = version(DummyClassifier())
    ridge = version(RidgeClassifier())
    difference = judge(ridge, dummy).difference
    features, target = ROWS_TEST.drop(columns="species"), ROWS_TEST["species"]
    shares = [(mlflow.sklearn.load_model(str(at.folder)).predict(features) == target).mean() for at in (ridge, dummy)]
    assert difference.difference == pytest.approx(shares[0] - shares[1])


def test_class_that_the_baseline_does_not_know_counts_against_it(judge, good, version):
    two = ROWS_TRAIN[ROWS_TRAIN["species"] != "virginica"]
    assert judge(good, version(rows=two)).difference.low > 1


# Thresholds


@pytest.mark.parametrize(
    ("thresholds", "result", "text"),
    [
        ({"accuracy_score": 0.8}, "passed", "accuracy_score 0.9667 (95 % interval 0.8333 to 0.9941), at least 0.8"),
        ({"accuracy_score": 0.999}, "failed", "accuracy_score 0.9667 (95 % interval 0.8333 to 0.9941), at least 0.999"),
        ({"log_loss": 0.2}, "passed", "log_loss 0.1589, at most 0.2"),
        ({"accuracy_score": 0.8, "log_loss": 0.1}, "failed", "at least 0.8; log_loss"),
        ({"accuracy": 0.5}, "failed", "accuracy is not among: accuracy_score, "),
        ({"accuracy_score": float("nan")}, "failed", "at least nan"),
    ],
)
@pytest.mark.extended  # it takes long
def test_thresholds_are_a_minimum_or_the_maximum_of_a_loss(judge, good, thresholds, result, text):
    verdict = judge(good, thresholds=thresholds)
    assert results(verdict)["thresholds"] == result
    assert text in detail(verdict, "thresholds")


def test_threshold_that_is_just_reached_is_printed_with_an_interval_that_reaches_far_below(judge, good):
    # given thirty rows, of which the model gets 24 right
    species = ROWS_TEST["species"].to_numpy(copy=True)
    right = mlflow.sklearn.load_model(str(good.folder)).predict(ROWS_TEST.drop(columns="species")) == species
    wrong = {"setosa": "virginica", "versicolor": "setosa", "virginica": "setosa"}
    for place in right.nonzero()[0][:5]:
        species[place] = wrong[species[place]]
    # when
    verdict = judge(good, rows=ROWS_TEST.assign(species=species))
    # then it passes, and a reader sees that it may be right in 63 % only
    assert results(verdict)["thresholds"] == "passed"
    assert detail(verdict, "thresholds") == "accuracy_score 0.8000 (95 % interval 0.6269 to 0.9049), at least 0.8"


def test_gate_without_a_threshold_is_refused(good):
    with pytest.raises(ValueError, match="State at least one threshold"):
        context_of(good, thresholds={})


# The baseline


def test_without_a_baseline_the_thresholds_decide(judge, good):
    assert results(judge(good))["baseline"] == "passed"


def test_worse_version_stays_out(judge, good, cautious):
    verdict = judge(cautious, good)
    assert results(verdict)["baseline"] == "failed"
    with pytest.raises(
        GateClosedError, match=r"baseline failed \(log probability -0\..* not better by more than chance"
    ):
        verdict.require()


def test_equal_version_is_not_better(judge, good):
    assert results(judge(good, replace(good)))["baseline"] == "failed"


@pytest.mark.parametrize(("gain", "result"), [(0.3, "passed"), (0.48, "failed")])
def test_minimum_gain_is_below_the_whole_interval(judge, good, cautious, gain, result):
    verdict = judge(good, cautious, minimum_gain=gain)
    assert verdict.difference.low < 0.48 < verdict.difference.difference
    assert results(verdict)["baseline"] == result


@pytest.mark.parametrize(("margin", "result"), [(0.4, "failed"), (0.6, "passed")])
def test_margin_is_above_the_whole_interval(judge, good, cautious, margin, result):
    verdict = judge(cautious, good, margin=margin)
    assert -0.6 < verdict.difference.low < -0.4
    assert results(verdict)["baseline"] == result


def test_same_predictions_pass_and_others_do_not(judge, good, cautious, version):
    renewed = version(LogisticRegression(max_iter=1000))
    assert results(judge(renewed, good, same_predictions=True))["baseline"] == "passed"
    verdict = judge(cautious, good, same_predictions=True)
    assert results(verdict)["baseline"] == "failed"
    assert "of 30 predictions are the same (probabilities differ by at most 0." in detail(verdict, "baseline")


def test_same_predictions_with_other_probabilities_fail(judge, good, version):
    # given a model that predicts the same classes, a little less sure of them
    other = version(LogisticRegression(C=0.999, max_iter=1000))
    verdict = judge(other, good, same_predictions=True)
    assert detail(verdict, "baseline").startswith("0 of 30 predictions are the same (probabilities differ")
    assert results(verdict)["baseline"] == "failed"


def test_same_predictions_need_a_baseline(judge, good):
    assert results(judge(good, same_predictions=True))["baseline"] == "failed"


@pytest.mark.extended  # it takes long
def test_gate_says_which_difference_the_rows_can_show(judge, good, cautious):
    for verdict in (judge(good, cautious), judge(cautious, good), judge(cautious, good, margin=1)):
        found = re.search(r"show a difference of (\S+) or more with 80 % power", detail(verdict, "baseline"))
        width = verdict.difference.high - verdict.difference.low
        assert float(found[1]) == pytest.approx(width / 2 / 1.96 * 2.8, rel=0.1)


@pytest.mark.parametrize(
    ("rule", "refusal"),
    [
        ({"margin": 0.1, "same_predictions": True}, "State one of"),
        ({"margin": 0.1, "minimum_gain": 0.1}, "State one of"),
        ({"margin": 0}, "must be above 0"),
        ({"margin": float("nan")}, "must be above 0"),
        ({"minimum_gain": -0.1}, "must be 0 or more"),
    ],
)
def test_rule_that_contradicts_itself_is_refused(rule, refusal):
    with pytest.raises(ValueError, match=refusal):
        GateSettings(THRESHOLDS, **rule)


# Regression


@pytest.fixture(scope="module")
def diabetes(version):
    """Give two regressors, the better one first, and test rows."""
    rows = load_diabetes(as_frame=True).frame
    train, test = train_test_split(rows, test_size=0.3, random_state=0)
    better = version(Ridge(alpha=0.1), rows=train, target="target")
    worse = version(Ridge(alpha=100), "1", rows=train, target="target")
    return better, worse, test


ERROR = {"mean_absolute_error": 50.0}


def test_better_regressor_passes_and_a_worse_one_is_refused(judge, diabetes):
    better, worse, rows = diabetes
    verdict = judge(better, worse, rows, "target", ERROR)
    assert set(results(verdict).values()) == {"passed", "not checked"}
    assert detail(verdict, "baseline").startswith("absolute error +")
    verdict = judge(worse, better, rows, "target", ERROR)
    assert results(verdict)["baseline"] == "failed"
    assert results(verdict)["thresholds"] == "failed"


def test_difference_of_regressors_is_that_of_their_mean_absolute_errors(judge, diabetes):
    better, worse, rows = diabetes
    features, target = rows.drop(columns="target"), rows["target"]
    errors = [
        mean_absolute_error(target, mlflow.sklearn.load_model(str(at.folder)).predict(features))
        for at in (worse, better)
    ]
    verdict = judge(better, worse, rows, "target", ERROR)
    assert verdict.difference.difference == pytest.approx(errors[0] - errors[1])
    assert verdict.metrics["mean_absolute_error"] == pytest.approx(errors[1])


def test_target_of_a_regressor_must_be_numeric(diabetes):
    better, _, rows = diabetes
    with pytest.raises(ValueError, match="The target 'target' must be numeric for a regressor, got object"):
        context_of(better, None, rows.assign(target="high"), "target", ERROR)


def test_classifier_is_not_compared_with_a_regressor(judge, diabetes, version):
    better, _, rows = diabetes
    train = load_diabetes(as_frame=True).frame
    other = version(DummyClassifier(), rows=train, target="target")
    verdict = judge(better, other, rows, "target", ERROR)
    assert results(verdict)["baseline"] == "failed"
    assert "A model for regression cannot be compared with one for classification" in detail(verdict, "baseline")


def test_order_of_the_columns_of_the_test_rows_does_not_matter(judge, good, cautious):
    shuffled = ROWS_TEST[ROWS_TEST.columns[::-1]].assign(more=0)
    assert judge(good, cautious, shuffled) == judge(good, cautious)


# The checks


def test_team_adds_a_check_of_its_own(judge, good):
    def check_size(context):
        return CheckResult("size", "failed", f"{len(context.rows)} test rows are too few")

    verdict = judge(good, checks=[*DEFAULT_CHECKS[:-1], check_size])
    with pytest.raises(GateClosedError, match=r"size failed \(30 test rows are too few\)"):
        verdict.require()


def test_check_that_raises_an_error_has_failed(judge, good):
    def check_the_weather(context):
        raise KeyError("rain")

    (check,) = judge(good, checks=[check_the_weather]).checks
    assert check == CheckResult("the weather", "failed", "KeyError: 'rain'")


def test_version_without_training_rows_is_checked_as_far_as_that_goes(judge, good, cautious):
    verdict = judge(replace(good, training_rows=None), cautious)
    assert results(verdict)["test rows"] == "not checked"
    assert detail(verdict, "test rows") == "no training data was signed"
    assert list(results(verdict).values()).count("passed") == 5
    verdict.require()
    with pytest.raises(ValueError, match=r"These columns are missing: petal width \(cm\)"):
        context_of(replace(good, training_rows=None), rows=ROWS_TEST.drop(columns="petal width (cm)"))


def test_rows_without_a_column_are_refused(good):
    with pytest.raises(ValueError, match=r"These columns are missing: petal width \(cm\), species"):
        context_of(good, rows=ROWS_TEST.iloc[:, :3])


def test_target_that_the_version_did_not_learn_from_is_refused_with_the_columns(good):
    refusal = r"training data has no column 'Y'\. The columns are: sepal length \(cm\), .*, species"
    for rows in (ROWS_TEST, ROWS_TEST.assign(Y=0)):
        with pytest.raises(ValueError, match=refusal):
            context_of(good, rows=rows, target="Y")


def test_missing_labels_are_refused_beside_an_unknown_class(good):
    rows = ROWS_TEST.copy()
    rows.iloc[:2, -1] = None
    rows.iloc[2, -1] = "unknown"
    with pytest.raises(ValueError, match="The target 'species' is missing in 2 of 30 test rows"):
        context_of(good, rows=rows)


def test_classes_learned_as_text_are_known_where_a_csv_has_numbers(judge, version, tmp_path):
    # given a version that learned the classes "0", "1" and "2" as text, and test rows in a file
    codes = {"setosa": "0", "versicolor": "1", "virginica": "2"}
    candidate = version(rows=ROWS_TRAIN.replace({"species": codes}))
    ROWS_TEST.replace({"species": codes}).to_csv(tmp_path / "test.csv", index=False)
    rows = read_table(tmp_path / "test.csv")
    assert rows["species"].dtype == int
    # then every check passes, against a baseline, too, and a class that is new is still told
    verdict = judge(candidate, replace(candidate), rows=rows, same_predictions=True)
    assert set(results(verdict).values()) == {"passed", "not checked"}
    assert verdict.metrics["accuracy_score"] > 0.9
    (check,) = [check for check in judge(candidate, rows=rows.replace(2, 3)).checks if check.name == "test rows"]
    assert check.detail.endswith("it never learned these classes: 3")


def test_model_that_cannot_be_scored_fails(judge, good, tmp_path):
    # given a model that takes one column only
    folder = shutil.copytree(good.folder, tmp_path / "model")
    save(tmp_path / "other", rows=ROWS_TRAIN[["petal width (cm)", "species"]])
    shutil.copy(tmp_path / "other/model.skops", folder)
    # then
    verdict = judge(replace(good, folder=folder))
    assert results(verdict) | {"thresholds": "failed", "fresh environment": "not checked"} == results(verdict)


def test_model_that_lost_its_signature_fails(version):
    # given a nullable integer column, for which MLflow drops the signature without a word
    check = check_signature(context_of(version(signature=None, input_example=None)))
    assert (check.result, check.detail) == ("failed", "no input columns")


def test_model_without_an_input_example_fails(version):
    assert check_input_example(context_of(version(input_example=None))).result == "failed"


@pytest.mark.parametrize("line", ["loose>=1", "bare==1.0", ""])
def test_package_without_its_hashes_fails(good, tmp_path, line):
    text = good.packages.read_text() + line if line else ""
    (tmp_path / "packages.txt").write_text(text)
    check = check_exact_pins(context_of(replace(good, packages=tmp_path / "packages.txt")))
    assert check.result == "failed"
    assert line.partition("==")[0] in check.detail


# Has it seen the test rows?


def test_candidate_that_learned_from_the_test_rows_fails(version):
    check = check_test_rows(context_of(version(rows=iris_rows()), rows=ROWS_TEST))
    assert (check.result, check.detail) == ("failed", "30 of 30 are among the 150 training rows")


def test_a_few_equal_rows_are_chance(good):
    mixed = ROWS_TEST.copy()
    mixed.iloc[:3] = ROWS_TRAIN.iloc[:3]
    assert check_test_rows(context_of(good, rows=mixed)).result == "passed"
    mixed.iloc[:4] = ROWS_TRAIN.iloc[:4]
    assert check_test_rows(context_of(good, rows=mixed)).detail == "4 of 30 are among the 120 training rows"
    assert check_test_rows(context_of(good, rows=mixed)).result == "failed"


def test_order_of_rows_and_columns_and_the_type_of_numbers_hide_nothing(version):
    rows = iris_rows().assign(whole=1.0)
    seen = rows.assign(whole=1)[rows.columns[::-1]].sample(30, random_state=0)
    assert (
        check_test_rows(context_of(version(rows=rows), rows=seen)).detail == "30 of 30 are among the 150 training rows"
    )


def test_unknown_classes_of_several_types_fail(good):
    mixed = ROWS_TEST.assign(species=["SETOSA", 1, *ROWS_TEST["species"][2:]])
    assert check_test_rows(context_of(good, rows=mixed)).detail.endswith("it never learned these classes: 1, SETOSA")


def test_rows_of_another_type_fail(good):
    check = check_test_rows(context_of(good, rows=ROWS_TEST.assign(**{"petal width (cm)": "wide"})))
    assert check.result == "failed"
    assert "other types than the training rows" in check.detail


# The environment


def test_environment_with_a_changed_hash_fails(good, tmp_path):
    text = good.packages.read_text().replace("six==1.", "six==1.", 1)
    before, _, after = text.partition("\nsix==")
    (tmp_path / "packages.txt").write_text(f"{before}\nsix=={after.replace('sha256:', 'sha256:0000', 2)}")
    check = check_fresh_environment(context_of(replace(good, packages=tmp_path / "packages.txt"), rebuild=True))
    assert check.result == "failed"
    assert "No environment was built." in check.detail


ODDITY = """
import sys

def odd(features):
    return features if "pytest" in sys.modules else -features
"""


@pytest.mark.extended
def test_model_that_answers_differently_elsewhere_fails(good, tmp_path, monkeypatch):
    # given a model that notices where it is
    (tmp_path / "oddity.py").write_text(ODDITY)
    monkeypatch.syspath_prepend(tmp_path)
    from oddity import odd

    model = make_pipeline(FunctionTransformer(odd), LogisticRegression(max_iter=1000))
    model.fit(ROWS_TRAIN.iloc[:, :4], ROWS_TRAIN["species"])
    options = {"code_paths": [str(tmp_path / "oddity.py")], "skops_trusted_types": ["oddity.odd"]}
    options |= {"pip_requirements": str(ROOT / "model_requirements.txt")}
    signature = infer_signature(ROWS_TRAIN.iloc[:, :4], ROWS_TRAIN["species"])
    mlflow.sklearn.save_model(model, tmp_path / "model", signature=signature, **options)
    # then
    check = check_fresh_environment(context_of(replace(good, folder=tmp_path / "model"), rebuild=True))
    assert check.result == "failed"
    assert "of 30 predictions are the same" in check.detail
    sys.modules.pop("oddity")


def test_verdict_names_every_check_that_failed():
    checks = [CheckResult("one", "failed", "because"), CheckResult("two", "passed", "fine")]
    checks.append(CheckResult("three", "failed", "really"))
    with pytest.raises(GateClosedError) as caught:
        Verdict(checks, {}, None).require()
    assert "one failed (because); three failed (really). The alias stays" in str(caught.value)


@pytest.mark.parametrize("open_before", [0, 1])
@pytest.mark.extended  # it takes long
def test_evaluation_leaves_no_figure_open_and_closes_no_other(judge, good, open_before):
    # given a figure of the caller's, or none
    plt.close("all")
    mine = [plt.figure().number for _ in range(open_before)]
    # when
    judge(good)
    # then
    assert plt.get_fignums() == mine
    plt.close("all")


@pytest.mark.extended  # it takes long
def test_notebook_still_shows_its_figures_after_an_evaluation(tmp_path, good):
    # given a kernel that has shown no figure before
    ROWS_TEST.to_parquet(tmp_path / "rows.parquet")
    sources = f"""
from pathlib import Path
from types import SimpleNamespace
import matplotlib.pyplot as plt, mlflow, pandas as pd
from mlflow_lifecycle.releases.gate import GateSettings, check_thresholds, gate_context
mlflow.set_tracking_uri("sqlite:///{(tmp_path / "mlflow.db").as_posix()}")
rows = pd.read_parquet({str(tmp_path / "rows.parquet")!r})
with mlflow.start_run():
    version = SimpleNamespace(folder=Path({str(good.folder)!r}), training_rows=None)
    check_thresholds(gate_context(version, None, rows, "species", GateSettings({{"accuracy_score": 0.5}})))
===
plt.plot([1, 2]);"""
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources.split("===")])
    # when
    with running_kernel(tmp_path) as kernel:
        client = NotebookClient(notebook, km=kernel)
        client.execute()
        client.kc.stop_channels()
    # then
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[1].outputs)
