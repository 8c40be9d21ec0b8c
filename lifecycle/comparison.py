"""Is a difference between two models more than chance? One decision rule for all guides, gate and report.

A difference counts when its interval leaves out 0. Otherwise the incumbent stays, or where there is none the simpler
model. MLflow compares single numbers: ``mlflow.validate_evaluation_results`` knows thresholds, and no uncertainty.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A difference, and the interval in which it lies with the stated confidence (a share, such as 0.95)."""

    difference: float
    low: float
    high: float
    confidence: float

    @property
    def counts(self) -> bool:
        """Whether the interval leaves out 0, so that the difference is taken for real."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        """Return it as one reads it: ``+0.0083 (95 % interval -0.0226 to +0.0393)``."""
        return f"{self.difference:+.4f} ({self.confidence:.0%} interval {self.low:+.4f} to {self.high:+.4f})".replace(
            "%", " %", 1
        )


def folds_interval(
    scores: Sequence[float], other_scores: Sequence[float], test_share: float, confidence: float = 0.95
) -> Interval:
    """Return the difference of two models that were scored on the same folds, the first minus the second.

    The folds share training rows, so their scores are not independent, and the usual paired t-test finds differences
    where there are none. The variance is therefore corrected as by C. Nadeau and Y. Bengio, "Inference for the
    Generalization Error", Machine Learning 52 (2003), 239-281: (1/n + test rows / training rows) in place of 1/n.

    Args:
        scores: the first model's score in each fold, of one or more repetitions of the cross-validation.
        other_scores: the second model's, in the same order.
        test_share: the share of the rows that a fold holds back, such as 0.2 for five folds.
        confidence: a share between 0 and 1.

    Raises:
        ValueError: there are fewer than two pairs, a score is not a finite number, or a share is not between 0 and 1.
    """
    if not (0 < test_share < 1 and 0 < confidence < 1):
        raise ValueError(f"test_share {test_share} and confidence {confidence} must lie between 0 and 1")
    differences = paired(scores, other_scores)
    count = len(differences)
    variance = (1 / count + test_share / (1 - test_share)) * differences.var(ddof=1)
    margin = stats.t.ppf((1 + confidence) / 2, count - 1) * math.sqrt(variance)
    mean = float(differences.mean())
    return Interval(mean, mean - float(margin), mean + float(margin), confidence)


def rows_interval(
    score: Callable[..., float],
    actual: Sequence,
    predicted: Sequence,
    other_predicted: Sequence,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the difference of two models' scores on the same test rows, the first minus the second.

    It is a paired bootstrap: rows are drawn with replacement, and both models are scored on the rows that were drawn
    (B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13: the percentile interval).

    Args:
        score: ``score(actual, predicted)``, such as scikit-learn's ``accuracy_score``.
        actual: the actual value of each row.
        predicted: what the first model predicts for each row, one value or one row of probabilities.
        other_predicted: what the second model predicts.
        confidence: a share between 0 and 1.
        resamples: how often rows are drawn.
        seed: of the draws.

    Raises:
        ValueError: there is no row, or not as many predictions as rows, or the score of rows that were drawn is not a
            finite number.
    """
    actual, predicted, other_predicted = np.asarray(actual), np.asarray(predicted), np.asarray(other_predicted)
    if not len(actual) == len(predicted) == len(other_predicted) or len(actual) == 0:
        counts = f"{len(actual)} rows, {len(predicted)} and {len(other_predicted)} predictions"
        raise ValueError(f"{counts} do not belong together")
    generator = np.random.default_rng(seed)
    differences = []
    for _ in range(resamples):
        drawn = generator.integers(len(actual), size=len(actual))
        differences.append(score(actual[drawn], predicted[drawn]) - score(actual[drawn], other_predicted[drawn]))
    if endless := int((~np.isfinite(differences)).sum()):
        found = f"In {endless} of {resamples} draws of rows the score is not a finite number, maybe for want of a class"
        raise ValueError(f"{found}. Take more rows of each class, or a score that needs no class, such as accuracy.")
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    difference = score(actual, predicted) - score(actual, other_predicted)
    return Interval(float(difference), float(low), float(high), confidence)


def choose(candidates: Sequence[str], interval: Callable[[str, str], Interval], incumbent: str | None = None) -> str:
    """Return the candidate that the decision rule chooses.

    Args:
        candidates: names, the simplest first.
        interval: gives the difference of two candidates, the first name's score minus the second's.
        incumbent: the candidate that stays unless another is better; by default the simplest.

    Raises:
        ValueError: there is no candidate, or the incumbent is not among them.
    """
    if not candidates or (incumbent is not None and incumbent not in candidates):
        raise ValueError(f"no such candidate: {incumbent!r}; there are {list(candidates)}")
    chosen = incumbent or candidates[0]
    better = [(interval(name, chosen), name) for name in candidates if name != chosen]
    better = [(difference.difference, name) for difference, name in better if difference.counts and difference.low > 0]
    return max(better, key=lambda pair: pair[0])[1] if better else chosen


def paired(scores: Sequence[float], other_scores: Sequence[float]) -> np.ndarray:
    """Return the differences of scores that belong together, one per pair.

    Raises:
        ValueError: there are fewer than two pairs, or a score is not a finite number.
    """
    if len(scores) != len(other_scores) or len(scores) < 2:
        raise ValueError(f"{len(scores)} and {len(other_scores)} scores are not two or more pairs")
    differences = np.asarray(scores, dtype=float) - np.asarray(other_scores, dtype=float)
    if not np.isfinite(differences).all():
        raise ValueError("a score is not a finite number")
    return differences
