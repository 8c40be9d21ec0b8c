"""monitoring: the verdict on a batch, for each thing that can go wrong with rows, labels and answers."""

import dataclasses

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.models import infer_signature
from scipy import stats
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from versions import LOCK, iris_rows, save

from mlflow_lifecycle.monitoring.drift import LEVEL, Limits, alarm_rate
from mlflow_lifecycle.monitoring.judge import Verdict, _is_worse, add_predictions, judge, load_reference
from mlflow_lifecycle.signing.statement import Statement
from mlflow_lifecycle.signing.verify import Verified

ROWS = iris_rows()
FEATURES, TARGET = ROWS.columns[:-1].tolist(), "species"


def version_of(folder, model, rows, target=TARGET) -> Verified:
    """Return a version as it is handed out once it is verified; its files are in ``folder``."""
    saved = save(folder / "model", model, rows, target, input_example=None)
    rows.to_parquet(folder / "rows.parquet")
    statement = Statement("iris", "1", "0", "release", "")
    return Verified("models:/iris/1", statement, saved, folder / "packages.txt", folder / "rows.parquet", "")


# As usual


def test_usual_rows_are_quiet(known, usual):
    judgement = judge(known, usual)
    assert judgement.verdict == Verdict.QUIET
    assert judgement.reasons == ()
    assert judgement.performance.value == (known.estimator.predict(usual[FEATURES]) == usual[TARGET]).mean()
    # and further columns and another order change nothing
    assert judge(known, usual[usual.columns[::-1]].assign(colour="blue")) == judgement


def test_labels_count_for_the_rows_that_have_them(known, usual):
    judgement = judge(known, usual[FEATURES])
    assert (judgement.verdict, judgement.performance) == (Verdict.QUIET, None)
    usual.loc[10:, TARGET] = None
    assert judge(known, usual).performance.rows == 10


@pytest.mark.extended  # it takes long
def test_rate_of_false_alarms_of_the_whole_verdict_is_low(known):
    def alarm(reference, rows):
        drawn = dataclasses.replace(known, rows=reference, predictions=known.estimator.predict(reference[FEATURES]))
        return judge(drawn, rows).verdict != Verdict.QUIET

    rate = alarm_rate(known.rows, 75, alarm, resamples=60)
    assert rate.low <= 2 * LEVEL


# Broken input: refuse or repair, never retrain


def test_ruler_that_shows_thirty_percent_too_much_is_broken_input(known, usual):
    judgement = judge(known, usual.assign(**1.3 * usual[FEATURES]))
    assert judgement.verdict == Verdict.BROKEN
    assert "sepal length (cm): " in judgement.reasons[0]
    assert "of the rows are outside the training range" in judgement.reasons[0]


def test_missing_column_and_gap_that_the_model_cannot_take_are_broken_input(known, usual):
    judgement = judge(known, usual.drop(columns=FEATURES[3]))
    assert judgement.verdict == Verdict.BROKEN
    assert judgement.reasons == ("These columns are missing: petal width (cm)",)
    usual.loc[0, FEATURES[0]] = np.nan
    judgement = judge(known, usual)
    assert judgement.verdict == Verdict.BROKEN
    assert "cannot predict these rows: Input X contains NaN" in judgement.reasons[0]


def test_no_rows_are_refused(known, usual):
    with pytest.raises(ValueError, match="no rows to judge"):
        judge(known, usual.head(0))


# Drift


def test_shifted_rows_within_the_range_are_drift(known, usual):
    judgement = judge(known, usual.assign(**{FEATURES[1]: usual[FEATURES[1]] * 0.6 + 1.6})[FEATURES])
    assert judgement.verdict == Verdict.DRIFT
    assert "sepal width (cm): " in judgement.reasons[0]
    assert "standard deviations, p = " in judgement.reasons[0]


def test_predictions_that_drift_are_drift_although_no_column_does(known, usual):
    # given answers that are all of one class, for the usual rows
    judgement = judge(known, usual[FEATURES].assign(prediction="setosa"))
    assert judgement.verdict == Verdict.DRIFT
    assert judgement.reasons[0].startswith("prediction of species: 0.59 of the rows")


# Labels: an alarm for people


def test_class_that_the_model_does_not_know_is_an_alarm(known, usual):
    """Attack 10."""
    judgement = judge(known, usual.replace({TARGET: {"setosa": "SETOSA "}}))
    assert judgement.verdict == Verdict.LABELS
    assert "the model does not know the class 'SETOSA '" in judgement.reasons


def test_class_that_has_vanished_is_an_alarm(known, usual):
    """Attack 10."""
    judgement = judge(known, usual[usual[TARGET] != "virginica"].head(20))
    assert judgement.verdict == Verdict.LABELS
    assert "none of 20 rows has the class 'virginica', which 33% of the training rows have" in judgement.reasons


def test_class_of_many_that_a_batch_lacks_by_chance_is_no_alarm(known):
    # given 20 equally frequent classes, of which one in six batches of 90 rows lacks at least one
    names = [f"species {number}" for number in range(20)] * 50
    rows = ROWS.sample(1000, replace=True, random_state=0, ignore_index=True).assign(species=names)
    many = dataclasses.replace(known, rows=rows, predictions=np.array(names))
    batch = rows.assign(prediction=names)[rows[TARGET] != "species 0"]
    # then
    assert judge(many, batch.head(90)).verdict == Verdict.QUIET
    assert judge(many, batch.head(200)).verdict == Verdict.LABELS


def test_labels_are_more_urgent_than_drift_and_broken_rows_than_labels(known, usual):
    rows = usual.assign(**{FEATURES[1]: usual[FEATURES[1]] * 0.6 + 1.6}).replace({TARGET: {"setosa": "pumila"}})
    judgement = judge(known, rows)
    assert judgement.verdict == Verdict.LABELS
    assert any(reason.startswith("sepal width (cm): ") for reason in judgement.reasons)
    assert judge(known, rows.assign(**1.3 * usual[FEATURES])).verdict == Verdict.BROKEN


# Accuracy


def test_labels_that_are_swapped_raise_the_accuracy_alarm(known, usual):
    # given the usual rows, with two species taken for each other
    swapped = {"versicolor": "virginica", "virginica": "versicolor"}
    judgement = judge(known, usual.replace({TARGET: swapped}))
    # then nothing but the accuracy shows it
    assert judgement.verdict == Verdict.PERFORMANCE
    assert judgement.reasons == (f"accuracy {judgement.performance}, expected {known.expected}",)
    assert judgement.performance.high < known.expected.low


def test_accuracy_that_may_be_lower_by_chance_is_no_alarm(known, usual):
    # given two errors in ten rows
    rows = add_predictions(known, usual.sample(10, random_state=0))
    wrong = rows.index[:2]
    rows.loc[wrong, "prediction"] = rows.loc[wrong, TARGET].map(
        {"setosa": "virginica", "versicolor": "setosa", "virginica": "setosa"}
    )
    assert judge(known, rows[[*FEATURES, TARGET, "prediction"]]).verdict == Verdict.QUIET


def test_small_loss_is_no_alarm_however_many_rows(known):
    # given an expectation that is met but for two in a hundred, on 20,000 rows
    rows = ROWS.sample(20_000, replace=True, random_state=0, ignore_index=True)
    expected = dataclasses.replace(known, rows=rows, predictions=rows[TARGET].to_numpy())
    rows = add_predictions(known, rows)
    rows["prediction"] = rows[TARGET].where(rows.index % 50 != 0, "setosa")
    judgement = judge(expected, rows)
    assert judgement.performance.high < judgement.expected.low
    assert judgement.verdict == Verdict.QUIET
    assert judge(expected, rows, Limits(loss=0.01)).verdict == Verdict.PERFORMANCE


def test_answers_that_were_given_are_judged_and_not_those_of_today(known, usual):
    judgement = judge(known, usual.assign(prediction=usual[TARGET]))
    assert judgement.performance.value == 1


@pytest.mark.parametrize("classes", [(0, 1), ("1.0", "2.0"), (False, True)])
def test_answers_and_labels_from_a_file_meet_classes_of_any_type(tmp_path, classes):
    # given classes of one type, and a file of labels and right answers, with a gap in each of both
    frame = load_breast_cancer(as_frame=True).frame[["mean radius", "mean texture", "target"]]
    rows = frame.assign(target=frame["target"].map(dict(enumerate(classes))))
    known = load_reference(version_of(tmp_path, LogisticRegression(max_iter=1000), rows[::2], "target"))
    batch = rows[1::2].reset_index(drop=True).assign(prediction=rows["target"][1::2].tolist()).astype(object)
    batch.to_csv(tmp_path / "whole.csv", index=False)
    batch.loc[0, "target"] = batch.loc[1, "prediction"] = None
    batch.to_csv(tmp_path / "gaps.csv", index=False)
    # then all answers that are there are right
    for name, wrong in (("whole", 0), ("gaps", 1)):
        judgement = judge(known, pd.read_csv(tmp_path / f"{name}.csv"))
        assert judgement.reasons == ()
        assert round(judgement.performance.value * judgement.performance.rows) == judgement.performance.rows - wrong


# What batches are compared with


def test_expected_accuracy_is_that_of_cross_validation_on_the_rows_learned_from(known):
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    model = LogisticRegression(max_iter=1000)
    scores = cross_val_score(model, known.rows[FEATURES], known.rows[TARGET], cv=folds)
    assert known.expected.value == pytest.approx(scores.mean())
    assert known.expected.rows == 75


def test_training_data_with_more_than_one_target_is_refused(tmp_path):
    version = version_of(tmp_path, None, ROWS)
    ROWS.assign(kind=1).to_parquet(version.training_rows)
    with pytest.raises(ValueError, match=r"models:/iris/1 must have one target, got \['species', 'kind'\]"):
        load_reference(version)


def test_version_without_training_data_is_refused_with_the_command_that_adds_it(tmp_path):
    version = dataclasses.replace(version_of(tmp_path, None, ROWS), training_rows=None)
    with pytest.raises(ValueError, match="Add it: lifecycle sign models:/iris/1 --training-data FILE"):
        load_reference(version)


def test_gaps_in_text_are_those_that_the_model_learned(tmp_path):
    # given a model that learned from a text with gaps, as read_csv reads them
    rows = pd.DataFrame({"group": np.array(["a", "b", np.nan] * 20, dtype=object), "kind": ["x", "y", "x"] * 20})
    known = load_reference(version_of(tmp_path, make_pipeline(OneHotEncoder(), LogisticRegression()), rows, "kind"))
    # then the rows that it learned from are rows that it can take
    assert known.estimator.predict(known.rows[["group"]]).tolist() == rows["kind"].tolist()


def test_column_that_is_called_as_the_answers_are_is_refused(tmp_path):
    version = version_of(tmp_path, None, ROWS.rename(columns={FEATURES[0]: "prediction"}))
    with pytest.raises(ValueError, match=r"no column 'prediction', which holds the predictions"):
        load_reference(version)


def test_class_of_one_row_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"models:/iris/1 cannot be cross-validated .*, got n_splits=1"):
        load_reference(version_of(tmp_path, None, ROWS.head(51)))


def test_class_of_three_rows_is_cross_validated(tmp_path):
    assert load_reference(version_of(tmp_path, None, ROWS.head(53))).expected.rows == 53


# A person decides


def test_accepted_change_is_a_verdict_of_its_own_and_keeps_its_reasons(known, usual):
    # given flowers that are longer
    longer = usual.assign(**1.3 * usual[FEATURES])
    # when a person has found the cause
    judgement = judge(known, longer, accepted="another garden")
    # then
    assert (judgement.verdict, judgement.accepted) == (Verdict.ACCEPTED, "another garden")
    assert judgement.reasons == judge(known, longer).reasons


def test_nothing_is_accepted_where_nothing_changed_or_the_model_cannot_take_the_rows(known, usual):
    for rows, verdict in ((usual, Verdict.QUIET), (usual.drop(columns=FEATURES[0]), Verdict.BROKEN)):
        judgement = judge(known, rows, accepted="another garden")
        assert (judgement.verdict, judgement.accepted) == (verdict, "")


# Regression


@pytest.fixture(scope="module")
def expected_length(tmp_path_factory):
    """Give what batches are compared with: of a regression of the length of petals, with a column of text."""
    rows = ROWS[::2].reset_index(drop=True).rename(columns={TARGET: "kind"})
    text = make_column_transformer((OneHotEncoder(), ["kind"]), remainder="passthrough")
    model = make_pipeline(text, LinearRegression())
    return load_reference(version_of(tmp_path_factory.mktemp("regression"), model, rows, FEATURES[2]))


@pytest.fixture
def later():
    """Give the other flowers, with the length of their petals as the label."""
    return ROWS[1::2].reset_index(drop=True).rename(columns={TARGET: "kind"})


def test_usual_rows_of_a_regression_are_quiet(expected_length, later):
    # given the error that cross-validation gives
    reference = expected_length
    rows, folds = reference.rows, KFold(5, shuffle=True, random_state=0)
    model, scoring = clone(reference.estimator), "neg_mean_absolute_error"
    scores = cross_val_score(model, rows[reference.features], rows[reference.target], cv=folds, scoring=scoring)
    assert reference.expected.value == pytest.approx(-scores.mean())
    # when, then
    judgement = judge(reference, later)
    assert judgement.reasons == ()
    assert judgement.verdict == Verdict.QUIET
    errors = reference.estimator.predict(later[reference.features]) - later[FEATURES[2]]
    assert judgement.performance.value == pytest.approx(errors.abs().mean())
    interval = stats.ttest_1samp(errors.abs(), 0).confidence_interval()
    assert (judgement.performance.low, judgement.performance.high) == pytest.approx(tuple(interval))


def test_larger_errors_of_a_regression_raise_the_alarm(expected_length, later):
    # given labels that are half a centimetre longer, for the same flowers
    judgement = judge(expected_length, later.assign(**{FEATURES[2]: later[FEATURES[2]] + 0.5}))
    assert judgement.verdict == Verdict.PERFORMANCE
    assert judgement.reasons[0].startswith("mean_absolute_error 0.")


def test_small_increase_of_the_error_is_no_alarm_however_many_rows(expected_length, later):
    # given a hundred times the same rows, whose errors are larger by a tenth
    rows = pd.concat([expected_length.rows] * 100, ignore_index=True)
    predictions = np.tile(expected_length.predictions, 100)
    reference = dataclasses.replace(expected_length, rows=rows, predictions=predictions)
    batch = rows.assign(prediction=rows[FEATURES[2]] + 1.1 * (predictions - rows[FEATURES[2]]))
    assert judge(reference, batch).verdict == Verdict.QUIET
    assert judge(reference, batch, Limits(error=0.05)).verdict == Verdict.PERFORMANCE


def test_predictions_of_a_regression_drift_as_numbers(expected_length, later):
    rows = add_predictions(expected_length, later)
    rows["prediction"] += 2
    judgement = judge(expected_length, rows.drop(columns=FEATURES[2]))
    assert judgement.verdict == Verdict.BROKEN  # some are longer than any petal
    assert any(reason.startswith("prediction of petal length (cm): 1.") for reason in judgement.reasons)


def test_label_of_a_regression_that_is_no_number_is_refused(expected_length, later):
    with pytest.raises(ValueError, match=r"Column 'petal length \(cm\)' must hold numbers: .*\"long\""):
        judge(expected_length, later.assign(**{FEATURES[2]: "long"}))


def test_skewed_errors_raise_no_false_alarms(expected_length):
    # given errors with a long tail, as before
    raised = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        reference = dataclasses.replace(expected_length)
        reference.__dict__["errors"] = generator.lognormal(size=75)
        raised += _is_worse(reference, generator.lognormal(size=20), Limits())
    assert raised <= stats.binom.ppf(0.999, 200, LEVEL)


# Another flavor


@pytest.mark.extended  # it takes long
def test_native_flavor_is_cross_validated_with_the_parameters_of_its_run(tmp_path):
    # given a model with few shallow trees, in XGBoost's format, which does not hold these parameters
    library = pytest.importorskip("xgboost")
    rows = load_breast_cancer(as_frame=True).frame
    features, target = rows.drop(columns="target"), rows["target"]
    parameters = {"n_estimators": 2, "max_depth": 1, "learning_rate": 0.1}
    model = library.XGBClassifier(**parameters, n_jobs=1)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    accuracy = cross_val_score(model, features, target, cv=folds).mean()
    model.fit(features, target)
    options = {"signature": infer_signature(features, target), "pip_requirements": ["xgboost"], "model_format": "ubj"}
    mlflow.xgboost.save_model(model, tmp_path / "model", **options)
    rows.to_parquet(tmp_path / "rows.parquet")
    logged = {key: str(value) for key, value in parameters.items()}
    statement = Statement("cancer", "1", "0", "release", "", parameters=logged)
    version = Verified("models:/cancer/1", statement, tmp_path / "model", LOCK, tmp_path / "rows.parquet", "")
    # when
    reference = load_reference(version)
    judgement = judge(reference, rows)
    # then
    assert reference.expected.value == pytest.approx(accuracy, abs=0.001)
    assert judgement.performance.value == (model.predict(features) == target).mean()
    # and without them it is refused
    with pytest.raises(ValueError, match="the run did not log n_estimators"):
        load_reference(dataclasses.replace(version, statement=dataclasses.replace(statement, parameters={})))
