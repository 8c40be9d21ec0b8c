"""Run a search by several workers that share a queue, and that goes on if one of them dies.

MLflow's way to share a study, ``MlflowSparkStudy``, needs Spark, and the cost of a trial grows with
their number. Here Optuna keeps the queue in PostgreSQL, and workers log the trials as child runs.
"""

import contextlib
import os
import platform
import re
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    """A trial was interrupted: MLflow cannot record it, or Ctrl+C was pressed. See ``__cause__``.

    It is no ``Exception``, so that Optuna does not end the trial. Another worker starts it again.
    """


def open_storage(address: str, parent: Run | None = None) -> RDBStorage:
    """Open the PostgreSQL database of the queue.

    Args:
        address: ``postgresql://user@host/database``. Put a password into PGPASSWORD or
            ``~/.pgpass``.
        parent: for a worker, the run of the search. Trials of dead workers are then started again.

    Raises:
        SearchFailedError: it is not PostgreSQL, or does not answer.
    """
    if not re.match(r"postgresql([+]\w+)?://", address):
        raise SearchFailedError(
            "The queue must be in a PostgreSQL database: postgresql://user@host/database"
        )
    url = re.sub(r"^postgresql([+]\w+)?:", "postgresql+psycopg2:", address)
    engine = {"connect_args": {"connect_timeout": 10}}
    try:
        if parent is None:
            return RDBStorage(url, engine_kwargs=engine)
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            retry = RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)

            def start_again(study: optuna.Study, trial: FrozenTrial) -> None:
                retry(study, trial)
                close_run(parent, trial)

            return RDBStorage(
                url,
                engine_kwargs=engine,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=start_again,
            )
    except ImportError:
        remedy = "Run: pip install psycopg2-binary"
        raise SearchFailedError(f"The driver of PostgreSQL is missing. {remedy}") from None
    except Exception as error:
        cause = " ".join(printable(str(error)).split()) or type(error).__name__
        raise SearchFailedError(f"Cannot use the PostgreSQL of the search: {cause}") from None


def close_run(parent: Run, trial: FrozenTrial) -> None:
    """Give the child run of a trial whose worker has died the status KILLED."""
    children = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    filter_string = f"{children} and tags.trial = '{trial.number}'"
    for run in mlflow.search_runs([parent.info.experiment_id], filter_string, output_format="list"):
        mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")


def make_queue(
    address: str, run_id: str, trials: Sequence[Mapping[str, Any]], metric: str
) -> optuna.Study:
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
        study.enqueue_trial(dict(parameters), user_attrs={WANTED: True})
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
    objective: Callable[[optuna.Trial], float],
    study: optuna.Study,
    parent: Run,
    tags: Mapping[str, str],
) -> Callable[[optuna.Trial], float]:
    """Return the objective, with each trial logged as a child run of ``parent``.

    It raises what the objective raises, and `CutOffError` if MLflow fails or Ctrl+C was pressed.
    """
    worker = f"{platform.node()} {os.getpid()}"

    def run_trial(trial: optuna.Trial) -> float:
        if WANTED not in trial.user_attrs:  # another worker has just taken the last of the queue
            raise optuna.TrialPruned
        trial.set_user_attr("worker", worker)
        failure = None
        try:
            with mlflow.start_run(
                run_name=f"trial {trial.number:03d}",
                tags={**tags, "trial": str(trial.number), "worker": worker},
                experiment_id=parent.info.experiment_id,
                parent_run_id=parent.info.run_id,
                nested=True,
            ):
                try:
                    value = float(objective(trial))
                except Exception as error:
                    failure = error
                    mlflow.set_tag("error", repr(error)[:5000])
                    raise
                finally:
                    mlflow.log_params(trial.params)
                mlflow.log_metric(study.user_attrs["metric"], value)
        except (Exception, KeyboardInterrupt) as error:
            if error is failure:
                raise
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
        study = optuna.load_study(
            study_name=run_id, storage=open_storage(address, parent), sampler=sampler
        )
    except KeyError:
        raise SearchFailedError(
            f"The PostgreSQL of the search has no study {run_id}. Is it the right one?"
        ) from None
    tags = {"mlflow.source.name": source}
    if "mlflow.source.git.commit" in parent.data.tags:
        tags["mlflow.source.git.commit"] = parent.data.tags["mlflow.source.git.commit"]
    run_trial = track(objective, study, parent, tags)
    while True:
        if study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
            try:
                study.optimize(run_trial, n_trials=1, catch=Exception)
            except CutOffError as error:
                raise error.__cause__ from None
        elif is_running(study):
            time.sleep(1)
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                optuna.storages.fail_stale_trials(study)
        else:
            break


def is_running(study: optuna.Study) -> bool:
    """Return whether a worker runs a trial of the queue."""
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        if "worker" in trial.user_attrs:
            return True
    return False


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
