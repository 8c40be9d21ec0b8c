"""A search whose every trial is a run, and which goes on after a kill.

MLflow's own Optuna storage keeps a study in its store, at about ten times the cost of an untracked trial, and the cost
of a trial grows with their number. Here a trial is logged by three calls when it ends, whatever came before it; and the
runs of the trials are all that a search needs to go on.
"""

import json
import platform
from collections.abc import Callable
from datetime import datetime

import mlflow
import optuna
import psutil
from mlflow.entities import Metric, Param, Run
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState, create_trial


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


def log_trials(parent: Run, metric: str, tags: dict[str, str] | None = None) -> Callable:
    """Return a callback for ``study.optimize`` that logs each trial, as it ends, as a child run of ``parent``.

    Args:
        parent: the run of the search.
        metric: the name under which the trial's value is logged; beside it goes ``duration_seconds``.
        tags: go to every child, such as the commit.
    """
    client = mlflow.MlflowClient()

    def log_trial(study: optuna.Study, trial: FrozenTrial) -> None:
        distributions = {name: distribution_to_json(value) for name, value in trial.distributions.items()}
        record = {"number": trial.number, "params": trial.params, "distributions": distributions}
        marks = (tags or {}) | {"mlflow.parentRunId": parent.info.run_id, "trial": json.dumps(record)}
        metrics = {"duration_seconds": trial.duration.total_seconds()}
        completed = trial.state == TrialState.COMPLETE
        if completed:
            metrics[metric] = trial.value
        else:
            marks["error"] = trial.user_attrs.get("error", "")[:5000]
        began, ended = milliseconds(trial.datetime_start), milliseconds(trial.datetime_complete)
        run = client.create_run(parent.info.experiment_id, began, marks, f"trial {trial.number:03d}").info
        values = [Metric(name, value, ended, 0) for name, value in metrics.items()]
        client.log_batch(run.run_id, values, [Param(name, str(value)) for name, value in trial.params.items()])
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
    nobody here can tell, so it is left alone. The parent run's tag ``process`` says who works at it.
    """
    filter_string = f"tags.search = '{quoted(search)}' and attributes.status != 'FINISHED'"
    this = psutil.Process()
    at_work = {process_name(process) for process in psutil.process_iter(["create_time"]) if process != this}
    for run in mlflow.search_runs([experiment_id], filter_string, output_format="list"):
        process = run.data.tags.get("process", "")
        if process.startswith(f"{platform.node()} ") and process not in at_work:
            return run
    return None


def quoted(text: str) -> str:
    """Return ``text`` for use in quotes in a filter string.

    Raises:
        ValueError: it has a quote, for which MLflow's filters know no escape.
    """
    if "'" in text:
        raise ValueError(f"Name the search without quotes, which MLflow cannot look for: {text}")
    return text


def take_up(study: optuna.Study, parent: Run, metric: str) -> int:
    """Add to ``study`` the trials that were logged below ``parent``, by their numbers, and return how many there are.

    A trial that was running when the end came was never logged. Its number stays empty, and it is tried anew.
    """
    filter_string = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    runs = mlflow.search_runs([parent.info.experiment_id], filter_string, output_format="list")
    trials = dict(logged_trial(run, metric) for run in runs if run.info.status in ("FINISHED", "FAILED"))
    for number in range(max(trials, default=-1) + 1):
        study.add_trial(trials.get(number) or create_trial(state=TrialState.FAIL))
    return len(trials)


def logged_trial(run: Run, metric: str) -> tuple[int, FrozenTrial]:
    """Return the number of the trial that ``run`` records, and the trial."""
    record = json.loads(run.data.tags["trial"])
    state = TrialState.COMPLETE if run.info.status == "FINISHED" else TrialState.FAIL
    distributions = {name: json_to_distribution(value) for name, value in record["distributions"].items()}
    value = run.data.metrics.get(metric)
    trial = create_trial(state=state, params=record["params"], distributions=distributions, value=value)
    return record["number"], trial
