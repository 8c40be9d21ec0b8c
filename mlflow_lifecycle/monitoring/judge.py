"""Judge the rows that a registered version is asked about: as usual, broken, drifted, or answered worse than expected?

MLflow keeps models, data and metrics, and compares none of them. Here a batch is compared with the rows that the
version learned from, which were signed with it, so that nobody can move the alarm by changing the store.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pandas as pd
from scipy import stats

from mlflow_lifecycle.datasets import as_classes, as_text
from mlflow_lifecycle.exceptions import ColumnsDifferError, InvalidInputError
from mlflow_lifecycle.monitoring.drift import (
    LIMITS,
    ColumnDrift,
    Limits,
    OutOfRange,
    Share,
    drift,
    out_of_range,
    share,
)
from mlflow_lifecycle.signing.verify import Verified

PREDICTION = "prediction"


class Verdict(StrEnum):
    """What a batch is, the most urgent first."""

    BROKEN = "broken input"  # refuse or repair the rows; no model learns from them
    LABELS = "other labels"  # somebody has to look at the labels; no model learns from them
    DRIFT = "drift"  # with labels, a challenger may learn from the rows
    ACCURACY = "accuracy alarm"  # the rows are as usual and the answers are not right: labels or world have changed
    QUIET = "quiet"


@dataclass(frozen=True)
class Judgement:
    """The verdict on a batch, its reasons, and the figures behind them."""

    verdict: Verdict
    reasons: tuple[str, ...]
    rows: int
    drift: tuple[ColumnDrift, ...] = ()
    out_of_range: tuple[OutOfRange, ...] = ()
    accuracy: Share | None = None
    expected: Share | None = None


@dataclass(frozen=True)
class Baseline:
    """What batches are compared with.

    Attributes:
        rows: those that the version learned from, target included.
        features: the columns that it is asked with.
        target: the column of classes.
        predictions: what a model of the same recipe predicts for ``rows``, each by folds without that row.
        expected: how many of them are right.
        estimator: the version's scikit-learn model.
    """

    rows: pd.DataFrame
    features: list[str]
    target: str
    predictions: np.ndarray
    expected: Share
    estimator: object


def baseline(version: Verified) -> Baseline:
    """Return what batches are compared with, all of it from what was signed. The model is loaded in this process.

    The store's word for a metric is not signed, so the version's recipe is cross-validated on its own rows.

    Args:
        version: a verified version of a scikit-learn classifier.

    Raises:
        ValueError: no training data was signed, the model is no classifier with a column of classes among its rows, a
            class has a single row, or a column is called ``prediction``.
    """
    import mlflow
    from sklearn.base import clone, is_classifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    if version.training_rows is None:
        remedy = f"Add it: lifecycle sign {version.uri} --training-data FILE"
        raise InvalidInputError(
            f"There is nothing to compare with: no training data was signed. {remedy}"
        )
    rows, signature = (
        pd.read_parquet(version.training_rows),
        mlflow.models.Model.load(str(version.folder)).signature,
    )
    rows = rows.fillna(
        np.nan
    )  # Parquet gives None for a gap in text, which scikit-learn takes for another value
    features = signature.inputs.input_names() if signature else []
    targets = [name for name in rows if name not in features]
    estimator = mlflow.sklearn.load_model(str(version.folder))
    if len(targets) != 1 or not is_classifier(estimator):
        raise InvalidInputError(
            f"{version.uri} is no classifier with one target; beside its inputs it learned from {targets}"
        )
    if PREDICTION in rows:
        told = f"{version.uri} learned from a column {PREDICTION!r}, which in a batch is what a version has answered"
        raise InvalidInputError(f"{told}. Rename the column, and train the model again.")
    (target,) = targets
    smallest = int(rows[target].value_counts().min())
    if smallest < 2:
        raise InvalidInputError(
            f"A class of {target!r} has one row, so {version.uri} cannot be cross-validated."
        )
    folds = StratifiedKFold(min(5, smallest), shuffle=True, random_state=0)
    predictions = cross_val_predict(clone(estimator), rows[features], rows[target], cv=folds)
    expected = share(int((predictions == rows[target]).sum()), len(rows))
    return Baseline(rows, features, target, predictions, expected, estimator)


def answered(known: Baseline, rows: pd.DataFrame) -> pd.DataFrame:
    """Return ``rows`` with the column ``prediction``: as it is there, or else as the model answers now.

    Raises:
        ValueError: the model cannot take the rows, scikit-learn says why.
    """
    return (
        rows
        if PREDICTION in rows
        else rows.assign(**{PREDICTION: known.estimator.predict(rows[known.features])})
    )


def judge(known: Baseline, rows: pd.DataFrame, limits: Limits = LIMITS) -> Judgement:
    """Return the verdict on a batch.

    Args:
        known: what to compare with.
        rows: a row per case. With the target's column, where it is not missing, the accuracy is judged, too. With the
            column ``prediction``, that is what the version answered; by default the model is asked here.
        limits: from where on a finding is an alarm.

    Raises:
        ValueError: there are no rows.
    """
    labels = labels_of(known, rows)
    found = [
        (Verdict.LABELS, reason)
        for reason in _other_labels(known.rows[known.target], labels.dropna(), limits)
    ]
    ranges, drifts, accuracy = (), (), None
    if rows.empty:
        raise InvalidInputError("There are no rows to judge.")
    try:
        ranges = out_of_range(known.rows[known.features], rows, limits)
        rows = answered(known, rows)
        drifts = drift(
            _compared(known, known.rows, known.predictions),
            _compared(known, rows, rows[PREDICTION]),
            limits,
        )
    except ColumnsDifferError as error:
        found.append((Verdict.BROKEN, str(error)))
    except ValueError as error:  # scikit-learn's, for gaps for example
        found.append(
            (
                Verdict.BROKEN,
                f"The model cannot predict these rows: {str(error).partition(chr(10))[0]}",
            )
        )
    for column in ranges:
        if column.alarm:
            beyond = f"{column.column}: {column.rows} of {len(rows)} rows are beyond what training saw, {column.seen}"
            found.append((Verdict.BROKEN, beyond))
    for column in drifts:
        if column.alarm:
            found.append(
                (
                    Verdict.DRIFT,
                    f"{column.column}: {column.size:.2f} {column.unit}, p = {column.p_value:.1g}",
                )
            )
    if drifts and labels.notna().any():
        right = (as_classes(known.rows[known.target], rows[PREDICTION]) == labels)[labels.notna()]
        accuracy = share(int(right.sum()), len(right))
        if _worse(accuracy, known.expected, limits):
            found.append((Verdict.ACCURACY, f"accuracy {accuracy}, expected {known.expected}"))
    order = list(Verdict)
    found.sort(key=lambda pair: order.index(pair[0]))
    verdict = found[0][0] if found else Verdict.QUIET
    return Judgement(
        verdict,
        tuple(text for _, text in found),
        len(rows),
        drifts,
        ranges,
        accuracy,
        known.expected,
    )


def unusual(reference: pd.DataFrame, rows: pd.DataFrame) -> bool:
    """Tell whether a column has drifted or is out of range, for ``mlflow_lifecycle.monitoring.drift.false_alarms``."""
    return any(column.alarm for column in (*drift(reference, rows), *out_of_range(reference, rows)))


def labels_of(known: Baseline, rows: pd.DataFrame) -> pd.Series:
    """Return the labels, as text where the version's classes are text; gaps where there are none."""
    if known.target not in rows:
        return pd.Series(np.nan, rows.index, dtype=object)
    return as_classes(known.rows[known.target], rows[known.target])


def _other_labels(known: pd.Series, labels: pd.Series, limits: Limits) -> list[str]:
    """Return what is wrong with the classes of a batch: one that nobody knows, or one that has vanished."""
    shares, reasons = known.value_counts(normalize=True), []
    for name in sorted(set(labels) - set(shares.index), key=str):
        alike = [
            other
            for other in shares.index
            if str(other).strip().casefold() == str(name).strip().casefold()
        ]
        hint = f", and is written like {alike[0]!r}" if alike else ""
        reasons.append(f"{name!r} is no class that the model knows{hint}")
    for name in sorted(set(shares.index) - set(labels), key=str):
        if (1 - shares[name]) ** len(labels) < limits.level / len(
            shares
        ):  # corrected for several classes
            reasons.append(
                f"no row of the class {name!r} among {len(labels)}, where {shares[name]:.0%} were"
            )
    return reasons


def _compared(known: Baseline, rows: pd.DataFrame, predictions: Iterable) -> pd.DataFrame:
    """Return the features, with the predictions as one more column of text."""
    return rows[known.features].assign(
        **{f"prediction of {known.target}": as_text(pd.Series(predictions)).to_numpy()}
    )


def _worse(accuracy: Share, expected: Share, limits: Limits) -> bool:
    """Tell whether the accuracy is lower by a loss that counts, and not by chance, by Fisher's exact test."""
    table = [[part.count, part.cases - part.count] for part in (accuracy, expected)]
    by_chance = stats.fisher_exact(table, alternative="less").pvalue
    return bool(by_chance < limits.level and expected.value - accuracy.value >= limits.loss)
