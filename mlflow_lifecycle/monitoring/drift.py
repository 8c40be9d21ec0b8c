"""Have rows drifted away from the rows that a model learned from? How far, how surely, and how often is that false?

MLflow logs data and compares none. A test alone is no answer: with enough rows it finds any difference, however
small. So drift counts here only if it is significant and its size is at least a stated one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from mlflow_lifecycle.datasets import as_text
from mlflow_lifecycle.exceptions import ColumnsDifferError, InvalidInputError

MOST_VALUES = 50  # of a column of text; rarer ones are taken together
TABLES, MOST_TABLES = (
    9_999,
    1_000_000,
)  # drawn at random for a column of categories with small counts


@dataclass(frozen=True)
class Limits:
    """From where on a finding is an alarm.

    Attributes:
        level: the share of false discoveries that is accepted, after the correction for several columns.
        shift: the smallest size of drift in a column of numbers, in standard deviations of the reference. J. Cohen,
            "Statistical Power Analysis for the Behavioral Sciences", 2nd edition 1988, calls 0.2 small, 0.5 medium.
        share: the smallest size of drift in a column of categories, as the share of rows with another value.
        outside: the smallest share of rows outside of the range.
        loss: the smallest loss of accuracy.
    """

    level: float = 0.01
    shift: float = 0.5
    share: float = 0.1
    outside: float = 0.05
    loss: float = 0.05


LIMITS = Limits()


@dataclass(frozen=True)
class ColumnDrift:
    """One column, tested: the corrected p-value, the size of the difference, and whether both make it an alarm."""

    column: str
    test: str
    statistic: float
    p_value: float
    size: float
    unit: str
    smallest: float  # the size from which on it counts
    alarm: bool


@dataclass(frozen=True)
class OutOfRange:
    """How many rows have a value in this column that was not seen in training, and whether they are an alarm."""

    column: str
    seen: str
    rows: int
    share: float
    p_value: float
    alarm: bool


@dataclass(frozen=True)
class Share:
    """A share of a number of cases, and the interval in which it lies with 95 % confidence."""

    count: int
    cases: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself."""
        return self.count / self.cases

    def __str__(self) -> str:
        """Return it as one reads it: ``0.9467 (95 % interval 0.8690 to 0.9853)``."""
        return f"{self.value:.4f} (95 % interval {self.low:.4f} to {self.high:.4f})"


def share(count: int, cases: int) -> Share:
    """Return ``count`` of ``cases`` with its interval, which no approximation makes too narrow.

    It is that of C. Clopper and E. Pearson, "The use of confidence or fiducial limits illustrated in the case of the
    binomial", Biometrika 26 (1934), 404-413.

    Raises:
        ValueError: there is no case, or there are fewer cases than counted ones.
    """
    interval = stats.binomtest(count, cases).proportion_ci()
    return Share(int(count), int(cases), float(interval.low), float(interval.high))


def drift(
    reference: pd.DataFrame, rows: pd.DataFrame, limits: Limits = LIMITS
) -> tuple[ColumnDrift, ...]:
    """Return the drift of each column of ``reference`` in ``rows``.

    Numbers are compared by the Kolmogorov-Smirnov test. Their size is the Wasserstein distance in standard deviations
    of the reference: where one distribution is the other, shifted, this is the shift. Categories, truth values and gaps
    are compared by the chi-squared test, where counts are small with tables drawn at random in place of the
    approximation, the more the more columns there are. Their size is the total variation distance: the share of rows
    that would have to take another value. The p-values are corrected for several columns: Y. Benjamini and Y. Hochberg,
    "Controlling the False Discovery Rate", Journal of the Royal Statistical Society B 57 (1995), 289-300. Dates are
    left out, because they always move.

    Args:
        reference: the rows that the model learned from.
        rows: the rows to judge. Columns that the reference lacks do not count.
        limits: from where on drift is an alarm.

    Raises:
        ColumnsDifferError: ``rows`` lack a column, or hold something else than numbers where the reference has numbers.
        ValueError: there are no rows.
    """
    found, names = [], _compared(reference, rows)
    # With two tests of each column, so many tables can give a p-value that is below the level when it is corrected.
    tables = int(min(2 * len(names) / max(limits.level, 1e-9), MOST_TABLES))
    for name in names:
        gaps = _missing(reference[name]), _missing(rows[name])
        if _is_number(reference[name]):
            numbers = [
                table[name][~gap].astype(float)
                for table, gap in zip((reference, rows), gaps, strict=True)
            ]
            if min(map(len, numbers)):
                found.append(
                    (
                        name,
                        "Kolmogorov-Smirnov",
                        *_numbers(*numbers),
                        "standard deviations",
                        limits.shift,
                    )
                )
            if any(gap.any() for gap in gaps):
                found.append(
                    (
                        f"{name} (gaps)",
                        "chi-squared",
                        *_categories(*gaps, tables),
                        "of the rows",
                        limits.share,
                    )
                )
        else:
            values = [as_text(table[name]).fillna("(gap)") for table in (reference, rows)]
            found.append(
                (name, "chi-squared", *_categories(*values, tables), "of the rows", limits.share)
            )
    corrected = stats.false_discovery_control([p for _, _, _, p, *_ in found]) if found else []
    return tuple(
        ColumnDrift(
            name,
            test,
            statistic,
            float(p),
            size,
            unit,
            smallest,
            bool(p < limits.level and size >= smallest),
        )
        for (name, test, statistic, _, size, unit, smallest), p in zip(
            found, corrected, strict=True
        )
    )


def out_of_range(
    reference: pd.DataFrame, rows: pd.DataFrame, limits: Limits = LIMITS
) -> tuple[OutOfRange, ...]:
    """Return for each column of ``reference`` how many ``rows`` hold a value beyond all that was seen in training.

    There the model guesses, and most often the cause is a fault: another unit, a broken instrument, a new code. Refuse
    such rows or repair them, and let no model learn from them.

    A few rows beyond are no fault. With n rows seen, the share of later numbers beyond their extremes has the
    distribution Beta(2, n - 1), whatever that of the numbers (S. Wilks, "Determination of sample sizes for setting
    tolerance limits", Annals of Mathematical Statistics 12 (1941), 91-96). The share of values never seen is about that
    of the values that were seen once (I. Good, Biometrika 40 (1953), 237-264). No chance brings many numbers that lie
    farther beyond than the whole range is wide, such as -999 for unknown. A gap counts where training had none.

    Args:
        reference: the rows that the model learned from.
        rows: the rows to judge.
        limits: from where on it is an alarm.

    Raises:
        ColumnsDifferError: as in ``drift``.
        ValueError: there are no rows, or fewer than two to compare with.
    """
    found, count = [], len(rows)
    for name in _compared(reference, rows):
        gap, seen = _missing(rows[name]), reference[name][~_missing(reference[name])]
        new_gap, far = gap & (len(seen) == len(reference)), 0
        if len(seen) < 2:
            continue
        if _is_number(reference[name]):
            low, high = float(seen.min()), float(seen.max())
            numbers = pd.to_numeric(rows[name]).astype(float)
            beyond, text = numbers.lt(low) | numbers.gt(high), f"{low:g} to {high:g}"
            far = int((numbers.lt(2 * low - high) | numbers.gt(2 * high - low)).sum())
            chance = stats.betabinom(count, 2, len(seen) - 1)
        else:
            known = as_text(seen).value_counts()
            beyond = ~gap & ~as_text(rows[name]).isin(known.index)
            text = ", ".join(known.index[:5]) + (", ..." if len(known) > 5 else "")
            chance = stats.binom(count, ((known == 1).sum() + 1) / (len(seen) + 1))
        outside = int((beyond | new_gap).sum())
        found.append((name, text, outside, far, float(chance.sf(outside - 1))))
    corrected = stats.false_discovery_control([p for *_, p in found]) if found else []
    many, ranges = limits.outside * count, []
    for (name, text, outside, far, _), p in zip(found, corrected, strict=True):
        alarm = far >= max(many, 1) or (outside >= many and p < limits.level)
        ranges.append(OutOfRange(name, text, outside, outside / count, float(p), bool(alarm)))
    return tuple(ranges)


def false_alarms(
    reference: pd.DataFrame,
    batch: int,
    alarm: Callable[[pd.DataFrame, pd.DataFrame], bool],
    *,
    resamples: int = 200,
    seed: int = 0,
) -> Share:
    """Return how often ``alarm`` is raised although nothing has changed.

    Both tables that it compares are drawn from ``reference``, with replacement, so they differ by chance alone.

    Args:
        reference: the rows that the model learned from.
        batch: how many rows are judged at a time.
        alarm: ``alarm(reference, rows)``, for example ``lambda a, b: any(c.alarm for c in drift(a, b))``.
        resamples: how often it is tried.
        seed: of the draws.
    """
    generator, raised = np.random.default_rng(seed), 0
    for _ in range(resamples):
        drawn = (generator.integers(len(reference), size=size) for size in (len(reference), batch))
        first, second = (reference.iloc[rows].reset_index(drop=True) for rows in drawn)
        raised += bool(alarm(first, second))
    return share(raised, resamples)


def _compared(reference: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """Return the columns to compare; refuse rows that cannot be compared with the reference."""
    if len(reference) < 2 or not len(rows):
        raise InvalidInputError(f"{len(rows)} rows cannot be compared with {len(reference)}.")
    if lacking := [str(name) for name in reference if name not in rows]:
        raise ColumnsDifferError(
            f"The rows lack a column that the model learned from: {', '.join(lacking)}."
        )
    for name in filter(lambda name: _is_number(reference[name]), reference):
        values = rows[name][~_missing(rows[name])]
        odd = values[pd.to_numeric(values, errors="coerce").isna()]
        if len(odd) or pd.api.types.is_datetime64_any_dtype(values):
            found = (odd if len(odd) else values).iloc[0]
            raise ColumnsDifferError(
                f"Column {name!r} holds numbers in training, and here {str(found)!r}."
            )
    return [name for name in reference if not pd.api.types.is_datetime64_any_dtype(reference[name])]


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _missing(column: pd.Series) -> pd.Series:
    """Tell which values are gaps; an infinite number is one."""
    return column.isna() | column.isin([np.inf, -np.inf])


def _numbers(reference: pd.Series, rows: pd.Series) -> tuple[float, float, float]:
    """Return the statistic and the p-value of the Kolmogorov-Smirnov test, and the size."""
    test = stats.ks_2samp(
        reference, rows, method="asymp" if len(reference) * len(rows) > 10**6 else "auto"
    )
    scale = float(reference.std(ddof=0)) or abs(float(reference.mean())) or 1.0
    return (
        float(test.statistic),
        float(test.pvalue),
        float(stats.wasserstein_distance(reference, rows)) / scale,
    )


def _categories(reference: pd.Series, rows: pd.Series, tables: int) -> tuple[float, float, float]:
    """Return the statistic and the p-value of the chi-squared test, and the size.

    ``tables`` are drawn at random where fewer do not tell how small the p-value is.
    """
    counts = pd.concat([reference, rows]).value_counts()
    frequent = counts[counts > 1].index[:MOST_VALUES]
    counted = [
        column.where(column.isin(frequent), "(rarer)").value_counts()
        for column in (reference, rows)
    ]
    table = pd.concat(counted, axis=1).fillna(0).to_numpy().T
    if table.shape[1] < 2:
        return 0.0, 1.0, 0.0
    small = stats.contingency.expected_freq(table).min() < 5
    test = _chi_squared(table, TABLES if small else 0)
    if (
        small and tables > TABLES and test.pvalue < 2 / (TABLES + 1)
    ):  # none of the tables was as unlike
        test = _chi_squared(table, tables)
    shares = table / table.sum(axis=1, keepdims=True)
    return float(test.statistic), float(test.pvalue), float(np.abs(shares[0] - shares[1]).sum() / 2)


def _chi_squared(table: np.ndarray, tables: int) -> stats.contingency.Chi2ContingencyResult:
    """Return scipy's chi-squared test, by so many tables drawn at random, or with 0 by the approximation."""
    drawn = (
        stats.MonteCarloMethod(tables, batch=10_000, rng=np.random.default_rng(0))
        if tables
        else None
    )
    return stats.chi2_contingency(table.astype(int), correction=False, method=drawn)
