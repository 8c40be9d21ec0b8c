"""Judge a batch of rows: as usual, broken, drifted, or predicted worse than expected?

A batch is compared with the rows that the version learned from. They were signed with it, so nobody
can silence the alarm by changing the store.
"""

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict

from mlflow_lifecycle.datasets import as_classes, as_text
from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.flavors import CLASSIFICATION, load_estimator, task_of
from mlflow_lifecycle.monitoring.drift import (
    LIMITS,
    Difference,
    Estimate,
    Limits,
    check_columns,
    compare,
    estimate_share,
    read_numbers,
)
from mlflow_lifecycle.scoring import order_columns
from mlflow_lifecycle.signing.verify import Verified

PREDICTION = "prediction"


class Verdict(StrEnum):
    """The verdict on a batch, the most urgent first.

    Rows cannot tell a fault from a change of the world. Until somebody has found the cause of one
    of the alarms, no model should learn from the rows. With drift, whose values are all within the
    training range, a new model may learn from them.
    """

    BROKEN = "broken input"
    LABELS = "other labels"
    DRIFT = "drift"
    PERFORMANCE = "performance alarm"
    ACCEPTED = "accepted change"  # a person has decided that the world has changed
    QUIET = "quiet"


@dataclass(frozen=True)
class Judgement:
    """The verdict on a batch, its reasons, and the figures behind them.

    Attributes:
        verdict: the most urgent finding, or what a person decided.
        reasons: one per finding, the most urgent first.
        rows: how many rows the batch has.
        differences: of the columns and of the predictions, from the training rows.
        metric: "accuracy" or "mean_absolute_error".
        performance: the metric on the rows with a label; None if there are fewer than two.
        expected: the cross-validated metric on the training rows.
        accepted: why the findings are a true change, as a person stated it.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    rows: int
    differences: tuple[Difference, ...]
    metric: str
    performance: Estimate | None
    expected: Estimate
    accepted: str


@dataclass(frozen=True)
class Reference:
    """What batches are compared with.

    Attributes:
        rows: the rows that the version learned from, target included.
        features: the columns that the model takes, in its order.
        target: the column with the true values.
        estimator: the model.
        predictions: for each row, of a model with the same parameters that did not learn from it.
    """

    rows: pd.DataFrame
    features: list[str]
    target: str
    estimator: BaseEstimator
    predictions: np.ndarray

    @property
    def is_classifier(self) -> bool:
        """Whether the task is classification, and not regression."""
        return task_of(self.estimator) == CLASSIFICATION

    @property
    def metric(self) -> str:
        """The name that MLflow has for the metric."""
        return "accuracy" if self.is_classifier else "mean_absolute_error"

    @functools.cached_property
    def errors(self) -> np.ndarray:
        """The error of each prediction."""
        return _find_errors(self, self.rows[self.target], self.predictions)

    @functools.cached_property
    def expected(self) -> Estimate:
        """The metric of the predictions."""
        return _estimate(self, self.errors)


def load_reference(version: Verified) -> Reference:
    """Return what batches are compared with. All of it was signed.

    The model is loaded in this process. A metric in the store is not signed, so the model is
    cross-validated on its training rows.

    Args:
        version: a verified version of a classifier or regressor.

    Raises:
        InvalidInputError: no training data was signed, it does not have one target, a column is
            named ``prediction``, or the model cannot be cross-validated on it.
    """
    if version.training_rows is None:
        raise InvalidInputError(
            f"No training data was signed with {version.uri}. "
            f"Add it: lifecycle sign {version.uri} --training-data FILE"
        )
    rows = pd.read_parquet(version.training_rows)
    # Parquet returns a missing text as None, which scikit-learn takes for another category.
    rows = rows.fillna(np.nan)
    features = list(order_columns(version.folder, rows))
    targets = [name for name in rows if name not in features]
    if len(targets) != 1:
        raise InvalidInputError(
            f"The training data of {version.uri} must have one target, got {targets}."
        )
    if PREDICTION in rows:
        raise InvalidInputError(
            f"{version.uri} learned from a column {PREDICTION!r}. In a batch, this column holds "
            "the predictions. Rename it, and train the model again."
        )
    target = targets[0]
    estimator = load_estimator(version.folder)
    copy = _copy_unfitted(estimator, version.statement.parameters)
    folds = KFold(5, shuffle=True, random_state=0)
    if task_of(estimator) == CLASSIFICATION:
        smallest = rows[target].value_counts().min()
        if smallest < 2:
            raise InvalidInputError(
                f"A class of {target!r} has one row, so {version.uri} cannot be cross-validated."
            )
        folds = StratifiedKFold(min(5, smallest), shuffle=True, random_state=0)
    try:
        predictions = cross_val_predict(copy, rows[features], rows[target], cv=folds)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise InvalidInputError(
            f"{version.uri} cannot be cross-validated on its training data: {reason}"
        ) from None
    return Reference(rows, features, target, estimator, np.ravel(predictions))


def add_predictions(reference: Reference, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with the column ``prediction``. If it is missing, the model predicts it.

    Raises:
        InvalidInputError: a column is missing, or the model cannot predict the rows.
    """
    check_columns(reference.features, rows)
    if PREDICTION in rows:
        return rows
    try:
        predictions = reference.estimator.predict(rows[reference.features])
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInputError(f"The model cannot predict these rows: {reason}") from None
    return rows.assign(**{PREDICTION: np.ravel(predictions)})


def judge(
    reference: Reference,
    rows: pd.DataFrame,
    limits: Limits = LIMITS,
    accepted: str = "",
) -> Judgement:
    """Return the verdict on a batch.

    Args:
        reference: what the batch is compared with.
        rows: the batch. With labels in the column of the target, the performance is judged, too.
            The column ``prediction`` holds what the version answered; without it, the model
            predicts here.
        limits: the alarm thresholds.
        accepted: why the findings are a true change, if a person has decided so. The verdict is
            then "accepted change", unless the model cannot take the rows.

    Raises:
        InvalidInputError: there are no rows, or a label of a regression is not a number.
    """
    if rows.empty:
        raise InvalidInputError("There are no rows to judge.")
    labels = read_labels(reference, rows)
    findings = []
    differences = ()
    performance = None
    if reference.is_classifier:
        for text in _check_classes(reference, labels.dropna(), limits):
            findings.append((Verdict.LABELS, text))
    try:
        rows = add_predictions(reference, rows)
        differences = compare(
            _with_predictions(reference, reference.rows, reference.predictions),
            _with_predictions(reference, rows, rows[PREDICTION]),
            limits,
        )
    except InvalidInputError as error:
        findings.append((Verdict.BROKEN, str(error)))
    for difference in differences:
        if difference.alarm:
            verdict = Verdict.BROKEN if difference.outside else Verdict.DRIFT
            findings.append((verdict, str(difference)))
    labelled = labels.notna()
    if differences and labelled.sum() > 1:
        errors = _find_errors(reference, labels[labelled], rows.loc[labelled, PREDICTION])
        performance = _estimate(reference, errors)
        if _is_worse(reference, errors, limits):
            text = f"{reference.metric} {performance}, expected {reference.expected}"
            findings.append((Verdict.PERFORMANCE, text))
    order = list(Verdict)
    findings.sort(key=lambda finding: order.index(finding[0]))
    verdict = findings[0][0] if findings else Verdict.QUIET
    if accepted and findings and differences:
        verdict = Verdict.ACCEPTED
    return Judgement(
        verdict=verdict,
        reasons=tuple(text for _, text in findings),
        rows=len(rows),
        differences=differences,
        metric=reference.metric,
        performance=performance,
        expected=reference.expected,
        accepted=accepted,
    )


def read_labels(reference: Reference, rows: pd.DataFrame) -> pd.Series:
    """Return the labels as the training rows write them, NaN where they are missing.

    Raises:
        InvalidInputError: the label of a regression is not a number.
    """
    if reference.target not in rows:
        return pd.Series(np.nan, rows.index)
    labels = rows[reference.target]
    if reference.is_classifier:
        return as_classes(reference.rows[reference.target], labels)
    return read_numbers(reference.target, labels)


def _copy_unfitted(estimator: BaseEstimator, parameters: dict[str, str]) -> BaseEstimator:
    """Return an unfitted copy.

    XGBoost's own format holds no parameters. Those that the run logged were signed.
    """
    copy = clone(estimator)
    for name, value in copy.get_params().items():
        text = parameters.get(name)
        if value is None and text is not None:
            try:
                copy.set_params(**{name: ast.literal_eval(text)})
            except (SyntaxError, ValueError):
                copy.set_params(**{name: text})
    return copy


def _find_errors(
    reference: Reference,
    labels: pd.Series,
    predictions: Sequence,
) -> np.ndarray:
    """Return the error of each prediction: 1 for a wrong class, or the absolute error."""
    predictions = pd.Series(np.asarray(predictions), labels.index)
    if reference.is_classifier:
        predictions = as_classes(reference.rows[reference.target], predictions)
        return (predictions != labels).to_numpy(dtype=float)
    return (read_numbers(PREDICTION, predictions) - labels).abs().to_numpy()


def _estimate(reference: Reference, errors: np.ndarray) -> Estimate:
    """Return the metric with its interval."""
    count = len(errors)
    if reference.is_classifier:
        return estimate_share(int(count - errors.sum()), count)
    mean = float(errors.mean())
    margin = float(stats.t.ppf(0.975, count - 1) * stats.sem(errors))
    return Estimate(mean, count, mean - margin, mean + margin)


def _is_worse(reference: Reference, errors: np.ndarray, limits: Limits) -> bool:
    """Return whether the errors are larger by the limit, and significantly by Welch's t-test."""
    expected = reference.errors
    limit = limits.loss if reference.is_classifier else limits.error * expected.mean()
    if errors.mean() - expected.mean() < limit:
        return False
    test = stats.ttest_ind(errors, expected, equal_var=False, alternative="greater")
    return bool(test.pvalue < limits.level)


def _check_classes(reference: Reference, labels: pd.Series, limits: Limits) -> list[str]:
    """Return what is wrong with the classes of a batch: a new one, or one that has vanished."""
    shares = reference.rows[reference.target].value_counts(normalize=True)
    reasons = []
    for name in sorted(set(labels) - set(shares.index), key=str):
        text = f"the model does not know the class {name!r}"
        for other in shares.index:
            if str(other).strip().casefold() == str(name).strip().casefold():
                text += f", which is written like {other!r}"
        reasons.append(text)
    for name, share in shares.sort_index().items():
        # The level is corrected for the number of classes.
        by_chance = (1 - share) ** len(labels)
        if name not in set(labels) and by_chance < limits.level / len(shares):
            text = f"none of {len(labels)} rows has the class {name!r}"
            reasons.append(f"{text}, which {share:.0%} of the training rows have")
    return reasons


def _with_predictions(
    reference: Reference,
    rows: pd.DataFrame,
    predictions: Sequence,
) -> pd.DataFrame:
    """Return the features, and the predictions as one more column."""
    column = pd.Series(np.asarray(predictions), rows.index)
    if reference.is_classifier:
        column = as_text(column)
    return rows[reference.features].assign(**{f"prediction of {reference.target}": column})
