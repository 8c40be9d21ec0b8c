"""Compare rows with the rows that a model learned from: drift, and values never seen.

MLflow logs data, and does not compare it. With enough rows, a test finds any difference, however
small. Drift is therefore an alarm only if it is significant and also reaches a stated size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from mlflow_lifecycle.datasets import as_text, check_columns
from mlflow_lifecycle.exceptions import InvalidInputError

LEVEL = 0.01  # the accepted share of false discoveries among the alarms of one batch


@dataclass(frozen=True)
class Limits:
    """Alarm thresholds.

    Attributes:
        shift: the size of drift in a column of numbers, in standard deviations of the training
            rows. J. Cohen, "Statistical Power Analysis for the Behavioral Sciences", 2nd edition
            1988, calls 0.2 small and 0.5 medium.
        share: the size of drift in a column of categories, as a share of the rows.
        loss: the loss of accuracy.
        error: the increase of the mean absolute error, as a share of the expected error.
    """

    shift: float = 0.5
    share: float = 0.1
    loss: float = 0.05
    error: float = 0.2


LIMITS = Limits()


@dataclass(frozen=True)
class Difference:
    """One test of a column.

    Attributes:
        column: the column, or what of it was compared, such as ``size (missing)``.
        size: the size of the difference.
        unit: the unit of the size, as text to read behind it.
        limit: the size from which on a significant difference is an alarm.
        p_value: corrected for the number of tests.
        outside: whether the test is about values outside the training range, and not about drift.
        alarm: whether it is significant and reaches the limit.
    """

    column: str
    size: float
    unit: str
    limit: float
    p_value: float
    outside: bool = False
    alarm: bool = False

    def __str__(self) -> str:
        """Return it as text: ``petal length (cm): 0.63 standard deviations, p = 1e-09``."""
        return f"{self.column}: {self.size:.2f} {self.unit}, p = {self.p_value:.1g}"


@dataclass(frozen=True)
class Estimate:
    """A mean over a number of rows, and its 95 % interval."""

    value: float
    rows: int
    low: float
    high: float

    def __str__(self) -> str:
        """Return it as text: ``0.9467 (95 % interval 0.8690 to 0.9853)``."""
        return f"{self.value:.4f} (95 % interval {self.low:.4f} to {self.high:.4f})"


def estimate_share(count: int, rows: int) -> Estimate:
    """Return the share ``count`` of ``rows`` with the exact interval of Clopper and Pearson."""
    interval = stats.binomtest(count, rows).proportion_ci()
    return Estimate(count / rows, rows, float(interval.low), float(interval.high))


def compare(
    reference: pd.DataFrame,
    rows: pd.DataFrame,
    limits: Limits = LIMITS,
) -> tuple[Difference, ...]:
    """Return the differences of ``rows`` from ``reference``: two tests or more for each column.

    Drift of numbers is tested by Kolmogorov and Smirnov's test. The size is the Wasserstein
    distance in standard deviations of the reference: for a shifted distribution, this is the shift.

    Drift of categories, booleans and missing values is tested by the chi-squared test. The size is
    the total variation distance, the share of rows that would have to take another value, less the
    distance that chance alone would give.

    Outside the training range, the model extrapolates. Often the cause is a fault, such as another
    unit, a broken instrument or a new code. A few rows outside are normal. With n rows seen, the
    share of later numbers outside their range has the distribution Beta(2, n - 1), for any
    continuous distribution (S. Wilks, "Determination of sample sizes for setting tolerance limits",
    Annals of Mathematical Statistics 12 (1941), 91-96). The share of categories never seen is about
    the share s / n of those seen once (I. Good, Biometrika 40 (1953), 237-264), here with the
    distribution Beta(s + 1, n - s + 1). A missing value is outside if the training rows have none.

    The p-values are corrected for the number of tests as by Y. Benjamini and Y. Hochberg,
    "Controlling the False Discovery Rate", Journal of the Royal Statistical Society B 57 (1995),
    289-300. Dates are left out, because they always change.

    Args:
        reference: the rows that the model learned from.
        rows: the rows to compare. Columns that the reference does not have are ignored.
        limits: the alarm thresholds.

    Raises:
        InvalidInputError: a column is missing in the rows, or it does not hold numbers where the
            reference does.
    """
    check_columns(rows, reference)
    tests = []
    for name, column in reference.items():
        if pd.api.types.is_datetime64_any_dtype(column):
            continue
        is_number = pd.api.types.is_numeric_dtype(column)
        if is_number and not pd.api.types.is_bool_dtype(column):
            tests += _compare_numbers(name, column, rows[name], limits)
        else:
            tests += _compare_texts(name, column, rows[name], limits)
    p_values = stats.false_discovery_control([test.p_value for test in tests])
    differences = []
    for test, p_value in zip(tests, p_values, strict=True):
        difference = replace(
            test,
            p_value=float(p_value),
            alarm=bool(p_value < LEVEL and test.size >= test.limit),
        )
        differences.append(difference)
    return tuple(differences)


def read_numbers(name: str, column: pd.Series) -> pd.Series:
    """Return a column as decimal numbers. An infinite number becomes NaN.

    Raises:
        InvalidInputError: it holds something else.
    """
    try:
        numbers = pd.to_numeric(column).astype(float)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"Column {name!r} must hold numbers: {error}") from None
    return numbers.where(np.isfinite(numbers))


def has_alarm(reference: pd.DataFrame, rows: pd.DataFrame) -> bool:
    """Return whether a difference of ``rows`` from ``reference`` is an alarm."""
    differences = compare(reference, rows)
    return any(difference.alarm for difference in differences)


def alarm_rate(
    reference: pd.DataFrame,
    batch: int,
    alarm: Callable[[pd.DataFrame, pd.DataFrame], bool] = has_alarm,
    *,
    resamples: int = 200,
) -> Estimate:
    """Return how often a batch raises an alarm: by default the rate of false alarms.

    Both tables are drawn from ``reference`` with replacement, so they differ by chance alone. An
    ``alarm`` that changes the batch before it compares gives the power for that change.

    Args:
        reference: the rows that the model learned from.
        batch: how many rows a batch has.
        alarm: what raises the alarm, called with the reference and the batch.
        resamples: how many batches are drawn.
    """
    generator = np.random.default_rng(0)

    def draw(rows: int) -> pd.DataFrame:
        return reference.sample(
            rows,
            replace=True,
            random_state=generator,
            ignore_index=True,
        )

    alarms = 0
    for _ in range(resamples):
        alarms += bool(alarm(draw(len(reference)), draw(batch)))
    return estimate_share(alarms, resamples)


def _compare_numbers(
    name: str,
    reference: pd.Series,
    rows: pd.Series,
    limits: Limits,
) -> list[Difference]:
    """Return the tests of a column of numbers."""
    reference = read_numbers(name, reference)
    rows = read_numbers(name, rows)
    seen = reference.dropna()
    numbers = rows.dropna()
    has_gaps = len(seen) < len(reference)
    tests = []
    if has_gaps or len(numbers) < len(rows):
        label = f"{name} (missing)"
        tests.append(_compare_counts(label, reference.isna(), rows.isna(), limits))
    if seen.empty or numbers.empty:
        return tests
    scale = seen.std(ddof=0) or 1.0
    drift = Difference(
        column=name,
        size=float(stats.wasserstein_distance(seen, numbers) / scale),
        unit="standard deviations",
        limit=limits.shift,
        p_value=stats.ks_2samp(seen, numbers).pvalue,
    )
    low = seen.min()
    high = seen.max()
    width = high - low
    is_outside = ~rows.between(low, high)
    if has_gaps:
        is_outside &= rows.notna()
    outside = _count_outside(
        name,
        is_outside,
        stats.betabinom(len(rows), 2, max(len(seen) - 1, 1)),
        f"{low:g} to {high:g}",
    )
    is_far = ~numbers.between(low - width, high + width)
    if is_far.sum() >= outside.limit * len(rows):  # no chance brings these, such as -999
        outside = replace(outside, p_value=0.0)
    return [*tests, drift, outside]


def _compare_texts(
    name: str,
    reference: pd.Series,
    rows: pd.Series,
    limits: Limits,
) -> list[Difference]:
    """Return the tests of a column of categories."""
    reference = as_text(reference).fillna("(missing)")
    rows = as_text(rows).fillna("(missing)")
    counts = reference.value_counts()
    once = (counts == 1).sum()
    outside = _count_outside(
        name,
        ~rows.isin(counts.index),
        stats.betabinom(len(rows), once + 1, len(reference) - once + 1),
        ", ".join(counts.index[:5]),
    )
    return [_compare_counts(name, reference, rows, limits), outside]


def _compare_counts(
    name: str,
    reference: pd.Series,
    rows: pd.Series,
    limits: Limits,
) -> Difference:
    """Return the test of how often each value occurs."""
    values = np.concatenate([reference, rows])
    sizes = [len(reference), len(rows)]
    counts = pd.crosstab(values, np.repeat([0, 1], sizes))
    # Values that are expected less than once are merged: with them, the chi-squared test raises
    # false alarms (W. Cochran, "Some methods for strengthening the common chi-squared tests",
    # Biometrics 10 (1954), 417-451).
    expected = stats.contingency.expected_freq(counts)
    rare = expected.min(axis=1) < 1
    counts = counts.groupby(np.where(rare, "(rare)", counts.index)).sum()
    shares = counts / counts.sum()
    distance = (shares[0] - shares[1]).abs().sum() / 2
    # By chance, the difference of a share p has the variance p (1 - p) (1 / n + 1 / m), and the
    # mean absolute value of a normal variable is its standard deviation times the root of 2 / pi.
    share = counts.sum(axis=1) / len(values)
    variance = share * (1 - share) * np.divide(1, sizes).sum()
    by_chance = np.sqrt(variance * 2 / np.pi).sum() / 2
    return Difference(
        column=name,
        size=max(float(distance - by_chance), 0.0),
        unit="of the rows",
        limit=limits.share,
        p_value=stats.chi2_contingency(counts).pvalue,
    )


def _count_outside(
    name: str,
    outside: pd.Series,
    chance: object,
    seen: str,
) -> Difference:
    """Return the test of how many rows are outside the training range.

    ``chance`` is the distribution of their number. At least three rows make many: a skewed column
    has one or two far outside by chance.
    """
    return Difference(
        column=name,
        size=float(outside.mean()),
        unit=f"of the rows are outside the training range ({seen})",
        limit=max(0.05, 3 / len(outside)),
        p_value=chance.sf(outside.sum() - 1),
        outside=True,
    )
