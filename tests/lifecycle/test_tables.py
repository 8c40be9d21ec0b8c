"""tables: which tables are refused, what is downloaded, and when two tables have the same rows."""

import hashlib
import shutil
import time

import mlflow
import numpy as np
import pandas as pd
import pytest
from execution import free_port
from serving import NAME, serving

from mlflow_lifecycle.datasets import almost_unique, check_table, fingerprint, read_table, runs_with, verified_file

UNREADABLE = {
    "not UTF-8": ("größe,art\n1,ä\n".encode("latin-1"), "'utf-8' codec can't decode byte"),
    "more fields than names": (b"a,b\n1,2,3\n4,5,6\n", "more fields than its header"),
    "name twice": (b"a,b,a\n1,2,3\n", "several columns have these names: a"),
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_file_that_is_no_table_is_refused_with_the_reason(tmp_path, content, reason):
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"Cannot use .*rows\.csv: .*{reason}"):
        read_table(tmp_path / "rows.csv")


def test_missing_file_is_refused_with_the_place_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"no such file \(looked for {tmp_path}/rows\.csv\)"):
        read_table("rows.csv")


def with_values(**columns) -> pd.DataFrame:
    """Return a good table with some columns in place of its own."""
    return pd.DataFrame({"weight": np.arange(40.0), "kind": ["a", "b"] * 20} | columns)


UNFAIR = {
    "no rows": (with_values().head(0), "There must be rows"),
    "no target": (with_values().rename(columns={"kind": "sort"}), "no column 'kind'. The columns are: weight, sort"),
    "gaps in the target": (with_values(kind=["a", None] * 20), "missing in 20 of 40 rows"),
    "infinite values": (with_values(weight=[np.inf] * 40), "infinite values: weight"),
    "one class": (with_values(kind=["a"] * 40), "one class only: a"),
    "rare class": (with_values(kind=["a"] * 37 + ["b"] * 3), "Class b of 'kind' has 3 rows, too few for 5 folds"),
}


@pytest.mark.parametrize(("rows", "reason"), UNFAIR.values(), ids=UNFAIR)
def test_table_that_cannot_give_a_fair_comparison_is_refused(rows, reason):
    with pytest.raises(ValueError, match=reason):
        check_table(rows, "kind")


def test_regression_takes_enough_rows_with_numbers():
    rows = with_values(kind=np.arange(40) / 7)
    check_table(rows, "kind", task="regression")
    with pytest.raises(ValueError, match="The target 'kind' has values that are not numbers"):
        check_table(with_values(), "kind", task="regression")
    with pytest.raises(ValueError, match="The table has 5 rows, too few for 5 folds"):
        check_table(rows.head(5), "kind", task="regression")


def test_share_of_test_rows_is_between_0_and_1():
    with pytest.raises(ValueError, match="test_share must be between 0 and 1, got 20"):
        check_table(with_values(), "kind", test_share=20)


def test_few_groups_are_refused():
    with pytest.raises(ValueError, match="has 2 groups, too few for 5 folds"):
        check_table(with_values(who=[1, 2, 3, 4] * 10), "kind", group="who")


def test_columns_that_are_almost_unique_are_found():
    # given an id, a date read as text, numbers with a decimal comma, and two columns that are not unique
    rows = with_values(
        id=range(40),
        day=[f"2024-01-{number % 28 + 1:02}" for number in range(40)],
        price=[f"{number},5" for number in range(40)],
        visits=[1, 2, 3, 4] * 10,
    )
    # then
    assert almost_unique(rows) == ["id", "day", "price"]


def large_table() -> pd.DataFrame:
    return pd.DataFrame({"number": np.arange(1.0, 20_001.0), "text": [None, "x"] * 10_000})


CHANGES = {
    "number beyond the 10,000th row": lambda rows: rows.assign(number=rows["number"].replace(19_999.0, -1.0)),
    "text column with gaps": lambda rows: rows.assign(text=rows["text"].replace("x", "y")),
    "last bit of a number": lambda rows: rows.assign(number=np.nextafter(rows["number"], np.inf)),
    "name of a column": lambda rows: rows.rename(columns={"text": "texts"}),
    "order of the rows": lambda rows: rows[::-1],
    "numbers as text": lambda rows: rows.assign(number=rows["number"].astype(str)),
    "empty text for a gap": lambda rows: rows.assign(text=rows["text"].fillna("")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_fingerprint_changes_with_whatever_changes(change):
    assert fingerprint(change(large_table())) != fingerprint(large_table())


def test_fingerprint_stays_over_index_and_spelling_of_gaps():
    rows = large_table()
    spelled = rows.assign(text=rows["text"].where(rows["text"].notna(), np.nan)).set_index(rows.index + 7)
    assert fingerprint(spelled) == fingerprint(rows)


def test_numbers_in_a_csv_file_are_those_that_were_written(tmp_path):
    rows = pd.DataFrame(np.random.default_rng(0).normal(size=(1000, 4)), columns=list("abcd"))
    rows.to_csv(tmp_path / "rows.csv", index=False)
    pd.testing.assert_frame_equal(read_table(tmp_path / "rows.csv"), rows, check_exact=True)


# A file that is downloaded and verified. The content is the test's own.

CONTENT = b"1,2,3\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
VARIABLE = "A_COPY_OF_THE_DATA"


def had(address, folder):
    """Return the path of the file, or what the error says, with a cache in ``folder``."""
    try:
        return verified_file(address, SHA256, VARIABLE, cache=folder / "cache")
    except ValueError as error:
        return str(error)


def cached(folder):
    return [path.name for path in (folder / "cache").glob("*")]


def test_file_is_downloaded_once_and_nothing_is_printed(tmp_path, capfd):
    with serving(CONTENT) as (address, requests):
        first, second = had(address, tmp_path), had(address, tmp_path)
    assert first == second
    assert first.read_bytes() == CONTENT
    assert requests == [f"/{NAME}"]
    assert cached(tmp_path) == [NAME]
    assert capfd.readouterr() == ("", "")


def test_variable_names_a_copy_which_must_be_the_same_file(tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    monkeypatch.setenv(VARIABLE, str(copy))
    copy.write_bytes(CONTENT)
    assert had("http://127.0.0.1:9/data", tmp_path) == copy
    assert cached(tmp_path) == []
    copy.write_bytes(CONTENT.replace(b"\n", b"\r\n"))
    assert f"its SHA-256 is not {SHA256}, so it is another file" in had("http://127.0.0.1:9/data", tmp_path)


def test_wrong_bytes_from_a_server_are_refused_and_not_kept(tmp_path):
    with serving(CONTENT.replace(b"\n", b"\r\n")) as (address, _):
        told = had(address, tmp_path)
    assert told.startswith(f"Cannot use the data at {address} : ")
    assert "does not match the known hash" in told
    assert cached(tmp_path) == []


def test_server_that_is_down_is_named_without_secrets_and_with_the_remedy(tmp_path):
    port = free_port()
    told = had(f"http://user:p@hunter2@127.0.0.1:{port}/{NAME}?token=hunter2", tmp_path)
    assert told.startswith(f"Cannot use the data at http://127.0.0.1:{port}/{NAME}")
    assert told.endswith(f"Check the connection, or set {VARIABLE} to the path or the address of a copy.")
    assert "hunter2" not in told


# Runs that used the same rows


@pytest.fixture
def store(tmp_path, empty_store):
    shutil.copy(empty_store, tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path.as_posix()}/mlflow.db")
    yield
    mlflow.set_tracking_uri(None)


def logged(experiment, rows, tags=None):
    """Log ``rows`` as the dataset of a run in ``experiment``, and return the run's id."""
    mlflow.set_experiment(experiment)
    with mlflow.start_run() as run:
        mlflow.log_input(mlflow.data.from_pandas(rows), tags=tags)
    return run.info.run_id


def test_runs_with_the_same_rows_are_found_in_all_experiments(store):
    # given runs with the same rows, with and without their fingerprint
    rows = pd.DataFrame({"a": [1.0, 2.0], "b": [True, False]})
    expected = {logged("one", rows), logged("two", rows, {"sha256": fingerprint(rows)})}
    # and others, of which one differs in a truth value, which MLflow's digest leaves out
    logged("two", rows.assign(a=0.0))
    others = rows.assign(b=True)
    assert mlflow.data.from_pandas(rows).digest == mlflow.data.from_pandas(others).digest
    logged("two", others, {"sha256": fingerprint(others)})
    # then
    assert {run.info.run_id for run in runs_with(mlflow.data.from_pandas(rows))} == expected


@pytest.mark.extended  # it takes long
def test_names_are_compared_in_time_that_grows_with_their_number_alone(tmp_path):
    """Attack 37."""

    # given tables with many columns
    def seconds(count: int) -> float:
        path = tmp_path / f"{count}.csv"
        pd.DataFrame([range(count)], columns=[f"c{number}" for number in range(count)]).to_csv(path, index=False)
        begin = time.process_time()
        assert read_table(path).shape == (1, count)
        return time.process_time() - begin

    # then ten times the columns take about ten times as long, and not a hundred times
    assert min(seconds(20_000) for _ in range(2)) < 50 * min(seconds(2_000) for _ in range(3))
