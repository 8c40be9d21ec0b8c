"""search: every trial is a run, and a search that was cut off goes on from its runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import mlflow
import optuna
import pandas as pd
import psutil
import pytest
from execution import environment

from mlflow_lifecycle import search
from mlflow_lifecycle.datasets import fingerprint
from mlflow_lifecycle.exceptions import SearchFailedError

METRIC = "loss"
ROWS = pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [0.0, 1.0, 0.0]})
DATASET = mlflow.data.from_pandas(ROWS, name="rows")


def objective(trial):
    x = trial.suggest_float("x", -1, 1)
    n = trial.suggest_int("n", 1, 9)
    if trial.number == 2:
        raise ValueError("this one fails")
    return (x - 0.5) ** 2 + n


@pytest.fixture(scope="module")
def store(tmp_path_factory, empty_store):
    """Give the address of a store, active as long as this module's tests."""
    folder = tmp_path_factory.mktemp("search")
    uri = f"sqlite:///{folder.as_posix()}/mlflow.db"
    shutil.copy(empty_store, folder)
    mlflow.set_tracking_uri(uri)
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
    data = search.dataset_input(DATASET)
    for _ in range(trials):
        search.log_trial(parent, search.run_trial(study, objective), METRIC, {"commit": "abc"}, data)
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
    assert search.load_trials(study, parent, METRIC) == 4
    # then it knows the same trials
    for new, old in zip(study.trials, before.trials, strict=True):
        assert (new.number, new.state, new.params, new.value) == (old.number, old.state, old.params, old.value)
        assert new.distributions == old.distributions
        assert new.user_attrs == old.user_attrs


def test_search_of_a_process_that_is_gone_is_unfinished(experiment_id):
    # given a process that has ended, and the run of its search
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        name = search.process_name(psutil.Process(process.pid))
    parent = begin(experiment_id, search="a search", process=name)
    # then
    assert search.find_interrupted("a search", experiment_id).info.run_id == parent.info.run_id


def test_search_at_which_a_process_works_is_left_alone(experiment_id):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        begin(experiment_id, search="a search", process=search.process_name(psutil.Process(process.pid)))
        assert search.find_interrupted("a search", experiment_id) is None


def test_new_process_with_the_old_number_is_another(experiment_id):
    # given a search of a process that had this test's number, but began at another moment
    machine, number, began = search.process_name().rsplit(" ", 2)
    parent = begin(experiment_id, search="a search", process=f"{machine} {number} {int(began) - 1000}")
    # then
    assert search.find_interrupted("a search", experiment_id).info.run_id == parent.info.run_id


OTHERS = {
    "another search": {"search": "another", "process": "here"},
    "another machine": {"search": "a search", "process": "no-such-machine 1 1"},
    "no process": {"search": "a search"},
}


@pytest.mark.parametrize("tags", OTHERS.values(), ids=OTHERS)
def test_other_searches_are_left_alone(experiment_id, tags):
    begin(experiment_id, **tags)
    assert search.find_interrupted("a search", experiment_id) is None


def test_name_may_have_a_quote(experiment_id):
    parent = begin(experiment_id, search="Zoë's search", process=f"{search.platform.node()} 1 1")
    assert search.find_interrupted("Zoë's search", experiment_id).info.run_id == parent.info.run_id


# A whole search


def run(experiment_id, objective=objective, rows=ROWS, **options):
    """Run a search of six trials, and return what it returns."""
    options = {"name": "a search", "metric": METRIC, "trials": 6, "seed": 1} | options
    dataset = mlflow.data.from_pandas(rows, name="rows")
    return search.run_search(objective, dataset, experiment_id=experiment_id, **options)


def searches(experiment_id):
    return [found for found in mlflow.search_runs([experiment_id], output_format="list") if "search" in found.data.tags]


def test_run_of_the_search_has_the_best_parameters_and_score(experiment_id):
    study, parent = run(experiment_id, tags={"commit": "abc"})
    assert parent.info.run_name == "search a search"
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {name: str(value) for name, value in study.best_params.items()}
    assert parent.data.metrics == {METRIC: study.best_value, "trials": 5}  # the third of six fails
    assert parent.data.tags["commit"] == "abc"
    assert "resumed" not in parent.data.tags


def test_search_and_trials_have_the_dataset_with_its_sha256(experiment_id):
    _, parent = run(experiment_id)
    for found in [parent, *children(parent)]:
        (item,) = found.inputs.dataset_inputs
        assert item.dataset.name == "rows"
        assert {tag.key: tag.value for tag in item.tags}["sha256"] == fingerprint(ROWS)


def test_search_that_is_finished_is_not_taken_up(experiment_id):
    _, first = run(experiment_id)
    _, second = run(experiment_id)
    assert first.info.run_id != second.info.run_id
    assert len(children(first)) == len(children(second)) == 6


def interrupted(trial):
    if trial.number == 4:
        raise KeyboardInterrupt
    return objective(trial)


def test_interrupted_search_goes_on(experiment_id):
    # given a search of six trials that Ctrl+C ends in the fifth
    with pytest.raises(KeyboardInterrupt):
        run(experiment_id, interrupted)
    assert [found.info.status for found in searches(experiment_id)] == ["KILLED"]
    # when it is started again
    _, parent = run(experiment_id)
    # then it is one search, with each number once
    assert parent.data.tags["resumed"] == "with 4 trials"
    assert [found.info.run_name for found in children(parent)] == [f"trial {number:03d}" for number in range(6)]
    assert len(searches(experiment_id)) == 1


DIFFERENT = {
    "name": {"name": "another"},
    "metric": {"metric": "another"},
    "seed": {"seed": 2},
    "rows": {"rows": ROWS.assign(y=1.0)},
}


@pytest.mark.parametrize("options", DIFFERENT.values(), ids=DIFFERENT)
@pytest.mark.extended  # it takes long
def test_search_that_differs_is_another(experiment_id, options):
    with pytest.raises(KeyboardInterrupt):
        run(experiment_id, interrupted)
    _, parent = run(experiment_id, **options)
    assert "resumed" not in parent.data.tags
    assert len(searches(experiment_id)) == 2


def parabola(trial):
    return (trial.suggest_float("x", -1, 1) - 0.5) ** 2 + trial.suggest_int("n", 1, 9)


def test_search_in_which_all_trials_fail_says_why(experiment_id):
    def failing(trial):
        raise MemoryError("no memory left")

    with pytest.raises(
        SearchFailedError, match=r"No trial succeeded. The first failed with MemoryError\('no memory left'\)"
    ):
        run(experiment_id, failing, trials=2)
    (parent,) = searches(experiment_id)
    assert parent.info.status == "FAILED"
    assert [found.info.status for found in children(parent)] == ["FAILED", "FAILED"]


def test_search_whose_trials_all_failed_begins_anew_with_the_mended_objective(experiment_id):
    # given a search whose objective has a mistake
    def mistaken(trial):
        trial.suggest_float("x", -1, 1)
        raise NameError("a typo")

    with pytest.raises(SearchFailedError, match="a typo"):
        run(experiment_id, mistaken, trials=2)
    # when it is started again without the mistake
    _, parent = run(experiment_id, parabola, trials=2)
    # then all trials are run, in a search of its own
    assert "resumed" not in parent.data.tags
    assert parent.data.metrics["trials"] == 2
    assert sorted(found.info.status for found in searches(experiment_id)) == ["FAILED", "FINISHED"]


def test_failed_trials_of_a_killed_search_count_and_their_error_is_said(experiment_id):
    # given a search that was killed after its last trial, all of which had failed
    def failing(trial):
        raise MemoryError("no memory left")

    with pytest.raises(SearchFailedError):
        run(experiment_id, failing, trials=2)
    (killed,) = searches(experiment_id)
    mlflow.MlflowClient().update_run(killed.info.run_id, status="RUNNING")
    # when it goes on, then no trial is repeated
    with pytest.raises(SearchFailedError, match=r"The first failed with MemoryError\('no memory left'\)"):
        run(experiment_id, failing, trials=2)
    assert [found.info.status for found in children(killed)] == ["FAILED", "FAILED"]
    assert len(searches(experiment_id)) == 1


def test_search_of_one_trial_has_its_score(experiment_id):
    study, parent = run(experiment_id, parabola, trials=1)
    assert parent.data.metrics == {METRIC: study.trials[0].value, "trials": 1}


def test_search_without_a_trial_is_refused_before_anything_is_logged(experiment_id):
    with pytest.raises(ValueError, match="trials must be at least 1"):
        run(experiment_id, trials=0)
    assert searches(experiment_id) == []


PROGRAM = """
    import sys, time
    import mlflow
    import pandas as pd
    from mlflow_lifecycle import search

    def objective(trial):
        time.sleep(0.05)
        return trial.suggest_float("x", -1, 1) ** 2

    rows = mlflow.data.from_pandas(pd.DataFrame({"x": [1.0]}))
    options = {"name": "a search", "metric": "loss", "trials": 40, "seed": 1, "experiment_id": sys.argv[1]}
    search.run_search(objective, rows, **options)
"""


@pytest.mark.extended  # it takes long
def test_killed_search_goes_on_with_its_trials(experiment_id, store, tmp_path):
    # given a search in a process of its own that is killed in the middle
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), experiment_id]
    variables = environment(tmp_path, MLFLOW_TRACKING_URI=store)
    with subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(mlflow.search_runs([experiment_id])) < 8 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    # when the same program is started again
    (before,) = searches(experiment_id)
    assert before.info.status == "RUNNING"
    kept = {found.info.run_id for found in children(before) if found.info.status == "FINISHED"}
    subprocess.run(command, env=variables, check=True, stderr=subprocess.DEVNULL)
    # then the search is finished, with its old trials, and each number once
    (parent,) = searches(experiment_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["resumed"] == f"with {len(kept)} trials"
    ended = [found for found in children(parent) if found.info.status == "FINISHED"]
    assert kept <= {found.info.run_id for found in ended}
    assert [json.loads(found.data.tags["trial"])["number"] for found in ended] == list(range(40))
