"""The team's server or its database fails while a notebook logs: what was acknowledged stays, the notebook goes on."""

import contextlib
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from deployment import secrets_in
from execution import MODEL, copy_project, environment, execute

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the server's image is Linux")

# Logs one value after the other, and prints the number of each that the server has acknowledged.
WRITER = """
import mlflow
run = mlflow.MlflowClient().create_run("0")
print(run.info.run_id, flush=True)
for number in range(1_000_000):
    mlflow.MlflowClient().log_metric(run.info.run_id, "number", number, step=number)
    print(number, flush=True)
"""


@contextlib.contextmanager
def writing(team, folder):
    """Run the writer until the end of the block, and give the file that it prints to."""
    acknowledged = folder / "acknowledged.txt"
    with acknowledged.open("w") as output, (folder / "errors.txt").open("w") as errors:
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER],
            cwd=folder,
            env=environment(folder, **team.as_user("admin")),
            stdout=output,
            stderr=errors,
        )
        try:
            yield acknowledged
        finally:
            writer.kill()
            writer.wait()


def wait_until(condition, limit=90):
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def logged_models(team) -> int:
    query = ["psql", "--no-align", "--tuples-only", "--dbname=mlflow", "--command=SELECT count(*) FROM logged_models"]
    return int(team.database.run(query, capture_output=True).stdout)


def numbers(acknowledged) -> list[int]:
    """Return the numbers that were acknowledged; the first line is the run's id, the last may be half."""
    return [int(line) for line in acknowledged.read_text().rpartition("\n")[0].splitlines()[1:]]


@pytest.mark.parametrize("failure", ["server killed", "database stopped"])
def test_what_was_acknowledged_survives_and_the_notebook_finishes_or_says_why(failure, team, tmp_path):
    team.empty()
    notebook = copy_project(tmp_path / "project")
    with ThreadPoolExecutor(1) as executor, team.client("admin") as client, writing(team, tmp_path) as acknowledged:
        # given a writer, and a notebook that has begun to log
        before = logged_models(team)
        execution = executor.submit(execute, notebook, notebook.parent, **team.as_user("ana"))
        wait_until(lambda: logged_models(team) > before)
        # when
        if failure == "server killed":
            team.kill()
            early = numbers(acknowledged)
            team.start()
        else:
            team.database.stop()
            early = numbers(acknowledged)
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
        wait_until(lambda: len(numbers(acknowledged)) > len(early) > 0)
        late = numbers(acknowledged)
        run_id = acknowledged.read_text().splitlines()[0]
        there = {metric.step for metric in client.get_metric_history(run_id, "number")}
        assert there.issuperset(late)
        assert secrets_in(process.stderr + (tmp_path / "errors.txt").read_text()) == []
