"""Split a table so that rows that belong together stay on one side, and score models in its folds.

scikit-learn has a splitter for each case: with or without classes, with or without groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    StratifiedGroupKFold,
    StratifiedKFold,
    cross_validate,
    train_test_split,
)

from mlflow_lifecycle.datasets import check_table


@dataclass(frozen=True)
class Split:
    """Training rows, test rows, and the folds of the training rows.

    A fold is the positions of the rows to train on, and of those to score. This is what ``cv`` of
    scikit-learn's ``cross_validate`` takes.
    """

    train: pd.DataFrame
    test: pd.DataFrame
    folds: list[tuple[np.ndarray, np.ndarray]]


def split_table(
    rows: pd.DataFrame,
    target: str,
    *,
    task: str = "classification",
    group: str = "",
    test_share: float = 0.2,
    folds: int = 5,
    repeats: int = 1,
    seed: int = 0,
) -> Split:
    """Return the rows, split at random into a test set and folds of the rest.

    Args:
        rows: one row per example.
        target: the column to predict. For classification each split is stratified by it.
        task: classification or regression.
        group: the column that says which rows belong together. No split divides them.
        test_share: the share of the rows in the test set; with groups, about this share.
        folds: the number of folds in each repetition.
        repeats: the number of repetitions, each with new folds.
        seed: fixes the split and the folds.

    Raises:
        InvalidInputError: `check_table` refuses the rows.
    """
    check_table(rows, target, task=task, group=group, test_share=test_share, folds=folds)
    if task == "classification":
        splitter = StratifiedGroupKFold if group else StratifiedKFold
        classes = rows[target]
    else:
        splitter = GroupKFold if group else KFold
        classes = None
    if group:
        parts = splitter(max(2, round(1 / test_share)), shuffle=True, random_state=seed)
        training, testing = next(parts.split(rows, rows[target], rows[group]))
        train = rows.iloc[training]
        test = rows.iloc[testing]
    else:
        train, test = train_test_split(
            rows, test_size=test_share, stratify=classes, random_state=seed
        )
    positions = []
    for repeat in range(repeats):
        parts = splitter(folds, shuffle=True, random_state=seed + repeat)
        positions += parts.split(train, train[target], train[group] if group else None)
    return Split(train, test, positions)


def score_folds(
    models: Mapping[str, object],
    features: pd.DataFrame,
    target: pd.Series,
    *,
    cv: object,
    scoring: list[str] | dict[str, object],
    folds: int = 5,
) -> pd.DataFrame:
    """Return the scores of models in the same folds, so that they are paired.

    Args:
        models: scikit-learn models by name. They are not fitted here.
        features: the training rows.
        target: what to predict.
        cv: the folds, or a splitter with a fixed seed, as for ``cross_validate``.
        scoring: scorers, as for ``cross_validate``. Greater is better.
        folds: the number of folds in each repetition.

    Returns:
        A row per fold, with the index ``repeat`` and ``fold``, and a column per model and scorer:
        ``scores["LogisticRegression", "accuracy"]``.
    """
    columns = {}
    for name, model in models.items():
        result = cross_validate(
            model, features, target, cv=cv, scoring=scoring, error_score="raise"
        )
        for measure in scoring:
            columns[name, measure] = result[f"test_{measure}"]
    scores = pd.DataFrame(columns)
    places = [scores.index // folds, scores.index % folds]
    return scores.set_index(places).rename_axis(["repeat", "fold"])
