"""The application of a served model: a right answer or a clear refusal, whatever is asked."""

import ast
import contextlib
import json
import re
import sys
import threading
import time
import warnings
from importlib.metadata import packages_distributions
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
from sklearn.datasets import load_breast_cancer, load_diabetes
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

from mlflow_lifecycle.exceptions import ServingFailedError
from mlflow_lifecycle.pins import read_pins
from mlflow_lifecycle.serving import read_record, serve_verified

BODY = split(THREE).encode()
WHOLE = message(BODY)


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
    predictor = predictor_of(save(tmp_path / "model", SVC(kernel="linear")))
    status, answer = answered(predictor, {"inputs": THREE.to_dict("list")}, probabilities=True)
    assert (status, answer["message"]) == (400, NO_PROBABILITIES)
    assert answered(predictor, {"inputs": THREE.to_dict("list")})[0] == 200


def test_ping_and_version(server):
    assert ask(server.address, path="/ping")[0] == 200
    status, text = ask(server.address, path="/version")
    assert (status, json.loads(text)) == (200, {"name": "flowers", "version": "7", "key_fingerprint": "ab" * 32})


# --- Bad requests


def with_value(value) -> str:
    """Return three flowers with a value in place of the second one's petal length."""
    rows = THREE.astype(object)
    rows.iloc[1, 2] = value
    return split(rows)


CELL = f"column '{PETAL}', row 2 of 3: "
BAD = {
    "text": (with_value("wide"), 400, CELL),
    "-999": (with_value(-999.0), 400, CELL),
    "an overflow": (with_value("x").replace('"x"', "1e999"), 400, CELL),
    "an endless integer": (with_value("x").replace('"x"', "1" + "0" * 5000), 400, "limit"),
    "a column missing in a row": (
        json.dumps({"inputs": [*THREE.to_dict("records"), {"sepal length (cm)": 1.0}]}),
        400,
        "column 'sepal width (cm)', row 4 of 4: ",
    ),
    "a column twice": (
        json.dumps({"dataframe_split": {"columns": [*NAMES, NAMES[0]], "data": [[5.1] * 5] * 3}}),
        400,
        "'sepal length (cm)' is repeated",
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
    "no columns": ('{"inputs": {}}', 400, "required"),
    "a short row": (split(THREE).replace(", 0.2]", "]", 1), 400, "each row has a value for each column"),
    "a long row": (split(THREE).replace(", 0.2]", ", 0.2, 0.2]", 1), 400, "each row has a value for each column"),
    "rows without names": (json.dumps({"inputs": THREE.to_numpy().tolist()}), 400, "name"),
    "rows of another form": ('{"dataframe_records": "rows"}', 400, "dataframe_records"),
    "split of another form": (json.dumps({"dataframe_split": THREE.to_dict("records")}), 400, "dataframe_split"),
    "split without data": (json.dumps({"dataframe_split": {"columns": NAMES}}), 400, "data"),
    "names that are no texts": (
        json.dumps({"dataframe_split": {"columns": [[]] * 4, "data": [[1.0] * 4]}}),
        400,
        "'[]' is repeated",
    ),
    "columns of two lengths": (
        json.dumps({"inputs": THREE.to_dict("list") | {PETAL: [1.0]}}),
        400,
        "as many values in each column",
    ),
    "a value for a column": (json.dumps({"inputs": THREE.to_dict("list") | {PETAL: 1.0}}), 400, f"column '{PETAL}'"),
    "an array": ("[]", 400, "inputs"),
    "malformed JSON": (split(THREE)[:-3], 400, "JSON"),
    "other bytes": (b"\xff\xfe\x00{}", 400, "UTF-8"),
    "a byte order mark": (split(THREE).encode("utf-8-sig"), 400, "JSON"),
    "900 deep": ('{"inputs":' + "[" * 900 + "]" * 900 + "}", 400, "name"),
    "deep nesting": ("[" * 100_000 + "]" * 100_000, 400, "deeply nested"),
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


@pytest.mark.parametrize("kind", [None, "text/plain", "text/csv"])
def test_another_content_type_is_refused(server, kind):
    assert ask(server.address, split(THREE), kind)[0] == 415


def test_content_type_may_name_its_encoding(server):
    assert ask(server.address, split(THREE), "Application/JSON; charset=UTF-8")[0] == 200


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/openapi.json", "GET", 404), ("/invocations", "GET", 405)],
)
def test_another_path_or_method_is_refused(server, path, method, status):
    answer = ask(server.address, split(THREE), path=path, method=method)
    assert answer[0] == status
    assert json.loads(answer[1])["message"]


def test_refusal_leaves_the_connection_usable(server):
    with connected(server.address) as connection:
        for body, expected in (("{}", 400), ("x" * 1_000_001, 413), (split(THREE), 200)):
            connection.sendall(message(body))
            assert answer_on(connection)[0] == expected


FLAVORS = [("sklearn", "LinearRegression", "LogisticRegression")]
FLAVORS += [("xgboost", "XGBRegressor", "XGBClassifier"), ("lightgbm", "LGBMRegressor", "LGBMClassifier")]


@pytest.mark.parametrize(("flavor", "regressor", "classifier"), FLAVORS)
@pytest.mark.parametrize("task", ["regression", "classification"])
@pytest.mark.extended  # it takes long
def test_model_of_each_flavor_and_task_answers_as_before_it_was_saved(tmp_path, flavor, regressor, classifier, task):
    # given a model that its library has trained, and MLflow has saved
    name = "sklearn.linear_model" if flavor == "sklearn" else flavor
    library = pytest.importorskip(name, reason=f"{name} is not installed. Install it: {INSTALL}")
    data = load_diabetes(as_frame=True) if task == "regression" else load_breast_cancer(as_frame=True)
    model = getattr(library, regressor if task == "regression" else classifier)()
    if flavor != "sklearn":
        model.set_params(n_estimators=3, n_jobs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(data.data, data.target)
    signature = infer_signature(data.data, model.predict(data.data))
    pins = str(ROOT / "model_requirements.txt")
    getattr(mlflow, flavor).save_model(model, tmp_path / "model", signature=signature, pip_requirements=pins)
    # when it is loaded and asked, with its columns in another order
    rows = data.data.head(20)
    payload = {"inputs": rows[[*rows][::-1]].to_dict("list")}
    predictor = predictor_of(tmp_path / "model")
    status, answer = answered(predictor, payload)
    # then it answers as before, with probabilities where there are some
    assert (status, answer["predictions"]) == (200, model.predict(rows).tolist())
    status, answer = answered(predictor, payload, probabilities=True)
    if task == "regression":
        assert (status, answer["message"]) == (400, NO_PROBABILITIES)
    else:
        assert (status, answer["classes"]) == (200, [0, 1])
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


def read_metrics(text: str) -> dict[str, float]:
    """Return the samples of a text in Prometheus' format, by name and labels; refuse anything else."""
    assert text.endswith("\n")
    samples, kinds = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds
            assert kind in ("counter", "gauge", "histogram")
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            found = re.fullmatch(r'([a-z_]+)(\{[a-z]+="[^"\\\n]*"\})? (\d+(?:\.\d+)?(?:e-?\d+)?)', line)
            assert found, line
            family = re.sub("_(bucket|sum|count)$", "", found[1]) if found[1] not in kinds else found[1]
            assert (kinds[family] == "histogram") == (family != found[1])
            assert found[1] + (found[2] or "") not in samples
            samples[found[1] + (found[2] or "")] = float(found[3])
    return samples


@pytest.mark.extended  # it takes long
def test_metrics_count_answers_rows_and_time(iris):
    # given a server that has answered, and refused
    with serve_verified(as_verified(iris), python=Path(sys.executable)) as server:
        before = read_metrics(ask(server.address, path="/metrics")[1])
        for body, kind in ((split(THREE), "application/json"), ("{}", "application/json"), ("", "text/csv")):
            ask(server.address, body, kind)
        ask(server.address, split(FEATURES))
        ask(server.address, path="/ping")
        # when its metrics are asked for
        metrics = read_metrics(ask(server.address, path="/metrics")[1])
    # then each answer to a request for predictions is counted once, and each predicted row
    assert (before["model_rows_total"], before["model_request_seconds_count"]) == (0, 0)
    requests = {name: value for name, value in metrics.items() if name.startswith("model_requests")}
    assert requests == {f'model_requests_total{{status="{status}"}}': n for status, n in ((200, 2), (400, 1), (415, 1))}
    assert metrics["model_rows_total"] == 153
    buckets = [value for name, value in metrics.items() if name.startswith("model_request_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == metrics["model_request_seconds_count"] == 4
    assert metrics["model_request_seconds_sum"] > 0


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
    status, answer = answered(predictor_of(folder), {"inputs": in_json(features)}, probabilities=True)
    assert status == 200
    expected = mlflow.sklearn.load_model(str(folder)).predict_proba(features)
    np.testing.assert_allclose(answer["probabilities"], expected, rtol=1e-12)


def test_rows_that_fit_but_that_the_model_cannot_take_are_refused(mixed):
    row = {"age": 20, "dose": 0.5, "group": "unheard of"}
    status, answer = answered(predictor_of(mixed[0]), {"inputs": [row]})
    assert status == 422
    assert "unknown categories" in answer["message"]


@pytest.mark.parametrize(
    "model", [GaussianMixture(2), MultiOutputClassifier(LogisticRegression())], ids=["no classes", "two targets"]
)
def test_probabilities_that_belong_to_no_classes_of_one_target_are_refused(tmp_path, model):
    rows = THREE.iloc[[0, 1, 2] * 2].reset_index(drop=True)
    model.fit(rows, np.array([[0, 0], [1, 1], [1, 2]] * 2))
    options = {"signature": infer_signature(rows), "pip_requirements": str(ROOT / "model_requirements.txt")}
    mlflow.sklearn.save_model(model, tmp_path / "model", **options)
    status, answer = answered(predictor_of(tmp_path / "model"), {"inputs": rows.to_dict("list")}, probabilities=True)
    assert (status, answer["message"]) == (400, NO_PROBABILITIES)


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
    options = {"signature": infer_signature(rows), "pip_requirements": str(ROOT / "model_requirements.txt")}
    mlflow.sklearn.save_model(model, tmp_path / "model", **options)
    with (
        (tmp_path / "log.txt").open("w") as log,
        serve_verified(as_verified(tmp_path / "model"), python=Path(sys.executable), log=log) as server,
    ):
        asked = ask(server.address, split(rows.head(1).assign(**{NAMES[0]: 0})))
    assert asked == (500, f'{{"message": "{FAILED}"}}')
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_unknown_column_to_leave_out_is_refused(iris):
    with pytest.raises(ValueError, match="leave_out must name columns of the signature, got 'colour'"):
        predictor_of(iris, leave_out=("colour",))


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


MANY = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.extended  # it takes long
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


@pytest.mark.extended  # it takes long
def test_fifty_clients_at_once_lose_nothing(server, record, model):
    check_crowd(crowd(server, 50, lambda count: count < 10), record, model)


# --- What it needs


def test_server_imports_only_what_is_in_the_environment_of_each_model():
    # given what the modules of the server import, and the packages that bring it
    imported = set()
    for path in (ROOT / "mlflow_lifecycle/server").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module)
    modules = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) - {"model_server"}
    installed = packages_distributions()
    # then a package for each is among the pins of a model
    pinned = {re.split("[=; ]", pin)[0].replace("_", "-") for pin in read_pins(ROOT / "model_requirements.txt")}
    missing = [name for name in modules if not {package.replace("_", "-") for package in installed[name]} & pinned]
    assert missing == []
    assert {"starlette", "uvicorn", "mlflow"} <= modules


@pytest.mark.extended  # it starts a server
def test_metrics_are_at_their_own_address_alone(iris):
    address = f"127.0.0.1:{free_port()}"
    with serve_verified(as_verified(iris), python=Path(sys.executable), metrics_address=address) as server:
        assert ask(server.address, path="/metrics")[0] == 404
        status, text = ask(f"http://{address}", path="/metrics")
    assert status == 200
    assert read_metrics(text)["model_rows_total"] == 0


@pytest.mark.parametrize("address", ["9000", "localhost:http"])
def test_metrics_address_without_host_or_port_is_refused(address, iris):
    server = serve_verified(as_verified(iris), python=Path(sys.executable), metrics_address=address)
    with pytest.raises(ServingFailedError, match="metrics_address must be HOST:PORT"), server:
        pass
