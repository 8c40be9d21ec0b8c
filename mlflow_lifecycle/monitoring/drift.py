"""Compare rows with the rows that a model learned from: drift, and values never seen.

MLflow logs data, and does not compare it. With enough rows, a test finds any difference, however
small. Drift is therefore an alarm only if it is significant and also reaches a stated size.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from mlflow_lifecycle.datasets import as_text
from mlflow_lifecycle.exceptions import InvalidInputError

# A skewed column has one or two rows far outside the training range by chance.
LEAST_OUTSIDE = 3


@dataclass(frozen=True)
class Limits:
    """Alarm thresholds.

    Attributes:
        level: the accepted share of false discoveries among the alarms of one batch.
        shift: the size of drift in a column of numbers, in standard deviations of the training
            rows. J. Cohen, "Statistical Power Analysis for the Behavioral Sciences", 2nd edition
            1988, calls 0.2 small and 0.5 medium.
        share: the size of drift in a column of categories, as a share of the rows.
        outside: the share of rows outside the training range.
        loss: the loss of accuracy.
        error: the increase of the mean absolute error, as a share of the expected error.
    """

    level: float = 0.01
    shift: float = 0.5
    share: float = 0.1
    outside: float = 0.05
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
    reference: pd.DataFrame, rows: pd.DataFrame, limits: Limits = LIMITS
) -> tuple[Difference, ...]:
    """Return the differences of ``rows`` from ``reference``: two tests or more for each column.

    Drift of numbers is tested by Kolmogorov and Smirnov's test. The size is the Wasserstein
    distance in standard deviations of the reference: for a shifted distribution, this is the shift.

    Drift of categories, booleans and missing values is tested by the chi-squared test, or by
    Fisher's exact test if there are two. The size is the total variation distance, the share of
    rows that would have to take another value, less the distance that chance alone would give.

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
        InvalidInputError: there are no rows, a column is missing in them, or it does not hold
            numbers where the reference does.
    """
    check_columns(reference.columns, rows)
    if len(reference) < 2 or rows.empty:
        raise InvalidInputError(f"{len(rows)} rows cannot be compared with {len(reference)}.")
    tests = []
    for name, column in reference.items():
        if pd.api.types.is_datetime64_any_dtype(column):
            continue
        if pd.api.types.is_numeric_dtype(column) and column.dtype != bool:
            tests += _compare_numbers(name, column, rows[name], limits)
        else:
            tests += _compare_texts(name, as_text(column), as_text(rows[name]), limits)
    corrected = stats.false_discovery_control([test.p_value for test in tests])
    differences = []
    for test, p_value in zip(tests, corrected, strict=True):
        alarm = p_value < limits.level and test.size >= test.limit
        differences.append(replace(test, p_value=float(p_value), alarm=bool(alarm)))
    return tuple(differences)


def check_columns(names: Iterable[str], rows: pd.DataFrame) -> None:
    """Refuse rows without these columns.

    Raises:
        InvalidInputError: a column is missing.
    """
    missing = [str(name) for name in names if name not in rows]
    if missing:
        raise InvalidInputError(f"These columns are missing: {', '.join(missing)}")


def read_numbers(name: str, column: pd.Series) -> pd.Series:
    """Return a column as decimal numbers. An infinite number becomes NaN.

    Raises:
        InvalidInputError: it holds something else.
    """
    try:
        numbers = pd.to_numeric(column).astype(float)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"Column {name!r} must hold numbers: {error}") from None
    return numbers.replace([np.inf, -np.inf], np.nan)


def has_alarm(reference: pd.DataFrame, rows: pd.DataFrame) -> bool:
    """Return whether a difference of ``rows`` from ``reference`` is an alarm."""
    return any(difference.alarm for difference in compare(reference, rows))


def alarm_rate(
    reference: pd.DataFrame,
    batch: int,
    alarm: Callable[[pd.DataFrame, pd.DataFrame], bool] = has_alarm,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> Estimate:
    """Return how often a batch raises an alarm: by default the rate of false alarms.

    Both tables are drawn from ``reference`` with replacement, so they differ by chance alone. An
    ``alarm`` that changes the batch before it compares gives the power for that change.

    Args:
        reference: the rows that the model learned from.
        batch: how many rows a batch has.
        alarm: what raises the alarm, called with the reference and the batch.
        resamples: how many batches are drawn.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    alarms = 0
    for _ in range(resamples):
        first = reference.sample(frac=1, replace=True, random_state=generator, ignore_index=True)
        second = reference.sample(batch, replace=True, random_state=generator, ignore_index=True)
        alarms += bool(alarm(first, second))
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
    tests = []
    if reference.isna().any() or rows.isna().any():
        label = f"{name} (missing)"
        tests.append(_compare_counts(label, reference.isna(), rows.isna(), limits))
    if seen.empty:
        return tests
    if len(numbers):
        scale = seen.std(ddof=0) or 1.0
        tests.append(
            Difference(
                column=name,
                size=float(stats.wasserstein_distance(seen, numbers) / scale),
                unit="standard deviations",
                limit=limits.shift,
                p_value=stats.ks_2samp(seen, numbers).pvalue,
            )
        )
    low = seen.min()
    high = seen.max()
    width = high - low
    outside = rows.lt(low) | rows.gt(high)
    far = rows.lt(low - width) | rows.gt(high + width)
    if len(seen) == len(reference):
        outside |= rows.isna()
    chance = stats.betabinom(len(rows), 2, max(len(seen) - 1, 1))
    tests.append(_count_outside(name, outside, far, f"{low:g} to {high:g}", chance, limits))
    return tests


def _compare_texts(
    name: str,
    reference: pd.Series,
    rows: pd.Series,
    limits: Limits,
) -> list[Difference]:
    """Return the tests of a column of categories."""
    filled = reference.fillna("(missing)")
    rows = rows.fillna("(missing)")
    counts = filled.value_counts()
    once = (counts == 1).sum()
    outside = ~rows.isin(counts.index)
    chance = stats.betabinom(len(rows), once + 1, len(filled) - once + 1)
    seen = ", ".join(counts.index[:5])
    return [
        _compare_counts(name, filled, rows, limits),
        _count_outside(name, outside, outside & False, seen, chance, limits),
    ]


def _compare_counts(
    name: str,
    reference: pd.Series,
    rows: pd.Series,
    limits: Limits,
) -> Difference:
    """Return the test of how often each value occurs."""
    counts = pd.concat([reference.value_counts(), rows.value_counts()], axis=1).fillna(0)
    smaller = min(len(reference), len(rows)) / (len(reference) + len(rows))
    # Values that are expected less than once are merged: with them, the chi-squared test raises
    # false alarms (W. Cochran, "Some methods for strengthening the common chi-squared tests",
    # Biometrics 10 (1954), 417-451).
    rare = counts.sum(axis=1) * smaller < 1
    counts = counts.groupby(counts.index.astype(str).where(~rare, "(rare)")).sum()
    p_value = 1.0
    if len(counts) > 1:
        test = stats.fisher_exact if len(counts) == 2 else stats.chi2_contingency
        p_value = test(counts.to_numpy(dtype=int)).pvalue
    shares = counts / counts.sum()
    distance = (shares.iloc[:, 0] - shares.iloc[:, 1]).abs().sum() / 2
    # By chance, the difference of a share p has the variance p (1 - p) (1 / n + 1 / m), and the
    # mean absolute value of a normal variable is its standard deviation times the root of 2 / pi.
    pooled = counts.sum(axis=1) / counts.to_numpy().sum()
    variance = pooled * (1 - pooled) * (1 / counts.sum()).sum()
    by_chance = np.sqrt(variance * 2 / np.pi).sum() / 2
    return Difference(
        column=name,
        size=max(float(distance - by_chance), 0.0),
        unit="of the rows",
        limit=limits.share,
        p_value=p_value,
    )


def _count_outside(
    name: str,
    outside: pd.Series,
    far: pd.Series,
    seen: str,
    chance: object,
    limits: Limits,
) -> Difference:
    """Return the test of how many rows are outside the training range."""
    count = len(outside)
    many = max(limits.outside * count, LEAST_OUTSIDE)
    p_value = chance.sf(outside.sum() - 1)
    if far.sum() >= many:  # no chance brings these, such as -999
        p_value = 0.0
    return Difference(
        column=name,
        size=float(outside.mean()),
        unit=f"of the rows are outside the training range ({seen})",
        limit=many / count,
        p_value=p_value,
        outside=True,
    )
