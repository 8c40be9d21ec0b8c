"""scoring: the score of a row, against scikit-learn's own metrics, and the traps of other libraries."""

from dataclasses import replace

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.models import infer_signature
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error
from versions import iris_rows

from mlflow_lifecycle.scoring import (
    ABSOLUTE_ERROR,
    ACCURACY,
    LOG_PROBABILITY,
    Predictions,
    equal_rows,
    measure_of,
    order_columns,
    predict,
    score_rows,
)

ROWS = iris_rows()
FEATURES, TARGET = ROWS.drop(columns="species"), ROWS["species"]
LENGTHS = FEATURES["petal length (cm)"]


def test_classifier_is_scored_by_the_log_of_its_probabilities():
    model = LogisticRegression(max_iter=1000).fit(FEATURES, TARGET)
    scores = score_rows(predict(model, FEATURES), TARGET, LOG_PROBABILITY)
    assert scores.mean() == pytest.approx(-log_loss(TARGET, model.predict_proba(FEATURES)))


def test_classifier_without_probabilities_is_scored_by_its_accuracy():
    model = RidgeClassifier().fit(FEATURES, TARGET)
    scores = score_rows(predict(model, FEATURES), TARGET, ACCURACY)
    assert set(scores) == {0.0, 1.0}
    assert scores.mean() == accuracy_score(TARGET, model.predict(FEATURES))


def test_regressor_is_scored_by_minus_its_absolute_error():
    model = Ridge().fit(FEATURES, LENGTHS)
    scores = score_rows(predict(model, FEATURES), LENGTHS, ABSOLUTE_ERROR)
    assert scores.mean() == pytest.approx(-mean_absolute_error(LENGTHS, model.predict(FEATURES)))


def test_class_that_the_model_does_not_know_gets_the_lowest_score():
    model = LogisticRegression(max_iter=1000).fit(FEATURES[:100], TARGET[:100])
    scores = score_rows(predict(model, FEATURES), TARGET, LOG_PROBABILITY)
    assert scores[100:] == pytest.approx(np.log(np.finfo(np.float32).eps))


@pytest.mark.parametrize("measure", [LOG_PROBABILITY, ACCURACY])
def test_classes_learned_as_text_are_those_that_a_file_gives_as_numbers(measure):
    numbers = TARGET.map({"setosa": 0, "versicolor": 1, "virginica": 2})
    model = LogisticRegression(max_iter=1000).fit(FEATURES, numbers.astype(str))
    scores = [score_rows(predict(model, FEATURES), target, measure) for target in (numbers, numbers.astype(str))]
    assert list(scores[0]) == list(scores[1])


def test_measure_follows_the_task_and_what_both_models_can_do():
    sure = Predictions("classification", np.array(["a"]), ["a"], np.array([[1.0]]))
    unsure = Predictions("classification", np.array(["a"]))
    number = Predictions("regression", np.array([1.0]))
    assert measure_of(sure, sure) == LOG_PROBABILITY
    assert measure_of(sure, unsure) == measure_of(unsure, sure) == ACCURACY
    assert measure_of(number, number) == ABSOLUTE_ERROR
    with pytest.raises(ValueError, match="A model for classification cannot be compared with one for regression"):
        measure_of(sure, number)


def test_columns_come_in_the_order_of_the_signature(tmp_path):
    signature = infer_signature(FEATURES, TARGET)
    mlflow.sklearn.save_model(LogisticRegression(), tmp_path / "model", signature=signature, pip_requirements=[])
    shuffled = FEATURES[FEATURES.columns[::-1]].assign(more=1)
    pd.testing.assert_frame_equal(order_columns(tmp_path / "model", shuffled), FEATURES)
    with pytest.raises(ValueError, match=r"These columns are missing: petal width \(cm\)"):
        order_columns(tmp_path / "model", FEATURES.iloc[:, :3])


def test_numbers_get_the_float_types_of_the_signature(tmp_path):
    # given a model of a float32 and a float64 column, and rows as a CSV file with whole numbers alone gives them
    learned = FEATURES.astype({FEATURES.columns[0]: "float32"})
    signature = infer_signature(learned, TARGET)
    mlflow.sklearn.save_model(LogisticRegression(), tmp_path / "model", signature=signature, pip_requirements=[])
    rows = FEATURES.round().astype(int)
    # then
    assert list(order_columns(tmp_path / "model", rows).dtypes) == list(learned.dtypes)


def test_columns_stay_as_they_are_without_a_signature(tmp_path):
    mlflow.sklearn.save_model(LogisticRegression(), tmp_path / "model", pip_requirements=[])
    pd.testing.assert_frame_equal(order_columns(tmp_path / "model", FEATURES), FEATURES)


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        (["a", "b"], ["a", "c"], [True, False]),
        ([1.0, 1e6], [1.0000001, 1e6 + 2], [True, False]),
        ([np.nan], [np.nan], [True]),
    ],
)
def test_predictions_are_equal_up_to_rounding(first, second, equal):
    task = "regression" if isinstance(first[0], float) else "classification"
    first, second = Predictions(task, np.array(first)), Predictions(task, np.array(second))
    assert list(equal_rows(first, second)) == equal


def test_probabilities_and_classes_must_be_equal_too():
    given = Predictions("classification", np.array(["a", "a"]), ["a", "b"], np.array([[0.9, 0.1], [0.8, 0.2]]))
    other = replace(given, probabilities=np.array([[0.9, 0.1], [0.8 - 1e-8, 0.2 + 1e-8]]))
    assert list(equal_rows(given, other)) == [True, True]
    assert list(equal_rows(given, other, tolerance=0)) == [True, False]
    assert list(equal_rows(given, replace(given, classes=["a", "c"]))) == [False, False]
