"""Score a model on each row, for classification and regression; a higher score is better.

MLflow gives one number per model. Whether chance alone could explain a difference between two
models shows only in the scores of the single rows.
"""

from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from mlflow_lifecycle.datasets import as_text, check_columns
from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.flavors import REGRESSION, task_of

LOG_PROBABILITY = "log probability"
ACCURACY = "accuracy"
ABSOLUTE_ERROR = "absolute error"
# XGBoost computes in float32. The same limit holds for all models, so that the comparison is fair.
SMALLEST = float(np.finfo(np.float32).eps)
TOLERANCE = 1e-6
FLOATS = {"float": "float32", "double": "float64"}  # by the types of a signature
# Metrics of mlflow.models.evaluate of which less is better.
LOWER_IS_BETTER = {
    "log_loss",
    "false_positives",
    "false_negatives",
    "mean_absolute_error",
    "mean_squared_error",
    "root_mean_squared_error",
    "mean_absolute_percentage_error",
    "max_error",
}


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for some rows.

    Attributes:
        task: classification or regression.
        predicted: a class or a number for each row.
        classes: the known classes, if the model gives probabilities.
        probabilities: of each class, for each row; or None.
    """

    task: str
    predicted: np.ndarray
    classes: ArrayLike | None = None
    probabilities: np.ndarray | None = None


def predict(model: object, features: pd.DataFrame) -> Predictions:
    """Return what a fitted model with scikit-learn's interface predicts for the rows."""
    predicted = np.ravel(model.predict(features))
    if not hasattr(model, "predict_proba"):
        return Predictions(task_of(model), predicted)
    probabilities = model.predict_proba(features)
    return Predictions(task_of(model), predicted, model.classes_, probabilities)


def measure_of(predictions: Predictions, other: Predictions) -> str:
    """Return the measure that compares two models: log probability, accuracy or absolute error.

    Raises:
        InvalidInputError: their tasks differ.
    """
    if predictions.task != other.task:
        raise InvalidInputError(
            f"A model for {predictions.task} cannot be compared with one for {other.task}."
        )
    if predictions.task == REGRESSION:
        return ABSOLUTE_ERROR
    if predictions.probabilities is None or other.probabilities is None:
        return ACCURACY
    return LOG_PROBABILITY


def score_rows(predictions: Predictions, target: pd.Series, measure: str) -> np.ndarray:
    """Return the score of each row; a higher score is better.

    Args:
        predictions: from `predict`.
        target: the true values. Classes are compared as text: a CSV file does not tell the text 0
            from the number.
        measure: from `measure_of`. Log probability: of the right class; it tells apart two models
            that are right equally often and not equally sure. Accuracy: 1 for a right prediction,
            else 0. Absolute error: minus it.
    """
    if measure == ABSOLUTE_ERROR:
        return -np.abs(predictions.predicted - target.to_numpy(dtype=float))
    labels = as_text(target).to_numpy()
    if measure == ACCURACY:
        is_right = labels == as_text(predictions.predicted).to_numpy()
        return is_right.astype(float)
    classes = as_text(predictions.classes).to_numpy()
    is_class = labels[:, np.newaxis] == classes
    # 0 for a class that the model does not know.
    probabilities = (predictions.probabilities * is_class).sum(axis=1)
    return np.log(np.clip(probabilities, SMALLEST, None))


def order_columns(folder: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that the model in ``folder`` takes, in the order of its signature.

    XGBoost takes columns by their position: in another order its predictions are wrong, without an
    error. Numbers get the float dtype of the signature: MLflow refuses a column of decimals in
    which a CSV file has whole numbers only, and float64 in place of float32.

    Raises:
        InvalidInputError: a column is missing.
    """
    schema = mlflow.models.Model.load(str(folder)).get_input_schema()
    if schema is None or not schema.has_input_names():
        return rows
    names = schema.input_names()
    check_columns(rows, names)
    dtypes = {}
    for column in schema:
        dtype = rows[column.name].dtype
        if isinstance(dtype, np.dtype) and dtype.kind in "iuf" and column.type.name in FLOATS:
            dtypes[column.name] = FLOATS[column.type.name]
    return rows[names].astype(dtypes)


def differences(first: Predictions, second: Predictions) -> np.ndarray:
    """Return for each row by how much two models differ.

    For probabilities it is the largest difference of a class; for numbers the difference as a share
    of the larger one; else 1 for another class.
    """
    is_other = (first.predicted != second.predicted).astype(float)
    if first.probabilities is not None and second.probabilities is not None:
        if list(first.classes) != list(second.classes):
            return np.ones(len(is_other))
        return np.abs(first.probabilities - second.probabilities).max(axis=1)
    if first.predicted.dtype.kind != "f" or second.predicted.dtype.kind != "f":
        return is_other
    both_missing = np.isnan(first.predicted) & np.isnan(second.predicted)
    larger = np.maximum(np.abs(first.predicted), np.abs(second.predicted))
    shares = np.abs(first.predicted - second.predicted) / np.where(larger > 0, larger, 1)
    return np.where(both_missing, 0, shares)


def equal_rows(first: Predictions, second: Predictions, tolerance: float = TOLERANCE) -> np.ndarray:
    """Return for each row whether two models predict the same.

    Args:
        first: the predictions of one model.
        second: those of the other one, for the same rows.
        tolerance: by how much they may differ, see `differences`. A class must be the same.
    """
    equal = differences(first, second) <= tolerance
    if first.task != REGRESSION:
        equal &= first.predicted == second.predicted
    return equal
