"""Protected aliases of the team's server move to releases alone and keep what they point to; every move is logged."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import mlflow
import psutil
import pytest
import requests
from deployment import PASSWORDS, deployed
from mlflow.exceptions import MlflowException
from postgresql import programs
from releases import ROWS_TRAIN, released
from sklearn.linear_model import LogisticRegression
from versions import NAME, register

from mlflow_lifecycle.experiments import create_experiment
from mlflow_lifecycle.releases.release import rollback
from mlflow_lifecycle.signing.keys import own_key, own_public_key

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the server's image is Linux")
API = "api/2.0/mlflow"
ALIAS = f"{API}/registered-models/alias"


@pytest.fixture(scope="module")
def team(tmp_path_factory, lacking):
    """Give a server with two protected aliases, on which ana has three signed versions; the first is in production."""
    if programs() is None:
        lacking("PostgreSQL", "make postgresql")
    folder = tmp_path_factory.mktemp("team")
    with deployed(folder, {"PROTECTED_ALIASES": "production, live"}) as team:
        with pytest.MonkeyPatch.context() as patch, team.client("ana"):
            patch.setenv("LIFECYCLE_KEYS", str(folder / "keys"))
            mlflow.set_tracking_uri(team.address)
            mlflow.set_experiment(experiment_id=create_experiment(team.address, "versions", "").experiment_id)
            for strength in (0.01, 1.0, 0.01):
                register(folder, LogisticRegression(C=strength, max_iter=1000), ROWS_TRAIN)
            shutil.copy(own_public_key(), team.public_keys)
            released(f"models:/{NAME}/1")
        yield team
        mlflow.set_tracking_uri(None)


@pytest.fixture
def ana(team, monkeypatch):
    """Give a client that comes as ana, and sign with her key."""
    monkeypatch.setenv("LIFECYCLE_KEYS", str(team.folder / "keys"))
    with team.client("ana") as client:
        mlflow.set_tracking_uri(team.address)
        yield client


def aliases(team) -> dict[str, str]:
    answer = team.send("ana", "GET", f"{API}/registered-models/get?name={NAME}").json()
    return {alias["alias"]: alias["version"] for alias in answer["registered_model"].get("aliases", [])}


def moves(team) -> list[list[str]]:
    """Return the log: who, model, alias, from, to."""
    query = "SELECT moved_by, registered_model, alias, from_version, to_version FROM alias_log ORDER BY moved_at"
    table = team.database.run(
        ["psql", "--csv", "--tuples-only", "--dbname=mlflow", f"--command={query}"], capture_output=True, text=True
    )
    return [line.split(",") for line in table.stdout.splitlines()]


def test_release_and_rollback_move_a_protected_alias_and_nobody_moves_it_back(team, ana):
    # given a version that was released, and then replaced by a rollback
    released(f"models:/{NAME}/2")
    assert aliases(team)["production"] == "2"
    rollback(NAME, key=own_key())
    assert aliases(team)["production"] == "1"
    # when somebody moves the alias by hand to what was released before
    with pytest.raises(MlflowException, match="Version 1 was released as production after it"):
        ana.set_registered_model_alias(NAME, "production", 2)
    # then
    assert aliases(team)["production"] == "1"


# What the server is asked by hand, as ana; version 3 was never released.
MOVES = {
    "api": (ALIAS, json.dumps),
    "what the interface asks": (ALIAS.replace("api", "ajax-api"), json.dumps),
    "encoded twice": (ALIAS, lambda body: json.dumps(json.dumps(body))),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("user", ["ana", "admin"])
def test_protected_alias_does_not_move_by_hand_to_what_was_not_released(user, move, team):
    path, encoded = MOVES[move]
    body = {"name": NAME, "alias": "production", "version": "3"}
    answer = team.send(user, "POST", path, data=encoded(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 403
    assert "There is no release as production of this version" in answer.json()["message"]
    assert aliases(team)["production"] == "1"


def test_client_is_told_why_a_protected_alias_does_not_move(team, ana):
    with pytest.raises(
        MlflowException, match=r"moves only to a version that was released as production\..*lifecycle release"
    ):
        ana.set_registered_model_alias(NAME, "production", 3)


def test_release_for_one_alias_is_none_for_another(team, ana):
    with pytest.raises(MlflowException, match="no release as live"):
        ana.set_registered_model_alias(NAME, "live", 1)


def test_release_with_a_key_that_the_server_does_not_have_moves_nothing(team, ana, tmp_path, monkeypatch):
    monkeypatch.setenv("LIFECYCLE_KEYS", str(tmp_path))
    version = register(tmp_path, rows=ROWS_TRAIN, name="with another key")
    with pytest.raises(MlflowException, match="has not signed it"):
        released(f"models:/with another key/{version.version}", key=own_key())
    assert ana.get_registered_model("with another key").aliases == {}


def test_other_user_without_rights_is_refused(team):
    body = {"name": NAME, "alias": "production", "version": "1"}
    assert team.send("ben", "POST", ALIAS, json=body).status_code == 403


def test_stranger_starts_no_verification(team):
    body = {"name": NAME, "alias": "production", "version": "3"}
    assert requests.post(f"{team.address}/{ALIAS}", json=body, timeout=30).status_code == 401


def test_many_moves_at_once_are_verified_one_after_the_other(team):
    # given six programs that move a protected alias at the same moment
    body = {"name": NAME, "alias": "production", "version": "3"}
    most = 0
    with ThreadPoolExecutor(6) as executor:
        answers = [executor.submit(team.send, "ana", "POST", ALIAS, json=body) for _ in range(6)]
        while not all(answer.done() for answer in answers):
            running = 0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    running += any(part.endswith("verify_release.py") for part in process.cmdline())
            most = max(most, running)
            time.sleep(0.05)
    # then each of the server's two processes verifies one of them at a time
    assert 1 <= most <= 2
    assert {answer.result().status_code for answer in answers} == {403}


def test_other_aliases_move_freely_and_are_logged_with_who_moved_them(team, ana):
    before = len(moves(team))
    ana.set_registered_model_alias(NAME, "champion", 2)
    ana.set_registered_model_alias(NAME, "champion", 3)
    with team.client("admin") as admin:
        admin.delete_registered_model_alias(NAME, "champion")
    assert moves(team)[before:] == [
        ["ana", NAME, "champion", "", "2"],
        ["ana", NAME, "champion", "2", "3"],
        ["admin", NAME, "champion", "3", ""],
    ]


def test_alias_that_goes_with_its_model_or_gets_another_name_is_logged(team, ana):
    before = len(moves(team))
    register(team.folder, rows=ROWS_TRAIN, name="old name")
    ana.set_registered_model_alias("old name", "champion", 1)
    ana.rename_registered_model("old name", "new name")
    ana.delete_registered_model("new name")
    assert moves(team)[before:] == [
        ["ana", "old name", "champion", "", "1"],
        ["ana", "old name", "champion", "1", ""],
        ["ana", "new name", "champion", "", "1"],
        ["ana", "new name", "champion", "1", ""],
    ]


@pytest.mark.parametrize(
    "change", ["DELETE FROM alias_log", "UPDATE alias_log SET moved_by = 'x'", "TRUNCATE alias_log"]
)
def test_log_is_append_only(change, team):
    before = moves(team)
    with pytest.raises(subprocess.CalledProcessError):
        team.database.run(["psql", "--quiet", "--set=ON_ERROR_STOP=1", "--dbname=mlflow", f"--command={change}"])
    assert moves(team) == before != []


@pytest.fixture(scope="module")
def held(team):
    """Give the ids and places of the version in production."""
    with team.client("ana") as client:
        version = client.get_model_version(NAME, 1)
        model = client.get_logged_model(version.source.removeprefix("models:/"))
        run = client.get_run(version.run_id).info
    files = model.artifact_location.removeprefix("mlflow-artifacts:/")
    evidence = run.artifact_uri.removeprefix("mlflow-artifacts:/")
    return {
        "run": run.run_id,
        "experiment": run.experiment_id,
        "model": model.model_id,
        "files": files,
        "evidence": evidence,
    }


FILES = "api/2.0/mlflow-artifacts"
CHANGES = {
    "version": ("DELETE", f"{API}/model-versions/delete", {"name": NAME, "version": "1"}),
    "version, written otherwise": ("DELETE", f"{API}/model-versions/delete", {"name": NAME, "version": " 01"}),
    "registered model": ("DELETE", f"{API}/registered-models/delete", {"name": NAME}),
    "name": ("POST", f"{API}/registered-models/rename", {"name": NAME, "new_name": "other"}),
    "alias": ("DELETE", ALIAS, {"name": NAME, "alias": "production"}),
    "run": ("POST", f"{API}/runs/delete", {"run_id": "{run}"}),
    "experiment": ("POST", f"{API}/experiments/delete", {"experiment_id": "{experiment}"}),
    "logged model": ("DELETE", f"{API}/logged-models/{{model}}", {}),
    "model's files": ("DELETE", f"{FILES}/artifacts/{{files}}", {}),
    "file of the model": ("DELETE", f"{FILES}/artifacts/{{files}}/MLmodel", {}),
    "all files of the experiment": ("DELETE", f"{FILES}/artifacts/{{experiment}}", {}),
    "signed evidence": ("DELETE", f"{FILES}/artifacts/{{evidence}}/signed", {}),
    "content of a file": ("PUT", f"{FILES}/artifacts/{{files}}/MLmodel", {}),
    "content of a file, by the interface": ("PUT", f"ajax-{FILES}/artifacts/{{files}}/MLmodel", {}),
    "content of a file, by a dot": (
        "PUT",
        f"{FILES}/artifacts/{{experiment}}/./models/{{model}}/artifacts/MLmodel",
        {},
    ),
    "content of a file, encoded": (
        "PUT",
        f"{FILES}/artifacts/{{experiment}}/%256dodels/{{model}}/artifacts/MLmodel",
        {},
    ),
    "content of a file, by slashes": (
        "PUT",
        f"{FILES}/artifacts/{{experiment}}//models/{{model}}/artifacts/MLmodel",
        {},
    ),
    "content of a file, by a detour": (
        "PUT",
        f"{FILES}/artifacts/{{experiment}}/x/%252e%252e/models/{{model}}/artifacts/MLmodel",
        {},
    ),
    "content of a file, in parts": (
        "POST",
        f"{FILES}/mpu/create/{{files}}",
        {"path": "{files}/MLmodel", "num_parts": 1},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_protected_alias_points_to_stays(change, team, held):
    # given
    method, path, body = CHANGES[change]
    body = {name: value.format(**held) if isinstance(value, str) else value for name, value in body.items()}
    model = team.artifacts / held["files"]
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    # when its owner asks
    answer = team.send("ana", method, path.format(**held), json=body)
    # then
    assert 400 <= answer.status_code < 500 or answer.status_code == 501, answer.text
    assert aliases(team)["production"] == "1"
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before != {}
    with team.client("ana") as client:
        assert client.get_run(held["run"]).info.lifecycle_stage == "active"
        assert client.get_experiment(held["experiment"]).lifecycle_stage == "active"
        assert client.get_logged_model(held["model"]).status == "READY"


def test_refusal_says_what_holds_a_version(team, held):
    body = {"name": NAME, "version": "1"}
    answer = team.send("ana", "DELETE", f"{API}/model-versions/delete", json=body).json()
    assert answer["error_code"] == "PERMISSION_DENIED"
    assert "version 1 of iris, which has the protected alias production" in answer["message"]


def test_version_without_a_protected_alias_can_be_deleted(team, ana):
    version = register(team.folder, rows=ROWS_TRAIN, name="free")
    ana.delete_model_version("free", version.version)
    ana.delete_run(version.run_id)
    assert ana.search_model_versions("name = 'free'") == []


def test_admin_may_delete_a_protected_alias(team, ana, tmp_path):
    version = register(tmp_path, rows=ROWS_TRAIN, name="retired")
    released(f"models:/retired/{version.version}")
    with team.client("admin") as admin:
        admin.delete_registered_model_alias("retired", "production")
    assert ana.get_registered_model("retired").aliases == {}


@pytest.mark.extended
def test_interface_shows_why_a_protected_alias_does_not_move(team, page):
    # given the page of version 3, as ana sees it
    credentials = {"username": "ana", "password": PASSWORDS["ana"]}
    with page.context.browser.new_context(http_credentials=credentials) as context:
        page = context.new_page()
        page.goto(f"{team.address}/#/models/{NAME}/versions/3")
        # when she adds the alias
        page.get_by_role("button", name="Add").first.click()
        page.get_by_role("combobox").fill("production")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Save aliases").click()
        # then
        page.get_by_text("production is a protected alias").first.wait_for(timeout=60_000)
    assert aliases(team)["production"] == "1"
