"""A search by several workers that share a queue, an Optuna study in PostgreSQL, and that a dead worker does not stop.

MLflow's way to share a study, ``MlflowSparkStudy``, needs Spark, and the cost of a trial grows with their number. Here
Optuna keeps the queue, and each trial is a child run in MLflow, logged by whoever runs it, on any machine.
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
from optuna.trial import TrialState

from mlflow_lifecycle.exceptions import InvalidInputError, SearchFailedError
from mlflow_lifecycle.experiments import printable

HEARTBEAT = 2  # seconds between two signs of life of a trial
GRACE = 10  # seconds without one after which its worker counts as dead: more than any pause of a living one
RETRIES = 3  # a trial that so many workers have died of is not begun again
WANTED = "wanted"  # marks the trials that were put into the queue


class CutOffError(BaseException):
    """A trial is cut off, for the reason in ``__cause__``: MLflow cannot record it, or somebody pressed Ctrl+C.

    It is no ``Exception``, so Optuna ends no trial with it: the trial stays open, as that of a killed worker.
    """


def open_storage(address: str, parent: Run | None = None) -> optuna.storages.RDBStorage:
    """Open the PostgreSQL that holds the queue.

    Args:
        address: ``postgresql://user@host/database``. A password belongs into PGPASSWORD or ``~/.pgpass``.
        parent: the run of the search, for a worker: it then begins the trials of workers that died again.

    Raises:
        SearchFailedError: it is not PostgreSQL, or gives no answer.
    """
    if not re.match(r"postgresql([+]\w+)?://", address):
        raise SearchFailedError(
            "The queue must be in a PostgreSQL: postgresql://user@host/database"
        )
    url = re.sub(
        r"^postgresql([+]\w+)?:", "postgresql+psycopg2:", address
    )  # the driver that is installed
    options: dict[str, Any] = {"engine_kwargs": {"connect_args": {"connect_timeout": 10}}}
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        if parent:
            retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)

            def begin_again(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
                retry(study, trial)
                close_run(parent, trial)

            options |= {"heartbeat_interval": HEARTBEAT, "grace_period": GRACE}
            options |= {"heartbeat_stale_trial_callback": begin_again}
        try:
            return optuna.storages.RDBStorage(url, **options)
        except ImportError:
            raise SearchFailedError(
                "The driver of PostgreSQL is missing. Install it: make scale"
            ) from None
        except Exception as error:
            cause = " ".join(printable(str(error)).split()) or type(error).__name__
            raise SearchFailedError(f"Cannot use the PostgreSQL of the search: {cause}") from None


def close_run(parent: Run, trial: optuna.trial.FrozenTrial) -> None:
    """Give the child run of a trial whose worker has died the status KILLED."""
    filter_string = (
        f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.trial = '{trial.number}'"
    )
    for run in mlflow.search_runs([parent.info.experiment_id], filter_string, output_format="list"):
        mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")


def make_queue(
    address: str, run_id: str, trials: Sequence[Mapping[str, Any]], metric: str
) -> optuna.Study:
    """Make the study of a search for the highest value, and put its trials into the queue.

    Args:
        address: as for ``open_storage``.
        run_id: of the parent run. It becomes the name of the study.
        trials: for each, the settings that are not left to the sampler; ``{}`` leaves all to it.
        metric: the name under which workers log what the objective returns.

    Raises:
        SearchFailedError: as for ``open_storage``.
    """
    study = optuna.create_study(
        storage=open_storage(address), study_name=run_id, direction="maximize"
    )
    study.set_user_attr("metric", metric)
    for settings in trials:
        study.enqueue_trial(dict(settings), user_attrs={WANTED: True})
    return study


def load_objective(where: str) -> Callable[[optuna.Trial], float]:
    """Return the function that ``where`` names: ``FILE.py:function``.

    Raises:
        ValueError: there is no such file or function.
    """
    source, _, name = where.rpartition(":")
    if not Path(source).is_file():
        raise InvalidInputError(
            f"There is no file {Path(source).resolve()} with an objective, as in FILE.py:function"
        )
    found = runpy.run_path(source, run_name=f"objective in {Path(source).stem}").get(name)
    if not callable(found):
        raise InvalidInputError(f"There is no function {name!r} in {source}")
    return found


def tracked(
    objective: Callable, study: optuna.Study, parent: Run, tags: Mapping[str, str]
) -> Callable:
    """Return ``objective`` with each trial as a child run of ``parent``, which has its parameters and its value.

    It raises what the objective raises, and `CutOffError` where MLflow fails or somebody presses Ctrl+C.
    """
    worker = f"{platform.node()} {os.getpid()}"

    def run_trial(trial: optuna.Trial) -> float:
        if WANTED not in trial.user_attrs:  # another worker has just taken the last of the queue
            raise optuna.TrialPruned
        trial.set_user_attr("worker", worker)
        marks = {**tags, "trial": str(trial.number), "worker": worker}
        place = {
            "experiment_id": parent.info.experiment_id,
            "parent_run_id": parent.info.run_id,
            "nested": True,
        }
        failed = None
        try:
            with mlflow.start_run(run_name=f"trial {trial.number:03d}", tags=marks, **place):
                try:
                    value = float(objective(trial))
                except Exception as error:
                    failed = error
                    mlflow.set_tag("error", repr(error)[:5000])
                    raise
                finally:
                    mlflow.log_params(trial.params)
                mlflow.log_metric(study.user_attrs["metric"], value)
        except (Exception, KeyboardInterrupt) as error:
            if error is failed:
                raise
            raise CutOffError from error
        return value

    return run_trial


def work(
    run_id: str, objective: Callable[[optuna.Trial], float], address: str, source: str = ""
) -> None:
    """Run trials of the search until none is waiting, and none is running that may have to be begun again.

    A trial whose objective fails has failed. A trial that MLflow does not record, or that Ctrl+C cuts off, ends the
    worker, and is begun again by another one, as that of a killed worker.

    Args:
        run_id: of the parent run, in the store that MLflow uses here.
        objective: takes a trial and returns its value.
        address: as for ``open_storage``.
        source: the file of the objective, for the tag of the runs.

    Raises:
        SearchFailedError: as for ``open_storage``, or the search has no study there.
        mlflow.MlflowException: there is no such run, or a trial cannot be recorded.
    """
    parent = mlflow.get_run(run_id)
    storage = open_storage(address, parent)
    try:
        # No seed: every worker must draw other numbers, and the order of their trials is chance anyway.
        study = optuna.load_study(
            study_name=run_id, storage=storage, sampler=optuna.samplers.TPESampler()
        )
    except KeyError:
        raise SearchFailedError(
            f"The PostgreSQL of the search has no study {run_id}. Is it the right one?"
        ) from None
    tags = {
        name: value
        for name, value in parent.data.tags.items()
        if name == "mlflow.source.git.commit"
    }
    run_trial = tracked(objective, study, parent, tags | {"mlflow.source.name": source})
    while True:
        if study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
            try:
                study.optimize(run_trial, n_trials=1, catch=Exception)
            except CutOffError as error:
                raise error.__cause__ from None
        elif any(
            "worker" in trial.user_attrs for trial in study.get_trials(states=[TrialState.RUNNING])
        ):
            time.sleep(1)
            with warnings.catch_warnings(
                action="ignore", category=optuna.exceptions.ExperimentalWarning
            ):
                optuna.storages.fail_stale_trials(study)
        else:
            break


@contextlib.contextmanager
def worker_process(
    run_id: str, objective: str, address: str, log: Path
) -> Iterator[subprocess.Popen]:
    """Start a worker on this machine, by the command; at the end of the block it is killed if it still runs."""
    command = [sys.executable, "-P", "-m", "mlflow_lifecycle", "search-worker", run_id]
    command += ["--objective", objective]
    variables = os.environ | {
        "SEARCH_STORAGE": address,
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
    }
    with Path(log).open("a") as output:
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
