"""What the signature says of a request: each value is what it must be, or is refused by its name."""

import json
import math
import time

import numpy as np
import pandas as pd
import pytest
from asking import in_json, inferred, predictor_of
from starlette.exceptions import HTTPException

from mlflow_lifecycle.server.schema import Columns


@pytest.mark.parametrize("form", ["dataframe_split", "inputs"])
def test_very_many_names_are_refused_at_once(iris, form):
    # given 50,000 names, the last of them twice
    names = [f"c{number}" for number in range(50_000)] + ["c49999"]
    object_of = "{" + ",".join(f'"{name}":[0]' for name in names) + "}"
    table = object_of if form == "inputs" else json.dumps({"columns": names, "data": [[0] * len(names)]})
    # when they are asked, during which nobody else is answered
    began = time.process_time()
    with pytest.raises(HTTPException, match=r"400: .*'c49999'"):
        predictor_of(iris).answer(f'{{"{form}": {table}}}'.encode(), False)
    # then
    assert time.process_time() - began < 5


# --- What the signature says


KINDS = pd.DataFrame(
    {
        "double": [1.5, 2.5, 3.5, 4.5],
        "float": np.array([1.5, 2.5, 3.5, 4.5], dtype="float32"),
        "long": [1, 2, 3, 2**53 + 1],
        "integer": np.array([1, 2, 3, 4], dtype="int32"),
        "string": ["a", "b", "a", "b"],
        "boolean": [True, False, True, True],
        "datetime": pd.to_datetime(
            ["2026-01-31", "2026-01-31T23:59:59", "1999-12-31T00:00:00.5", "2026-02-01"], format="ISO8601"
        ),
    }
)
GAPS = pd.DataFrame(
    {
        "double": [1.5, np.nan],
        "long": pd.array([2**53 + 1, None], dtype="Int64"),
        "string": np.array(["a", np.nan], dtype=object),
        "boolean": pd.array([True, None], dtype="boolean"),
        "datetime": pd.to_datetime(["2026-01-31", None]),
    }
)


@pytest.mark.parametrize("rows", [KINDS, GAPS], ids=["all kinds", "gaps"])
def test_model_gets_the_rows_as_it_learned_them(rows):
    # given a signature that MLflow has inferred
    columns = Columns(inferred(rows), {})
    # when the rows come as JSON, then they are the same table, to the last bit
    frame = columns.frame(columns.check(json.loads(json.dumps(in_json(rows)))))
    pd.testing.assert_frame_equal(frame, rows, check_exact=True)


def test_missing_optional_column_is_filled_with_null():
    columns = Columns(inferred(GAPS), {})
    frame = columns.frame(columns.check({"double": [1.5, None]}))
    assert frame.isna().to_numpy().tolist() == [[False] + [True] * 4, [True] * 5]
    assert frame.dtypes.equals(GAPS.dtypes)


def test_missing_column_is_named_as_missing_and_not_as_a_wrong_value():
    columns = Columns(inferred(pd.DataFrame({"a": [1.5], "b": [2.5]})), {})
    for table in ([{"a": 1.0}], {"a": [1.0]}):
        with pytest.raises(HTTPException, match=r"column 'b'(, row 1 of 1)?: Field required"):
            columns.check(table)
    with pytest.raises(HTTPException, match="at least one row"):
        columns.check([])


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *[("double", value) for value in ("1", None, math.nan)],
        ("float", 3.5e38),
        *[("long", value) for value in (1.0, 2**63)],
        ("integer", 2**31),
        *[("string", value) for value in (1, "\ud800")],
        ("boolean", 1),
        *[("datetime", value) for value in (0, "tomorrow", "2026-01-31T00:00:00Z")],
    ],
)
def test_value_of_the_wrong_type_is_refused_with_its_column_and_row(kind, value):
    columns, table = Columns(inferred(KINDS), {}), in_json(KINDS)
    table[kind] = [*table[kind][:2], value, table[kind][3]]
    with pytest.raises(HTTPException, match=rf"column '{kind}', row 3 of 4: \w"):
        columns.check(table)


def test_time_beyond_what_pandas_can_hold_is_refused():
    columns = Columns(inferred(KINDS), {})
    table = in_json(KINDS) | {"datetime": ["9999-01-01"] * 4}
    with pytest.raises(ValueError, match="Out of bounds"):
        columns.frame(columns.check(table))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("double", 1),
        ("long", -(2**63)),
        ("string", ""),
        ("datetime", "2026-01-31T00:00:00.123456789"),
    ],
)
def test_odd_value_that_fits_is_taken(kind, value):
    columns, table = Columns(inferred(KINDS), {}), in_json(KINDS)
    table[kind] = [value] * 4
    expected = [pd.Timestamp(value) if kind == "datetime" else value] * 4
    assert columns.frame(columns.check(table))[kind].tolist() == expected


def test_limits_hold_for_their_columns_and_include_their_ends():
    columns = Columns(inferred(KINDS), {"double": (0.0, 10.0), "long": (0.5, 2**60)})
    for name, value in {"double": 10.0, "long": 2**60, "float": 11.0}.items():
        columns.frame(columns.check(in_json(KINDS) | {name: [value] * 4}))
    for name, value in {"double": 10.1, "long": 0}.items():
        with pytest.raises(HTTPException, match=f"column '{name}', row 1 of 4: Input should be from .* to "):
            columns.frame(columns.check(in_json(KINDS) | {name: [value] * 4}))


@pytest.mark.parametrize(
    ("rows", "limits", "told"),
    [
        (None, {}, "no signature of named columns"),
        (pd.DataFrame({1: [1.0]}), {}, "no signature of named columns"),
        (pd.DataFrame({"a": [[1.0]]}), {}, "no signature of named columns"),
        (KINDS, {"double": (0, math.nan)}, "limits must .*double"),
        (KINDS, {"long": (1, 0)}, "limits must .*long"),
        (KINDS, {"colour": (0, 1)}, "limits must .*colour"),
        (KINDS, {"string": (0, 1)}, "limits must .*string"),
    ],
)
def test_signature_or_limits_that_do_not_fit_are_refused_at_once(rows, limits, told):
    with pytest.raises(ValueError, match=told):
        Columns(None if rows is None else inferred(rows), limits)


def test_limits_of_numbers_of_32_bits_include_the_same_numbers_in_decimals():
    # given limits as training_limits has them
    rows = pd.DataFrame({"x": np.array([0.1, 0.7], dtype="float32")})
    columns = Columns(inferred(rows), {"x": (float(rows["x"].min()), float(rows["x"].max()))})
    # then
    assert columns.frame(columns.check({"x": [0.1, 0.7]})).equals(rows)
    with pytest.raises(HTTPException, match=r"row 2 of 2: Input should be from 0\.1"):
        columns.frame(columns.check({"x": [0.1, 0.70001]}))
