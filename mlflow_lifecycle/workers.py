"""Run a search by several workers that share a queue, and that goes on if one of them dies.

MLflow's way to share a study, ``MlflowSparkStudy``, needs Spark, and the cost of a trial grows with
their number. Here Optuna keeps the queue in PostgreSQL, and workers log the trials as child runs.
"""

import contextlib
import math
import os
import platform
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import optuna
from mlflow.entities import Run
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from mlflow_lifecycle.exceptions import InvalidInputError, SearchFailedError
from mlflow_lifecycle.experiments import printable

HEARTBEAT = 2  # seconds between two heartbeats of a trial
GRACE = 10  # seconds without a heartbeat after which a worker counts as dead
RETRIES = 3  # a trial that so many workers died of is not started again
WANTED = "wanted"  # marks the trials that were put into the queue


class CutOffError(BaseException):
    """MLflow cannot record a trial, or Ctrl+C was pressed. See ``__cause__``.

    It is no ``Exception``, so that Optuna does not end the trial. Another worker starts it again.
    """


def open_storage(address: str) -> RDBStorage:
    """Open the PostgreSQL database of the queue, in which the trials of dead workers start again.

    Args:
        address: ``postgresql://user@host/database``. Put a password into PGPASSWORD or
            ``~/.pgpass``.

    Raises:
        SearchFailedError: it is not PostgreSQL, or does not answer.
    """
    scheme, _, place = address.partition(":")
    if not scheme.startswith("postgresql"):
        raise SearchFailedError(
            "The queue must be in a PostgreSQL database: postgresql://user@host/database"
        )
    try:
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            return RDBStorage(
                f"postgresql+psycopg2:{place}",
                engine_kwargs={"connect_args": {"connect_timeout": 10}},
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=start_again,
            )
    except Exception as error:
        cause = " ".join(printable(str(error)).split()) or type(error).__name__
        raise SearchFailedError(f"Cannot use the PostgreSQL of the search: {cause}") from None


def start_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Put the trial of a dead worker into the queue again, and mark its run as killed."""
    RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)(study, trial)
    if "run_id" in trial.user_attrs:
        mlflow.MlflowClient().set_terminated(trial.user_attrs["run_id"], "KILLED")


def make_queue(address: str, run_id: str, trials: list[dict], metric: str) -> optuna.Study:
    """Create the study of a search for the highest value, and put its trials into the queue.

    Args:
        address: see `open_storage`.
        run_id: of the parent run. It is the name of the study.
        trials: for each, the parameters that the sampler does not choose.
        metric: the name under which workers log the value of the objective.

    Raises:
        SearchFailedError: see `open_storage`.
    """
    study = optuna.create_study(
        storage=open_storage(address), study_name=run_id, direction="maximize"
    )
    study.set_user_attr("metric", metric)
    for parameters in trials:
        study.enqueue_trial(parameters, user_attrs={WANTED: True})
    return study


def load_objective(where: str) -> Callable[[optuna.Trial], float]:
    """Return the function at ``FILE.py:function``.

    Raises:
        InvalidInputError: there is no such file or function.
    """
    source, _, name = where.rpartition(":")
    if not Path(source).is_file():
        raise InvalidInputError(
            f"There is no file {Path(source).resolve()} with an objective, as in FILE.py:function"
        )
    objective = runpy.run_path(source, run_name=f"objective in {Path(source).stem}").get(name)
    if not callable(objective):
        raise InvalidInputError(f"There is no function {name!r} in {source}")
    return objective


def track(
    objective: Callable[[optuna.Trial], float], parent: Run, metric: str, source: str = ""
) -> Callable[[optuna.Trial], float]:
    """Return the objective, with each trial logged as a child run of ``parent``.

    A trial whose objective fails has the value NaN, so that Optuna marks it as failed. If MLflow
    fails or Ctrl+C is pressed, it raises `CutOffError`.
    """
    tags = {"mlflow.source.name": source, "worker": f"{platform.node()} {os.getpid()}"}
    if "mlflow.source.git.commit" in parent.data.tags:
        tags["mlflow.source.git.commit"] = parent.data.tags["mlflow.source.git.commit"]

    def run_trial(trial: optuna.Trial) -> float:
        if WANTED not in trial.user_attrs:  # another worker has just taken the last of the queue
            raise optuna.TrialPruned
        trial.set_user_attr("worker", tags["worker"])
        try:
            with mlflow.start_run(
                run_name=f"trial {trial.number:03d}",
                tags=tags | {"trial": str(trial.number)},
                experiment_id=parent.info.experiment_id,
                parent_run_id=parent.info.run_id,
                nested=True,
            ) as run:
                trial.set_user_attr("run_id", run.info.run_id)
                try:
                    value = float(objective(trial))
                except Exception as error:
                    value = math.nan
                    mlflow.set_tag("error", repr(error)[:5000])
                    reason = printable(repr(error))
                    print(f"Trial {trial.number} failed: {reason}", file=sys.stderr)
                mlflow.log_params(trial.params)
                if math.isnan(value):
                    mlflow.end_run("FAILED")
                else:
                    mlflow.log_metric(metric, value)
        except (Exception, KeyboardInterrupt) as error:
            raise CutOffError from error
        return value

    return run_trial


def work(
    run_id: str, objective: Callable[[optuna.Trial], float], address: str, source: str = ""
) -> None:
    """Run trials of a search until none is waiting, and none is running that may start again.

    A trial fails if its objective fails. If MLflow cannot record a trial, or Ctrl+C is pressed, the
    worker ends, and another one starts the trial again.

    Args:
        run_id: of the parent run, in the active store.
        objective: takes a trial and returns its value.
        address: see `open_storage`.
        source: the file of the objective, for a tag of the runs.

    Raises:
        SearchFailedError: see `open_storage`, or the search has no study there.
        mlflow.MlflowException: there is no such run, or a trial cannot be recorded.
    """
    parent = mlflow.get_run(run_id)
    sampler = optuna.samplers.TPESampler()  # without a seed: each worker must draw other numbers
    try:
        study = optuna.load_study(study_name=run_id, storage=open_storage(address), sampler=sampler)
    except KeyError:
        raise SearchFailedError(
            f"The PostgreSQL of the search has no study {run_id}. Is it the right one?"
        ) from None
    run_trial = track(objective, parent, study.user_attrs["metric"], source)
    while True:
        states = set()
        for trial in study.get_trials(deepcopy=False):
            if WANTED in trial.user_attrs:
                states.add(trial.state)
        if TrialState.WAITING in states:
            try:
                study.optimize(run_trial, n_trials=1)
            except CutOffError as error:
                raise error.__cause__ from None
        elif TrialState.RUNNING in states:
            time.sleep(1)
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                optuna.storages.fail_stale_trials(study)
        else:
            return


@contextlib.contextmanager
def worker_process(
    run_id: str, objective: str, address: str, log: Path
) -> Iterator[subprocess.Popen]:
    """Start a worker on this machine. At the end of the block it is killed if it still runs."""
    command = [sys.executable, "-P", "-m", "mlflow_lifecycle", "search-worker", run_id]
    command += ["--objective", objective]
    variables = {"SEARCH_STORAGE": address, "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    with Path(log).open("a") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
