"""lifecycle.tables: which tables are refused, and when two tables have the same rows."""

import mlflow
import numpy as np
import pandas as pd
import pytest

from lifecycle.tables import check_table, fingerprint, read_table

GOOD = "weight,kind\n" + "".join(f"{number},{'ab'[number % 2]}\n" for number in range(40))
UNREADABLE = {
    "empty file": (b"", "the file is empty"),
    "not UTF-8": ("größe,art\n1,ä\n".encode("latin-1"), "not a CSV file in UTF-8"),
    "lines of different length": (b"a,b\n1,2\n1,2,3\n", "not a CSV file in UTF-8"),
    "more fields than names": (b"a,b\n1,2,3\n4,5,6\n", "more fields than its header"),
    "name twice": (b"a,b,a\n1,2,3\n", "more than once: a"),
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


def test_good_table_is_read_and_taken(tmp_path):
    (tmp_path / "rows.csv").write_text(GOOD)
    rows = read_table(tmp_path / "rows.csv")
    check_table(rows, "kind")
    assert list(rows) == ["weight", "kind"]
    assert len(rows) == 40


def with_values(**columns) -> pd.DataFrame:
    """Return a good table with some columns in place of its own."""
    return pd.DataFrame({"weight": np.arange(40.0), "kind": ["a", "b"] * 20} | columns)


UNFAIR = {
    "no rows": (with_values().head(0), "There must be rows"),
    "no other column": (with_values()[["kind"]], "There must be rows, and columns"),
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


def test_test_part_too_small_for_the_classes_is_refused():
    with pytest.raises(ValueError, match="too small for 2 classes"):
        check_table(with_values(), "kind", test_share=0.04)


def large_table() -> pd.DataFrame:
    return pd.DataFrame({"number": np.arange(20_000.0), "text": [None, "x"] * 10_000, "truth": [True, False] * 10_000})


CHANGES = {
    "number beyond the 10,000th row": lambda rows: rows.assign(number=rows["number"].replace(19_999.0, -1.0)),
    "text column with gaps": lambda rows: rows.assign(text=rows["text"].replace("x", "y")),
    "truth value": lambda rows: rows.assign(truth=~rows["truth"]),
    "last bit of a number": lambda rows: rows.assign(number=np.nextafter(rows["number"], np.inf)),
    "name of a column": lambda rows: rows.rename(columns={"text": "texts"}),
    "order of the rows": lambda rows: rows[::-1],
    "one row less": lambda rows: rows.iloc[:-1],
    "numbers as text": lambda rows: rows.assign(number=rows["number"].astype(str)),
    "empty text for a gap": lambda rows: rows.assign(text=rows["text"].fillna("")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_fingerprint_changes_with_whatever_changes(change):
    assert fingerprint(change(large_table())) != fingerprint(large_table())


def test_digest_of_mlflow_misses_what_the_fingerprint_sees():
    # given a change beyond the 10,000th row, and one in a text column with gaps
    for change in ("number beyond the 10,000th row", "text column with gaps"):
        datasets = [mlflow.data.from_pandas(rows) for rows in (large_table(), CHANGES[change](large_table()))]
        # then MLflow's digest is the same; on the day that this fails, the fingerprint may go
        assert datasets[0].digest == datasets[1].digest


def test_fingerprint_stays_over_index_and_spelling_of_gaps():
    rows = large_table()
    spelled = rows.assign(text=rows["text"].where(rows["text"].notna(), np.nan)).set_index(rows.index + 7)
    assert fingerprint(spelled) == fingerprint(rows)


def test_fingerprint_survives_a_csv_file(tmp_path):
    rows = large_table()
    rows.to_csv(tmp_path / "rows.csv", index=False)
    assert fingerprint(read_table(tmp_path / "rows.csv")) == fingerprint(rows)
