"""comparison: the interval of a difference, against computations of others, and the decision rule."""

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score
from sklearn.tree import DecisionTreeClassifier

from mlflow_lifecycle.comparison import (
    Interval,
    calibration_table,
    choose,
    detectable_difference,
    folds_interval,
    proportions,
    rows_interval,
)


@pytest.fixture(scope="module")
def scores():
    """Give the accuracies of a tree and of a linear model on the same 25 folds."""
    features, target = load_breast_cancer(return_X_y=True)
    folds = RepeatedStratifiedKFold(n_splits=5, n_repeats=5, random_state=0)
    models = DecisionTreeClassifier(random_state=0), LogisticRegression(solver="liblinear")
    return [cross_val_score(model, features, target, cv=folds) for model in models]


def test_folds_interval_is_that_of_scikit_learns_example(scores):
    # given the computation in scikit-learn's example "Statistical comparison of models using grid search"
    differences, test_rows, training_rows = scores[1] - scores[0], 1, 4
    corrected_std = np.sqrt(np.var(differences, ddof=1) * (1 / len(differences) + test_rows / training_rows))
    distribution = stats.t(len(differences) - 1, loc=np.mean(differences), scale=corrected_std)
    # then
    interval = folds_interval(scores[1], scores[0], test_share=0.2)
    assert (interval.low, interval.high) == pytest.approx(distribution.interval(0.95))
    assert interval.difference == pytest.approx(differences.mean())


def test_rows_interval_is_that_of_the_paired_t_test():
    generator = np.random.default_rng(1)
    scores, other = generator.normal(0.1, 0.4, 200), generator.normal(0.0, 0.4, 200)
    interval = rows_interval(scores, other)
    expected = stats.ttest_rel(scores, other).confidence_interval()
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.difference == pytest.approx((scores - other).mean())


def test_interval_of_zeros_and_ones_is_centered_as_by_agresti_and_min():
    # given 100 rows: 12 that only the first model gets right, 5 that only the second does
    right, other = np.repeat([1, 1, 0, 0], [70, 12, 5, 13]), np.repeat([1, 0, 1, 0], [70, 12, 5, 13])
    # when
    interval = rows_interval(right, other)
    # then by hand: 7 / 102, and the root of (18 - 49 / 102) / 102 / 102
    middle, error = 7 / 102, np.sqrt(18 - 49 / 102) / 102
    margin = stats.t.ppf(0.975, 99) * error
    assert (interval.low, interval.high) == pytest.approx((middle - margin, middle + margin))
    assert interval.difference == pytest.approx(0.07)


@pytest.mark.parametrize(("interval", "share"), [(rows_interval, {}), (folds_interval, {"test_share": 0.2})])
def test_detectable_difference_is_that_of_bloom(scores, interval, share):
    # given the standard error of the difference
    found = interval(scores[1], scores[0], **share)
    error = (found.high - found.difference) / stats.t.ppf(0.975, 24)
    # then
    expected = (stats.t.ppf(0.975, 24) + stats.t.ppf(0.8, 24)) * error
    assert detectable_difference(scores[1], scores[0], **share) == pytest.approx(expected)


LOWER_BOUNDS = {("b", "a"): 0.02, ("c", "a"): 0.05, ("c", "b"): -0.01, ("d", "b"): 0.01}


def interval_of(name, other):
    low = LOWER_BOUNDS.get((name, other), -1.0)
    return Interval(low + 0.03, low, low + 0.06)


def test_candidate_must_beat_the_current_choice():
    # given b better than a, and c better than a, but not than b
    assert choose(["a", "b", "c"], interval_of) == "b"
    assert choose(["a", "b", "c", "d"], interval_of) == "d"


@pytest.mark.parametrize(("scores", "other"), [([1, 0], [1]), ([1], [0]), ([1, np.inf], [1, 0])])
def test_rows_that_are_no_pairs_are_refused(scores, other):
    with pytest.raises(ValueError, match=r"pairs|finite"):
        rows_interval(scores, other)


# Proportions, and probabilities that are held against them


def test_interval_of_a_proportion_is_that_of_wilson():
    table = proportions({"recall": [True] * 26 + [False] * 2})
    assert table.loc["recall", ["hits", "rows"]].to_list() == [26, 28]
    assert table.loc["recall", ["low", "high"]].to_list() == pytest.approx([0.774, 0.980], abs=5e-4)


def test_proportion_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="'recall_women' needs at least one row"):
        proportions({"recall_women": []})


def test_calibrated_probabilities_lie_in_the_intervals_of_the_observed_shares_and_others_do_not():
    # given events that happen as often as predicted
    generator = np.random.default_rng(0)
    probabilities = generator.random(5000)
    events = generator.random(5000) < probabilities
    # then each group's prediction is in its interval
    table = calibration_table(events, probabilities)
    assert table["rows"].to_list() == [1000] * 5
    assert table["predicted"].between(table["low"], table["high"]).all()
    # and that of a model that is too sure of itself is not
    table = calibration_table(events, probabilities**3 / (probabilities**3 + (1 - probabilities) ** 3))
    assert not table["predicted"].between(table["low"], table["high"])[[0, 1, 3, 4]].any()
