"""The server of one model: a right answer or a clear refusal, whatever is asked, and a record of what was answered."""

import ast
import contextlib
import http.client
import json
import math
import re
import shutil
import signal
import string
import sys
import threading
import time
import warnings
from datetime import UTC, datetime, timedelta
from importlib.metadata import packages_distributions
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
from asking import answer_on, as_verified, ask, connected, message, split
from execution import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.models import infer_signature
from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC
from versions import iris_rows, save

from mlflow_lifecycle.guard import Columns, Guard, Record, RefusedError, Settings
from mlflow_lifecycle.pins import read_pins
from mlflow_lifecycle.serving import read_record, serve_verified

FEATURES = iris_rows().drop(columns="species")
NAMES = [*FEATURES]
PETAL = "petal length (cm)"
THREE = iris_rows().groupby("species").head(1)[NAMES]
SPECIES = ["setosa", "versicolor", "virginica"]
LIMITS = dict.fromkeys(NAMES, (0.0, 100.0))
MINUTE = 60


@pytest.fixture(scope="module")
def iris(tmp_path_factory):
    """Give the folder of a linear model of Iris."""
    return save(tmp_path_factory.mktemp("iris") / "model", make_pipeline(StandardScaler(), LogisticRegression()))


@pytest.fixture(scope="module")
def model(iris):
    """Give the same model, loaded here."""
    return mlflow.sklearn.load_model(str(iris))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return tmp_path_factory.mktemp("record")


@pytest.fixture(scope="module")
def server(iris, record):
    """Serve it, with limits and a record."""
    options = {"limits": LIMITS, "record": record, "leave_out": ["sepal width (cm)"], "patience_seconds": 60}
    with serve_verified(as_verified(iris), python=Path(sys.executable), **options) as server:
        yield server


@pytest.fixture(scope="module")
def hasty(iris):
    """Serve it so that a client must be quick."""
    with serve_verified(as_verified(iris), python=Path(sys.executable), patience_seconds=1) as server:
        yield server


def own_guard(folder: Path, **options) -> Guard:
    """Return the guard of a saved model, in this process."""
    return Guard(Settings(str(folder), "flowers", "7", "ab", **options))


def answered(guard: Guard, payload: object, probabilities: bool = False) -> tuple[int, dict]:
    status, text = guard.answer(json.dumps(payload).encode(), probabilities)
    return status, json.loads(text)


# --- Right answers


@pytest.mark.parametrize("form", ["dataframe_split", "dataframe_records", "inputs", "instances"])
def test_predictions_are_those_in_process(server, model, form):
    # given all flowers in one of MLflow's forms
    rows = {
        "dataframe_split": FEATURES.to_dict("split"),
        "dataframe_records": FEATURES.to_dict("records"),
        "inputs": FEATURES.to_dict("list"),
        "instances": FEATURES.to_dict("records"),
    }
    # when
    status, text = ask(server.address, json.dumps({form: rows[form]}))
    # then
    assert status == 200
    assert json.loads(text)["predictions"] == model.predict(FEATURES).tolist()


@pytest.mark.parametrize("rows", [THREE.assign(colour="blue"), THREE[NAMES[::-1]], THREE.astype(object)])
def test_extra_and_reordered_columns_change_no_answer(server, rows):
    status, text = ask(server.address, split(rows))
    assert (status, json.loads(text)["predictions"]) == (200, SPECIES)


def test_probabilities_come_on_request_in_the_order_of_the_classes(server, model):
    status, text = ask(server.address, split(FEATURES), path="/invocations?probabilities=true")
    answer = json.loads(text)
    assert (status, answer["classes"]) == (200, SPECIES)
    np.testing.assert_allclose(answer["probabilities"], model.predict_proba(FEATURES), rtol=1e-12)
    assert answer["predictions"] == model.predict(FEATURES).tolist()
    assert "probabilities" not in ask(server.address, split(FEATURES))[1]


def test_model_without_probabilities_says_so(tmp_path):
    guard = own_guard(save(tmp_path / "model", SVC(kernel="linear")))
    status, answer = answered(guard, {"inputs": THREE.to_dict("list")}, probabilities=True)
    assert (status, answer["message"]) == (400, "this model gives no probabilities of the classes of one target")
    assert answered(guard, {"inputs": THREE.to_dict("list")})[0] == 200


def test_ping_and_version(server):
    assert ask(server.address, path="/ping")[0] == 200
    status, text = ask(server.address, path="/version")
    assert (status, json.loads(text)) == (200, {"name": "flowers", "version": "7", "key_fingerprint": "ab" * 32})


def test_connection_serves_many_requests(server):
    with connected(server.address) as connection:
        for _ in range(5):
            connection.sendall(message(split(THREE)))
            status, text = answer_on(connection)
            assert (status, json.loads(text)["predictions"]) == (200, SPECIES)


# --- Bad requests


def with_value(value) -> str:
    """Return three flowers with a value in place of the second one's petal length."""
    rows = THREE.astype(object)
    rows.iloc[1, 2] = value
    return split(rows)


CELL = f"column '{PETAL}', row 2 of 3: "
BAD = {
    "text": (with_value("wide"), 400, CELL),
    "true": (with_value(True), 400, CELL),
    "a list": (with_value([5.6]), 400, CELL),
    "null": (with_value(None), 400, CELL),
    "NaN": (with_value(math.nan), 400, CELL),
    "infinity": (with_value(math.inf), 400, CELL),
    "-999": (with_value(-999.0), 400, CELL),
    "1000": (with_value(1000), 400, CELL),
    "an overflow": (with_value("x").replace('"x"', "1e999"), 400, CELL),
    "a huge whole number": (with_value("x").replace('"x"', "1" + "0" * 5000), 400, CELL),
    "a number as text": (with_value("5.6"), 400, CELL),
    "a missing column": (split(THREE[NAMES[:2] + NAMES[3:]]), 400, f"column '{PETAL}'"),
    "a column missing in a row": (
        json.dumps({"inputs": [*THREE.to_dict("records"), {"sepal length (cm)": 1.0}]}),
        400,
        "column 'sepal width (cm)', row 4 of 4",
    ),
    "a column twice": (
        json.dumps({"dataframe_split": {"columns": [*NAMES, NAMES[0]], "data": [[5.1] * 5] * 3}}),
        400,
        "column 'sepal length (cm)'",
    ),
    "a key twice": (
        f'{{"inputs": [{json.dumps(THREE.to_dict("records")[0])[:-1]}, "{PETAL}": 9}}]}}',
        400,
        f"'{PETAL}'",
    ),
    "a form twice": (f"{split(THREE)[:-1]}, {split(THREE)[1:]}", 400, "dataframe_split"),
    "two forms": (json.dumps({"inputs": THREE.to_dict("list"), "instances": THREE.to_dict("list")}), 400, "inputs"),
    "parameters": (json.dumps({"inputs": THREE.to_dict("list"), "params": {"a": 1}}), 400, "inputs"),
    "an empty body": ("", 400, "JSON"),
    "an empty object": ("{}", 400, "inputs"),
    "0 rows": (split(THREE.head(0)), 400, "row"),
    "0 records": ('{"inputs": []}', 400, "row"),
    "no columns": ('{"inputs": {}}', 400, "row"),
    "a short row": (split(THREE).replace(", 0.2]", "]", 1), 400, "row 1 of 3"),
    "a long row": (split(THREE).replace(", 0.2]", ", 0.2, 0.2]", 1), 400, "row 1 of 3"),
    "rows without names": (json.dumps({"inputs": THREE.to_numpy().tolist()}), 400, "name"),
    "rows of another form": ('{"dataframe_records": "rows"}', 400, "dataframe_records"),
    "records of another form": (json.dumps({"dataframe_records": THREE.to_dict("list")}), 400, "dataframe_records"),
    "split of another form": (json.dumps({"dataframe_split": THREE.to_dict("records")}), 400, "dataframe_split"),
    "split without data": (json.dumps({"dataframe_split": {"columns": NAMES}}), 400, "data"),
    "names that are no texts": (
        json.dumps({"dataframe_split": {"columns": [[]] * 4, "data": [[1.0] * 4]}}),
        400,
        "name",
    ),
    "columns of two lengths": (
        json.dumps({"inputs": THREE.to_dict("list") | {PETAL: [1.0]}}),
        400,
        f"column '{PETAL}'",
    ),
    "a value for a column": (json.dumps({"inputs": THREE.to_dict("list") | {PETAL: 1.0}}), 400, f"column '{PETAL}'"),
    "a number": ("3", 400, "inputs"),
    "an array": ("[]", 400, "inputs"),
    "malformed JSON": (split(THREE)[:-3], 400, "JSON"),
    "more after it": (f"{split(THREE)} {{}}", 400, "JSON"),
    "other bytes": (b"\xff\xfe\x00{}", 400, "UTF-8"),
    "UTF-16": (split(THREE).encode("utf-16"), 400, "UTF-8"),
    "a byte order mark": (split(THREE).encode("utf-8-sig"), 400, "JSON"),
    "900 deep": ('{"inputs":' + "[" * 900 + "]" * 900 + "}", 400, "name"),
    "deep nesting": ("[" * 100_000 + "]" * 100_000, 400, "nested"),
    "8 MB": (split(THREE.assign(colour="x" * 2_700_000)), 413, "1000000 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_refused_and_told_why(server, case):
    body, expected, told = BAD[case]
    status, text = ask(server.address, body)
    assert status == expected
    said = json.loads(text)["message"]
    assert told in said
    assert "\n" not in said
    assert "Traceback" not in text


@pytest.mark.parametrize("form", ["dataframe_split", "inputs"])
def test_very_many_names_are_refused_at_once(iris, form):
    # given 50,000 names, the last of them twice
    names = [f"c{number}" for number in range(50_000)] + ["c49999"]
    object_of = "{" + ",".join(f'"{name}":[0]' for name in names) + "}"
    table = object_of if form == "inputs" else json.dumps({"columns": names, "data": []})
    # when they are asked, during which nobody else is answered
    began = time.monotonic()
    status, text = own_guard(iris).answer(f'{{"{form}": {table}}}'.encode(), False)
    # then
    assert (status, "'c49999'" in json.loads(text)["message"]) == (400, True)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", [None, "text/plain", "text/csv", "application/json; charset=latin-1"])
def test_another_content_type_is_refused(server, kind):
    assert ask(server.address, split(THREE), kind)[0] == 415


def test_content_type_may_name_its_encoding(server):
    assert ask(server.address, split(THREE), "Application/JSON; charset=UTF-8")[0] == 200


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/", "GET", 404),
        ("/openapi.json", "GET", 404),
        ("/invocations/", "POST", 404),
        ("/invocations", "GET", 405),
        ("/ping", "POST", 405),
        ("/invocations?probability=true", "POST", 400),
        ("/invocations?probabilities=1", "POST", 400),
    ],
)
def test_another_path_method_or_parameter_is_refused(server, path, method, status):
    answer = ask(server.address, split(THREE), path=path, method=method)
    assert answer[0] == status
    assert json.loads(answer[1])["message"]


def test_refusal_leaves_the_connection_usable(server):
    with connected(server.address) as connection:
        for body, expected in (("{}", 400), ("x" * 1_000_001, 413), (split(THREE), 200)):
            connection.sendall(message(body))
            assert answer_on(connection)[0] == expected


def chunked(size: int):
    """Return a body that is right, in chunks, with white space up to a size."""
    whole = split(THREE).encode().ljust(size)
    return iter([whole[start : start + 65_536] for start in range(0, size, 65_536)])


def test_chunked_body_is_taken_up_to_the_limit_and_refused_beyond(server):
    status, text = ask(server.address, chunked(1_000_000))
    assert (status, json.loads(text)["predictions"]) == (200, SPECIES)
    assert ask(server.address, chunked(1_000_001))[0] == 413


def test_chunked_body_without_end_is_refused(server):
    with connected(server.address) as connection:
        connection.sendall(message("", "Transfer-Encoding: chunked"))
        for _ in range(20):
            connection.sendall(b"10000\r\n" + b" " * 65_536 + b"\r\n")
        assert answer_on(connection)[0] == 413


@pytest.mark.parametrize(
    "line", ["Content-Length: -1", "Content-Length: 1, 2", "Content-Length: x", " bad: line", "no"]
)
def test_head_that_is_no_http_is_refused(server, line):
    with connected(server.address) as connection:
        connection.sendall(message(split(THREE), line))
        assert answer_on(connection)[0] == 400


# --- Slow and half-open clients


def closed_after(connection, sent: bytes) -> tuple[int, str]:
    """Send some bytes and nothing more; return the answer, and see that the connection is closed then."""
    connection.sendall(sent)
    answer = answer_on(connection)
    with contextlib.suppress(ConnectionError):
        assert connection.recv(1) == b""
    return answer


BODY = split(THREE).encode()
WHOLE = message(BODY)


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"", 0), (b"POST /invo", 408), (WHOLE[:-9], 408), (message("{}", "Content-Length: 9999"), 408)],
    ids=["nothing", "half a head", "half a body", "less than its length"],
)
def test_client_that_stops_in_between_is_refused(hasty, sent, status):
    with connected(hasty.address) as connection:
        assert closed_after(connection, sent)[0] == status


@pytest.mark.parametrize("part", ["head", "body"])
def test_client_that_trickles_is_refused_while_others_are_answered(hasty, part):
    # given a client that sends a byte now and then, for longer than the server waits
    start = 5 if part == "head" else len(WHOLE) - 200
    with connected(hasty.address) as connection:
        connection.sendall(WHOLE[:start])
        for number in range(start, start + 100):
            # when another one asks meanwhile, then it is answered
            assert ask(hasty.address, split(THREE))[0] == 200
            try:
                connection.sendall(WHOLE[number : number + 1])
            except ConnectionError:
                break
            time.sleep(0.05)
        # then the slow one is refused before it has sent all
        with contextlib.suppress(ConnectionError):
            assert answer_on(connection)[0] in (408, 0)


def test_client_that_reads_no_answer_is_cut_off(hasty):
    # given a client that asks for many answers and takes none
    body = message(split(pd.concat([FEATURES] * 100)))
    with connected(hasty.address) as connection:
        connection.settimeout(5)
        deadline = time.monotonic() + MINUTE
        # when the server has waited, then it closes the connection, although there is something to send
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    connection.sendall(body)
    assert psutil.Process(hasty.process.pid).net_connections("tcp")[0].status == psutil.CONN_LISTEN


@pytest.mark.parametrize("requests", [1, 2, 3])
def test_client_that_closes_its_direction_gets_its_answers(server, requests):
    with connected(server.address) as connection:
        connection.sendall(WHOLE * requests)
        connection.shutdown(1)
        received = b""
        while part := connection.recv(65_536):
            received += part
    assert received.count(b"HTTP/1.1 200") == received.count(b'["setosa", "versicolor", "virginica"]') == requests


@pytest.mark.parametrize("sent", [WHOLE[:20], WHOLE[:-9]], ids=["half a head", "half a body"])
def test_client_that_closes_its_direction_too_early_is_told(server, sent):
    with connected(server.address) as connection:
        connection.sendall(sent)
        connection.shutdown(1)
        assert answer_on(connection)[0] == 400


def test_clients_that_go_away_do_no_harm(server):
    for sent in (b"", WHOLE[:20], WHOLE[:-9], WHOLE):
        for _ in range(20):
            with connected(server.address) as connection:
                connection.sendall(sent)
    assert ask(server.address, split(THREE))[0] == 200


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


def inferred(rows, *more):
    """Return the signature that MLflow infers; its advice on whole numbers is no error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return infer_signature(rows, *more)


def in_json(rows: pd.DataFrame) -> dict[str, list]:
    """Return the columns of ``rows`` as JSON has them."""
    rows = rows.astype({name: str for name in rows if rows[name].dtype.kind == "M"}).astype(object)
    return {name: [None if pd.isna(v) or v == "NaT" else v for v in rows[name]] for name in rows}


@pytest.mark.parametrize("rows", [KINDS, GAPS], ids=["all kinds", "gaps"])
def test_model_gets_the_rows_as_it_learned_them(rows):
    # given a signature that MLflow has inferred
    columns = Columns(inferred(rows), {})
    # when the rows come as JSON, then they are the same table, to the last bit
    frame = columns.frame(columns.checked(json.loads(json.dumps(in_json(rows)))))
    pd.testing.assert_frame_equal(frame, rows, check_exact=True)


def test_optional_column_that_lacks_has_gaps():
    columns = Columns(inferred(GAPS), {})
    frame = columns.frame(columns.checked({"double": [1.5, None]}))
    assert frame.isna().to_numpy().tolist() == [[False] + [True] * 4, [True] * 5]
    assert frame.dtypes.equals(GAPS.dtypes)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *[("double", value) for value in (True, "1", None, [1], {}, math.nan, -math.inf, 10**400)],
        *[("float", value) for value in (3.5e38, -1e300, True)],
        *[("long", value) for value in (1.0, 2**63, -(2**63) - 1, True, "1", None)],
        *[("integer", value) for value in (2**31, -(2**31) - 1, 0.5, False)],
        *[("string", value) for value in (1, True, None, ["a"], "\ud800")],
        *[("boolean", value) for value in (1, 0, "true", None)],
        *[
            ("datetime", value)
            for value in (0, 1e9, "1700000000.5", "tomorrow", "", "2026-01-31T00:00:00Z", None, True)
        ],
        ("datetime", "2026-01-31T00:00:00.123456789"),
        *[("datetime", value) for value in ("2026-02-30", "1500-01-01", "9999-01-01", "2026-01-31T00:00+01:00")],
    ],
)
def test_value_that_is_none_for_its_column_is_refused_by_name(kind, value):
    columns, table = Columns(inferred(KINDS), {}), in_json(KINDS)
    table[kind] = [*table[kind][:2], value, table[kind][3]]
    with pytest.raises(RefusedError, match=rf"column '{kind}', row 3 of 4: \w"):
        columns.checked(table)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("double", 1),
        ("double", -0.0),
        ("double", 5e-324),
        ("float", 1),
        ("long", -(2**63)),
        ("string", ""),
        ("string", "ä☃"),
    ],
)
def test_odd_value_that_fits_is_taken(kind, value):
    columns, table = Columns(inferred(KINDS), {}), in_json(KINDS)
    table[kind] = [value] * 4
    assert columns.frame(columns.checked(table))[kind].tolist() == [value] * 4


def test_limits_hold_for_their_columns_and_include_their_ends():
    columns = Columns(inferred(KINDS), {"double": (0.0, 10.0), "long": (0.5, 2**60)})
    for name, value in {"double": 10.0, "long": 2**60, "float": 11.0}.items():
        columns.checked(in_json(KINDS) | {name: [value] * 4})
    for name, value in {"double": 10.1, "long": 0}.items():
        with pytest.raises(RefusedError, match=f"column '{name}', row 1 of 4: .*than or equal to"):
            columns.checked(in_json(KINDS) | {name: [value] * 4})


@pytest.mark.parametrize(
    ("rows", "limits", "told"),
    [
        (None, {}, "no signature of named columns"),
        (np.array([[1.0]]), {}, "no signature of named columns"),
        (pd.DataFrame({1: [1.0]}), {}, "no signature of named columns"),
        (pd.DataFrame({"a": [[1.0]]}), {}, "no signature of named columns"),
        (KINDS, {"double": (0, math.nan)}, "limits .* double"),
        (KINDS, {"long": (1, 0)}, "limits .* long"),
        (KINDS, {"string": (0, 1)}, "limits .* string"),
        (KINDS, {"colour": (0, 1)}, "limits .* colour"),
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
    assert columns.frame(columns.checked({"x": [0.1, 0.7]})).equals(rows)
    with pytest.raises(RefusedError, match=r"row 2 of 2: .*less than or equal to"):
        columns.checked({"x": [0.1, 0.70001]})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Give the folder of a model of numbers with gaps and of categories, and the rows it learned from."""
    rows = pd.DataFrame(
        {
            "age": pd.array([20, 30, None, 50] * 5, dtype="Int64"),
            "dose": [0.5, np.nan, 1.5, 2.5] * 5,
            "group": ["a", "b", "a", "b"] * 5,
            "kind": ["yes", "no", "no", "yes"] * 5,
        }
    )
    encode = make_column_transformer((SimpleImputer(), ["age", "dose"]), (OneHotEncoder(), ["group"]))
    options = {"skops_trusted_types": ["numpy.dtype"], "signature": inferred(rows.drop(columns="kind"), rows["kind"])}
    return save(
        tmp_path_factory.mktemp("mixed") / "m", make_pipeline(encode, LogisticRegression()), rows, "kind", **options
    ), rows


def test_model_of_numbers_and_categories_answers_as_in_process(mixed):
    folder, rows = mixed
    features = rows.drop(columns="kind")
    status, answer = answered(own_guard(folder), {"inputs": in_json(features)}, probabilities=True)
    assert status == 200
    expected = mlflow.sklearn.load_model(str(folder)).predict_proba(features)
    np.testing.assert_allclose(answer["probabilities"], expected, rtol=1e-12)


def test_rows_that_fit_but_that_the_model_cannot_take_are_refused(mixed, capsys):
    row = {"age": 20, "dose": 0.5, "group": "unheard of"}
    status, answer = answered(own_guard(mixed[0]), {"inputs": [row]})
    assert status == 422
    assert "unknown categories" in answer["message"]
    assert "Traceback" in capsys.readouterr().err


def test_refusal_that_quotes_a_column_that_is_left_out_is_not_recorded_with_it(mixed, tmp_path):
    # given a record without a column
    guard = own_guard(mixed[0], record=str(tmp_path), leave_out=("group",))
    # when the model cannot take a value of it, and says which
    status, answer = answered(guard, {"inputs": [{"age": 20, "dose": 0.5, "group": "my secret"}]})
    # then only the client is told
    assert (status, "my secret" in answer["message"]) == (422, True)
    (entry,) = entries(tmp_path)
    assert (entry["status"], entry["message"]) == (422, "the model cannot take these rows")
    guard.record.file.close()


def test_log_does_not_grow_without_end(mixed, capsys):
    guard = own_guard(mixed[0])
    for _ in range(1100):
        assert answered(guard, {"inputs": [{"age": 20, "dose": 0.5, "group": "unheard of"}]})[0] == 422
    assert capsys.readouterr().err.count("Traceback") == 1000


@pytest.mark.parametrize(
    "model", [GaussianMixture(2), MultiOutputClassifier(LogisticRegression())], ids=["no classes", "two targets"]
)
def test_probabilities_that_belong_to_no_classes_of_one_target_are_refused(tmp_path, model):
    rows = THREE.iloc[[0, 1, 2] * 2].reset_index(drop=True)
    model.fit(rows, np.array([[0, 0], [1, 1], [1, 2]] * 2))
    options = {"signature": infer_signature(rows), "pip_requirements": str(ROOT / "model_requirements.txt")}
    mlflow.sklearn.save_model(model, tmp_path / "model", **options)
    status, answer = answered(own_guard(tmp_path / "model"), {"inputs": rows.to_dict("list")}, probabilities=True)
    assert (status, answer["message"]) == (400, "this model gives no probabilities of the classes of one target")


def test_model_that_prints_is_answered(tmp_path):
    # given a model that prints to the standard output with each answer
    model = RandomForestClassifier(50, verbose=100, random_state=0)
    folder = save(tmp_path / "model", model, skops_trusted_types=["sklearn.tree._tree.Tree"])
    with serve_verified(as_verified(folder), python=Path(sys.executable)) as server:
        # then it is answered when a pipe that nobody reads would long be full
        for _ in range(60):
            assert ask(server.address, split(THREE))[0] == 200


def test_model_that_fails_otherwise_is_answered_with_one_line(iris, capsys):
    guard = own_guard(iris)
    guard.model.predict = lambda rows: rows.secret
    status, answer = answered(guard, {"inputs": THREE.to_dict("list")})
    assert (status, answer) == (500, {"message": "the model failed"})
    assert "secret" in capsys.readouterr().err


# --- The record


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


def test_answer_is_in_the_record_under_its_id_without_what_is_left_out(server, record):
    answer = json.loads(ask(server.address, split(THREE), path="/invocations?probabilities=true")[1])
    (entry,) = [entry for entry in entries(record) if entry["id"] == answer["id"]]
    assert entry["inputs"] == THREE.drop(columns="sepal width (cm)").to_dict("list")
    assert {name: entry[name] for name in answer} == answer
    assert (entry["name"], entry["version"], entry["status"]) == ("flowers", "7", 200)


def test_refusal_is_in_the_record_without_its_body(server, record):
    answer = json.loads(ask(server.address, split(THREE.assign(**{PETAL: "my secret"})))[1])
    (entry,) = [entry for entry in entries(record) if entry["id"] == answer["id"]]
    assert (entry["status"], entry["message"]) == (400, answer["message"])
    assert "my secret" not in json.dumps(entry)


def test_record_is_for_its_owner_alone(server, record):
    ask(server.address, split(THREE))
    assert {path.stat().st_mode & 0o077 for path in record.glob("*.jsonl")} == {0}


def test_killed_server_has_recorded_all_that_it_answered(iris, tmp_path):
    # given clients that ask without pause
    seen, record = set(), tmp_path / "record"
    with serve_verified(as_verified(iris), python=Path(sys.executable), record=record) as server:

        def client():
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                while True:  # until it is killed
                    seen.add(json.loads(ask(server.address, split(THREE))[1])["id"])

        threads = [threading.Thread(target=client) for _ in range(4)]
        for thread in threads:
            thread.start()
        while len(seen) < 100:
            time.sleep(0.01)
        # when it is killed
        server.process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        for thread in threads:
            thread.join()
    # then each answer that arrived is in the record, whole
    kept = read_record(record)
    assert seen <= set(kept["request_id"])
    assert kept["prediction"].tolist() == SPECIES * (len(kept) // 3)


def test_nothing_is_answered_that_cannot_be_recorded(iris, tmp_path):
    resource = pytest.importorskip("resource", reason="Windows has no limits for a process")
    # given a guard that has answered, and a disk on which only a few more bytes fit
    guard = own_guard(iris, record=str(tmp_path))
    assert answered(guard, {"inputs": THREE.to_dict("list")})[0] == 200
    (file,) = tmp_path.iterdir()
    before, (_, hard) = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    # when it is asked again
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        status, answer = answered(guard, {"inputs": THREE.to_dict("list")})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    # then it says so, and half a line is not left
    assert (status, "recorded" in answer["message"]) == (503, True)
    assert file.read_bytes() == before
    assert answered(guard, {"inputs": THREE.to_dict("list")})[0] == 200
    assert len(entries(tmp_path)) == 2
    guard.record.file.close()


def test_full_disk_that_cannot_take_the_log_either_is_said(iris, tmp_path, monkeypatch):
    guard = own_guard(iris, record=str(tmp_path))
    monkeypatch.setattr(guard.record, "keep", lambda entry: (_ for _ in ()).throw(OSError("the disk is full")))
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        status, answer = answered(guard, {"inputs": THREE.to_dict("list")})
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert (status, "recorded" in answer["message"]) == (503, True)


def test_answers_are_recorded_after_somebody_has_removed_the_file_or_not_given(iris, tmp_path):
    # given a guard whose file was removed
    guard = own_guard(iris, record=str(tmp_path / "record"))
    assert answered(guard, {"inputs": THREE.to_dict("list")})[0] == 200
    next((tmp_path / "record").iterdir()).unlink()
    # then the next answer is in a new one
    assert answered(guard, {"inputs": THREE.to_dict("list")})[0] == 200
    assert len(entries(tmp_path / "record")) == 1
    # and without the folder there is no answer
    shutil.rmtree(tmp_path / "record")
    assert answered(guard, {"inputs": THREE.to_dict("list")})[0] == 503
    guard.record.file.close()


def test_old_file_that_cannot_be_removed_stops_neither_the_server_nor_the_others(tmp_path):
    # given one that cannot be removed, as on Windows one that is open
    (tmp_path / "requests-2020-01-01-aa.jsonl").mkdir()
    (tmp_path / "requests-2020-01-01-bb.jsonl").touch()
    # when
    Record(str(tmp_path), 7).forget()
    # then
    assert [path.name for path in tmp_path.iterdir()] == ["requests-2020-01-01-aa.jsonl"]


def test_record_is_forgotten_after_its_days(tmp_path):
    # given files of some days, and one of somebody else
    days = [datetime.now(UTC).date() - timedelta(days=ago) for ago in (0, 6, 7, 8, 400)]
    for day in days:
        (tmp_path / f"requests-{day}-abc.jsonl").touch()
    (tmp_path / "requests-mine.jsonl").touch()
    # when a record is kept there for a week
    Record(str(tmp_path), 7)
    # then only what is older than that is gone
    left = {f"requests-{day}-abc.jsonl" for day in days[:3]} | {"requests-mine.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_unknown_column_to_leave_out_is_refused(iris):
    with pytest.raises(ValueError, match="no such columns to leave out: colour"):
        own_guard(iris, leave_out=("colour",))


# --- Many requests

numbers = st.one_of(st.floats(), st.integers(), st.floats(0, 100), st.integers(0, 100))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=9)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)
good = st.one_of(st.floats(0, 100), st.integers(0, 100))
values = st.one_of(good, good, good, good, anything)
rows = st.lists(
    st.fixed_dictionaries(dict.fromkeys(NAMES, values), optional={"colour": anything}), min_size=1, max_size=3
)
names = st.lists(st.sampled_from([*NAMES, "colour"]), max_size=6) | st.permutations(NAMES)
tables = st.one_of(
    st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, good)), min_size=1, max_size=3),
    rows,
    st.fixed_dictionaries(dict.fromkeys(NAMES, st.lists(values, max_size=3))),
    names.flatmap(
        lambda names: st.fixed_dictionaries(
            {
                "columns": st.just(names),
                "data": st.lists(st.lists(values, min_size=len(names), max_size=len(names)), max_size=3),
            }
        )
    ),
    anything,
)
forms = st.sampled_from(["dataframe_split", "dataframe_records", "inputs", "instances"])
bodies = st.one_of(
    st.builds(lambda form, table: json.dumps({form: table}).encode(), forms, tables),
    st.builds(lambda form, table: json.dumps({form: table}).encode(), forms, tables),
    anything.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=99),
    st.builds(
        lambda at, byte: BODY[:at] + bytes([byte]) + BODY[at + 1 :], st.integers(0, len(BODY) - 1), st.integers(0, 255)
    ),
)


def right(model, body: bytes) -> list | None:
    """Return the predictions for a body that is well formed, by another way than the guard's; None for any other."""
    try:
        ((form, table),) = json.loads(body).items()
        if form == "dataframe_split":
            frame = pd.DataFrame(table["data"], columns=table["columns"], dtype=object)
        else:
            frame = pd.DataFrame(table, dtype=object)
        frame = frame[NAMES]
        fits = frame.map(lambda value: type(value) in (int, float) and 0 <= value <= 100).to_numpy().all()
        return model.predict(frame.astype(float)).tolist() if fits and len(frame) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


MANY = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def test_thousand_bodies_get_a_right_answer_or_a_clear_refusal(server, model):
    asked = dict.fromkeys((200, 400), 0)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(connected(server.address))

        @settings(max_examples=1000, **MANY)
        @given(bodies)
        def ask_for(body):
            connection.sendall(message(body))
            status, text = answer_on(connection)
            asked[status] += 1
            if status == 200:
                assert json.loads(text)["predictions"] == right(model, body)
            else:
                said = json.loads(text)["message"]
                assert "\n" not in said
                assert "Traceback" not in said

        ask_for()
    assert min(asked.values()) > 50, asked


printable = st.text(string.printable, max_size=30).map(str.encode)
raw = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda at, part: WHOLE[:at] + part + WHOLE[at:], st.integers(0, len(WHOLE)), st.binary(max_size=9)),
    st.builds(lambda at, to: WHOLE[:at] + WHOLE[to:], st.integers(0, len(WHOLE)), st.integers(0, len(WHOLE))),
    st.builds(lambda name, value: message("{}", (name + b": " + value).decode()), printable, printable),
    st.builds(lambda length: message(split(THREE), f"Content-Length: {length}"), st.integers(-9, 2000)),
    st.builds(lambda body: message(body, "Transfer-Encoding: chunked"), st.binary(max_size=50)),
)


def test_thousand_streams_of_bytes_get_an_answer_that_is_no_failure(server, model):
    @settings(max_examples=1000, **MANY)
    @given(raw)
    def send(sent):
        with connected(server.address) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(sent)
                connection.shutdown(1)
            status, text = answer_on(connection)
        assert status in (0, 200) or 400 <= status < 500, text
        assert "Traceback" not in text
        assert status != 0 or not sent.strip()

    send()
    assert ask(server.address, split(THREE))[0] == 200


def crowd(server, clients: int, go_on, pause: float = 0) -> list[tuple[str, int]]:
    """Let clients ask at once for flowers, until ``go_on(number)`` is false; return the ids and which flower it was.

    Each waits ``pause`` seconds before it asks again.
    """
    found, errors = [], []

    def client(number: int):
        try:
            count = 0
            while go_on(count):
                flower = (number + count) % 150
                status, text = ask(server.address, split(FEATURES.iloc[[flower]]))
                answer = json.loads(text)
                assert status == 200, text
                found.append((answer["id"], flower, answer["predictions"][0]))
                count += 1
                time.sleep(pause)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return found


def check_crowd(found: list, record: Path, model) -> None:
    """See that each was answered rightly, and that each answer is in the record, once."""
    answers = pd.DataFrame(found, columns=["request_id", "flower", "answer"])
    assert (answers["answer"] == model.predict(FEATURES)[answers["flower"]]).all()
    kept = read_record(record)
    kept = kept[kept["request_id"].isin(answers["request_id"])]  # without other clients'
    both = answers.merge(kept, on="request_id", validate="one_to_one")
    assert len(both) == len(found)
    assert (both["prediction"] == both["answer"]).all()
    assert (both[PETAL] == FEATURES[PETAL].to_numpy()[both["flower"]]).all()


def test_fifty_clients_at_once_lose_nothing(server, record, model):
    check_crowd(crowd(server, 50, lambda count: count < 10), record, model)


@pytest.mark.extended  # it takes a minute
def test_fifty_clients_for_a_minute_lose_nothing_and_memory_stays_flat(iris, model, tmp_path):
    with serve_verified(as_verified(iris), python=Path(sys.executable), record=tmp_path / "record") as server:
        memory = psutil.Process(server.process.pid).memory_info
        crowd(server, 50, lambda count: count < 20)
        before, end = memory().rss, time.monotonic() + MINUTE
        found = crowd(server, 50, lambda _: time.monotonic() < end, pause=0.5)
        assert memory().rss < before + 10_000_000
    check_crowd(found, tmp_path / "record", model)


# --- What it needs


def test_guard_imports_only_what_is_in_a_models_own_closure():
    # given what the guard imports, and the packages that bring it
    tree = ast.parse((ROOT / "mlflow_lifecycle/guard.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    installed = packages_distributions()
    # then a package for each is among the pins of a model
    pinned = {re.split("[=; ]", pin)[0] for pin in read_pins(ROOT / "model_requirements.txt")}
    assert {name for name in modules if not {*installed.get(name, ())} & pinned} == set()
    assert {"fastapi", "uvicorn", "mlflow"} <= modules
