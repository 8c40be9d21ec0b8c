"""challenger: from which rows a challenger may learn, and when it takes the champion's place."""

import dataclasses

import mlflow
import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.metrics import log_loss
from versions import LOCK, NAME, iris_rows

from mlflow_lifecycle.challenger import NoChallengeError, challenge, contest
from mlflow_lifecycle.signing.keys import own_key, own_public_key
from mlflow_lifecycle.signing.verify import verified

ROWS = iris_rows()
FEATURES, TARGET = ROWS.columns[:-1].tolist(), "species"


def drawn(seed: int, **counts: int) -> pd.DataFrame:
    """Return flowers drawn from normal distributions with the means and covariances of the species of Iris."""
    generator, tables = np.random.default_rng(seed), []
    for name, count in counts.items():
        species = ROWS.loc[ROWS[TARGET] == name, FEATURES]
        values = generator.multivariate_normal(species.mean(), species.cov(), count, method="cholesky")
        tables.append(pd.DataFrame(values.round(1), columns=FEATURES).assign(species=name))
    return pd.concat(tables, ignore_index=True)


def changed(seed: int = 1) -> pd.DataFrame:
    """Return new flowers: few setosa, and versicolor with longer petals, which the champion takes for virginica."""
    rows = drawn(seed, setosa=10, versicolor=60, virginica=50)
    rows.loc[rows[TARGET] == "versicolor", "petal length (cm)"] += 0.9
    return rows


@pytest.fixture
def challenged(version, known, store):
    """Give a function that challenges the champion with rows."""

    def run(usual, new):
        files = {"key": own_key(), "lock": LOCK}
        return challenge(version, known, usual, new, **files)

    return run


def versions() -> int:
    return len(mlflow.MlflowClient().search_model_versions(f"name = '{NAME}'"))


# The rule


def trained(known, *tables):
    rows = pd.concat([known.rows, *tables], ignore_index=True)
    return clone(known.estimator).fit(rows[FEATURES], rows[TARGET])


def test_challenger_that_is_better_by_a_difference_that_counts_wins(known, usual):
    found = contest(known, trained(known, changed(1)), usual, changed(2))
    assert found.winner == "challenger"
    assert found.new.low > 0
    assert found.both.low > 0


def test_differences_are_those_of_the_log_losses(known, usual):
    challenger, new = trained(known, changed(1)), changed(2)
    found = contest(known, challenger, usual, new)
    for rows, difference in ((usual, found.usual), (new, found.new), (found.rows, found.both)):
        losses = [
            log_loss(rows[TARGET], model.predict_proba(rows[FEATURES])) for model in (challenger, known.estimator)
        ]
        assert difference.difference == pytest.approx(losses[1] - losses[0])
    assert len(found.rows) == len(usual) + len(new)


def test_equal_challenger_leaves_the_champion_in_place(known, usual):
    assert contest(known, known.estimator, usual, changed()).winner == "champion"


def test_challenger_that_is_worse_on_usual_rows_loses_although_it_is_better_on_all(known, usual):
    # given a model of new rows alone, and many of them to be judged on
    new = drawn(3, setosa=100, versicolor=100, virginica=100)
    new.loc[new[TARGET] == "versicolor", FEATURES[2:]] += 1.5
    challenger = clone(known.estimator).fit(new[FEATURES], new[TARGET])
    found = contest(known, challenger, usual, new)
    assert found.both.low > 0
    assert found.usual.high < 0
    assert found.winner == "champion"


class Stated(ClassifierMixin, BaseEstimator):
    """A model that gives the class of each row a stated probability: first of the usual rows, then of the new ones."""

    classes_ = np.array(["no", "yes"])

    def __init__(self, usual, new):
        """Take both lists of probabilities."""
        self.shares = {len(usual): usual, len(new): new, len(usual) + len(new): [*usual, *new]}

    def predict_proba(self, features):
        """Return the probabilities of both classes."""
        right = np.array(self.shares[len(features)])
        return np.column_stack([1 - right, right])


def test_challenger_that_is_better_on_new_rows_alone_loses_where_all_rows_do_not_tell(known):
    # given a challenger that is surer of three new rows, and on twenty usual rows now surer and now less sure
    rows = pd.DataFrame({"width": [1.0] * 20, "answer": ["yes"] * 20})
    champion = Stated([0.5] * 20, [0.5] * 3)
    of_the_champion = dataclasses.replace(known, features=["width"], target="answer", estimator=champion)
    challenger = Stated([0.9, 0.3] * 10, [0.6, 0.6, 0.7])
    found = contest(of_the_champion, challenger, rows, rows.head(3))
    assert found.new.low > 0
    assert not found.both.counts
    assert found.winner == "champion"


def test_model_of_twenty_rows_of_two_species_does_not_win(known, usual):
    few = usual[usual[TARGET] != "setosa"].sample(20, random_state=0)
    challenger = clone(known.estimator).fit(few[FEATURES], few[TARGET])
    assert contest(known, challenger, usual, few).winner == "champion"


# Who may learn from what


def test_challenger_learns_from_old_and_new_rows_and_is_signed_as_a_candidate(store, challenged, usual, version):
    new = changed()
    candidate, found = challenged(usual, new)
    # then it won, on usual rows and on the half of the new ones that it has not learned from
    assert found.winner == "challenger"
    with verified(f"models:/{NAME}/{candidate.version}", own_public_key()) as challenger:
        assert challenger.statement.purpose == "candidate"
        learned = pd.read_parquet(challenger.training_rows)
    old = pd.read_parquet(version.training_rows)
    pd.testing.assert_frame_equal(learned.head(len(old)), old)
    assert len(learned) == len(old) + len(new) // 2
    assert len(found.rows) == len(usual) + len(new) - len(new) // 2
    # and no alias has moved, and the contest is kept with its run
    assert mlflow.MlflowClient().get_registered_model(NAME).aliases == {}
    run = mlflow.get_run(candidate.run_id)
    assert (run.data.tags["winner"], run.data.tags["champion"]) == ("challenger", f"models:/{NAME}/1")
    assert mlflow.artifacts.load_dict(f"runs:/{candidate.run_id}/contest.json")["new"]["low"] == found.new.low


def test_classes_of_text_are_found_in_new_rows_that_a_file_gives_as_numbers(store, version, known, usual):
    # given a champion whose classes are "0", "1" and "2"
    numbers = {name: number for number, name in enumerate(known.estimator.classes_)}
    rows = known.rows.assign(species=known.rows[TARGET].map(numbers).map(str))
    model = clone(known.estimator).fit(rows[FEATURES], rows[TARGET])
    champion = dataclasses.replace(known, rows=rows, predictions=model.predict(rows[FEATURES]), estimator=model)
    # when the labels are numbers
    files = {"key": own_key(), "lock": LOCK}
    batches = [batch.assign(species=batch[TARGET].map(numbers)) for batch in (usual, changed())]
    _, found = challenge(version, champion, *batches, **files)
    # then
    assert set(found.rows[TARGET]) == {"0", "1", "2"}
    assert found.winner == "challenger"


def ruler(rows):
    return rows.assign(**1.3 * rows[FEATURES])


REFUSED = {
    "a broken ruler": (lambda usual: (usual, ruler(usual)), "The new rows: broken input"),
    "two species": (lambda usual: (usual, usual[usual[TARGET] != "setosa"].head(20)), "The new rows: other labels"),
    "SETOSA ": (lambda usual: (usual, changed().replace("setosa", "SETOSA ")), "The new rows: other labels"),
    "a new species": (lambda usual: (usual, changed().replace("setosa", "pumila")), "The new rows: other labels"),
    "swapped labels": (
        lambda usual: (usual, usual.replace({TARGET: {"setosa": "virginica", "virginica": "setosa"}})),
        "The new rows: accuracy alarm",
    ),
    "nothing new": (lambda usual: (usual, usual), r"The new rows: quiet \(nothing has changed\)"),
    "no labels": (lambda usual: (usual, changed()[FEATURES]), "The new rows have no labels in 'species'"),
    "a gap in the labels": (lambda usual: (usual, changed().replace({TARGET: {"setosa": None}})), "have no labels"),
    "no usual rows": (lambda usual: (changed(), changed()), "The usual rows: drift"),
    "usual rows without labels": (lambda usual: (usual[FEATURES], changed()), "The usual rows have no labels"),
    "one row of a species": (
        lambda usual: (usual, pd.concat([changed()[10:], changed().head(1)])),
        "Fewer than two new rows of setosa|other labels",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_nobody_may_learn_from_or_judge_by_train_nothing(challenged, usual, case):
    rows, reason = REFUSED[case]
    before = versions()
    with pytest.raises(NoChallengeError, match=reason):
        challenged(*rows(usual))
    assert versions() == before
