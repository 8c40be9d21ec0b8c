"""workers: a search on several workers, in a real PostgreSQL, in which no trial is lost or run twice."""

import contextlib
import re
import shutil
import subprocess
import sys
import textwrap
import time

import mlflow
import optuna
import pytest
from click.testing import CliRunner
from optuna.trial import TrialState

from mlflow_lifecycle import workers
from mlflow_lifecycle.cli import main

pytestmark = pytest.mark.extended  # it takes long

OBJECTIVE = """
    import os, time
    from pathlib import Path

    def score(trial):
        x = trial.suggest_float("x", -1, 1)
        if os.environ.get("STAYS"):
            time.sleep(600)
        here = Path(__file__).parent
        (here / f"at work {os.getpid()}").touch()
        deadline = time.monotonic() + 60
        while len(list(here.glob("at work *"))) < 2 and time.monotonic() < deadline:  # until the other is at work, too
            time.sleep(0.05)
        return 1 - x**2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, empty_store):
    """Give a folder with an objective and a store, which is active as long as this module's tests."""
    folder = tmp_path_factory.mktemp("workers")
    (folder / "objective.py").write_text(textwrap.dedent(OBJECTIVE))
    shutil.copy(empty_store, folder)
    mlflow.set_tracking_uri(f"sqlite:///{folder.as_posix()}/mlflow.db")
    yield folder
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)


@pytest.fixture
def parent(folder, request):
    """Give the run of a search, in an experiment of the test's own."""
    client = mlflow.MlflowClient()
    experiment_id = client.create_experiment(request.node.name, (folder / "mlruns").as_uri())
    return client.create_run(experiment_id, tags={"mlflow.source.git.commit": "abc"})


def children(parent):
    filter_string = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    return mlflow.search_runs([parent.info.experiment_id], filter_string, output_format="list")


@contextlib.contextmanager
def closing(study):
    """Close the study's connections at the end of the block."""
    yield study
    study._storage.remove_session()
    study._storage._backend.engine.dispose()


def until(condition, log, limit=60):
    deadline = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def search(folder, storage):
    """Give the trials and the child runs of a search whose first worker is killed in its first trial.

    The working directory has programs of a stranger.
    """
    (folder / "work").mkdir()
    for name in ("mlflow", "optuna"):
        (folder / f"work/{name}.py").write_text("from pathlib import Path\nPath(f'{__file__}.ran').touch()\n")
    client = mlflow.MlflowClient()
    parent = client.create_run(client.create_experiment("killed", (folder / "mlruns").as_uri()))
    run_id, log, objective = parent.info.run_id, folder / "workers.log", f"{folder / 'objective.py'}:score"
    with closing(workers.make_queue(storage, run_id, [{"x": 0.5}] + [{}] * 6, "score")) as study:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder / "work")
            patch.setenv("STAYS", "on")
            with workers.worker_process(run_id, objective, storage, log) as victim:
                until(lambda: any(trial.params for trial in study.trials) and children(parent), log)
                victim.kill()
            patch.delenv("STAYS")
            patch.setattr(workers, "GRACE", 4)  # seconds are enough for this worker, which is one of the two others
            with workers.worker_process(run_id, objective, storage, log) as other:
                workers.work(run_id, workers.load_objective(objective), storage)
                assert other.wait(timeout=60) == 0, log.read_text()
        trials = study.trials
    return trials, children(parent), victim.pid, log.read_text()


def test_no_module_of_the_working_directory_is_run(search, folder):
    """Attack 26."""
    assert list((folder / "work").glob("*.ran")) == []


def test_trial_of_a_killed_worker_is_begun_again_with_its_settings(search):
    trials, runs, victim, log = search
    # given the trial that the killed worker was running
    lost = trials[0]
    assert lost.state == TrialState.FAIL
    assert lost.user_attrs["worker"].endswith(f" {victim}")
    # then it was done by another worker, and all that were asked for are complete
    (again,) = [trial for trial in trials[1:] if trial.params == lost.params == {"x": 0.5}]
    assert again.state == TrialState.COMPLETE
    assert not again.user_attrs["worker"].endswith(f" {victim}")
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 7
    # and its run says what became of it
    assert {run.data.tags["trial"]: run.info.status for run in runs}["0"] == "KILLED"
    assert "Warning" not in log


def test_each_trial_is_run_once_and_logged_by_workers_that_draw_other_numbers(search):
    trials, runs, _, _ = search
    finished = [run for run in runs if run.info.status == "FINISHED"]
    numbers = [int(run.data.tags["trial"]) for run in finished]
    assert sorted(numbers) == [trial.number for trial in trials if trial.state == TrialState.COMPLETE]
    assert len({run.data.tags["trial"] for run in runs}) == len(runs) == 8
    for run in runs:
        trial = trials[int(run.data.tags["trial"])]
        assert run.info.run_name == f"trial {trial.number:03d}"
        assert run.data.tags["worker"] == trial.user_attrs["worker"]
    for run, number in zip(finished, numbers, strict=True):
        assert run.data.metrics == {"score": trials[number].value}
        assert run.data.params == {name: str(value) for name, value in trials[number].params.items()}
    assert len({run.data.params["x"] for run in finished}) == 7
    assert len({run.data.tags["worker"] for run in runs}) == 3


def test_trial_that_fails_keeps_its_error_and_the_search_goes_on(parent, storage, folder):
    # given an objective that fails, and then returns no number
    def objective(trial):
        if trial.number == 0:
            raise ValueError("this one fails")
        return None if trial.number == 1 else trial.suggest_float("x", 0, 1)

    # when a worker is done
    with closing(workers.make_queue(storage, parent.info.run_id, [{}, {}, {"x": 0.25}], "score")) as study:
        workers.work(parent.info.run_id, objective, storage, "objective.py")
        assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE]
    # then
    done, empty, failed = runs = children(parent)
    assert (failed.info.status, failed.data.tags["error"]) == ("FAILED", "ValueError('this one fails')")
    assert "NoneType" in empty.data.tags["error"]
    assert (done.info.status, done.data.metrics, done.data.params) == ("FINISHED", {"score": 0.25}, {"x": "0.25"})
    # and all say where they come from
    for run in runs:
        assert run.data.tags["mlflow.source.name"] == "objective.py"
        assert run.data.tags["mlflow.source.git.commit"] == "abc"


@pytest.fixture
def mlflow_back():
    """Give what makes this module's store the active one again, and call it at the end."""
    uri = mlflow.get_tracking_uri()
    yield lambda: mlflow.set_tracking_uri(uri)
    mlflow.set_tracking_uri(uri)


@pytest.mark.parametrize("moment", ["before the objective", "after it failed", "by Ctrl+C"])
def test_trial_that_is_cut_off_is_begun_again(parent, storage, monkeypatch, mlflow_back, moment):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run_id, begin = parent.info.run_id, mlflow.start_run

    def begin_without_mlflow(**options):
        mlflow.set_tracking_uri("http://127.0.0.1:1")
        return begin(**options)

    def cut_off(trial):
        if moment == "by Ctrl+C":
            raise KeyboardInterrupt
        mlflow.set_tracking_uri("http://127.0.0.1:1")
        raise ValueError("this one fails")

    with closing(workers.make_queue(storage, run_id, [{"x": 0.25}, {"x": 0.5}], "score")) as study:
        # given a worker whose MLflow goes away in its first trial, or that is interrupted, which ends the worker
        with monkeypatch.context() as patch:
            if moment == "before the objective":
                patch.setattr(mlflow, "start_run", begin_without_mlflow)
            with pytest.raises(KeyboardInterrupt if moment == "by Ctrl+C" else mlflow.MlflowException):
                workers.work(run_id, cut_off, storage)
        # when MLflow is back, and a worker is started
        mlflow_back()
        monkeypatch.setattr(workers, "GRACE", 1)
        workers.work(run_id, lambda trial: trial.suggest_float("x", 0, 1), storage)
        # then all that was asked for is done
        assert sorted(trial.value for trial in study.get_trials(states=[TrialState.COMPLETE])) == [0.25, 0.5]
    # and no run is left open
    statuses = ["FINISHED", "FINISHED"] if moment == "before the objective" else ["FINISHED", "FINISHED", "KILLED"]
    assert sorted(run.info.status for run in children(parent)) == statuses


def test_trial_that_nobody_asked_for_is_not_run(parent):
    # given an empty queue, as a worker finds it that came a moment late
    study = optuna.create_study()
    # when it asks for a trial all the same
    study.optimize(workers.track(lambda trial: 1.0, parent, "score"), n_trials=1)
    # then that is not run, and so is in no run
    assert [trial.state for trial in study.trials] == [TrialState.PRUNED]
    assert children(parent) == []


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with Study.optimize")
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_trial_that_kills_every_worker_is_given_up(parent, storage, monkeypatch):
    # given a trial whose worker gives no sign of life, as often as it is begun
    monkeypatch.setattr(workers, "RETRIES", 2)
    with closing(workers.make_queue(storage, parent.info.run_id, [{}], "score")) as study:
        for _ in range(3):
            trial = study.ask()
            study.tell(trial, state=TrialState.FAIL)
            # when it is to be begun again
            workers.start_again(study, study.trials[trial.number])
        # then that happens so often, and not more
        assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 3


OBJECTIVES = {
    "no file": ("nowhere.py:score", "There is no file .*nowhere.py with an objective"),
    "no function": ("objective.py:nothing", "There is no function 'nothing' in objective.py"),
}


@pytest.mark.parametrize(("where", "reason"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_objective_that_is_not_there_is_refused(folder, monkeypatch, where, reason):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=reason):
        workers.load_objective(where)


LOADED = {
    "data class": """
        from __future__ import annotations
        from dataclasses import dataclass

        @dataclass
        class Settings:
            x: float = 1.0

        def score(trial):
            return Settings().x
    """,
    "own processes": """
        from joblib import Parallel, delayed

        def half(number):
            return number / 2

        def score(trial):
            return sum(Parallel(n_jobs=2)(delayed(half)(number) for number in (1, 1)))
    """,
}


@pytest.mark.parametrize("text", LOADED.values(), ids=LOADED)
def test_objective_of_a_file_is_found(tmp_path, text):
    path = tmp_path / "own_objective.py"
    path.write_text(textwrap.dedent(text))
    assert workers.load_objective(f"{path}:score")(None) == 1.0


ADDRESSES = {
    "password": (lambda address: address.replace("hidden", "secret"), "password authentication failed"),
    "no PostgreSQL": (lambda address: "sqlite:///secret.db", "The queue must be in a PostgreSQL"),
}


@pytest.mark.parametrize(("change", "reason"), ADDRESSES.values(), ids=ADDRESSES)
def test_storage_that_cannot_be_used_is_named_without_the_password(storage, change, reason):
    with pytest.raises(workers.SearchFailedError, match=reason) as error:
        workers.open_storage(change(storage))
    assert not re.search("hidden|secret", str(error.value))
    assert error.value.__suppress_context__ or not error.value.__context__  # nor in its traceback


def test_missing_driver_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(workers.SearchFailedError, match="Please install"):
        workers.open_storage("postgresql://me@127.0.0.1:1/x")


def test_search_that_has_no_study_is_refused(parent, storage):
    with pytest.raises(workers.SearchFailedError, match=f"has no study {parent.info.run_id}"):
        workers.work(parent.info.run_id, lambda trial: 1.0, storage)


def test_command_says_in_one_line_what_is_wrong(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("SEARCH_STORAGE", raising=False)
    variables = {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    answer = CliRunner().invoke(main, ["search-worker", "nothing", "--objective", "objective.py:score"], env=variables)
    assert (answer.exit_code, answer.stdout) == (1, "")
    (line,) = answer.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "SEARCH_STORAGE must name the PostgreSQL" in line


def test_worker_is_gone_at_the_end_of_the_block(parent, storage, folder):
    # given a worker that would run for ten minutes
    study = workers.make_queue(storage, parent.info.run_id, [{}], "score")
    with closing(study), pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAYS", "on")
        objective, log = f"{folder / 'objective.py'}:score", folder / "stays.log"
        # when the block that it belongs to fails
        with (
            pytest.raises(subprocess.TimeoutExpired),
            workers.worker_process(parent.info.run_id, objective, storage, log) as process,
        ):
            process.wait(timeout=0.5)
    # then
    assert process.returncode is not None
    assert "hidden" not in log.read_text()
