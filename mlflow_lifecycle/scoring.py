"""Score a model on each row, for classification and regression; a higher score is better.

MLflow gives one number per model. Whether chance alone could explain a difference between two
models shows only in the scores of the single rows.
"""

from pathlib import Path

import mlflow
import numpy as np
import pandas as pd

from mlflow_lifecycle.datasets import as_text
from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.flavors import REGRESSION, task_of

LOG_PROBABILITY, ACCURACY, ABSOLUTE_ERROR = "log probability", "accuracy", "absolute error"
# XGBoost computes in float32. The same limit holds for all models, so that the comparison is fair.
SMALLEST = float(np.finfo(np.float32).eps)
TOLERANCE = 1e-6


def measure_of(model: object, other: object) -> str:
    """Return the measure that compares two models: log probability, accuracy or absolute error.

    Raises:
        ValueError: their tasks differ.
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
    model: object, features: pd.DataFrame, target: pd.Series, measure: str
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
        return -np.abs(np.ravel(model.predict(features)) - target.to_numpy(dtype=float))
    labels = as_text(target)
    if measure == ACCURACY:
        predicted = as_text(pd.Series(np.ravel(model.predict(features)), index=labels.index))
        return (predicted == labels).to_numpy(dtype=float)
    classes = as_text(pd.Series(model.classes_))
    places = pd.Index(classes).get_indexer(labels)
    given = model.predict_proba(features)[np.arange(len(labels)), places]
    given = np.where(places < 0, 0.0, given)  # a class that the model does not know
    return np.log(np.clip(given, SMALLEST, None))


def order_columns(folder: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that the model in ``folder`` takes, in the order of its signature.

    XGBoost takes columns by their position: in another order its predictions are wrong, without an
    error.

    Raises:
        ValueError: a column is missing.
    """
    signature = mlflow.models.Model.load(str(Path(folder) / "MLmodel")).signature
    if signature is None or signature.inputs is None or not signature.inputs.has_input_names():
        return rows
    names = signature.inputs.input_names()
    missing = [name for name in names if name not in rows]
    if missing:
        raise InvalidInputError(f"The test rows lack these columns: {', '.join(missing)}")
    return rows[names]


def equal_predictions(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return for each row whether two predictions are equal.

    Decimal numbers may differ by a millionth of their size.
    """
    first = np.ravel(first)
    second = np.ravel(second)
    if first.dtype.kind == "f" and second.dtype.kind == "f":
        return np.isclose(first, second, rtol=TOLERANCE, atol=0, equal_nan=True)
    return first == second
