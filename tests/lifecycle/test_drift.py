"""drift: the statistics against computations of their own, what is an alarm, and how often it is false."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.datasets import load_iris

from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.monitoring.drift import LIMITS, Limits, alarm_rate, compare, estimate_share, has_alarm

FLOWERS = load_iris(as_frame=True).data


def flowers(rows: int, seed: int) -> pd.DataFrame:
    """Return flowers of Iris, drawn with replacement."""
    return FLOWERS.sample(rows, replace=True, random_state=seed, ignore_index=True)


def numbers(rows: int, seed: int, columns: int = 4) -> pd.DataFrame:
    """Return standard normal numbers."""
    return pd.DataFrame(np.random.default_rng(seed).normal(size=(rows, columns))).rename(columns="column {}".format)


def colours(**counts: int) -> pd.DataFrame:
    return pd.DataFrame({"colour": [name for name, count in counts.items() for _ in range(count)]})


def drift(reference, rows, limits=LIMITS) -> list:
    """Return the tests for drift."""
    return [found for found in compare(reference, rows, limits) if not found.outside]


def out_of_range(reference, rows) -> list:
    """Return the tests for values outside the training range."""
    return [found for found in compare(reference, rows) if found.outside]


def alarms(differences) -> list[str]:
    return [found.column for found in differences if found.alarm]


def drifted(reference, rows) -> bool:
    return bool(alarms(drift(reference, rows)))


def outside(reference, rows) -> bool:
    return bool(alarms(out_of_range(reference, rows)))


# The statistics


def test_size_of_a_shift_is_the_shift_in_standard_deviations():
    reference = numbers(500, 0, 1) * 7 + 100
    (found,) = drift(reference, reference + 3)
    assert found.size == pytest.approx(3 / reference["column 0"].std(ddof=0))


def test_size_sees_a_spread_that_grew_around_the_same_mean():
    # given as many rows, so that the distance is the mean one of the sorted values
    reference = numbers(500, 0, 1)
    (found,) = drift(reference, 3 * reference)
    expected = np.abs(np.sort(3 * reference["column 0"]) - np.sort(reference["column 0"])).mean()
    assert found.size == pytest.approx(expected / reference["column 0"].std(ddof=0))
    assert found.alarm


def test_size_of_categories_is_the_share_that_would_have_to_change_beyond_chance():
    # given so many rows that chance alone gives no difference
    (found, _) = compare(colours(red=50_000, green=50_000), colours(red=80_000, green=20_000))
    assert found.size == pytest.approx(0.3, abs=0.005)
    # and fewer, of which chance gives a difference that a simulation finds, too
    generator = np.random.default_rng(0)
    shares = generator.binomial(100, 0.65, size=(2, 20_000)) / 100
    (found, _) = compare(colours(red=50, green=50), colours(red=80, green=20))
    assert found.size == pytest.approx(0.3 - np.abs(shares[0] - shares[1]).mean(), abs=0.002)


def test_p_value_of_categories_is_the_chi_squared_tests():
    observed = np.array([[50, 30, 20], [40, 30, 30]])
    expected = observed.sum(axis=1, keepdims=True) * observed.sum(axis=0) / observed.sum()
    p_value = stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), df=2)
    found = compare(colours(red=50, green=30, blue=20), colours(red=40, green=30, blue=30))
    # that there is no new colour is the other test, with the p-value 1
    assert [test.p_value for test in found] == pytest.approx([2 * p_value, 1])


def test_p_values_are_corrected_for_the_number_of_tests():
    # given the p-values of two tests of each of four columns
    reference, rows = numbers(80, 0), numbers(80, 1) + np.array([0, 0.2, 0.4, 0.6])
    raw = []
    for name in reference:
        beyond = ((rows[name] < reference[name].min()) | (rows[name] > reference[name].max())).sum()
        raw.append(stats.ks_2samp(reference[name], rows[name]).pvalue)
        raw.append(stats.betabinom(80, 2, 79).sf(beyond - 1))
    # when they are corrected step by step, from the largest down
    expected, smallest = [1.0] * 8, 1.0
    for rank in range(8, 0, -1):
        place = int(np.argsort(raw)[rank - 1])
        smallest = min(smallest, raw[place] * 8 / rank)
        expected[place] = smallest
    # then
    assert [found.p_value for found in compare(reference, rows)] == pytest.approx(expected)


def test_interval_of_a_share_is_clopper_and_pearsons():
    found = estimate_share(71, 75)
    assert (found.low, found.high) == pytest.approx((stats.beta.ppf(0.025, 71, 5), stats.beta.ppf(0.975, 72, 4)))
    assert str(found) == "0.9467 (95 % interval 0.8690 to 0.9853)"


def test_chance_of_values_beyond_the_extremes_is_that_of_a_simulation():
    # given 30 numbers and a batch of 40, many times over, and how often three or more of the batch lie beyond
    generator, beyond = np.random.default_rng(0), 0
    for _ in range(4000):
        seen, later = generator.normal(size=30), generator.normal(size=40)
        beyond += ((later < seen.min()) | (later > seen.max())).sum() >= 3
    # when three of 40 lie beyond
    reference = pd.DataFrame({"length": np.linspace(0, 1, 30)})
    (found,) = out_of_range(reference, pd.DataFrame({"length": [2.0] * 3 + [0.5] * 37}))
    # then
    assert found.size == 3 / 40
    # (of the two tests, this has the larger p-value, which the correction leaves as it is)
    assert found.p_value == pytest.approx(beyond / 4000, abs=0.03)


# Alarms


def test_two_percent_at_five_thousand_rows_is_significant_and_no_alarm():
    found = drift(FLOWERS, (1.02 * flowers(5000, 0)).round(2))
    assert min(column.p_value for column in found) < 0.01
    assert alarms(found) == []


@pytest.mark.parametrize("seed", range(2))
def test_two_percent_is_no_alarm_either_if_few_rows_were_learned_from(seed):
    assert not drifted(flowers(75, seed), (1.02 * flowers(5000, seed + 100)).round(2))


def test_large_shift_in_a_few_rows_is_an_alarm():
    assert alarms(drift(numbers(75, 0), numbers(40, 1) + np.array([0, 0, 0, 1.5]))) == ["column 3"]


def test_large_difference_that_is_not_significant_is_no_alarm():
    (found,) = drift(numbers(75, 0, 1), numbers(75, 0, 1).nlargest(3, "column 0"))
    assert found.size > 0.5
    (found,) = drift(numbers(4, 0, 1), numbers(4, 0, 1) + 2)
    assert found.size > 0.5
    assert not found.alarm


def test_caller_states_what_counts():
    reference, rows = numbers(500, 0, 1), numbers(500, 1, 1) + 0.4
    assert not drift(reference, rows)[0].alarm
    assert drift(reference, rows, Limits(shift=0.3))[0].alarm


@pytest.mark.parametrize("kind", [str, bool, "boolean", "category"])
def test_other_shares_of_categories_are_an_alarm(kind):
    def made(first, second):
        return pd.DataFrame({"kind": pd.Series([1] * first + [0] * second).astype(kind)})

    # as numbers they would shift by 0.3 standard deviations, which is no alarm
    assert alarms(drift(made(500, 500), made(650, 350))) == ["kind"]
    assert alarms(drift(made(50, 50), made(51, 49))) == []


@pytest.mark.parametrize("others", [0, 150, 600])
@pytest.mark.extended  # it takes long
def test_column_with_a_rare_value_that_has_moved_wholly_is_an_alarm_among_however_many_columns(others):
    reference, rows = numbers(200, 0, others), numbers(80, 1, others)
    reference["colour"] = colours(red=100, green=97, blue=3)["colour"]
    rows["colour"] = "green"
    assert alarms(drift(reference, rows)) == ["colour"]


@pytest.mark.parametrize("codes", [("1", "2"), ("1.0", "2.0"), ("True", "False")])
def test_codes_are_the_same_when_a_file_with_a_gap_gives_them_back(tmp_path, codes):
    # given a column of text, and the same rows but one as pandas reads them from a file
    reference = pd.DataFrame({"code": [*codes, None] * 40, "size": 1.0})
    reference.assign(code=reference["code"].where(reference.index > 0)).to_csv(tmp_path / "rows.csv", index=False)
    rows = pd.read_csv(tmp_path / "rows.csv")
    assert not isinstance(rows.loc[3, "code"], str)
    # then nothing has changed
    assert alarms(drift(reference, rows)) == []
    assert alarms(out_of_range(reference, rows)) == []


def test_gaps_that_become_frequent_are_an_alarm():
    reference = numbers(200, 0, 2).mask(np.arange(400).reshape(200, 2) % 20 == 0)
    rows = numbers(200, 1, 2).mask(np.arange(400).reshape(200, 2) % 4 == 0)
    assert alarms(drift(reference, rows)) == ["column 0 (missing)"]


def test_column_of_gaps_alone_is_an_alarm():
    assert alarms(drift(numbers(50, 0, 1), numbers(50, 1, 1) * np.nan)) == ["column 0 (missing)"]


def test_names_that_never_repeat_are_no_drift():
    reference, rows = ({"name": [f"{letter}{number}" for number in range(300)]} for letter in "ab")
    assert alarms(drift(pd.DataFrame(reference), pd.DataFrame(rows))) == []
    assert alarms(out_of_range(pd.DataFrame(reference), pd.DataFrame(rows))) == []


def test_dates_are_left_out():
    dates = pd.DataFrame({"day": pd.date_range("2026-01-01", periods=50)})
    assert compare(dates, dates + pd.Timedelta(days=365)) == ()


def test_value_of_unknown_is_out_of_range():
    rows = flowers(75, 1)
    rows.loc[:7, "petal width (cm)"] = -999
    assert alarms(out_of_range(flowers(75, 0), rows)) == ["petal width (cm)"]


def test_one_row_in_a_hundred_beyond_is_no_alarm_however_many_rows():
    reference, rows = pd.DataFrame({"length": np.linspace(0, 1, 5000)}), pd.DataFrame({"length": [0.5] * 1000})
    rows.loc[:9, "length"] = 1.1
    (found,) = out_of_range(reference, rows)
    assert found.p_value < 0.01
    assert not found.alarm


def test_category_never_seen_and_gap_never_seen_are_out_of_range():
    reference = colours(red=40, green=40).assign(size=1.0)
    assert alarms(out_of_range(reference, colours(red=30, lilac=10).assign(size=1.0))) == ["colour"]
    rows = colours(red=20, green=20).assign(size=[1.0] * 30 + [np.nan] * 10)
    assert alarms(out_of_range(reference, rows)) == ["size"]


def test_gaps_like_those_of_training_are_in_range():
    reference = pd.DataFrame({"size": pd.array([1, 2, None] * 20, dtype="Int64"), "colour": ["red", None, "red"] * 20})
    assert alarms(out_of_range(reference, reference)) == []


def test_infinite_number_is_out_of_range_and_no_error():
    rows = numbers(50, 1, 1)
    rows.iloc[:10] = np.inf
    assert alarms(out_of_range(numbers(50, 0, 1), rows)) == ["column 0"]
    assert all(np.isfinite(column.size) for column in drift(numbers(50, 0, 1), rows))


def test_constant_column_that_moves_has_a_finite_size():
    reference = pd.DataFrame({"level": [5.0] * 50, "zero": [0.0] * 50})
    found = {column.column: column for column in drift(reference, reference + 5)}
    assert np.isfinite([found["level"].size, found["zero"].size]).all()
    assert found["level"].alarm


def test_column_of_one_value_and_column_without_values_are_no_error():
    reference = pd.DataFrame({"size": [1.0, None, None], "none": [np.nan] * 3})
    assert not has_alarm(reference, pd.DataFrame({"size": [2.0], "none": [np.nan]}))


def test_rows_that_cannot_be_compared_are_refused():
    with pytest.raises(InvalidInputError, match=r"These columns are missing: petal width \(cm\)"):
        compare(FLOWERS, FLOWERS.drop(columns="petal width (cm)"))
    with pytest.raises(InvalidInputError, match=r"'petal width \(cm\)' must hold numbers: .*\"wide\""):
        compare(FLOWERS, FLOWERS.assign(**{"petal width (cm)": [0.2] * 149 + ["wide"]}))


def test_nothing_of_the_tables_is_changed():
    reference, rows = flowers(50, 0), flowers(50, 1)
    before = reference.copy(), rows.copy()
    compare(reference, rows)
    pd.testing.assert_frame_equal(reference, before[0])
    pd.testing.assert_frame_equal(rows, before[1])


# False alarms


def test_resampling_raises_the_alarm_that_it_is_given():
    assert alarm_rate(FLOWERS, 10, lambda *_: True, resamples=5).value == 1
    sizes = []
    alarm_rate(FLOWERS, 10, lambda *tables: sizes.append(tuple(map(len, tables))), resamples=2)
    assert sizes == [(150, 10), (150, 10)]


def test_one_or_two_rows_outside_are_not_many():
    # given few rows, of which 5 % are one row, and so many training rows that it is significant
    reference = pd.DataFrame({"length": np.linspace(0, 1, 5000)})
    rows = pd.DataFrame({"length": np.linspace(0, 1, 20)})
    for count in (1, 2, 3):
        rows.loc[count, "length"] = 99
        assert outside(reference, rows) == (count == 3)
