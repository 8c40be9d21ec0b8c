"""The application of a served model: a right answer or a clear refusal, whatever is asked."""

import contextlib
import json
import re
import sys
import threading
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from asking import (
    FEATURES,
    NAMES,
    PETAL,
    SPECIES,
    THREE,
    answer_on,
    answered,
    as_verified,
    ask,
    connected,
    in_json,
    inferred,
    message,
    predictor_of,
    split,
)
from execution import ROOT, free_port
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.models import infer_signature
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.svm import SVC
from versions import iris_rows, save

from mlflow_lifecycle.server.app import split_address
from mlflow_lifecycle.serving import serve_verified

BODY = split(THREE).encode()


PINS = str(ROOT / "model_requirements.txt")
INSTALL = "make site"
FAILED = "the model failed, or its answer cannot be recorded"
NO_PROBABILITIES = "the model has no predict_proba for the classes of one target: ask without probabilities=true"


@pytest.fixture(scope="module")
def model(iris):
    """Give the served model, loaded here."""
    return mlflow.sklearn.load_model(str(iris))


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


def test_extra_and_reordered_columns_change_no_answer(server):
    status, text = ask(server.address, split(THREE[NAMES[::-1]].assign(colour="blue")))
    assert (status, json.loads(text)["predictions"]) == (200, SPECIES)


def test_probabilities_come_on_request_in_the_order_of_the_classes(server, model):
    status, text = ask(server.address, split(FEATURES), path="/invocations?probabilities=true")
    answer = json.loads(text)
    assert (status, answer["classes"]) == (200, SPECIES)
    np.testing.assert_allclose(answer["probabilities"], model.predict_proba(FEATURES), rtol=1e-12)
    assert answer["predictions"] == model.predict(FEATURES).tolist()
    assert "probabilities" not in ask(server.address, split(FEATURES))[1]


CLASSES = [0, 1, 1] * 2
WITHOUT_PROBABILITIES = {
    "no probabilities": (SVC(kernel="linear"), CLASSES),
    "no classes": (GaussianMixture(2), CLASSES),
    "two targets": (MultiOutputClassifier(LogisticRegression()), [[0, 0], [1, 1], [1, 2]] * 2),
}


@pytest.mark.parametrize(("model", "target"), WITHOUT_PROBABILITIES.values(), ids=WITHOUT_PROBABILITIES)
def test_model_without_probabilities_for_the_classes_of_one_target_says_so(tmp_path, model, target):
    rows = THREE.iloc[[0, 1, 2] * 2]
    options = {"signature": infer_signature(rows), "pip_requirements": PINS}
    mlflow.sklearn.save_model(model.fit(rows, target), tmp_path / "model", **options)
    predictor, payload = predictor_of(tmp_path / "model"), {"inputs": rows.to_dict("list")}
    status, answer = answered(predictor, payload, probabilities=True)
    assert (status, answer["message"]) == (400, NO_PROBABILITIES)
    assert answered(predictor, payload)[0] == 200


def test_ping_version_and_metrics_have_their_addresses(server):
    assert ask(server.address, path="/ping")[0] == 200
    assert ask(server.address, path="/metrics")[0] == 200
    status, text = ask(server.address, path="/version")
    assert (status, json.loads(text)) == (200, {"name": "flowers", "version": "7", "key_fingerprint": "ab" * 32})


# --- Bad requests


def with_value(value) -> str:
    """Return three flowers with a value in place of the second one's petal length."""
    rows = THREE.astype(object)
    rows.iloc[1, 2] = value
    return split(rows)


CELL = f"column '{PETAL}', row 2 of 3: "
ROWS_FIT = "each row has a value for each column"
BAD = {
    "text": (with_value("wide"), CELL),
    "-999": (with_value(-999.0), CELL),
    "a form twice": (f"{split(THREE)[:-1]}, {split(THREE)[1:]}", "dataframe_split"),
    "two forms": (json.dumps({"inputs": THREE.to_dict("list"), "instances": THREE.to_dict("list")}), "inputs"),
    "an empty object": ("{}", "inputs"),
    "an array": ("[1]", "inputs"),
    "0 rows": (split(THREE.head(0)), "row"),
    "a short row": (split(THREE).replace(", 0.2]", "]", 1), ROWS_FIT),
    "a long row": (split(THREE).replace(", 0.2]", ", 0.2, 0.2]", 1), ROWS_FIT),
    "rows without names": (json.dumps({"inputs": THREE.to_numpy().tolist()}), "name"),
    "split without data": (json.dumps({"dataframe_split": {"columns": NAMES}}), "data"),
    "names that are no texts": (
        json.dumps({"dataframe_split": {"columns": [[]] * 4, "data": [[1.0] * 4]}}),
        "'[]' is repeated",
    ),
    "columns of two lengths": (
        json.dumps({"inputs": THREE.to_dict("list") | {PETAL: [1.0]}}),
        "as many values in each column",
    ),
    "malformed JSON": (split(THREE)[:-3], "JSON"),
    "other bytes": (b"\xff\xfe\x00{}", "UTF-8"),
    "a byte order mark": (split(THREE).encode("utf-8-sig"), "JSON"),
    "deep nesting": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_refused_and_told_why(server, case):
    body, told = BAD[case]
    status, text = ask(server.address, body)
    assert status == 400
    said = json.loads(text)["message"]
    assert told in said
    assert "\n" not in said
    assert "Traceback" not in text


@pytest.mark.parametrize(("kind", "status"), [(None, 415), ("text/csv", 415), ("Application/JSON; charset=UTF-8", 200)])
def test_content_type_must_be_json(server, kind, status):
    assert ask(server.address, split(THREE), kind)[0] == status


def test_another_method_is_refused_in_json(server):
    status, text = ask(server.address, path="/invocations")
    assert status == 405
    assert json.loads(text)["message"]


def test_refusal_leaves_the_connection_usable(server):
    with connected(server.address) as connection:
        for body, expected in (("{}", 400), ("x" * 1_000_001, 413), (split(THREE), 200)):
            connection.sendall(message(body))
            assert answer_on(connection)[0] == expected


@pytest.mark.parametrize(
    ("flavor", "name"), [("xgboost", "XGBRegressor"), ("xgboost", "XGBClassifier"), ("lightgbm", "LGBMClassifier")]
)
@pytest.mark.extended  # it takes long
def test_model_of_another_flavor_answers_as_before_it_was_saved(tmp_path, flavor, name):
    # given a model that its library has trained, and MLflow has saved
    library = pytest.importorskip(flavor, reason=f"{flavor} is not installed. Install it: {INSTALL}")
    rows, target = load_breast_cancer(return_X_y=True, as_frame=True)
    model = getattr(library, name)(n_estimators=3, n_jobs=1).fit(rows, target)
    signature = infer_signature(rows, model.predict(rows))
    getattr(mlflow, flavor).save_model(model, tmp_path / "model", signature=signature, pip_requirements=PINS)
    # when it is loaded and asked
    predictor, payload = predictor_of(tmp_path / "model"), {"inputs": rows.to_dict("list")}
    status, answer = answered(predictor, payload)
    # then it answers as before, with probabilities where there are some
    assert (status, answer["predictions"]) == (200, model.predict(rows).tolist())
    if name.endswith("Classifier"):
        answer = answered(predictor, payload, probabilities=True)[1]
        assert answer["classes"] == [0, 1]
        np.testing.assert_allclose(answer["probabilities"], model.predict_proba(rows), rtol=1e-6)


@pytest.mark.extended  # it takes long
def test_ping_is_answered_while_the_model_predicts(tmp_path):
    """Attack 35."""
    # given a model that needs seconds for a large request
    folder = save(tmp_path / "model", KNeighborsClassifier(algorithm="brute"), pd.concat([iris_rows()] * 200))
    body = split(pd.concat([FEATURES] * 60))
    pings, answers = [], []
    with serve_verified(as_verified(folder), python=Path(sys.executable)) as server:
        began = time.monotonic()
        asking = threading.Thread(target=lambda: answers.append(ask(server.address, body)[0]))
        asking.start()
        # when it is pinged meanwhile
        while asking.is_alive():
            begin = time.monotonic()
            assert ask(server.address, path="/ping")[0] == 200
            pings.append(time.monotonic() - begin)
            time.sleep(0.01)
        needed = time.monotonic() - began
    # then nearly every ping is answered in a small part of the time
    assert answers == [200]
    assert len(pings) > 10
    assert np.quantile(pings, 0.95) < needed / 10


@pytest.mark.extended  # it takes long
def test_metrics_count_answers_rows_and_time_at_their_own_address(iris):
    address = f"127.0.0.1:{free_port()}"
    with serve_verified(as_verified(iris), python=Path(sys.executable), metrics_address=address) as server:
        # given a server that has answered, and refused
        for body, kind in ((split(THREE), "application/json"), ("{}", "application/json"), ("", "text/csv")):
            ask(server.address, body, kind)
        ask(server.address, split(FEATURES))
        ask(server.address, path="/ping")
        # when its metrics are asked for
        assert ask(server.address, path="/metrics")[0] == 404
        text = ask(f"http://{address}", path="/metrics")[1]
    # then each answer to a request for predictions is counted once, and each predicted row
    kinds = re.findall(r"(?m)^# TYPE (\w+ \w+)$", text)
    assert kinds == ["model_requests_total counter", "model_rows_total counter", "model_request_seconds histogram"]
    samples = dict(re.findall(r'(?m)^([a-z_]+(?:\{[a-z]+="[^"]*"\})?) ([\d.e-]+)$', text))
    assert len(text.splitlines()) == len(samples) + 2 * len(kinds)
    requests = {name[-5:-2]: count for name, count in samples.items() if name.startswith("model_requests")}
    assert requests == {"200": "2", "400": "1", "415": "1"}
    assert samples["model_rows_total"] == "153"
    buckets = [int(count) for name, count in samples.items() if name.startswith("model_request_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == int(samples["model_request_seconds_count"]) == 4
    assert float(samples["model_request_seconds_sum"]) > 0


def test_model_of_numbers_and_categories_answers_as_in_process_and_refuses_an_unknown_category(tmp_path):
    # given a model of numbers with gaps and of categories
    rows = pd.DataFrame(
        {
            "age": pd.array([20, 30, None, 50] * 5, dtype="Int64"),
            "dose": [0.5, np.nan, 1.5, 2.5] * 5,
            "group": ["a", "b", "a", "b"] * 5,
            "kind": ["yes", "no", "no", "yes"] * 5,
        }
    )
    features = rows.drop(columns="kind")
    encode = make_column_transformer((SimpleImputer(), ["age", "dose"]), (OneHotEncoder(), ["group"]))
    options = {"skops_trusted_types": ["numpy.dtype"], "signature": inferred(features, rows["kind"])}
    folder = save(tmp_path / "m", make_pipeline(encode, LogisticRegression()), rows, "kind", **options)
    # when, then
    predictor, payload = predictor_of(folder), {"inputs": in_json(features)}
    status, answer = answered(predictor, payload, probabilities=True)
    assert status == 200
    expected = mlflow.sklearn.load_model(str(folder)).predict_proba(features)
    np.testing.assert_allclose(answer["probabilities"], expected, rtol=1e-12)
    # and rows that fit the signature, but that the model cannot take, are refused
    payload["inputs"]["group"][0] = "unheard of"
    status, answer = answered(predictor, payload)
    assert (status, "unknown categories" in answer["message"]) == (422, True)


@pytest.mark.extended  # it takes long
def test_model_that_prints_is_answered(tmp_path):
    # given a model that prints to the standard output with each answer
    model = RandomForestClassifier(50, verbose=100, random_state=0)
    folder = save(tmp_path / "model", model, skops_trusted_types=["sklearn.tree._tree.Tree"])
    with serve_verified(as_verified(folder), python=Path(sys.executable)) as server:
        # then it is answered when a pipe that nobody reads would long be full
        for _ in range(60):
            assert ask(server.address, split(THREE))[0] == 200


@pytest.mark.extended  # it takes long
def test_model_that_predicts_no_number_is_a_failure_that_is_logged(tmp_path):
    # given a model whose predictions are NaN
    rows = FEATURES.drop(columns=PETAL)
    model = LinearRegression().fit(rows, FEATURES[PETAL])
    model.coef_[:] = np.inf
    options = {"signature": infer_signature(rows), "pip_requirements": PINS}
    mlflow.sklearn.save_model(model, tmp_path / "model", **options)
    with (
        (tmp_path / "log.txt").open("w") as log,
        serve_verified(as_verified(tmp_path / "model"), python=Path(sys.executable), log=log) as server,
    ):
        asked = ask(server.address, split(rows.head(1).assign(**{NAMES[0]: 0})))
    assert asked == (500, f'{{"message": "{FAILED}"}}')
    assert "Traceback" in (tmp_path / "log.txt").read_text()


# --- Many requests

anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)
good = st.floats(0, 100) | st.integers(0, 100)
values = st.one_of(good, good, good, good, anything)
tables = st.one_of(
    st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, good)), min_size=1, max_size=3),
    st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, values), optional={"colour": anything}), max_size=3),
    st.fixed_dictionaries(dict.fromkeys(NAMES, st.lists(values, max_size=3))),
    st.fixed_dictionaries(
        {
            "columns": st.permutations(NAMES) | st.lists(st.sampled_from([*NAMES, "colour"]), max_size=6),
            "data": st.lists(st.lists(values, min_size=4, max_size=4), max_size=3),
        }
    ),
    anything,
)
forms = st.sampled_from(["dataframe_split", "dataframe_records", "inputs", "instances"])
bodies = st.one_of(
    st.builds(lambda form, table: json.dumps({form: table}).encode(), forms, tables),
    anything.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=99),
    st.builds(
        lambda at, byte: BODY[:at] + bytes([byte]) + BODY[at + 1 :], st.integers(0, len(BODY) - 1), st.integers(0, 255)
    ),
)


def right(model, body: bytes) -> list | None:
    """Return the predictions for a body that is well formed, by another way than the server's; None for any other."""
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


@pytest.mark.extended  # it takes long
def test_thousand_bodies_get_a_right_answer_or_a_clear_refusal(server, model):
    asked = dict.fromkeys((200, 400), 0)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(connected(server.address))

        @settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
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


@pytest.mark.parametrize("address", ["9000", "localhost:http"])
def test_metrics_address_without_host_or_port_is_refused(address):
    with pytest.raises(ValueError, match="metrics_address must be HOST:PORT"):
        split_address(address)
