"""Run a search whose every trial is a run, and which goes on after it was killed.

MLflow's own Optuna storage keeps a study in its store, at about ten times the cost of an untracked
trial, and the cost of a trial grows with their number. Here a trial is logged by four calls when it
ends, and the runs of the trials are all that a search needs to go on.
"""

import json
import platform
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

import mlflow
import optuna
import psutil
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from mlflow_lifecycle.datasets import fingerprint
from mlflow_lifecycle.exceptions import InvalidInputError, SearchFailedError

if TYPE_CHECKING:
    from mlflow.data.pandas_dataset import PandasDataset


def run_search(
    objective: Callable[[optuna.Trial], float],
    dataset: "PandasDataset",
    *,
    name: str,
    metric: str,
    experiment_id: str,
    trials: int,
    seed: int,
    tags: dict[str, str] | None = None,
) -> tuple[optuna.Study, Run]:
    """Search for the parameters with the lowest score, or finish a search that was interrupted.

    Args:
        objective: takes an Optuna trial and returns its score.
        dataset: the rows that the objective learns from and is scored on.
        name: of the search. Searches with the same name, dataset and seed are the same.
        metric: the name of the score in the runs.
        experiment_id: where the run of the search and those of its trials are logged.
        trials: the number of trials in the end, including those before an interruption.
        seed: of the sampler TPE.
        tags: of the run of the search and of those of its trials.

    Returns:
        The study, and the run of the search, which has the best parameters, their score and the
        number of trials.

    Raises:
        InvalidInputError: ``trials`` is less than 1.
        SearchFailedError: no trial succeeded. The message has the error of the first.
    """
    if trials < 1:
        raise InvalidInputError(f"trials must be at least 1, got {trials}")
    client = mlflow.MlflowClient()
    tags = tags or {}
    own_tags = {
        "mlflow.runName": f"search {name}",
        "search": f"{name}, TPE, seed {seed}, data {fingerprint(dataset.df)}",
        "process": process_name(),
    }
    study = optuna.create_study()
    parent = find_interrupted(own_tags["search"], experiment_id)
    count = 0
    if parent is None:
        parent = client.create_run(experiment_id, tags=tags | own_tags)
        client.log_inputs(parent.info.run_id, [dataset_input(dataset)])
    else:
        count = load_trials(study, parent, metric)
        client.set_tag(parent.info.run_id, "process", own_tags["process"])
        client.set_tag(parent.info.run_id, "resumed", f"with {count} trials")
        client.update_run(parent.info.run_id, status="RUNNING")
    study.sampler = optuna.samplers.TPESampler(seed=seed + count)
    status = "KILLED"  # by Ctrl+C, for example
    try:
        study.optimize(
            keep_error(objective),
            max(trials - count, 0),
            catch=Exception,
            callbacks=[log_trials(parent, metric, tags, dataset)],
        )
        status = "KILLED" if study.get_trials(states=[TrialState.COMPLETE]) else "FAILED"
        log_best(study, parent, metric)
        status = "FINISHED"
    finally:
        client.set_terminated(parent.info.run_id, status)
    return study, mlflow.get_run(parent.info.run_id)


def log_best(study: optuna.Study, parent: Run, metric: str) -> None:
    """Log the best parameters, their score and the number of trials to the run of the search.

    Raises:
        SearchFailedError: no trial succeeded. The message has the error of the first.
    """
    completed = study.get_trials(states=[TrialState.COMPLETE])
    if not completed:
        error = "no record"
        for trial in reversed(study.trials):
            error = trial.user_attrs.get("error", error)
        raise SearchFailedError(f"No trial succeeded. The first failed with {error}")
    now = milliseconds(datetime.now())
    values = [Metric(metric, study.best_value, now, 0), Metric("trials", len(completed), now, 0)]
    best = [Param(name, str(value)) for name, value in study.best_params.items()]
    mlflow.MlflowClient().log_batch(parent.info.run_id, values, best)


def dataset_input(dataset: "PandasDataset") -> DatasetInput:
    """Return a dataset as an input of a run, with its fingerprint as the tag ``sha256``."""
    context = InputTag("mlflow.data.context", "training")
    sha256 = InputTag("sha256", fingerprint(dataset.df))
    return DatasetInput(Dataset(**dataset.to_dict()), [context, sha256])


def process_name(process: psutil.Process | None = None) -> str:
    """Return what identifies a process, by default this one: machine, number and start time."""
    process = process or psutil.Process()
    return f"{platform.node()} {process.pid} {process.create_time():.0f}"


def keep_error(objective: Callable[[optuna.Trial], float]) -> Callable[[optuna.Trial], float]:
    """Return the objective, with the error of a failed trial kept as its attribute ``error``."""

    def call_objective(trial: optuna.Trial) -> float:
        try:
            return objective(trial)
        except Exception as error:
            trial.set_user_attr("error", repr(error))
            raise

    return call_objective


def log_trials(
    parent: Run, metric: str, tags: dict[str, str], dataset: "PandasDataset"
) -> Callable[[optuna.Study, FrozenTrial], None]:
    """Return a callback for ``study.optimize`` that logs each trial as a child run of ``parent``.

    Args:
        parent: the run of the search.
        metric: the name of the trial's value. Its duration is logged as ``duration_seconds``.
        tags: of every child, such as the commit.
        dataset: an input of every child.
    """
    client = mlflow.MlflowClient()
    data = dataset_input(dataset)

    def log_trial(study: optuna.Study, trial: FrozenTrial) -> None:
        distributions = {}
        for name, distribution in trial.distributions.items():
            distributions[name] = distribution_to_json(distribution)
        record = {
            "number": trial.number,
            "params": trial.params,
            "distributions": distributions,
        }
        own_tags = {"mlflow.parentRunId": parent.info.run_id, "trial": json.dumps(record)}
        ended = milliseconds(trial.datetime_complete)
        values = [Metric("duration_seconds", trial.duration.total_seconds(), ended, 0)]
        status = "FAILED"
        if trial.state == TrialState.COMPLETE:
            status = "FINISHED"
            values.append(Metric(metric, trial.value, ended, 0))
        else:
            own_tags["error"] = trial.user_attrs.get("error", "")[:5000]
        run = client.create_run(
            parent.info.experiment_id,
            milliseconds(trial.datetime_start),
            tags | own_tags,
            f"trial {trial.number:03d}",
        )
        params = [Param(name, str(value)) for name, value in trial.params.items()]
        client.log_inputs(run.info.run_id, [data])
        client.log_batch(run.info.run_id, values, params)
        client.set_terminated(run.info.run_id, status, ended)

    return log_trial


def milliseconds(moment: datetime) -> int:
    """Return a local time as MLflow counts it: milliseconds since 1970."""
    return int(moment.timestamp() * 1000)


def find_interrupted(search: str, experiment_id: str) -> Run | None:
    """Return the run of a search that was begun on this machine and interrupted, or None.

    A search is left alone if a process of this machine still works at it, if it was begun on
    another machine, or if it failed: then the objective has to be corrected first.

    Args:
        search: the tag ``search`` of its run: data, model, sampler, seed.
        experiment_id: where to look.
    """
    filter_string = f"tags.search = {search!r} and status != 'FINISHED' and status != 'FAILED'"
    this = psutil.Process()
    running = set()
    for process in psutil.process_iter(["create_time"]):
        if process != this:
            running.add(process_name(process))
    for run in mlflow.search_runs([experiment_id], filter_string, output_format="list"):
        name = run.data.tags.get("process", "")
        if name.startswith(f"{platform.node()} ") and name not in running:
            return run
    return None


def load_trials(study: optuna.Study, parent: Run, metric: str) -> int:
    """Add the trials that were logged below ``parent`` to a study, and return how many there are.

    A trial that was running at an interruption was not logged. Its number stays empty.
    """
    filter_string = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    trials = {}
    for run in mlflow.search_runs([parent.info.experiment_id], filter_string, output_format="list"):
        if run.info.status in ("FINISHED", "FAILED"):
            number, trial = read_trial(run, metric)
            trials[number] = trial
    for number in range(max(trials, default=-1) + 1):
        study.add_trial(trials.get(number) or create_trial(state=TrialState.FAIL))
    return len(trials)


def read_trial(run: Run, metric: str) -> tuple[int, FrozenTrial]:
    """Return the number of the trial that a run records, and the trial."""
    record = json.loads(run.data.tags["trial"])
    distributions = {}
    for name, text in record["distributions"].items():
        distributions[name] = json_to_distribution(text)
    attributes = {}
    if "error" in run.data.tags:
        attributes["error"] = run.data.tags["error"]
    trial = create_trial(
        state=TrialState.COMPLETE if run.info.status == "FINISHED" else TrialState.FAIL,
        params=record["params"],
        distributions=distributions,
        value=run.data.metrics.get(metric),
        user_attrs=attributes,
    )
    return record["number"], trial
