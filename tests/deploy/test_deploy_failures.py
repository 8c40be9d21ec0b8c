"""The team's server or its database fails while a notebook logs: what was acknowledged stays, the notebook goes on."""

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from deployment import secrets_in, writing
from execution import MODEL, copy_project, execute, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the server's image is Linux")


def logged_models(team) -> int:
    query = ["psql", "--no-align", "--tuples-only", "--dbname=mlflow", "--command=SELECT count(*) FROM logged_models"]
    return int(team.database.run(query, capture_output=True).stdout)


@pytest.mark.parametrize("failure", ["server killed", "database stopped"])
def test_what_was_acknowledged_survives_and_the_notebook_finishes_or_says_why(failure, team, tmp_path):
    team.empty()
    notebook = copy_project(tmp_path / "project")
    with (
        ThreadPoolExecutor(1) as executor,
        team.client("admin") as client,
        writing(team.as_user("admin"), tmp_path) as acknowledged,
    ):
        # given a writer, and a notebook that has begun to log
        before = logged_models(team)
        execution = executor.submit(execute, notebook, notebook.parent, **team.as_user("ana"))
        wait_until(lambda: logged_models(team) > before)
        # when
        if failure == "server killed":
            team.kill()
            early = acknowledged()
            team.start()
        else:
            team.database.stop()
            early = acknowledged()
            time.sleep(5)
            team.database.start()
        # then the notebook finishes, so the reloaded models predict as those in memory; or it ends with MLflow's error
        process = execution.result()
        if process.returncode == 0:
            versions = client.search_model_versions(f"name = '{MODEL}'")
            assert len(versions) >= 2  # a version that was made, but not acknowledged, is made again
            assert {client.get_run(version.run_id).info.status for version in versions} == {"FINISHED"}
        else:
            assert re.search(r"^\S*(MlflowException|RuntimeError)\S*: ", process.stderr, flags=re.MULTILINE)
        # and the writer goes on, and nothing that was acknowledged is lost
        wait_until(lambda: len(acknowledged()) > len(early) > 1)
        run_id, *numbers = acknowledged()
        there = {metric.step for metric in client.get_metric_history(run_id, "number")}
        assert there.issuperset(map(int, numbers))
        assert secrets_in(process.stderr + (tmp_path / "errors.txt").read_text()) == []
