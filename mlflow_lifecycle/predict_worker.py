"""Predict rows in the environment of a model: ``python -I predict_worker.py MODEL ROWS ANSWER``.

ROWS and ANSWER are files of JSON. This file runs in that environment, and imports nothing of this
package.
"""

import json
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd

OPTIONAL_DTYPES = {"long": "Int64", "integer": "Int32", "boolean": "boolean"}
DTYPES = {"float": "float32", "double": "float64", "integer": "int32"}


def predict_file(folder: str, rows_file: str, answer_file: str) -> None:
    """Write what a model predicts for the rows in a file, which holds the values of each column.

    pandas chooses the type of each other column itself, as for a program that reads the rows in
    this environment.
    """
    model = mlflow.pyfunc.load_model(folder)
    rows = pd.DataFrame(json.loads(Path(rows_file).read_text(encoding="utf-8")))
    for column in model.metadata.signature.inputs:
        if column.type.name == "datetime":
            rows[column.name] = pd.to_datetime(rows[column.name])
        elif not column.required and column.type.name in OPTIONAL_DTYPES:
            rows[column.name] = rows[column.name].astype(OPTIONAL_DTYPES[column.type.name])
        elif column.type.name in DTYPES:
            rows[column.name] = rows[column.name].astype(DTYPES[column.type.name])
    answer = {"predicted": np.ravel(model.predict(rows)).tolist()}
    estimator = model.get_raw_model()
    if hasattr(estimator, "predict_proba"):
        answer["classes"] = np.asarray(estimator.classes_).tolist()
        answer["probabilities"] = np.asarray(estimator.predict_proba(rows)).tolist()
    Path(answer_file).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    predict_file(*sys.argv[1:])
