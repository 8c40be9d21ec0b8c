"""Judge a batch of rows: as usual, broken, drifted, or predicted worse than expected?

A batch is compared with the rows that the version learned from. They were signed with it, so nobody
can silence the alarm by changing the store.
"""

import ast
import contextlib
import functools
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict

from mlflow_lifecycle.datasets import as_text, check_columns
from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.flavors import CLASSIFICATION, load_estimator, task_of
from mlflow_lifecycle.monitoring.drift import (
    LEVEL,
    LIMITS,
    Difference,
    Estimate,
    Limits,
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
    def answered(self) -> pd.DataFrame:
        """The rows, with the predictions in the column ``prediction``."""
        return self.rows.assign(**{PREDICTION: self.predictions})

    @functools.cached_property
    def errors(self) -> pd.Series:
        """The error of each prediction."""
        return _find_errors(self, self.answered)

    @property
    def expected(self) -> Estimate:
        """The accuracy, or the mean absolute error, of the predictions."""
        return _estimate(self, self.errors)


def load_reference(version: Verified) -> Reference:
    """Return what batches are compared with. All of it was signed.

    The model is loaded in this process. A metric in the store is not signed, so the model is
    cross-validated on its training rows.

    Args:
        version: a verified version of a classifier or regressor.

    Raises:
        InvalidInputError: no training data was signed, it does not have one target beside the
            columns of the model, or the model cannot be cross-validated on it.
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
    targets = list(rows.columns.drop(features))
    if len(targets) != 1 or PREDICTION in rows:
        raise InvalidInputError(
            f"The training data of {version.uri} must have one target, got {targets}, and no "
            f"column {PREDICTION!r}, which holds the predictions of a batch."
        )
    target = targets[0]
    estimator = load_estimator(version.folder)
    folds = KFold(5, shuffle=True, random_state=0)
    try:
        if task_of(estimator) == CLASSIFICATION:
            smallest = rows[target].value_counts().min()
            folds = StratifiedKFold(min(5, smallest), shuffle=True, random_state=0)
        predictions = cross_val_predict(
            _copy_unfitted(estimator, version.statement.parameters),
            rows[features],
            rows[target],
            cv=folds,
        )
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise InvalidInputError(
            f"{version.uri} cannot be cross-validated on its training data: {reason}"
        ) from None
    return Reference(rows, features, target, estimator, predictions)


def add_predictions(reference: Reference, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with the column ``prediction``. If it is missing, the model predicts it.

    Raises:
        InvalidInputError: a column is missing, or the model cannot predict the rows.
    """
    check_columns(rows, reference.features)
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
    findings = {verdict: [] for verdict in Verdict}
    labels = rows.get(reference.target, pd.Series(np.nan, rows.index)).dropna()
    if reference.is_classifier:
        findings[Verdict.LABELS] = _check_classes(reference, labels)
    differences = ()
    try:
        rows = add_predictions(reference, rows)
        differences = compare(
            _select_columns(reference, reference.answered),
            _select_columns(reference, rows),
            limits,
        )
    except InvalidInputError as error:
        findings[Verdict.BROKEN].append(str(error))
    for difference in differences:
        if difference.alarm:
            verdict = Verdict.BROKEN if difference.outside else Verdict.DRIFT
            findings[verdict].append(str(difference))
    metric = "accuracy" if reference.is_classifier else "mean_absolute_error"
    performance = None
    if differences and len(labels) > 1:
        errors = _find_errors(reference, rows.dropna(subset=reference.target))
        performance = _estimate(reference, errors)
        if _is_worse(reference, errors, limits):
            text = f"{metric} {performance}, expected {reference.expected}"
            findings[Verdict.PERFORMANCE].append(text)
    reasons = [(verdict, text) for verdict in Verdict for text in findings[verdict]]
    verdict = reasons[0][0] if reasons else Verdict.QUIET
    if accepted and reasons and differences:
        verdict = Verdict.ACCEPTED
    return Judgement(
        verdict=verdict,
        reasons=tuple(text for _, text in reasons),
        rows=len(rows),
        differences=differences,
        metric=metric,
        performance=performance,
        expected=reference.expected,
        accepted=accepted if verdict is Verdict.ACCEPTED else "",
    )


def _copy_unfitted(estimator: BaseEstimator, parameters: dict[str, str]) -> BaseEstimator:
    """Return an unfitted copy.

    XGBoost's own format contains no parameters. Those that the run logged were signed.

    Raises:
        InvalidInputError: the run did not log the number of trees.
    """
    copy = clone(estimator)
    values = copy.get_params()
    if values.get("n_estimators", 0) is None and "n_estimators" not in parameters:
        raise InvalidInputError(
            "XGBoost's format contains no parameters, and the run did not log n_estimators. Log "
            "all of them, and register the model again: mlflow.log_params(model.get_params())"
        )
    for name, value in values.items():
        if value is None and name in parameters:
            logged = parameters[name]
            with contextlib.suppress(SyntaxError, ValueError):  # a text, such as gbtree
                logged = ast.literal_eval(logged)
            copy.set_params(**{name: logged})
    return copy


def _find_errors(reference: Reference, rows: pd.DataFrame) -> pd.Series:
    """Return the error of each prediction: 1 for a wrong class, or the absolute error."""
    labels = rows[reference.target]
    predictions = rows[PREDICTION]
    if reference.is_classifier:
        return (as_text(predictions) != as_text(labels)).astype(float)
    labels = read_numbers(reference.target, labels)
    predictions = read_numbers(PREDICTION, predictions)
    return (predictions - labels).abs()


def _estimate(reference: Reference, errors: pd.Series) -> Estimate:
    """Return the metric with its interval."""
    count = len(errors)
    if reference.is_classifier:
        return estimate_share(int(count - errors.sum()), count)
    mean = float(errors.mean())
    quantile = float(stats.t.ppf(0.975, count - 1))
    margin = quantile * float(errors.sem())
    return Estimate(mean, count, mean - margin, mean + margin)


def _is_worse(
    reference: Reference,
    errors: pd.Series,
    limits: Limits,
) -> bool:
    """Return whether the errors are larger by the limit, and significantly by Welch's t-test."""
    expected = reference.errors
    limit = limits.loss if reference.is_classifier else limits.error * expected.mean()
    if errors.mean() - expected.mean() < limit:
        return False
    test = stats.ttest_ind(
        errors,
        expected,
        equal_var=False,
        alternative="greater",
    )
    return bool(test.pvalue < LEVEL)


def _check_classes(reference: Reference, labels: pd.Series) -> list[str]:
    """Return what is wrong with the classes of a batch: a new one, or one that has vanished."""
    known = as_text(reference.rows[reference.target])
    shares = known.value_counts(normalize=True).sort_index()
    names = set(as_text(labels))
    reasons = []
    for name in sorted(names.difference(shares.index)):
        reasons.append(f"the model does not know the class {name!r}")
    for name, share in shares.items():
        # The level is corrected for the number of classes.
        by_chance = (1 - share) ** len(labels)
        if name not in names and by_chance < LEVEL / len(shares):
            text = f"none of {len(labels)} rows has the class {name!r}"
            reasons.append(f"{text}, which {share:.0%} of the training rows have")
    return reasons


def _select_columns(reference: Reference, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the features, and the predictions as one more column."""
    predictions = rows[PREDICTION]
    if reference.is_classifier:
        predictions = as_text(predictions)
    name = f"prediction of {reference.target}"
    return rows[reference.features].assign(**{name: predictions})
