"""What users of the team's server may not do: write beside their own files, list users, and guess passwords."""

import json
import socket
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from deployment import PASSWORDS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the server's image is Linux")
EXPERIMENTS = ["api/2.0/mlflow/experiments/create", "ajax-api/2.0/mlflow/experiments/create"]
FILES = ["api/2.0/mlflow-artifacts/artifacts", "ajax-api/2.0/mlflow-artifacts/artifacts"]


def files(team) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in team.folder.rglob("artifacts/**/*") if path.is_file()}


@pytest.fixture(scope="module")
def places(team):
    """Give where a run of ana's and one of ben's have their files: experiment, run and model, by user."""
    found = {}
    for user in ("ana", "ben"):
        with team.client(user) as client:
            run = client.create_run(client.create_experiment(user)).info
            client.log_text(run.run_id, f"by {user}", "notes.txt")
            model = client.create_logged_model(run.experiment_id, name="model")
            client.create_registered_model(user)
        found[user] = {"experiment": run.experiment_id, "run": run.run_id, "model": model.model_id}
    return found


LOCATIONS = {
    "a file's address": lambda team, ana: {"artifact_location": f"file://{team.artifacts}/{ana}"},
    "the server's address": lambda team, ana: {"artifact_location": f"mlflow-artifacts:/{ana}"},
    "the other spelling": lambda team, ana: {"artifactLocation": f"file://{team.artifacts}/{ana}"},
    "outside": lambda team, ana: {"artifact_location": f"file://{team.folder}/outside"},
    "a wrong type behind it": lambda team, ana: {"artifact_location": f"mlflow-artifacts:/{ana}", "tags": 5},
}


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize(
    ("route", "encoded"),
    [(EXPERIMENTS[0], json.dumps), (EXPERIMENTS[1], lambda body: json.dumps(json.dumps(body)))],
    ids=["once", "twice"],
)
def test_user_may_not_choose_where_an_experiments_files_go(encoded, route, location, team, places):
    # given
    body = {"name": "chosen"} | LOCATIONS[location](team, places["ana"]["experiment"])
    headers = {"Content-Type": "application/json"}
    # when
    answer = team.send("ben", "POST", route, data=encoded(body), headers=headers)
    # then
    assert answer.status_code == 403
    assert "Only an admin may choose an artifact_location. Leave it out" in answer.text
    with team.client("admin") as client:
        assert client.get_experiment_by_name("chosen") is None


def test_admin_may_choose_where_an_experiments_files_go(team):
    with team.client("admin") as client:
        number = client.create_experiment("elsewhere", "mlflow-artifacts:/elsewhere")
        assert client.get_experiment(number).artifact_location == "mlflow-artifacts:/elsewhere"


def test_an_empty_location_is_no_choice(team):
    body = {"name": "empty", "artifact_location": ""}
    assert team.send("ben", "POST", EXPERIMENTS[0], json=body).status_code == 200


# Paths below the address of the files; {ana} and {ben} are the numbers of their experiments.
PATHS = [
    "{ana}/evil",
    "{ben}/../{ana}/evil",
    "{ben}/%2e%2e/{ana}/evil",
    "{ben}/%252e%252e/{ana}/evil",
    "{ben}/..%2f{ana}/evil",
    "{ben}%2f..%2f{ana}%2fevil",
    "%2e%2e/evil",
    "../evil",
    "./{ana}/evil",
    "/{ana}/evil",
    "%2f{ana}/evil",
    "0{ana}/evil",
    "+{ana}/evil",
    "%253{ana}/evil",
    "models/{ana}/evil",
    "evil",
    "file:evil",
]


@pytest.mark.parametrize("path", PATHS)
def test_user_writes_and_deletes_no_file_of_another(path, team, places):
    before = files(team)
    numbers = {user: place["experiment"] for user, place in places.items()}
    for address in FILES:
        for method in ("PUT", "DELETE"):
            answer = team.send("ben", method, f"{address}/{path.format(**numbers)}", data=b"evil")
            assert 400 <= answer.status_code < 500, method
            assert files(team) == before


# Other ways to name a place: method, path and body; {ana}, {ana_run}, {ben_run} and so on are ids.
ROUTES = {
    "upload to a run": ("POST", "ajax-api/2.0/mlflow/upload-artifact?run_uuid={ana_run}&path=evil", {}),
    "upload by dots": ("POST", "ajax-api/2.0/mlflow/upload-artifact?run_uuid={ben_run}&path=../../{ana}/evil", {}),
    "upload in parts": ("POST", "api/2.0/mlflow-artifacts/mpu/create/{ana}/evil", {"path": "evil", "num_parts": 1}),
    "model in an experiment": ("POST", "api/2.0/mlflow/logged-models", {"experiment_id": "{ana}", "name": "evil"}),
    "run in an experiment": ("POST", "api/2.0/mlflow/runs/create", {"experiment_id": "{ana}"}),
    "GraphQL": (
        "POST",
        "graphql",
        {"query": 'mutation {{mlflowCreateExperiment(input: {{name: "evil"}}) {{experimentId}}}}'},
    ),
    "version of a run": (
        "POST",
        "api/2.0/mlflow/model-versions/create",
        {"name": "ben", "source": "mlflow-artifacts:/{ana}/{ana_run}/artifacts", "run_id": "{ben_run}"},
    ),
    "version of nothing": (
        "POST",
        "api/2.0/mlflow/model-versions/create",
        {"name": "ben", "source": "mlflow-artifacts:/{ana}/{ana_run}/artifacts"},
    ),
    "version by dots": (
        "POST",
        "api/2.0/mlflow/model-versions/create",
        {"name": "ben", "source": "mlflow-artifacts:/{ben}/{ben_run}/artifacts/../../../{ana}", "run_id": "{ben_run}"},
    ),
    "version of a file": (
        "POST",
        "api/2.0/mlflow/model-versions/create",
        {"name": "ben", "source": "file:///artifacts/{ana}"},
    ),
    "version of a model": (
        "POST",
        "api/2.0/mlflow/model-versions/create",
        {"name": "ben", "source": "models:/{ana_model}", "model_id": "{ana_model}"},
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_user_reaches_no_place_of_another_by(route, team, places):
    # given
    method, path, body = ROUTES[route]
    names = {user: place["experiment"] for user, place in places.items()}
    names |= {f"{user}_{kind}": number for user, place in places.items() for kind, number in place.items()}
    before = files(team)
    # when
    body = {name: value.format(**names) if isinstance(value, str) else value for name, value in body.items()}
    answer = team.send("ben", method, path.format(**names), json=body)
    # then
    assert answer.status_code >= 400 or '"errors":["Cannot query field' in answer.text
    assert files(team) == before


@pytest.mark.parametrize("kind", ["run", "model"])
@pytest.mark.parametrize("field", ["artifact_uri", "artifact_location"])
def test_place_of_a_run_or_model_follows_its_experiment(field, kind, team, places):
    # given a place of ana's
    evil = {"experiment_id": places["ben"]["experiment"], field: f"file://{team.artifacts}/evil"}
    route = {"run": "runs/create", "model": "logged-models"}[kind]
    # when ben makes a run or a model there
    answer = team.send("ben", "POST", f"api/2.0/mlflow/{route}", json=evil | {"name": "named"})
    # then the server takes no notice
    place = answer.json()[kind]["info"]["artifact_uri"]
    assert place.startswith(f"mlflow-artifacts:/{places['ben']['experiment']}/")


@pytest.mark.parametrize("prefix", ["api", "ajax-api"])
@pytest.mark.parametrize(("user", "status"), {"ben": 403, "admin": 200}.items())
def test_only_an_admin_lists_the_users(user, status, prefix, team):
    assert team.send(user, "GET", f"{prefix}/2.0/mlflow/users/list").status_code == status


def guess(team, name: str, password: str, path: str = "api/2.0/mlflow/experiments/get?experiment_id=0") -> int:
    return requests.get(f"{team.address}/{path}", auth=(name, password), timeout=60).status_code


@pytest.fixture
def new_user(team):
    """Return a function that adds a user, who has the same password as ana."""

    def add(name):
        team.ask("admin", "2.0/mlflow/users/create", username=name, password=PASSWORDS["ana"])

    return add


GUESSED = ["api/2.0/mlflow/experiments/get?experiment_id=0", f"{FILES[0]}/1/notes.txt", "gateway/mlflow/v1/models"]


@pytest.mark.parametrize("path", GUESSED)
def test_wrong_passwords_are_soon_refused_unseen(path, team, new_user):
    # given a user who works, and two who do not
    name = f"guessed{GUESSED.index(path)}"
    new_user(name)
    with requests.Session() as session:
        session.auth = (name, PASSWORDS["ana"])
        assert session.get(f"{team.address}/{GUESSED[0]}", timeout=30).status_code == 403  # known, but no reader
        # when somebody guesses, forty times at the same moment
        with ThreadPoolExecutor(20) as executor:
            answers = Counter(executor.map(lambda number: guess(team, name, f"guess{number}", path), range(40)))
        # then the server verifies five of them in each of its two processes
        assert answers.keys() == {401, 429}
        assert answers[401] <= 2 * 5
        # and then not even the right password, while who worked goes on
        assert session.get(f"{team.address}/{GUESSED[0]}", timeout=30).status_code == 403
    assert guess(team, "ana", PASSWORDS["ana"]) == 403
    refused = requests.get(f"{team.address}/{GUESSED[0]}", auth=(name, "guess"), timeout=30)
    assert refused.headers["Retry-After"] == "60"


def test_a_name_without_a_user_is_refused_as_any_other(team):
    with ThreadPoolExecutor(20) as executor:
        answers = Counter(executor.map(lambda number: guess(team, "nobody", f"guess{number}"), range(40)))
    assert answers.keys() == {401, 429}


def test_a_name_without_a_user_costs_the_same_time(team, new_user):
    # given eight users
    names = {"there": [f"user{number}" for number in range(8)], "not there": [f"none{number}" for number in range(8)]}
    for name in names["there"]:
        new_user(name)
    # when somebody tries a wrong password for each, and for as many names without a user, in turn
    times = {"there": [], "not there": []}
    for pair in zip(*names.values(), strict=True):
        for kind, name in zip(names, pair, strict=True):
            before = time.perf_counter()
            assert guess(team, name, "wrong") == 401
            times[kind].append(time.perf_counter() - before)
    # then the times do not tell one from the other: without the same work, they are ten times apart
    ratio = statistics.median(times["there"]) / statistics.median(times["not there"])
    assert 1 / 2 < ratio < 2


UNREADABLE = ["Basic", "Basic !", "Basic\tYW5hOng=", "Bearer token", "Basic YW5hOng=, Basic YW5hOng=", "Negotiate YQ=="]


@pytest.mark.parametrize("value", UNREADABLE)
def test_credentials_that_cannot_be_read_are_refused(value, team):
    for header in ("Authorization", "X-MLflow-Authorization"):
        answer = requests.get(f"{team.address}/{GUESSED[0]}", headers={header: value}, timeout=30)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == 'Basic realm="mlflow"'


def begin(team, name: str) -> list[int]:
    """Make an experiment and a registered model as ana, or find them made; then use both. Return the statuses."""
    for kind in ("experiments", "registered-models"):
        answer = team.send("ana", "POST", f"api/2.0/mlflow/{kind}/create", json={"name": name})
        assert answer.ok or answer.json()["error_code"] == "RESOURCE_ALREADY_EXISTS", answer.text
    answer = team.send("ana", "GET", f"api/2.0/mlflow/experiments/get-by-name?experiment_name={name}")
    assert answer.ok, answer.text
    tag = {"name": name, "key": "begun", "value": "yes", "experiment_id": answer.json()["experiment"]["experiment_id"]}
    return [
        team.send("ana", "POST", f"api/2.0/mlflow/{path}", json=tag).status_code
        for path in ("experiments/set-experiment-tag", "registered-models/set-tag")
    ]


def test_what_several_programs_of_a_user_begin_at_once_is_theirs_from_the_first_moment(team):
    with ThreadPoolExecutor(8) as executor:
        for number in range(5):
            assert list(executor.map(begin, [team] * 8, [f"begun-{number}"] * 8)) == [[200, 200]] * 8


def test_alias_that_several_programs_set_at_once_is_set(team):
    for number in range(5):
        # given a version of a new registered model
        name = f"aliased-{number}"
        with team.client("ana") as client:
            run = client.create_run(client.create_experiment(name)).info
            client.create_registered_model(name)
            client.create_model_version(name, run.artifact_uri, run.run_id)
        # when eight programs let it take the same alias, which nobody had before
        alias = {"name": name, "alias": "champion", "version": "1"}
        with ThreadPoolExecutor(8) as executor:
            answers = executor.map(
                lambda body: team.send("ana", "POST", "api/2.0/mlflow/registered-models/alias", json=body), [alias] * 8
            )
            # then each is told that it is done
            assert [answer.status_code for answer in answers] == [200] * 8


@pytest.mark.parametrize("columns", [4, 4000], ids=["small", "larger than an upload"])
def test_data_set_that_several_programs_log_at_once_is_an_input_of_each_run(columns, team):
    schema = json.dumps({"mlflow_colspec": [{"type": "double", "name": f"measured_{at}"} for at in range(columns)]})
    for number in range(5):
        with team.client("ana") as client:
            experiment = client.create_experiment(f"shared-data-{columns}-{number}")
            runs = [client.create_run(experiment).info.run_id for _ in range(8)]
        data = {"dataset": {"name": "iris", "digest": "0123abcd", "source_type": "local", "source": "{}"}}
        data["dataset"]["schema"] = schema
        bodies = [{"run_id": run, "datasets": [data]} for run in runs]
        with ThreadPoolExecutor(8) as executor:
            logged = executor.map(
                lambda body: team.send("ana", "POST", "api/2.0/mlflow/runs/log-inputs", json=body), bodies
            )
            assert [answer.status_code for answer in logged] == [200] * 8


def test_file_of_which_a_part_arrives_is_not_kept(team, places):
    # given a connection that ends within the body of an upload
    path = f"{FILES[0]}/{places['ana']['experiment']}/{places['ana']['run']}/artifacts/half.txt"
    request = requests.Request("PUT", f"{team.address}/{path}", data=b"x" * 1000, auth=("ana", PASSWORDS["ana"]))
    prepared = request.prepare()
    head = "".join(f"{name}: {value}\r\n" for name, value in prepared.headers.items())
    with socket.create_connection(("127.0.0.1", team.port), timeout=30) as connection:
        connection.sendall(f"PUT /{path} HTTP/1.1\r\nHost: 127.0.0.1:{team.port}\r\n{head}\r\nhalf".encode())
    # when a later one is whole, then it alone is there
    whole = team.send("ana", "PUT", path.replace("half", "whole"), data=b"x" * 1000)
    assert whole.status_code == 200, whole.text
    time.sleep(1)
    assert {Path(name).name for name in files(team) if f"/{places['ana']['run']}/" in name} >= {"whole.txt"}
    assert [name for name in files(team) if name.endswith("half.txt")] == []
