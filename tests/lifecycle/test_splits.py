"""splits: rows that belong together stay on one side, and what a random split of them hides."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import train_test_split

from mlflow_lifecycle.splits import score_folds, split_table


def subjects(seed: int) -> pd.DataFrame:
    """Return 40 subjects with five nearly equal rows each, and a random label per subject."""
    generator = np.random.default_rng(seed)
    subject = np.repeat(range(40), 5)
    values = generator.normal(size=(40, 4))[subject] + generator.normal(0, 0.1, (200, 4))
    rows = pd.DataFrame(values, columns=list("abcd"))
    return rows.assign(subject=subject, label=generator.integers(0, 2, 40)[subject])


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_no_split_divides_a_group(task):
    rows = subjects(0)
    split = split_table(rows, "label", task=task, group="subject", repeats=2)
    assert set(split.train["subject"]).isdisjoint(split.test["subject"])
    assert len(split.test) == pytest.approx(40, abs=10)
    assert len(split.folds) == 10
    for training, testing in split.folds:
        groups = split.train["subject"].to_numpy()
        assert set(groups[training]).isdisjoint(groups[testing])


def test_classes_have_the_same_share_in_each_part():
    rows = subjects(0).drop(columns="subject")
    split = split_table(rows, "label")
    expected = rows["label"].mean()
    parts = [split.train, split.test, *(split.train.iloc[testing] for _, testing in split.folds)]
    assert [part["label"].mean() for part in parts] == pytest.approx([expected] * 7, abs=0.03)


def test_test_rows_without_groups_are_those_of_scikit_learn():
    rows = subjects(0)
    expected = train_test_split(rows, test_size=0.3, stratify=rows["label"], random_state=7)[1]
    pd.testing.assert_frame_equal(split_table(rows, "label", test_share=0.3, seed=7).test, expected)


def test_unfit_table_is_refused():
    with pytest.raises(ValueError, match="no column 'who'"):
        split_table(subjects(0), "label", group="who")


def test_each_repetition_has_other_folds_and_the_seed_fixes_them():
    first, again, other = (split_table(subjects(0), "label", repeats=2, seed=seed) for seed in (1, 1, 2))
    tests = [[list(testing) for _, testing in split.folds] for split in (first, again, other)]
    assert tests[0] == tests[1] != tests[2]
    assert tests[0][:5] != tests[0][5:]


def test_scores_are_paired_by_repetition_and_fold():
    # given two models with the same settings
    rows = subjects(0)
    split = split_table(rows, "label", repeats=2)
    models = {"first": LogisticRegression(), "second": LogisticRegression()}
    # when both are scored
    features = split.train[list("abcd")]
    scoring = ["neg_log_loss", "accuracy"]
    scores = score_folds(models, features, split.train["label"], cv=split.folds, scoring=scoring)
    # then they have the same scores in each fold
    assert list(scores.index) == [(repeat, fold) for repeat in range(2) for fold in range(5)]
    assert list(scores["first"]) == scoring
    pd.testing.assert_frame_equal(scores["first"], scores["second"])


def test_model_that_cannot_be_fitted_raises_its_own_error():
    rows = subjects(0).assign(a="text")
    split = split_table(rows, "label", task="regression")
    models = {"linear": LinearRegression()}
    with pytest.raises(ValueError, match="could not convert string to float"):
        score_folds(models, split.train[["a"]], split.train["label"], cv=split.folds, scoring=["r2"])
