"""Compare two models by the interval of the difference of their scores.

One rule decides in the guides, the gate and the report: a difference counts if its interval
excludes 0. Otherwise the baseline stays, or the simpler model. MLflow compares single numbers:
``mlflow.validate_evaluation_results`` knows thresholds, and no uncertainty.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from mlflow_lifecycle.exceptions import InvalidInputError


@dataclass(frozen=True)
class Interval:
    """A difference and its 95 % interval."""

    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return it as text: ``+0.0083 (95 % interval -0.0226 to +0.0393)``."""
        return f"{self.difference:+.4f} (95 % interval {self.low:+.4f} to {self.high:+.4f})"


def folds_interval(
    scores: ArrayLike,
    other_scores: ArrayLike,
    test_share: float,
) -> Interval:
    """Return the difference of two models on the same folds, the first minus the second.

    Folds share training rows, so their scores are not independent, and the usual paired t-test
    finds differences where there are none. The variance is therefore corrected as by C. Nadeau and
    Y. Bengio, "Inference for the Generalization Error", Machine Learning 52 (2003), 239-281, for
    repeated cross-validation as by R. Bouckaert and E. Frank, "Evaluating the Replicability of
    Significance Tests for Comparing Learning Algorithms", PAKDD (2004), 3-12: (1/n + test rows /
    training rows) in place of 1/n.

    Args:
        scores: the first model's score in each fold, of one or more repetitions.
        other_scores: the second model's, in the same order.
        test_share: the share of the rows that a fold holds back, such as 0.2 for five folds.

    Raises:
        InvalidInputError: there are fewer than two pairs, or a score is not a finite number.
    """
    differences = _subtract(scores, other_scores)
    count = len(differences)
    mean = differences.mean()
    factor = 1 / count + test_share / (1 - test_share)
    error = math.sqrt(factor * differences.var(ddof=1))
    margin = stats.t.ppf(0.975, count - 1) * error
    return Interval(mean, mean - margin, mean + margin)


def rows_interval(
    scores: ArrayLike,
    other_scores: ArrayLike,
) -> Interval:
    """Return the difference of two models on the same test rows, the first minus the second.

    It is the interval of the paired t-test. If every score is 0 or 1, half a row is added for each
    way in which two models can be right or wrong, as by A. Agresti and Y. Min, "Simple improved
    confidence intervals for comparing matched proportions", Statistics in Medicine 24 (2005),
    729-740: two models that are right on the same 30 rows can still differ.

    Args:
        scores: the first model's score on each row.
        other_scores: the second model's, in the same order.

    Raises:
        InvalidInputError: there are fewer than two pairs, or a score is not a finite number.
    """
    differences = _subtract(scores, other_scores)
    count = len(differences)
    center = differences.mean()
    error = stats.sem(differences)
    if np.isin([scores, other_scores], (0, 1)).all():
        center = differences.sum() / (count + 2)
        mean_square = (np.square(differences).sum() + 1) / (count + 2)
        error = math.sqrt((mean_square - center**2) / (count + 2))
    margin = stats.t.ppf(0.975, count - 1) * error
    return Interval(differences.mean(), center - margin, center + margin)


def proportion_interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion by E. B. Wilson, such as of an accuracy."""
    interval = stats.binomtest(count, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def detectable_difference(
    scores: ArrayLike,
    other_scores: ArrayLike,
    test_share: float | None = None,
) -> float:
    """Return the smallest true difference that these rows or folds would show with 80 % power.

    It is (t(0.975) + t(0.8)) times the standard error of the paired differences, with n - 1 degrees
    of freedom: H. S. Bloom, "Minimum detectable effects", Evaluation Review 19 (1995), 547-556. A
    smaller difference often stays unseen, so few rows prove neither "not worse" nor "not better".

    Args:
        scores: the first model's score on each row, or in each fold.
        other_scores: the second model's, in the same order.
        test_share: for folds, the share of the rows that each holds back.

    Raises:
        InvalidInputError: there are fewer than two pairs, or a score is not a finite number.
    """
    interval = rows_interval(scores, other_scores)
    if test_share is not None:
        interval = folds_interval(scores, other_scores, test_share)
    margin = (interval.high - interval.low) / 2
    freedom = len(scores) - 1
    power = stats.t.ppf(0.8, freedom) / stats.t.ppf(0.975, freedom)
    return margin * (1 + power)


def proportions(hits: Mapping[str, Sequence[bool]]) -> pd.DataFrame:
    """Return proportions with their 95 % Wilson intervals, one per row.

    The interval stays between 0 and 1, and has a width even if all are hits. That of the bootstrap
    has none then.

    Args:
        hits: by name, whether each of some rows is a hit. There is at least one row.

    Returns:
        For each name the number of hits, the number of rows, the share, and its limits ``low`` and
        ``high``.

    Raises:
        InvalidInputError: a name has no rows.
    """
    results = []
    for name, values in hits.items():
        count = len(values)
        if not count:
            raise InvalidInputError(f"the proportion {name!r} needs at least one row")
        hit_count = int(np.sum(values))
        low, high = proportion_interval(hit_count, count)
        results.append([hit_count, count, hit_count / count, low, high])
    return pd.DataFrame(results, list(hits), ["hits", "rows", "share", "low", "high"])


def calibration_table(
    events: Sequence[bool], probabilities: Sequence[float], groups: int = 5
) -> pd.DataFrame:
    """Return the predicted and the observed share of events, in groups of similar probability.

    The probabilities are calibrated, as far as the rows show, if ``predicted`` lies between ``low``
    and ``high``. scikit-learn's ``calibration_curve`` gives no intervals.

    Args:
        events: whether the event happened, one value per row.
        probabilities: the predicted probability of each row.
        groups: the number of groups, each with about as many rows as the others.
    """
    table = pd.DataFrame({"event": np.asarray(events), "predicted": np.asarray(probabilities)})
    grouped = table.groupby(pd.qcut(table["predicted"], groups, labels=False, duplicates="drop"))
    shares = proportions(dict(list(grouped["event"])))
    shares.insert(0, "predicted", grouped["predicted"].mean())
    return shares


def choose(
    candidates: Sequence[str],
    interval: Callable[[str, str], Interval],
) -> str:
    """Return the candidate that the rule chooses.

    A candidate replaces the current choice only if it is better by a difference that counts.

    Args:
        candidates: names, the simplest first, or the baseline.
        interval: gives the difference of two candidates, the first name's score minus the second's.
    """
    chosen, *others = candidates
    for name in others:
        if interval(name, chosen).low > 0:
            chosen = name
    return chosen


def _subtract(
    scores: ArrayLike,
    other_scores: ArrayLike,
) -> np.ndarray:
    """Return the differences of scores that belong together, one per pair."""
    if len(scores) != len(other_scores) or len(scores) < 2:
        raise InvalidInputError(
            f"{len(scores)} and {len(other_scores)} scores are not two or more pairs"
        )
    first = np.asarray(scores, dtype=float)
    second = np.asarray(other_scores, dtype=float)
    differences = first - second
    if not np.isfinite(differences).all():
        raise InvalidInputError("a score is not a finite number")
    return differences
