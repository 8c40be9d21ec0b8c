"""Score a model on each row, for classification and regression; a higher score is better.

MLflow gives one number per model. Whether chance alone could explain a difference between two
models shows only in the scores of the single rows.
"""

from pathlib import Path

import mlflow
import numpy as np
import pandas as pd

from mlflow_lifecycle.datasets import as_text, check_columns
from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.flavors import REGRESSION, task_of

LOG_PROBABILITY = "log probability"
ACCURACY = "accuracy"
ABSOLUTE_ERROR = "absolute error"
# XGBoost computes in float32. The same limit holds for all models, so that the comparison is fair.
SMALLEST = float(np.finfo(np.float32).eps)
TOLERANCE = 1e-6
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


def measure_of(model: object, other: object) -> str:
    """Return the measure that compares two models: log probability, accuracy or absolute error.

    Raises:
        InvalidInputError: their tasks differ.
    """
    task = task_of(model)
    if task != task_of(other):
        raise InvalidInputError(
            f"A model for {task} cannot be compared with one for {task_of(other)}."
        )
    if task == REGRESSION:
        return ABSOLUTE_ERROR
    if hasattr(model, "predict_proba") and hasattr(other, "predict_proba"):
        return LOG_PROBABILITY
    return ACCURACY


def score_rows(
    model: object,
    features: pd.DataFrame,
    target: pd.Series,
    measure: str,
) -> np.ndarray:
    """Return the score of each row; a higher score is better.

    Args:
        model: a fitted scikit-learn model, or one with its interface.
        features: the rows, with the columns in the order that the model takes.
        target: the true values. Classes are compared as text: a CSV file does not tell the text 0
            from the number.
        measure: from `measure_of`. Log probability: of the right class; it tells apart two models
            that are right equally often and not equally sure. Accuracy: 1 for a right prediction,
            else 0. Absolute error: minus it.
    """
    if measure == ABSOLUTE_ERROR:
        predictions = np.ravel(model.predict(features))
        return -np.abs(predictions - target.to_numpy(dtype=float))
    labels = as_text(target).to_numpy()
    if measure == ACCURACY:
        predictions = np.ravel(model.predict(features))
        is_right = labels == as_text(predictions).to_numpy()
        return is_right.astype(float)
    classes = as_text(model.classes_).to_numpy()
    is_class = labels[:, np.newaxis] == classes
    # 0 for a class that the model does not know.
    probabilities = (model.predict_proba(features) * is_class).sum(axis=1)
    return np.log(np.clip(probabilities, SMALLEST, None))


def order_columns(folder: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that the model in ``folder`` takes, in the order of its signature.

    XGBoost takes columns by their position: in another order its predictions are wrong, without an
    error.

    Raises:
        InvalidInputError: a column is missing.
    """
    schema = mlflow.models.Model.load(str(folder)).get_input_schema()
    if schema is None or not schema.has_input_names():
        return rows
    names = schema.input_names()
    check_columns(rows, names)
    return rows[names]


def equal_predictions(
    first: np.ndarray,
    second: np.ndarray,
) -> np.ndarray:
    """Return for each row whether two predictions are equal.

    Decimal numbers may differ by a millionth of their size.
    """
    first = np.ravel(first)
    second = np.ravel(second)
    if first.dtype.kind == "f" and second.dtype.kind == "f":
        return np.isclose(
            first,
            second,
            rtol=TOLERANCE,
            atol=0,
            equal_nan=True,
        )
    return first == second
