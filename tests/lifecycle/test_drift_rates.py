"""drift: how often an alarm is false, and how often a shift is found, in simulations that take long."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_drift import drifted, flowers, numbers

from mlflow_lifecycle.monitoring.drift import LEVEL, LIMITS, alarm_rate, compare, has_alarm


@pytest.mark.parametrize("batch", [20, 75])
def test_rate_of_false_alarms_is_below_the_level(batch):
    found = alarm_rate(flowers(75, 0), batch, resamples=100)
    assert found.rows == 100
    assert found.low <= 2 * LEVEL


def test_rate_on_independent_draws_is_below_the_level():
    # given rows and batches from the same source, columns of numbers and one of categories
    def made(rows, seed):
        chosen = np.random.default_rng(seed).choice(["red", "green", "blue"], rows)
        return numbers(rows, seed, 3).assign(colour=chosen)

    raised = sum(has_alarm(made(75, seed), made(40, seed + 1000)) for seed in range(200))
    # then no more alarms than the level allows, for the number of trials
    assert raised <= stats.binom.ppf(0.999, 200, LEVEL)


def rate(trial, trials: int = 100) -> float:
    """Return in what share of the trials, each with its own seed, an alarm was raised."""
    return sum(trial(np.random.default_rng(seed)) for seed in range(trials)) / trials


@pytest.mark.parametrize(("shift", "low", "high"), [(0.2, 0, 0.02), (0.5, 0.3, 0.7), (0.8, 0.95, 1)])
def test_power_for_a_shift_grows_around_the_limit(shift, low, high):
    found = alarm_rate(numbers(100, 0, 1), 120, lambda reference, rows: drifted(reference, rows + shift), resamples=100)
    assert low <= found.value <= high


@pytest.mark.parametrize(("first", "second"), [(75, 20), (100, 120), (300, 600)])
def test_size_of_many_categories_is_not_reached_by_chance(first, second):
    # given ten colours that are equally frequent, before and now
    def size(generator):
        reference = pd.DataFrame({"colour": generator.integers(10, size=first).astype(str)})
        rows = pd.DataFrame({"colour": generator.integers(10, size=second).astype(str)})
        return compare(reference, rows)[0].size >= LIMITS.share

    # then one row in ten seldom has another colour by chance; the plain distance has it in 20 to 100 %
    assert rate(size) <= 0.15


@pytest.mark.parametrize("rows", [(75, 120), (500, 40), (2000, 100)])
def test_rare_categories_raise_no_false_alarms(rows):
    # given 200 words with frequencies as in a text, where the plain chi-squared test is wrong in up to 9 %
    share = 1 / np.arange(1, 201)

    def alarm(generator):
        first, second = (generator.choice(200, size, p=share / share.sum()).astype(str) for size in rows)
        return has_alarm(pd.DataFrame({"word": first}), pd.DataFrame({"word": second}))

    assert rate(alarm) <= 0.03


@pytest.mark.parametrize("sigma", [1, 2])
@pytest.mark.parametrize("rows", [(30, 10), (75, 20), (100, 40)])
def test_long_tail_raises_no_false_alarms(rows, sigma):
    # given amounts with a long tail, of which one in 20 is far outside the training range in 2 to 13 %
    def alarm(generator):
        first, second = (generator.lognormal(sigma=sigma, size=size) for size in rows)
        return has_alarm(pd.DataFrame({"amount": first}), pd.DataFrame({"amount": second}))

    assert rate(alarm) <= 0.03
