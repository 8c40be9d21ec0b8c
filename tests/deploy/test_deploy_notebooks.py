"""The quickstart on the team's server: its stored outputs, many at once, and what users may not do."""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from deployment import PASSWORDS, logged, secrets_in, services
from execution import (
    MODEL,
    NOT_REBUILT,
    ROOT,
    copy_project,
    differing_outputs,
    execute,
    finished,
)
from kernels import execute_in
from mlflow.exceptions import MlflowException

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the server's image is Linux")
GRANT = "3.0/mlflow/users/permissions/grant"


def test_quickstart_gives_its_stored_outputs_and_three_at_once_lose_nothing(team, tmp_path):
    # given a quickstart that ana has executed, and that gives what is stored
    team.empty()
    folders = [tmp_path / str(number) for number in range(4)]
    notebook = copy_project(tmp_path / "project")
    for folder in folders:
        folder.mkdir()
    process = execute(notebook, folders[0], **team.as_user("ana"))
    assert process.returncode == 0, process.stderr
    assert differing_outputs(folders[0]) == NOT_REBUILT
    # when three begin at the same moment, on the store where the experiment is; `make reliability` starts eight
    with ThreadPoolExecutor(3) as executor:
        processes = list(executor.map(lambda folder: execute(notebook, folder, **team.as_user("ana")), folders[1:]))
    # then each finishes
    assert [process.stderr for process in processes if process.returncode] == []
    # and eight versions are there, without gap or duplicate, each by a run of its own that is complete
    with team.client("ana") as client:
        versions = client.search_model_versions(f"name = '{MODEL}'")
        runs = client.search_runs([client.get_experiment_by_name(MODEL).experiment_id])
    assert sorted(int(version.version) for version in versions) == list(range(1, 9))
    assert {version.run_id for version in versions} == {run.info.run_id for run in runs}
    assert len(runs) == 8
    for run in runs:
        assert run.info.status == "FINISHED"
        assert {data.dataset.name for data in run.inputs.dataset_inputs} == {"iris_train", "iris_test"}
        assert len(run.data.metrics) == 3
    assert len({version.source for version in versions}) == 8


def logged_by_ana(team) -> dict:
    """Empty the store and let ana log what a notebook logs, under the quickstart's names; return where it is."""
    team.empty()
    with team.client("ana") as client:
        experiment = client.create_experiment(MODEL)
        run = client.create_run(experiment).info
        client.log_text(run.run_id, "by ana", "notes.txt")
        client.create_registered_model(MODEL)
        version = client.create_model_version(MODEL, run.artifact_uri, run.run_id)
    return {"experiment": experiment, "run": run, "version": version.version}


COMERS = {
    "nobody": "401 != 200. Response body: 'You are not authenticated.",
    "wrong password": "401 != 200. Response body: 'You are not authenticated.",
    "another user": "403 != 200. Response body: 'Permission denied'",
    "reader": "403 != 200. Response body: 'Permission denied'",
}


@pytest.fixture(scope="module")
def refusals(team, tmp_path_factory, kernel):
    """Execute the quickstart as each of the comers, who meets an experiment of ana's.

    Give the error of each, and what was logged before and after.
    """
    folder = tmp_path_factory.mktemp("refusals")
    notebook = copy_project(folder / "project")
    place = logged_by_ana(team)
    variables = {
        "nobody": {"MLFLOW_TRACKING_URI": team.address},
        "wrong password": team.as_user("ana", "not-anas-pass-phrase"),
        "another user": team.as_user("ben"),
        "reader": team.as_user("cleo"),
    }

    with team.client("admin") as client:
        for kind, name in {"experiment": place["experiment"], "registered_model": MODEL}.items():
            granted = {"username": "cleo", "resource_type": kind, "resource_id": name, "permission": "READ"}
            team.ask("admin", GRANT, **granted)
        before = logged(client)
        errors = {comer: execute_in(kernel, notebook, notebook.parent, **variables[comer]) for comer in COMERS}
        return errors, before, logged(client)


@pytest.mark.parametrize("comer", COMERS)
def test_who_may_not_write_is_refused_with_a_clear_error(comer, refusals):
    error = refusals[0][comer]
    assert COMERS[comer] in error.strip().splitlines()[-1]
    assert secrets_in(error) == []


def test_what_was_refused_has_written_nothing(refusals):
    _, before, after = refusals
    assert len(before["runs"]) == len(before["versions"]) == 1
    assert after == before


CALLS = {
    "read a run": lambda client, place: client.get_run(place["run"].run_id),
    "search runs": lambda client, place: client.search_runs([place["experiment"]])[0],
    "make a run": lambda client, place: client.create_run(place["experiment"]),
    "log": lambda client, place: client.log_metric(place["run"].run_id, "accuracy", 1),
    "delete": lambda client, place: client.delete_experiment(place["experiment"]),
    "read a file": lambda client, place: client.download_artifacts(place["run"].run_id, "notes.txt"),
    "write a file": lambda client, place: client.log_text(place["run"].run_id, "by ben", "notes.txt"),
    "read a version": lambda client, place: client.get_model_version(MODEL, place["version"]),
    "make a version": lambda client, place: client.create_model_version(MODEL, place["run"].artifact_uri),
    "move an alias": lambda client, place: client.set_registered_model_alias(MODEL, "champion", place["version"]),
}
RIGHTS = {
    GRANT: {"username": "ben", "resource_type": "experiment", "resource_id": "1", "permission": "MANAGE"},
    "2.0/mlflow/users/create": {"username": "dan", "password": "dans-own-pass-phrase-7"},
}


def test_another_users_work_can_neither_be_read_nor_changed(team):
    # given what ana has logged, when ben reads or changes it by each of the calls
    place = logged_by_ana(team)
    answers = {}
    with team.client("ben") as client:
        for name, call in CALLS.items():
            with pytest.raises((MlflowException, IndexError, requests.HTTPError)) as error:
                call(client, place)
            answers[name] = str(error.value)
    for endpoint, fields in RIGHTS.items():
        with pytest.raises(requests.HTTPError) as error:
            team.ask("ben", endpoint, **fields)
        answers[endpoint] = str(error.value)
    # then each is refused, and a search finds nothing
    assert answers.pop("search runs") == "list index out of range"
    assert [name for name, answer in answers.items() if "403" not in answer] == []
    with team.client("ana") as client:
        assert len(client.search_runs([place["experiment"]])) == 1
        assert client.get_run(place["run"].run_id).data.metrics == {}
        assert client.get_registered_model(MODEL).aliases == {}


def test_experiment_container_runs_make_run_against_the_server(team, tmp_path):
    # given what the container's image holds, and its environment variables
    service = services({"EXPERIMENT_USERNAME": "ana"})["experiment"]
    assert service["command"] == ["make", "run"]
    copy_project(tmp_path)
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "secret").write_text(PASSWORDS["ana"])
    entrypoint = [part.replace("/run/secrets/EXPERIMENT_PASSWORD", "secret") for part in service["entrypoint"]]
    own = {"MLFLOW_TRACKING_URI": team.address, "REBUILD_ENVIRONMENT": "off"}
    variables = {name: value for name, value in service["environment"].items() if value} | own
    team.empty()
    # when its command is run, with this environment in place of the one in the image
    installed = ["INSTALLED=", f"BIN='{Path(sys.executable).parent}'"]
    process = finished(
        [*entrypoint, *service["command"], *installed], tmp_path, dict(os.environ) | variables, limit=120
    )
    # then the notebook is executed, and has logged to the server
    assert process.returncode == 0, process.stderr
    assert "NOT CHECKED" in (tmp_path / "build/project.html").read_text(encoding="utf-8")
    with team.client("ana") as client:
        assert len(client.search_model_versions(f"name = '{MODEL}'")) == 2
    assert not (tmp_path / "mlflow.db").exists()
