"""lifecycle.search: every trial is a run, and a search that was cut off goes on from its runs."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import mlflow
import optuna
import psutil
import pytest
from execution import environment
from optuna.trial import TrialState

from lifecycle import search

METRIC = "loss"


def objective(trial):
    x = trial.suggest_float("x", -1, 1)
    n = trial.suggest_int("n", 1, 9)
    if trial.number == 2:
        raise ValueError("this one fails")
    return (x - 0.5) ** 2 + n


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Give the address of a store, active as long as this module's tests."""
    folder = tmp_path_factory.mktemp("search")
    uri = f"sqlite:///{folder.as_posix()}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    mlflow.MlflowClient().search_experiments()
    yield uri
    mlflow.set_tracking_uri(None)


@pytest.fixture
def experiment_id(store, request):
    """Give an experiment of the test's own."""
    return mlflow.create_experiment(request.node.name)


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)


def begin(experiment_id, **tags):
    return mlflow.MlflowClient().create_run(experiment_id, tags=tags)


def children(parent):
    filter_string = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    runs = mlflow.search_runs([parent.info.experiment_id], filter_string, output_format="list")
    return sorted(runs, key=lambda run: run.info.run_name)


def searched(parent, trials, seed=0):
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    callbacks = [search.log_trials(parent, METRIC, {"commit": "abc"})]
    study.optimize(search.remembered(objective), trials, catch=Exception, callbacks=callbacks)
    return study


def test_every_trial_is_a_child_run_with_parameters_value_and_duration(experiment_id):
    parent = begin(experiment_id)
    study = searched(parent, 4)
    runs = children(parent)
    assert [run.info.run_name for run in runs] == [f"trial {number:03d}" for number in range(4)]
    for run, trial in zip(runs, study.trials, strict=True):
        assert run.data.params == {name: str(value) for name, value in trial.params.items()}
        assert run.data.metrics.get(METRIC) == trial.value
        assert run.data.metrics["duration_seconds"] >= 0
        assert run.data.tags["commit"] == "abc"


def test_trial_that_fails_keeps_its_error_and_the_search_goes_on(experiment_id):
    parent = begin(experiment_id)
    searched(parent, 4)
    failed = children(parent)[2]
    assert [run.info.status for run in children(parent)] == ["FINISHED", "FINISHED", "FAILED", "FINISHED"]
    assert failed.data.tags["error"] == "ValueError('this one fails')"
    assert METRIC not in failed.data.metrics


def test_trials_taken_up_are_those_that_were_logged(experiment_id):
    # given a search of four trials, one of which failed
    parent = begin(experiment_id)
    before = searched(parent, 4)
    # when another study takes them up
    study = optuna.create_study()
    assert search.take_up(study, parent, METRIC) == 4
    # then it knows the same trials
    for new, old in zip(study.trials, before.trials, strict=True):
        assert (new.number, new.state, new.params, new.value) == (old.number, old.state, old.params, old.value)
        assert new.distributions == old.distributions


def test_number_of_a_trial_that_never_ended_stays_empty(experiment_id):
    # given a search whose second trial was running when the end came
    parent = begin(experiment_id)
    searched(parent, 4)
    mlflow.delete_run(children(parent)[1].info.run_id)
    # when it is taken up
    study = optuna.create_study()
    assert search.take_up(study, parent, METRIC) == 3
    # then the others keep their numbers
    assert [trial.state for trial in study.trials] == [
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]
    assert study.trials[1].params == {}


def test_search_of_a_process_that_is_gone_is_unfinished(experiment_id):
    # given a process that has ended, and the run of its search
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        name = search.process_name(psutil.Process(process.pid))
    parent = begin(experiment_id, search="a search", process=name)
    # then
    assert search.unfinished("a search", experiment_id).info.run_id == parent.info.run_id


def test_search_at_which_a_process_works_is_left_alone(experiment_id):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        begin(experiment_id, search="a search", process=search.process_name(psutil.Process(process.pid)))
        assert search.unfinished("a search", experiment_id) is None


def test_new_process_with_the_old_number_is_another(experiment_id):
    # given a search of a process that had this test's number, but began at another moment
    machine, number, began = search.process_name().rsplit(" ", 2)
    parent = begin(experiment_id, search="a search", process=f"{machine} {number} {int(began) - 1000}")
    # then
    assert search.unfinished("a search", experiment_id).info.run_id == parent.info.run_id


OTHERS = {
    "another search": {"search": "another", "process": "here"},
    "another machine": {"search": "a search", "process": "no-such-machine 1 1"},
    "no process": {"search": "a search"},
}


@pytest.mark.parametrize("tags", OTHERS.values(), ids=OTHERS)
def test_other_searches_are_left_alone(experiment_id, tags):
    begin(experiment_id, **tags)
    assert search.unfinished("a search", experiment_id) is None


def test_finished_search_is_not_taken_up(experiment_id):
    parent = begin(experiment_id, search="a search", process=f"{search.platform.node()} 1 1")
    mlflow.MlflowClient().set_terminated(parent.info.run_id)
    assert search.unfinished("a search", experiment_id) is None


def test_name_with_a_quote_is_refused(experiment_id):
    with pytest.raises(ValueError, match="Name the search without quotes"):
        search.unfinished("Zoë's search", experiment_id)


PROGRAM = """
    import sys, time
    import mlflow, optuna
    from lifecycle import search

    def objective(trial):
        time.sleep(0.05)
        return trial.suggest_float("x", -1, 1) ** 2

    client = mlflow.MlflowClient()
    parent = client.create_run(sys.argv[1], tags={"search": "a search", "process": search.process_name()})
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1))
    study.optimize(objective, 1000, callbacks=[search.log_trials(parent, "loss")])
"""


def test_killed_search_goes_on_with_its_trials(experiment_id, store, tmp_path):
    # given a search in a process of its own that is killed in the middle
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), experiment_id]
    variables = environment(tmp_path, MLFLOW_TRACKING_URI=store)
    with subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(mlflow.search_runs([experiment_id])) < 8 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    # when it is looked for and taken up
    parent = search.unfinished("a search", experiment_id)
    study = optuna.create_study()
    count = search.take_up(study, parent, "loss")
    # then every trial that ended is there once, and the search goes on after them
    assert count >= 5
    study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2, 2, callbacks=[search.log_trials(parent, "loss")])
    ended = [run for run in children(parent) if run.info.status == "FINISHED"]
    numbers = [json.loads(run.data.tags["trial"])["number"] for run in ended]
    assert len(numbers) == len(set(numbers)) == count + 2
