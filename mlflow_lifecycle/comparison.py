"""Compare two models by the interval of the difference of their scores.

One rule decides in the guides, the gate and the report: a difference counts if its interval
excludes 0. Otherwise the baseline stays, or the simpler model. MLflow compares single numbers:
``mlflow.validate_evaluation_results`` knows thresholds, and no uncertainty.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mlflow_lifecycle.exceptions import InvalidInputError


@dataclass(frozen=True)
class Interval:
    """A difference and its 95 % interval."""

    difference: float
    low: float
    high: float

    @property
    def counts(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        """Return it as text: ``+0.0083 (95 % interval -0.0226 to +0.0393)``."""
        return f"{self.difference:+.4f} (95 % interval {self.low:+.4f} to {self.high:+.4f})"


def folds_interval(
    scores: Sequence[float],
    other_scores: Sequence[float],
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
        InvalidInputError: there are fewer than two pairs, a score is not a finite number, or the
            share is not between 0 and 1.
    """
    if not 0 < test_share < 1:
        raise InvalidInputError(f"test_share must be between 0 and 1, got {test_share}")
    differences = _subtract(scores, other_scores)
    count = len(differences)
    factor = 1 / count + test_share / (1 - test_share)
    margin = stats.t.ppf(0.975, count - 1) * math.sqrt(factor * differences.var(ddof=1))
    mean = float(differences.mean())
    return Interval(mean, float(mean - margin), float(mean + margin))


def rows_interval(scores: Sequence[float], other_scores: Sequence[float]) -> Interval:
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
    middle, error = _center_and_error(differences, scores, other_scores)
    margin = stats.t.ppf(0.975, len(differences) - 1) * error
    return Interval(float(differences.mean()), float(middle - margin), float(middle + margin))


def detectable_difference(scores: Sequence[float], other_scores: Sequence[float]) -> float:
    """Return the smallest true difference that these rows would show with 80 % power.

    It is (t(0.975) + t(0.8)) times the standard error of the paired differences, with n - 1 degrees
    of freedom: H. S. Bloom, "Minimum detectable effects", Evaluation Review 19 (1995), 547-556. A
    smaller difference often stays unseen, so few rows prove neither "not worse" nor "not better".

    Args:
        scores: the first model's score on each row.
        other_scores: the second model's, in the same order.

    Raises:
        InvalidInputError: there are fewer than two pairs, or a score is not a finite number.
    """
    differences = _subtract(scores, other_scores)
    _, error = _center_and_error(differences, scores, other_scores)
    return float(stats.t.ppf([0.975, 0.8], len(differences) - 1).sum() * error)


def choose(candidates: Sequence[str], interval: Callable[[str, str], Interval]) -> str:
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


def _subtract(scores: Sequence[float], other_scores: Sequence[float]) -> np.ndarray:
    """Return the differences of scores that belong together, one per pair."""
    if len(scores) != len(other_scores) or len(scores) < 2:
        raise InvalidInputError(
            f"{len(scores)} and {len(other_scores)} scores are not two or more pairs"
        )
    differences = np.asarray(scores, dtype=float) - np.asarray(other_scores, dtype=float)
    if not np.isfinite(differences).all():
        raise InvalidInputError("a score is not a finite number")
    return differences


def _center_and_error(
    differences: np.ndarray,
    scores: Sequence[float],
    other_scores: Sequence[float],
) -> tuple[float, float]:
    """Return the center of the interval and the standard error, see ``rows_interval``."""
    if not np.isin([scores, other_scores], (0, 1)).all():
        return differences.mean(), stats.sem(differences)
    extended = np.append(differences, [1, -1, 0, 0])
    weights = np.append(np.ones(len(differences)), [0.5] * 4)
    center = np.average(extended, weights=weights)
    variance = np.average(extended**2, weights=weights) - center**2
    return center, math.sqrt(variance / weights.sum())
