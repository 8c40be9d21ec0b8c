"""Is a difference between two models more than chance? One decision rule for all guides, gate and report.

A difference counts when its interval excludes 0. Otherwise the incumbent stays, or where there is none the simpler
model. MLflow compares single numbers: ``mlflow.validate_evaluation_results`` knows thresholds, and no uncertainty.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mlflow_lifecycle.exceptions import InvalidInputError


@dataclass(frozen=True)
class Interval:
    """A difference, and the interval in which it lies with 95 % confidence."""

    difference: float
    low: float
    high: float

    @property
    def counts(self) -> bool:
        """Whether the interval excludes 0, so that the difference is taken for real."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        """Return it as one reads it: ``+0.0083 (95 % interval -0.0226 to +0.0393)``."""
        return f"{self.difference:+.4f} (95 % interval {self.low:+.4f} to {self.high:+.4f})"


def folds_interval(
    scores: Sequence[float], other_scores: Sequence[float], test_share: float
) -> Interval:
    """Return the difference of two models that were scored on the same folds, the first minus the second.

    The folds share training rows, so their scores are not independent, and the usual paired t-test finds differences
    where there are none. The variance is therefore corrected as by C. Nadeau and Y. Bengio, "Inference for the
    Generalization Error", Machine Learning 52 (2003), 239-281: (1/n + test rows / training rows) in place of 1/n.

    Args:
        scores: the first model's score in each fold, of one or more repetitions of the cross-validation.
        other_scores: the second model's, in the same order.
        test_share: the share of the rows that a fold holds back, such as 0.2 for five folds.

    Raises:
        ValueError: there are fewer than two pairs, a score is not a finite number, or the share is not between 0 and 1.
    """
    if not 0 < test_share < 1:
        raise InvalidInputError(f"test_share {test_share} must lie between 0 and 1")
    differences = paired(scores, other_scores)
    count = len(differences)
    variance = (1 / count + test_share / (1 - test_share)) * differences.var(ddof=1)
    margin = float(stats.t.ppf(0.975, count - 1) * math.sqrt(variance))
    mean = float(differences.mean())
    return Interval(mean, mean - margin, mean + margin)


def rows_interval(scores: Sequence[float], other_scores: Sequence[float]) -> Interval:
    """Return the difference of two models' mean scores on the same test rows, the first minus the second.

    It is a paired bootstrap: rows are drawn with replacement, and both models are scored on the rows that were drawn
    (B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13: the percentile interval).

    Where every score is 0 or 1, it is the interval of A. Agresti and Y. Min, "Simple improved confidence intervals for
    comparing matched proportions", Statistics in Medicine 24 (2005), 729-740. Two models that are right on the same
    30 rows can still differ, and the bootstrap would give an interval of width 0.

    Args:
        scores: the first model's score on each row.
        other_scores: the second model's, in the same order.

    Raises:
        ValueError: there are fewer than two pairs, or a score is not a finite number.
    """
    differences = paired(scores, other_scores)
    if _are_zero_or_one(scores, other_scores):
        middle, error = _adjusted_proportions(differences)
        margin = float(stats.norm.ppf(0.975)) * error
        return Interval(float(differences.mean()), middle - margin, middle + margin)
    drawn = {"n_resamples": 2000, "batch": 100, "method": "percentile", "rng": 0}
    low, high = stats.bootstrap((differences,), np.mean, **drawn).confidence_interval
    return Interval(float(differences.mean()), float(low), float(high))


def detectable_difference(scores: Sequence[float], other_scores: Sequence[float]) -> float:
    """Return the smallest true difference that these rows would show with 80 % power at the level of 5 %.

    It is (t(0.975) + t(0.8)) times the standard error of the paired differences, with n - 1 degrees of freedom: H. S.
    Bloom, "Minimum detectable effects", Evaluation Review 19 (1995), 547-556. A smaller difference often stays unseen,
    so that "not worse" and "not better" on few rows prove little.

    Args:
        scores: the first model's score on each row.
        other_scores: the second model's, in the same order.

    Raises:
        ValueError: there are fewer than two pairs, or a score is not a finite number.
    """
    differences = paired(scores, other_scores)
    count = len(differences)
    if _are_zero_or_one(scores, other_scores):
        _, error = _adjusted_proportions(differences)
    else:
        error = float(differences.std(ddof=1)) / math.sqrt(count)
    return float(stats.t.ppf(0.975, count - 1) + stats.t.ppf(0.8, count - 1)) * error


def _are_zero_or_one(scores: Sequence[float], other_scores: Sequence[float]) -> bool:
    """Return whether every score is 0 or 1."""
    return bool(np.isin(scores, (0, 1)).all() and np.isin(other_scores, (0, 1)).all())


def _adjusted_proportions(differences: np.ndarray) -> tuple[float, float]:
    """Return the mean and its standard error, as Agresti and Min adjust them by two rows more.

    Half a row is added for each way in which two models can be right or wrong.
    """
    count = len(differences) + 2
    wins = np.sum(differences == 1) + 0.5
    losses = np.sum(differences == -1) + 0.5
    mean = (wins - losses) / count
    variance = (wins + losses) / count - mean**2
    return float(mean), math.sqrt(variance / count)


def choose(candidates: Sequence[str], interval: Callable[[str, str], Interval]) -> str:
    """Return the candidate that the decision rule chooses.

    Args:
        candidates: names, the incumbent first, or where there is none the simplest.
        interval: gives the difference of two candidates, the first name's score minus the second's.
    """
    first, *others = candidates
    better = {name: found.difference for name in others if (found := interval(name, first)).low > 0}
    return max(better, key=better.get, default=first)


def paired(scores: Sequence[float], other_scores: Sequence[float]) -> np.ndarray:
    """Return the differences of scores that belong together, one per pair.

    Raises:
        ValueError: there are fewer than two pairs, or a score is not a finite number.
    """
    if len(scores) != len(other_scores) or len(scores) < 2:
        raise InvalidInputError(
            f"{len(scores)} and {len(other_scores)} scores are not two or more pairs"
        )
    differences = np.asarray(scores, dtype=float) - np.asarray(other_scores, dtype=float)
    if not np.isfinite(differences).all():
        raise InvalidInputError("a score is not a finite number")
    return differences
