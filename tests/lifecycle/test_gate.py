"""The gate: each check, failing for its own reason."""

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
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from versions import LOCK, iris_rows, save, store_in

from mlflow_lifecycle.gate import (
    Check,
    GateClosedError,
    Verdict,
    check_environment,
    check_example,
    check_pins,
    check_rows,
    check_signature,
    check_version,
    difference_of,
)
from mlflow_lifecycle.pins import locked, read_pins
from mlflow_lifecycle.tables import fingerprint, read_table
from mlflow_lifecycle.verification import Statement, Verified

ROWS_TRAIN, ROWS_TEST = train_test_split(iris_rows(), test_size=0.2, stratify=iris_rows()["species"], random_state=42)
FLOORS = {"accuracy_score": 0.8}


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


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Give the function that checks a version in a run, without building its environment."""

    def check(candidate, holder=None, rows=ROWS_TEST, target="species", floors=FLOORS, **options) -> Verdict:
        with mlflow.start_run():
            return check_version(candidate, holder, rows, target, floors=floors, rebuild=False, **options)

    with pytest.MonkeyPatch.context() as monkeypatch, store_in(tmp_path_factory.mktemp("store"), monkeypatch):
        yield check


def results(verdict: Verdict) -> dict[str, str]:
    return {check.name: check.result for check in verdict.checks}


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
    holder, candidate = mlflow.search_runs(output_format="list", max_results=2)
    assert candidate.data.metrics["accuracy_score"] == verdict.metrics["accuracy_score"]
    assert holder.data.tags["mlflow.parentRunId"] == candidate.info.run_id


def loaded(*versions: Verified) -> list:
    return [mlflow.sklearn.load_model(str(version.folder)) for version in versions]


def test_difference_is_that_of_the_log_losses(good, cautious):
    difference = difference_of(loaded(good, cautious), ROWS_TEST, "species")
    losses = [
        log_loss(ROWS_TEST["species"], mlflow.sklearn.load_model(str(at.folder)).predict_proba(ROWS_TEST.iloc[:, :4]))
        for at in (cautious, good)
    ]
    assert difference.difference == pytest.approx(losses[0] - losses[1])
    assert difference.counts


def test_model_without_probabilities_is_compared_by_accuracy(good, version):
    dummy = version(DummyClassifier())
    ridge = version(RidgeClassifier())
    difference = difference_of(loaded(ridge, dummy), ROWS_TEST, "species")
    features, target = ROWS_TEST.drop(columns="species"), ROWS_TEST["species"]
    shares = [(mlflow.sklearn.load_model(str(at.folder)).predict(features) == target).mean() for at in (ridge, dummy)]
    assert difference.difference == pytest.approx(shares[0] - shares[1])


def test_class_that_the_holder_does_not_know_counts_against_it(good, version):
    two = ROWS_TRAIN[ROWS_TRAIN["species"] != "virginica"]
    difference = difference_of(loaded(good, version(rows=two)), ROWS_TEST, "species")
    assert difference.low > 1


def test_worse_version_stays_out(judge, good, cautious):
    verdict = judge(cautious, good)
    assert results(verdict)["holder"] == "failed"
    with pytest.raises(GateClosedError, match=r"holder failed \(-0\..* not better by a difference that counts"):
        verdict.require(allow_unchecked=True)


@pytest.mark.parametrize("allowed", [False, True])
def test_equal_version_passes_only_if_that_is_allowed(judge, good, allowed):
    verdict = judge(good, replace(good), allow_equal=allowed)
    assert results(verdict)["holder"] == ("passed" if allowed else "failed")


def test_worse_version_stays_out_even_if_equal_ones_are_allowed(judge, good, cautious):
    assert results(judge(cautious, good, allow_equal=True))["holder"] == "failed"


@pytest.mark.parametrize(("floor", "result"), [(0.8, "passed"), (0.999, "failed")])
def test_without_a_holder_the_floor_decides(judge, good, floor, result):
    verdict = judge(good, floors={"accuracy_score": floor})
    assert results(verdict)["floor"] == result
    assert results(verdict)["holder"] == "passed"
    if result == "failed":
        with pytest.raises(GateClosedError, match=r"floor failed \(accuracy_score 0\.9667 of 0\.999\)"):
            verdict.require(allow_unchecked=True)


def test_metric_that_mlflow_does_not_give_fails(judge, good):
    assert results(judge(good, floors={"accuracy": 0.5}))["floor"] == "failed"


def test_gate_without_a_floor_is_refused(judge, good):
    with pytest.raises(ValueError, match="State at least one floor"):
        judge(good, floors={})


@pytest.mark.parametrize("name", ["log_loss", "false_positives", "false_negatives"])
def test_floor_on_a_metric_of_which_less_is_better_is_refused(judge, good, name):
    with pytest.raises(ValueError, match=f"There is no floor for {name}: less of it is better"):
        judge(good, floors={"accuracy_score": 0.8, name: 0.01})


def test_rows_without_a_column_are_refused(judge, good):
    with pytest.raises(ValueError, match=r"The test rows lack these columns: petal width \(cm\), species"):
        judge(good, rows=ROWS_TEST.iloc[:, :3])


def test_target_that_the_version_did_not_learn_from_is_refused_with_the_columns(judge, good):
    refusal = r"learned from no column 'Y'\. The columns are: sepal length \(cm\), .*, species"
    for rows in (ROWS_TEST, ROWS_TEST.assign(Y=0)):
        with pytest.raises(ValueError, match=refusal):
            judge(good, rows=rows, target="Y")


def test_missing_labels_are_refused_beside_an_unknown_class(judge, good):
    rows = ROWS_TEST.copy()
    rows.iloc[:2, -1] = None
    rows.iloc[2, -1] = "unknown"
    with pytest.raises(ValueError, match="The target 'species' is missing in 2 of 30 test rows"):
        judge(good, rows=rows)


def test_classes_learned_as_text_are_known_where_a_csv_has_numbers(judge, version, tmp_path):
    # given a version that learned the classes "0", "1" and "2" as text, and test rows in a file
    codes = {"setosa": "0", "versicolor": "1", "virginica": "2"}
    candidate = version(rows=ROWS_TRAIN.replace({"species": codes}))
    ROWS_TEST.replace({"species": codes}).to_csv(tmp_path / "test.csv", index=False)
    rows = read_table(tmp_path / "test.csv")
    assert rows["species"].dtype == int
    # then every check passes, against a holder, too, and a class that is new is still told
    verdict = judge(candidate, replace(candidate), rows=rows, allow_equal=True)
    assert set(results(verdict).values()) == {"passed", "not checked"}
    assert verdict.metrics["accuracy_score"] > 0.9
    (check,) = [check for check in judge(candidate, rows=rows.replace(2, 3)).checks if check.name == "test rows"]
    assert check.detail.endswith("it never learned these classes: 3")


def test_environment_that_was_not_built_is_no_pass(judge, good, cautious):
    verdict = judge(good, cautious)
    with pytest.raises(GateClosedError, match="fresh environment not checked"):
        verdict.require()
    verdict.require(allow_unchecked=True)


def test_model_that_cannot_be_scored_fails(judge, good, tmp_path):
    # given a model that takes one column only
    folder = shutil.copytree(good.folder, tmp_path / "model")
    save(tmp_path / "other", rows=ROWS_TRAIN[["petal width (cm)", "species"]])
    shutil.copy(tmp_path / "other/model.skops", folder)
    # then
    verdict = judge(replace(good, folder=folder))
    assert results(verdict) | {"score": "failed", "fresh environment": "not checked"} == results(verdict)


def test_model_that_lost_its_signature_fails(version):
    # given a nullable integer column, for which MLflow drops the signature without a word
    check = check_signature(version(signature=None, input_example=None))
    assert (check.result, check.detail) == ("failed", "no columns go in")


def test_model_without_an_input_example_fails(version):
    assert check_example(version(input_example=None)).result == "failed"


@pytest.mark.parametrize("line", ["loose>=1", "bare==1.0", ""])
def test_package_without_its_hashes_fails(good, tmp_path, line):
    text = good.packages.read_text() + line if line else ""
    (tmp_path / "packages.txt").write_text(text)
    check = check_pins(replace(good, packages=tmp_path / "packages.txt"))
    assert check.result == "failed"
    assert line.partition("==")[0] in check.detail


# Has it seen the test rows?


def test_candidate_that_learned_from_the_test_rows_fails(version):
    check = check_rows(version(rows=iris_rows()), ROWS_TEST, "species")
    assert (check.result, check.detail) == ("failed", "30 of 30 are among the 150 training rows")


def test_a_few_equal_rows_are_chance(good):
    mixed = ROWS_TEST.copy()
    mixed.iloc[:3] = ROWS_TRAIN.iloc[:3]
    assert check_rows(good, mixed, "species").result == "passed"
    mixed.iloc[:4] = ROWS_TRAIN.iloc[:4]
    assert check_rows(good, mixed, "species").detail == "4 of 30 are among the 120 training rows"
    assert check_rows(good, mixed, "species").result == "failed"


def test_order_of_rows_and_columns_and_the_type_of_numbers_hide_nothing(version):
    rows = iris_rows().assign(whole=1.0)
    seen = rows.assign(whole=1)[rows.columns[::-1]].sample(30, random_state=0)
    assert check_rows(version(rows=rows), seen, "species").detail == "30 of 30 are among the 150 training rows"


def test_class_that_the_candidate_never_learned_fails(good):
    check = check_rows(good, ROWS_TEST.assign(species="SETOSA "), "species")
    assert check.result == "failed"
    assert "it never learned these classes: SETOSA " in check.detail


def test_unknown_classes_of_several_types_fail(good):
    mixed = ROWS_TEST.assign(species=["SETOSA", 1, *ROWS_TEST["species"][2:]])
    assert check_rows(good, mixed, "species").detail.endswith("it never learned these classes: 1, SETOSA")


def test_rows_of_another_type_fail(good):
    check = check_rows(good, ROWS_TEST.assign(**{"petal width (cm)": "wide"}), "species")
    assert check.result == "failed"
    assert "of other types than the training rows" in check.detail


# The environment


def test_environment_with_a_changed_hash_fails(good, tmp_path):
    text = good.packages.read_text().replace("six==1.", "six==1.", 1)
    before, _, after = text.partition("\nsix==")
    (tmp_path / "packages.txt").write_text(f"{before}\nsix=={after.replace('sha256:', 'sha256:0000', 2)}")
    check = check_environment(replace(good, packages=tmp_path / "packages.txt"), ROWS_TEST.iloc[:, :4])
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
    check = check_environment(replace(good, folder=tmp_path / "model"), ROWS_TEST.iloc[:, :4])
    assert check.result == "failed"
    assert "of 30 predictions are the same" in check.detail
    sys.modules.pop("oddity")


def test_verdict_names_every_check_that_did_not_pass():
    checks = [Check("one", "failed", "because"), Check("two", "passed", "fine"), Check("three", "not checked", "left")]
    with pytest.raises(GateClosedError) as caught:
        Verdict(checks, {}, None).require()
    assert "one failed (because); three not checked (left). The alias stays" in str(caught.value)


@pytest.mark.parametrize("open_before", [0, 1])
def test_evaluation_leaves_no_figure_open_and_closes_no_other(judge, good, open_before):
    # given a figure of the caller's, or none
    plt.close("all")
    mine = [plt.figure().number for _ in range(open_before)]
    # when
    judge(good)
    # then
    assert plt.get_fignums() == mine
    plt.close("all")


def test_notebook_still_shows_its_figures_after_an_evaluation(tmp_path, good):
    # given a kernel that has shown no figure before
    ROWS_TEST.to_parquet(tmp_path / "rows.parquet")
    sources = f"""
from types import SimpleNamespace
import matplotlib.pyplot as plt, mlflow, pandas as pd
from mlflow_lifecycle.gate import evaluate
mlflow.set_tracking_uri("sqlite:///{(tmp_path / "mlflow.db").as_posix()}")
rows = pd.read_parquet({str(tmp_path / "rows.parquet")!r})
with mlflow.start_run():
    evaluate(SimpleNamespace(folder={str(good.folder)!r}), rows, "species")
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
