"""The gate: each check, failing for its own reason."""

import re
import sys
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import mlflow
import pytest
from execution import ROOT
from kernels import running_kernel
from mlflow.models import infer_signature
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from releases import ROWS_TEST, ROWS_TRAIN
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from versions import LOCK, iris_rows, save, store_in

from mlflow_lifecycle.datasets import fingerprint, read_table
from mlflow_lifecycle.exceptions import GateClosedError
from mlflow_lifecycle.pins import locked, read_pins
from mlflow_lifecycle.releases.gate import (
    CheckResult,
    GateContext,
    GateSettings,
    Verdict,
    check_baseline,
    check_exact_pins,
    check_fresh_environment,
    check_input_example,
    check_signature,
    check_test_rows,
    gate,
    gate_context,
)
from mlflow_lifecycle.signing.verify import Statement, Verified

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


def test_good_version_passes_with_its_scores_and_its_difference_from_the_baseline(judge, good, cautious):
    verdict = judge(good, cautious)
    # then every check but the one that is left out has passed
    assert list(results(verdict).values()) == ["passed"] * 6 + ["not checked"]
    # and the accuracy and the difference of the log losses are those of scikit-learn
    features, target = ROWS_TEST.drop(columns="species"), ROWS_TEST["species"]
    model, other = (mlflow.sklearn.load_model(str(each.folder)) for each in (good, cautious))
    gain = log_loss(target, other.predict_proba(features)) - log_loss(target, model.predict_proba(features))
    assert verdict.metrics["accuracy_score"] == model.score(features, target)
    assert verdict.difference.difference == pytest.approx(gain)
    # and MLflow's scores are in the run
    (run,) = mlflow.search_runs(output_format="list", max_results=1)
    assert run.data.metrics["accuracy_score"] == verdict.metrics["accuracy_score"]


# Thresholds


@pytest.mark.parametrize(
    ("thresholds", "result", "text"),
    [
        ({"accuracy_score": 0.8}, "passed", "accuracy_score 0.9667 (95 % interval 0.8333 to 0.9941), at least 0.8"),
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


# The baseline


def test_without_a_baseline_the_thresholds_decide_and_there_is_none_to_predict_the_same_as(good):
    assert check_baseline(context_of(good)).result == "passed"
    assert check_baseline(context_of(good, same_predictions=True)).result == "failed"


def test_equal_version_is_not_better(good):
    check = check_baseline(context_of(good, replace(good)))
    assert check.result == "failed"
    assert "not better by more than chance, so the baseline stays" in check.detail


@pytest.mark.parametrize(("gain", "result"), [(0.3, "passed"), (0.48, "failed")])
def test_minimum_gain_is_below_the_whole_interval(good, cautious, gain, result):
    context = context_of(good, cautious, minimum_gain=gain)
    assert check_baseline(context).result == result
    assert context.difference.low < 0.48 < context.difference.difference


@pytest.mark.parametrize(("margin", "result"), [(0.4, "failed"), (0.6, "passed")])
def test_margin_is_above_the_whole_interval_and_the_difference_that_the_rows_can_show_is_said(
    good, cautious, margin, result
):
    context = context_of(cautious, good, margin=margin)
    check = check_baseline(context)
    assert -0.6 < context.difference.low < -0.4
    assert check.result == result
    found = re.search(r"show a difference of (\S+) or more with 80 % power", check.detail)
    width = context.difference.high - context.difference.low
    assert float(found[1]) == pytest.approx(width / 2 / 1.96 * 2.8, rel=0.1)


def test_same_predictions_pass_and_those_with_other_probabilities_fail(good, version):
    renewed = version(LogisticRegression(max_iter=1000))
    assert check_baseline(context_of(renewed, good, same_predictions=True)).result == "passed"
    # given a model that predicts the same classes, a little less sure of them
    other = version(LogisticRegression(C=0.999, max_iter=1000))
    check = check_baseline(context_of(other, good, same_predictions=True))
    assert check.detail.startswith("0 of 30 predictions are the same (probabilities differ")
    assert check.result == "failed"


@pytest.mark.parametrize(
    ("rule", "refusal"),
    [
        ({"thresholds": {}}, "State at least one threshold"),
        ({"margin": 0.1, "same_predictions": True}, "State one of"),
        ({"margin": 0.1, "minimum_gain": 0.1}, "State one of"),
        ({"margin": 0}, "must be above 0"),
        ({"margin": float("nan")}, "must be above 0"),
        ({"minimum_gain": -0.1}, "must be 0 or more"),
    ],
)
def test_rule_that_contradicts_itself_is_refused(rule, refusal):
    with pytest.raises(ValueError, match=refusal):
        GateSettings(**{"thresholds": THRESHOLDS} | rule)


# Regression


def test_better_regressor_passes_and_its_target_must_be_numeric(judge, version):
    # given two regressors, and test rows
    train, rows = train_test_split(load_diabetes(as_frame=True).frame, test_size=0.3, random_state=0)
    better = version(Ridge(alpha=0.1), rows=train, target="target")
    worse = version(Ridge(alpha=100), "1", rows=train, target="target")
    # then the better one passes
    thresholds = {"mean_absolute_error": 50.0}
    verdict = judge(better, worse, rows, "target", thresholds)
    assert set(results(verdict).values()) == {"passed", "not checked"}
    assert detail(verdict, "baseline").startswith("absolute error +")
    # and test rows without numbers are refused
    with pytest.raises(ValueError, match="The target 'target' must be numeric for a regressor, got object"):
        context_of(better, None, rows.assign(target="high"), "target", thresholds)


def test_order_of_the_columns_of_the_test_rows_does_not_matter(good, cautious):
    shuffled = ROWS_TEST[ROWS_TEST.columns[::-1]].assign(more=0)
    assert check_baseline(context_of(good, cautious, shuffled)) == check_baseline(context_of(good, cautious))


# The checks


def test_team_adds_a_check_of_its_own_and_one_that_raises_an_error_has_failed(judge, good):
    def check_size(context):
        return CheckResult("size", "passed", f"{len(context.rows)} test rows")

    def check_the_weather(context):
        raise KeyError("rain")

    verdict = judge(good, checks=[check_size, check_the_weather, partial(check_the_weather)])
    assert verdict.checks == [
        CheckResult("size", "passed", "30 test rows"),
        CheckResult("the weather", "failed", "KeyError: 'rain'"),
        CheckResult("partial", "failed", "KeyError: 'rain'"),
    ]


def test_version_without_training_rows_is_checked_as_far_as_that_goes(judge, good, cautious):
    verdict = judge(replace(good, training_rows=None), cautious)
    assert results(verdict)["test rows"] == "not checked"
    assert detail(verdict, "test rows") == "no training data was signed"
    assert list(results(verdict).values()).count("passed") == 5
    verdict.require()
    with pytest.raises(ValueError, match=r"These columns are missing: petal width \(cm\)"):
        context_of(replace(good, training_rows=None), rows=ROWS_TEST.drop(columns="petal width (cm)"))


UNFIT = {
    "no rows": (ROWS_TEST.head(0), "species", "There are no test rows"),
    "no column": (ROWS_TEST.iloc[:, :3], "species", r"These columns are missing: petal width \(cm\), species"),
    "another target": (ROWS_TEST.assign(Y=0), "Y", r"training data has no column 'Y'\. The columns are: .*, species"),
    "no label, beside an unknown class": (
        ROWS_TEST.assign(species=[None, None, "unknown", *ROWS_TEST["species"][3:]]),
        "species",
        "The column 'species' is missing in 2 of 30 rows",
    ),
}


@pytest.mark.parametrize(("rows", "target", "refusal"), UNFIT.values(), ids=UNFIT)
def test_rows_that_do_not_fit_the_version_are_refused(good, rows, target, refusal):
    with pytest.raises(ValueError, match=refusal):
        context_of(good, rows=rows, target=target)


@pytest.mark.parametrize("dtype", ["object", "string"])
def test_classes_learned_as_text_are_known_where_a_csv_has_numbers(judge, version, tmp_path, dtype):
    # given a version that learned the classes "0", "1" and "2" as text, and test rows in a file
    codes = {"setosa": "0", "versicolor": "1", "virginica": "2"}
    candidate = version(rows=ROWS_TRAIN.replace({"species": codes}).astype({"species": dtype}))
    ROWS_TEST.replace({"species": codes}).to_csv(tmp_path / "test.csv", index=False)
    rows = read_table(tmp_path / "test.csv")
    assert rows["species"].dtype == int
    # then every check passes, against a baseline, too, and a class that is new is still told
    verdict = judge(candidate, replace(candidate), rows=rows, same_predictions=True)
    assert set(results(verdict).values()) == {"passed", "not checked"}
    assert verdict.metrics["accuracy_score"] > 0.9
    (check,) = [check for check in judge(candidate, rows=rows.replace(2, 3)).checks if check.name == "test rows"]
    assert check.detail.endswith("it never learned these classes: 3")


def test_model_without_signature_and_input_example_fails(version):
    # given a nullable integer column, for which MLflow drops the signature without a word
    context = context_of(version(signature=None, input_example=None))
    check = check_signature(context)
    assert (check.result, check.detail) == ("failed", "no input columns")
    assert check_input_example(context).result == "failed"
    # given one whose columns have no names
    signature = infer_signature(ROWS_TRAIN.iloc[:, :4].to_numpy(), ROWS_TRAIN["species"])
    check = check_signature(context_of(version(signature=signature, input_example=None)))
    assert (check.result, check.detail) == ("failed", "no input columns")


@pytest.mark.parametrize("line", ["loose>=1", "bare==1.0", ""])
def test_package_without_its_hashes_fails(good, tmp_path, line):
    text = good.packages.read_text() + line if line else ""
    (tmp_path / "packages.txt").write_text(text)
    check = check_exact_pins(context_of(replace(good, packages=tmp_path / "packages.txt")))
    assert check.result == "failed"
    assert line.partition("==")[0] in check.detail


# Has it seen the test rows?


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
    # given
    text = good.packages.read_text().replace("sha256:", "sha256:0000")
    (tmp_path / "packages.txt").write_text(text)
    context = context_of(replace(good, packages=tmp_path / "packages.txt"))
    # when the environment is checked, as it is by default
    check = check_fresh_environment(replace(context, settings=GateSettings(THRESHOLDS)))
    # then
    assert check.result == "failed"
    assert "No environment was built." in check.detail


ODDITY = """
import sys

def odd(features):
    return features if "pytest" in sys.modules else -features
"""


@pytest.mark.extended
def test_model_that_answers_differently_elsewhere_fails(version, tmp_path, monkeypatch):
    # given a model that notices where it is
    (tmp_path / "oddity.py").write_text(ODDITY)
    monkeypatch.syspath_prepend(tmp_path)
    from oddity import odd

    model = make_pipeline(FunctionTransformer(odd), LogisticRegression(max_iter=1000))
    options = {"code_paths": [str(tmp_path / "oddity.py")], "skops_trusted_types": ["oddity.odd"]}
    candidate = version(model, **options)
    # then
    check = check_fresh_environment(context_of(candidate, rebuild=True))
    assert check.result == "failed"
    assert "of 30 predictions are the same" in check.detail
    sys.modules.pop("oddity")


def test_verdict_names_every_check_that_failed():
    checks = [CheckResult("one", "failed", "because"), CheckResult("two", "passed", "fine")]
    checks.append(CheckResult("three", "failed", "really"))
    with pytest.raises(GateClosedError) as caught:
        Verdict(checks, {}, None).require()
    assert "one failed (because); three failed (really). The alias stays" in str(caught.value)


@pytest.mark.extended  # it takes long
def test_evaluation_leaves_no_figure_open_and_closes_no_other(judge, good):
    mine = plt.figure().number
    judge(good)
    assert plt.get_fignums() == [mine]
    plt.close(mine)


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
