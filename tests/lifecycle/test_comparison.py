"""lifecycle.comparison: the interval of a difference, against computations of others, and the decision rule."""

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score
from sklearn.tree import DecisionTreeClassifier

from lifecycle.comparison import Interval, choose, folds_interval, rows_interval


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


def test_folds_interval_is_wider_than_the_usual_one(scores):
    usual = stats.ttest_rel(scores[1], scores[0]).confidence_interval()
    interval = folds_interval(scores[1], scores[0], test_share=0.2)
    assert interval.high - interval.low > 2 * (usual.high - usual.low)


def test_folds_interval_errs_as_often_as_it_says():
    # given scores of two equal models, whose folds share a part that makes them dependent as Nadeau and Bengio assume
    generator = np.random.default_rng(0)
    share, count, wrong = 0.2, 10, 0
    for _ in range(2000):
        common, own = generator.normal(scale=share**0.5), generator.normal(size=count) * (1 - share) ** 0.5
        wrong += folds_interval(common + own, np.zeros(count), test_share=share).counts
    # then about one in twenty is taken for a difference; with 1/n alone it would be about every third
    assert 0.03 < wrong / 2000 < 0.07


def share_right(actual, predicted):
    return (actual == predicted).mean()


def test_rows_interval_agrees_with_scipys_paired_bootstrap():
    # given which of 200 rows each of two models gets right
    generator = np.random.default_rng(1)
    right, other = generator.random(200) < 0.9, generator.random(200) < 0.8
    actual = np.ones(200, dtype=bool)
    # when
    interval = rows_interval(share_right, actual, right, other, resamples=4000)
    # then it is scipy's, as far as draws repeat
    expected = stats.bootstrap(
        (right.astype(float) - other,), np.mean, method="percentile", n_resamples=4000, rng=generator
    ).confidence_interval
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert interval.difference == pytest.approx(right.mean() - other.mean())


def test_thirty_rows_decide_little():
    # given 30 rows, of which one model gets two more right
    actual = np.ones(30)
    better, worse = np.r_[np.ones(29), 0], np.r_[np.ones(27), np.zeros(3)]
    # then the difference does not count
    assert not rows_interval(accuracy_score, actual, better, worse).counts


def test_same_draws_give_the_same_interval():
    arguments = share_right, [0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]
    assert rows_interval(*arguments) == rows_interval(*arguments)


@pytest.mark.parametrize(
    ("low", "high", "counts"), [(0.01, 0.2, True), (-0.2, -0.01, True), (-0.01, 0.2, False), (0.0, 0.2, False)]
)
def test_difference_counts_when_its_interval_leaves_out_zero(low, high, counts):
    assert Interval(0.1, low, high, 0.95).counts == counts


def test_interval_reads_as_a_sentence():
    assert str(Interval(-0.0066, -0.04131, 0.0281, 0.95)) == "-0.0066 (95 % interval -0.0413 to +0.0281)"


LOWER_BOUNDS = {("b", "a"): 0.02, ("c", "a"): -0.01, ("d", "a"): 0.01, ("a", "c"): -0.03, ("b", "c"): -0.02}


def interval_of(name, other):
    low = LOWER_BOUNDS.get((name, other), -1.0)
    return Interval(low + 0.03, low, low + 0.06, 0.95)


def test_best_of_those_that_are_clearly_better_is_chosen():
    assert choose(["a", "b", "c", "d"], interval_of) == "b"


def test_simplest_is_chosen_where_no_difference_counts():
    assert choose(["a", "c"], interval_of) == "a"


def test_incumbent_stays_where_no_difference_counts():
    assert choose(["a", "b", "c"], interval_of, incumbent="c") == "c"


@pytest.mark.parametrize(("candidates", "incumbent"), [([], None), (["a"], "z")])
def test_choice_without_such_a_candidate_is_refused(candidates, incumbent):
    with pytest.raises(ValueError, match="no such candidate"):
        choose(candidates, interval_of, incumbent)


@pytest.mark.parametrize(("scores", "other"), [([0.9], [0.8]), ([0.9, 0.8], [0.9]), ([0.9, float("nan")], [0.8, 0.7])])
def test_scores_that_are_no_pairs_are_refused(scores, other):
    with pytest.raises(ValueError, match=r"pairs|finite"):
        folds_interval(scores, other, test_share=0.2)


@pytest.mark.parametrize(("test_share", "confidence"), [(0, 0.95), (1, 0.95), (0.2, 95)])
def test_shares_outside_of_zero_and_one_are_refused(test_share, confidence):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        folds_interval([0.9, 0.8], [0.8, 0.7], test_share, confidence)


def test_rows_and_predictions_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="do not belong together"):
        rows_interval(accuracy_score, [1, 0], [1], [1, 0])


@pytest.mark.filterwarnings("ignore:Only one class is present")
def test_score_that_is_not_defined_for_some_draws_is_refused_with_cause_and_remedy():
    # given two rows of one class among twelve, so that every ninth draw has none of them
    actual, generator = np.r_[np.ones(2), np.zeros(10)], np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"In \d+ of 2000 draws .* not a finite number.* Take more rows of each class"):
        rows_interval(roc_auc_score, actual, generator.random(12), generator.random(12))
