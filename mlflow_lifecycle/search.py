"""A search whose every trial is a run, and which goes on after a kill.

MLflow's own Optuna storage keeps a study in its store, at about ten times the cost of an untracked trial, and the cost
of a trial grows with their number. Here a trial is logged by four calls when it ends, whatever came before it; and the
runs of the trials are all that a search needs to go on.
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
    """Look for the parameters with the lowest score; go on with a search of the same name and rows that was cut off.

    Args:
        objective: takes an Optuna trial and returns its score.
        dataset: the rows that the objective learns from and is scored on.
        name: what is searched, as in the run's name: two searches with one name, dataset and seed are the same.
        metric: the name of the score in the runs.
        experiment_id: where the run of the search and those of its trials go.
        trials: how many trials there shall be in the end, those before a kill included.
        seed: of the sampler TPE.
        tags: go to the run of the search and to those of its trials.

    Returns:
        The study, and the run of the search, which has the best parameters, their score and the number of trials.

    Raises:
        ValueError: there shall be no trial.
        RuntimeError: no trial succeeded; with the error of the first.
    """
    if trials < 1:
        raise InvalidInputError("trials must be at least 1")
    search = f"{name}, TPE, seed {seed}, data {fingerprint(dataset.df)}"
    study, tags = optuna.create_study(), tags or {}
    parent, count = begin(
        study, search, dataset, metric, experiment_id, tags | {"mlflow.runName": f"search {name}"}
    )
    study.sampler = optuna.samplers.TPESampler(seed=seed + count)
    status = "KILLED"  # by Ctrl+C, for example
    try:
        callbacks = [log_trials(parent, metric, tags, dataset)]
        study.optimize(
            remembered(objective), max(trials - count, 0), catch=Exception, callbacks=callbacks
        )
        status = "KILLED" if study.get_trials(states=[TrialState.COMPLETE]) else "FAILED"
        log_best(study, parent, metric)
        status = "FINISHED"
    finally:
        mlflow.MlflowClient().set_terminated(parent.info.run_id, status)
    return study, mlflow.get_run(parent.info.run_id)


def begin(
    study: optuna.Study,
    search: str,
    dataset: "PandasDataset",
    metric: str,
    experiment_id: str,
    tags: dict[str, str],
) -> tuple[Run, int]:
    """Return the run of ``search``, and how many trials ``study`` took up from it: 0 in a new run."""
    client, own_tags = mlflow.MlflowClient(), {"search": search, "process": process_name()}
    parent = unfinished(search, experiment_id)
    if not parent:
        parent = client.create_run(experiment_id, tags=tags | own_tags)
        client.log_inputs(parent.info.run_id, [dataset_input(dataset)])
        return parent, 0
    count = take_up(study, parent, metric)
    for key, value in (own_tags | {"resumed": f"with {count} trials"}).items():
        client.set_tag(parent.info.run_id, key, value)
    client.update_run(parent.info.run_id, status="RUNNING")
    return parent, count


def log_best(study: optuna.Study, parent: Run, metric: str) -> None:
    """Log the best parameters, their score and the number of trials to the run of the search.

    Raises:
        RuntimeError: no trial succeeded; with the error of the first.
    """
    completed = study.get_trials(states=[TrialState.COMPLETE])
    if not completed:
        errors = [
            trial.user_attrs["error"] for trial in study.trials if "error" in trial.user_attrs
        ]
        raise SearchFailedError(
            f"No trial succeeded. The first failed with {errors[0] if errors else 'no record'}"
        )
    now = milliseconds(datetime.now())
    values = [Metric(metric, study.best_value, now, 0), Metric("trials", len(completed), now, 0)]
    best = [Param(name, str(value)) for name, value in study.best_params.items()]
    mlflow.MlflowClient().log_batch(parent.info.run_id, values, best)


def dataset_input(dataset: "PandasDataset") -> DatasetInput:
    """Return ``dataset`` as an input of a run, with its fingerprint as the tag ``sha256``."""
    tags = [
        InputTag("mlflow.data.context", "training"),
        InputTag("sha256", fingerprint(dataset.df)),
    ]
    return DatasetInput(Dataset(**dataset.to_dict()), tags)


def process_name(process: psutil.Process | None = None) -> str:
    """Return what tells ``process``, by default this one, from all others: machine, number, and when it began."""
    process = process or psutil.Process()
    return f"{platform.node()} {process.pid} {process.create_time():.0f}"


def remembered(objective: Callable[[optuna.Trial], float]) -> Callable[[optuna.Trial], float]:
    """Return ``objective``, with the error that a trial ends with kept as its attribute ``error``."""

    def wrapped(trial: optuna.Trial) -> float:
        try:
            return objective(trial)
        except Exception as error:
            trial.set_user_attr("error", repr(error))
            raise

    return wrapped


def log_trials(
    parent: Run, metric: str, tags: dict[str, str], dataset: "PandasDataset"
) -> Callable:
    """Return a callback for ``study.optimize`` that logs each trial, as it ends, as a child run of ``parent``.

    Args:
        parent: the run of the search.
        metric: the name under which the trial's value is logged; beside it goes ``duration_seconds``.
        tags: go to every child, such as the commit.
        dataset: what the trials learn from, which becomes an input of every child.
    """
    client, data = mlflow.MlflowClient(), dataset_input(dataset)

    def log_trial(study: optuna.Study, trial: FrozenTrial) -> None:
        distributions = {
            name: distribution_to_json(value) for name, value in trial.distributions.items()
        }
        record = {"number": trial.number, "params": trial.params, "distributions": distributions}
        marks = tags | {"mlflow.parentRunId": parent.info.run_id, "trial": json.dumps(record)}
        metrics = {"duration_seconds": trial.duration.total_seconds()}
        completed = trial.state == TrialState.COMPLETE
        if completed:
            metrics[metric] = trial.value
        else:
            marks["error"] = trial.user_attrs.get("error", "")[:5000]
        began, ended = milliseconds(trial.datetime_start), milliseconds(trial.datetime_complete)
        run = client.create_run(
            parent.info.experiment_id, began, marks, f"trial {trial.number:03d}"
        ).info
        values = [Metric(name, value, ended, 0) for name, value in metrics.items()]
        client.log_inputs(run.run_id, [data])
        client.log_batch(
            run.run_id, values, [Param(name, str(value)) for name, value in trial.params.items()]
        )
        client.set_terminated(run.run_id, "FINISHED" if completed else "FAILED", ended)

    return log_trial


def milliseconds(moment: datetime) -> int:
    """Return a local time as MLflow counts it: milliseconds since 1970."""
    return int(moment.timestamp() * 1000)


def unfinished(search: str, experiment_id: str) -> Run | None:
    """Return the run of a search that was begun on this machine and cut off, or None.

    Args:
        search: what the search is, as in its parent run's tag ``search``: data, model, sampler, seed.
        experiment_id: where to look.

    A search at which a process of this machine still works is not cut off. Of one that was begun on another machine,
    nobody here can tell, so it is left alone. The parent run's tag ``process`` says who works at it. A search that
    has failed is left alone, too: it can only begin anew, once the objective is mended.
    """
    filter_string = f"tags.search = {search!r} and status != 'FINISHED' and status != 'FAILED'"
    this = psutil.Process()
    at_work = {
        process_name(process) for process in psutil.process_iter(["create_time"]) if process != this
    }
    for run in mlflow.search_runs([experiment_id], filter_string, output_format="list"):
        process = run.data.tags.get("process", "")
        if process.startswith(f"{platform.node()} ") and process not in at_work:
            return run
    return None


def take_up(study: optuna.Study, parent: Run, metric: str) -> int:
    """Add to ``study`` the trials that were logged below ``parent``, by their numbers, and return how many there are.

    A trial that was running when the end came was never logged. Its number stays empty, and it is tried anew.
    """
    filter_string = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    found = mlflow.search_runs([parent.info.experiment_id], filter_string, output_format="list")
    trials = dict(
        logged_trial(run, metric) for run in found if run.info.status in ("FINISHED", "FAILED")
    )
    for number in range(max(trials, default=-1) + 1):
        study.add_trial(trials.get(number) or create_trial(state=TrialState.FAIL))
    return len(trials)


def logged_trial(run: Run, metric: str) -> tuple[int, FrozenTrial]:
    """Return the number of the trial that ``run`` records, and the trial."""
    record = json.loads(run.data.tags["trial"])
    state = TrialState.COMPLETE if run.info.status == "FINISHED" else TrialState.FAIL
    distributions = {
        name: json_to_distribution(value) for name, value in record["distributions"].items()
    }
    value = run.data.metrics.get(metric)
    error = {"error": run.data.tags["error"]} if "error" in run.data.tags else {}
    trial = create_trial(
        state=state,
        params=record["params"],
        distributions=distributions,
        value=value,
        user_attrs=error,
    )
    return record["number"], trial
