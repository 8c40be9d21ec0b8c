"""Run a search whose every trial is a run, and which goes on after it was killed.

MLflow's own Optuna storage keeps a study in its store, at about ten times the cost of an untracked
trial, and the cost of a trial grows with their number. Here a trial is logged by four calls when it
ends, and the runs of the trials are all that a search needs to go on.
"""

import json
import platform
from collections.abc import Callable

import mlflow
import optuna
import psutil
from mlflow.data.pandas_dataset import PandasDataset
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from mlflow_lifecycle.datasets import fingerprint
from mlflow_lifecycle.exceptions import InvalidInputError, SearchFailedError


def run_search(
    objective: Callable[[optuna.Trial], float],
    dataset: PandasDataset,
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
        name: of the search. Two searches are the same if their name, metric, dataset and seed are
            equal.
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
        "search": f"{name}, {metric}, TPE, seed {seed}, data {fingerprint(dataset.df)}",
        "process": process_name(),
    }
    data = dataset_input(dataset)
    study = optuna.create_study()
    count = 0
    parent = find_interrupted(own_tags["search"], experiment_id)
    if parent is None:
        parent = client.create_run(experiment_id, tags=tags | own_tags)
        client.log_inputs(parent.info.run_id, [data])
    else:
        count = load_trials(study, parent, metric)
        client.set_tag(parent.info.run_id, "process", own_tags["process"])
        client.set_tag(parent.info.run_id, "resumed", f"with {count} trials")
        client.update_run(parent.info.run_id, status="RUNNING")
    study.sampler = optuna.samplers.TPESampler(seed=seed + count)
    status = "KILLED"  # by Ctrl+C, for example
    try:
        for _ in range(trials - count):
            trial = run_trial(study, objective)
            log_trial(parent, trial, metric, tags, data)
        log_best(study, parent, metric)
        status = "FINISHED"
    except SearchFailedError:
        status = "FAILED"
        raise
    finally:
        client.set_terminated(parent.info.run_id, status)
    return study, mlflow.get_run(parent.info.run_id)


def run_trial(study: optuna.Study, objective: Callable[[optuna.Trial], float]) -> FrozenTrial:
    """Run the next trial of a study. If the objective fails, the trial keeps the error."""
    trial = study.ask()
    try:
        value = objective(trial)
    except Exception as error:
        trial.set_user_attr("error", repr(error)[:5000])
        return study.tell(trial, state=TrialState.FAIL)
    return study.tell(trial, value)


def log_best(study: optuna.Study, parent: Run, metric: str) -> None:
    """Log the best parameters, their score and the number of trials to the run of the search.

    Raises:
        SearchFailedError: no trial succeeded. The message has the error of the first.
    """
    completed = study.get_trials(states=[TrialState.COMPLETE])
    if not completed:
        error = study.trials[0].user_attrs.get("error", "no number")
        raise SearchFailedError(f"No trial succeeded. The first failed with {error}")
    metrics = {metric: study.best_value, "trials": len(completed)}
    mlflow.log_metrics(metrics, run_id=parent.info.run_id)
    mlflow.log_params(study.best_params, run_id=parent.info.run_id)


def dataset_input(dataset: PandasDataset) -> DatasetInput:
    """Return a dataset as an input of a run, with its fingerprint as the tag ``sha256``."""
    context = InputTag("mlflow.data.context", "training")
    sha256 = InputTag("sha256", fingerprint(dataset.df))
    return DatasetInput(Dataset(**dataset.to_dict()), [context, sha256])


def process_name(process: psutil.Process | None = None) -> str:
    """Return what identifies a process, by default this one: machine, number and start time."""
    process = process or psutil.Process()
    return f"{platform.node()} {process.pid} {process.create_time():.0f}"


def log_trial(
    parent: Run, trial: FrozenTrial, metric: str, tags: dict[str, str], data: DatasetInput
) -> None:
    """Log a trial as a child run of ``parent``, with its duration as ``duration_seconds``."""
    client = mlflow.MlflowClient()
    distributions = {}
    for name, distribution in trial.distributions.items():
        distributions[name] = distribution_to_json(distribution)
    record = {"number": trial.number, "params": trial.params, "distributions": distributions}
    own_tags = {"mlflow.parentRunId": parent.info.run_id, "trial": json.dumps(record)}
    started = int(trial.datetime_start.timestamp() * 1000)
    ended = int(trial.datetime_complete.timestamp() * 1000)
    metrics = [Metric("duration_seconds", trial.duration.total_seconds(), ended, 0)]
    status = "FAILED"
    if trial.state == TrialState.COMPLETE:
        status = "FINISHED"
        metrics.append(Metric(metric, trial.value, ended, 0))
    else:
        own_tags["error"] = trial.user_attrs.get("error", "no number")
    name = f"trial {trial.number:03d}"
    run = client.create_run(parent.info.experiment_id, started, tags | own_tags, name)
    params = [Param(name, str(value)) for name, value in trial.params.items()]
    client.log_inputs(run.info.run_id, [data])
    client.log_batch(run.info.run_id, metrics, params)
    client.set_terminated(run.info.run_id, status, ended)


def find_interrupted(search: str, experiment_id: str) -> Run | None:
    """Return the run of a search that was begun on this machine and interrupted, or None.

    A search is left alone if a process of this machine still works at it, if it was begun on
    another machine, or if it failed: then the objective has to be corrected first.

    Args:
        search: the tag ``search`` of its run: name, metric, sampler, seed, data.
        experiment_id: where to look.
    """
    filter_string = f"tags.search = {search!r} and status != 'FINISHED' and status != 'FAILED'"
    working = set()
    for process in psutil.process_iter():
        if process != psutil.Process():
            working.add(process_name(process))
    for run in mlflow.search_runs([experiment_id], filter_string, output_format="list"):
        name = run.data.tags.get("process", "")
        if name.startswith(f"{platform.node()} ") and name not in working:
            return run
    return None


def load_trials(study: optuna.Study, parent: Run, metric: str) -> int:
    """Add the trials that were logged below ``parent`` to a study, and return how many there are.

    A trial that was running at an interruption was not logged.
    """
    filter_string = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and status != 'RUNNING'"
    trials = {}
    for run in mlflow.search_runs([parent.info.experiment_id], filter_string, output_format="list"):
        record = json.loads(run.data.tags["trial"])
        trials[record["number"]] = make_trial(run, record, metric)
    for number in sorted(trials):
        study.add_trial(trials[number])
    return len(trials)


def make_trial(run: Run, record: dict, metric: str) -> FrozenTrial:
    """Return the trial that was logged as a run, by its tag ``trial``."""
    distributions = {}
    for name, text in record["distributions"].items():
        distributions[name] = json_to_distribution(text)
    attributes = {}
    state = TrialState.COMPLETE
    if "error" in run.data.tags:
        attributes["error"] = run.data.tags["error"]
        state = TrialState.FAIL
    return create_trial(
        state=state,
        params=record["params"],
        distributions=distributions,
        value=run.data.metrics.get(metric),
        user_attrs=attributes,
    )
