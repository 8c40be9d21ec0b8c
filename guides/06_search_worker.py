"""One worker of the search in guide 06: takes trials from the queue and runs them, each tracked, until none is left.

Usage, on any machine that reaches both servers, as often as you like:

    MLFLOW_TRACKING_URI=... SEARCH_STORAGE=postgresql://... python 06_search_worker.py RUN

RUN is the id of the parent run, and the name of the study. SEARCH_STORAGE is the address of the PostgreSQL that has the
study; where it wants a password, PGPASSWORD or ~/.pgpass is the place for it.

To search something else, put your own into `objective`. The rest stays.
"""

import logging
import os
import platform
import re
import sys
import time
import warnings

import mlflow
import optuna
from optuna.trial import TrialState
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_score

HEARTBEAT = 2  # seconds between two signs of life of a trial
GRACE = 10  # seconds without one after which its worker counts as dead: more than any pause of a living one


def objective(trial: optuna.Trial) -> float:
    """Score one forest on handwritten digits by cross-validation, in a run of its own below the parent run."""
    if "wanted" not in trial.user_attrs:  # another worker has just taken the last of the queue
        raise optuna.TrialPruned
    worker = f"{platform.node()} {os.getpid()}"
    trial.set_user_attr("worker", worker)
    settings = {
        "max_features": trial.suggest_float("max_features", 0.03, 0.3, log=True),
        "min_samples_leaf": trial.suggest_int("min_samples_leaf", 1, 8),
    }
    tags = source_tags | {"trial": str(trial.number), "worker": worker}
    with mlflow.start_run(run_name=f"trial {trial.number:03d}", parent_run_id=parent, nested=True, tags=tags):
        mlflow.log_params(settings)
        forest = RandomForestClassifier(random_state=0, **settings)
        accuracy = cross_val_score(forest, digits.data, digits.target, cv=3).mean()
        mlflow.log_metric("cv_accuracy", accuracy)
    return accuracy


def begin_again(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Put the trial of a worker that died back into the queue, and close its run."""
    study.enqueue_trial(trial.params, user_attrs={"wanted": True})
    filter_string = f"tags.`mlflow.parentRunId` = '{parent}' and tags.trial = '{trial.number}'"
    for run in mlflow.search_runs([experiment_id], filter_string, output_format="list"):
        mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")


def work(study: optuna.Study) -> None:
    """Run trials until none is waiting, and none is running that may have to be begun again."""
    while True:
        if study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
            study.optimize(objective, n_trials=1, catch=Exception)
        elif any("worker" in trial.user_attrs for trial in study.get_trials(states=[TrialState.RUNNING])):
            time.sleep(1)
            optuna.storages.fail_stale_trials(study)
        else:
            break


if __name__ == "__main__":
    if len(sys.argv) != 2 or not os.environ.get("SEARCH_STORAGE"):
        sys.exit(__doc__)
    parent = sys.argv[1]
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # the heartbeat
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    try:
        storage = optuna.storages.RDBStorage(
            re.sub(
                r"^postgresql([+]\w+)?:", "postgresql+psycopg2:", os.environ["SEARCH_STORAGE"]
            ),  # the driver we have
            engine_kwargs={"connect_args": {"connect_timeout": 10}},
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=begin_again,
        )
        # No seed: every worker must draw other numbers, and the order of their trials is chance anyway.
        study = optuna.load_study(study_name=parent, storage=storage, sampler=optuna.samplers.TPESampler())
        run = mlflow.get_run(parent)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        sys.exit(f"Cannot work on {parent}: " + re.sub(r"//\S*@", "//", reason))  # no password
    experiment_id = run.info.experiment_id
    mlflow.set_experiment(experiment_id=experiment_id)
    source_tags = {"mlflow.source.name": "guides/06_search_worker.py"}
    if commit := run.data.tags.get("mlflow.source.git.commit"):
        source_tags["mlflow.source.git.commit"] = commit
    digits = load_digits()
    work(study)
