"""Measure what tracking a search costs, against the same search untracked and against MLflow's own Optuna storage.

Usage: python benchmarks/search.py [--trials 30 300] [--rounds 3] [--storage-trials 30 60]

The objective is that of guide 03, on the petals alone: a linear model on Iris, cross-validated by log loss. It is run
by the same sampler in three ways:

- untracked: plain Optuna, trials in memory.
- tracked: by `mlflow_lifecycle.search.run_search`, as in the guide, which makes each trial a child run.
- storage: plain Optuna, its trials kept by `mlflow.optuna.storage.MlflowStorage`. Its cost grows with the number of
  trials, so it is measured at other numbers.

A round runs the ways in turn; a ratio is formed within a round, and its median over the rounds is the figure. The last
lines compare the mean cost per trial in the last tenth of a tracked search with that in the first tenth.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import mlflow
import optuna
from mlflow.optuna.storage import MlflowStorage
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlflow_lifecycle.search import run_search

SEED = 42
IRIS = load_iris(as_frame=True)
ROWS = IRIS.data.assign(species=IRIS.target_names[IRIS.target])
SPLITTER = StratifiedKFold(5, shuffle=True, random_state=SEED)


def objective(trial: optuna.Trial) -> float:
    """Return the log loss of a linear model on the petals, cross-validated, as in guide 03."""
    tried = {"C": trial.suggest_float("C", 1e-2, 1e3, log=True), "l1_ratio": trial.suggest_float("l1_ratio", 0, 1)}
    estimator = LogisticRegression(solver="saga", max_iter=10_000, random_state=SEED, **tried)
    model = make_pipeline(StandardScaler(), estimator)
    scores = cross_val_score(model, IRIS.data.iloc[:, 2:], ROWS["species"], cv=SPLITTER, scoring="neg_log_loss")
    return round(-scores.mean(), 6)


def search(experiment_id: str, way: str, trials: int) -> list[float]:
    """Run ``trials`` trials in one of the three ways and return the seconds from the start to the end of each.

    Args:
        experiment_id: where they are logged.
        way: "untracked", "tracked" or "storage".
        trials: how many.
    """
    ended = []

    def timed(trial: optuna.Trial) -> float:
        if trial.number:  # the one before has ended, and was logged
            ended.append(time.perf_counter() - began)
        return objective(trial)

    dataset = mlflow.data.from_pandas(ROWS, name="iris", targets="species")
    began = time.perf_counter()
    if way == "tracked":
        options = {"name": "benchmark", "metric": "cv_log_loss", "experiment_id": experiment_id, "seed": SEED}
        run_search(timed, dataset, trials=trials, **options)
    else:
        storage = MlflowStorage(experiment_id=experiment_id) if way == "storage" else None
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=SEED), storage=storage)
        study.optimize(timed, trials)
    return [*ended, time.perf_counter() - began]


def compare(experiment_id: str, way: str, trials: int, rounds: int) -> None:
    """Print the ratio of ``way`` to the untracked search, at that number of trials."""
    ratios, ends = [], []
    for _ in range(rounds):
        untracked, other = search(experiment_id, "untracked", trials), search(experiment_id, way, trials)
        ratios.append(other[-1] / untracked[-1])
        tenth = max(trials // 10, 1)
        ends.append(((other[-1] - other[-1 - tenth]) / tenth) / (other[tenth] / (tenth + 1)))
    print(
        f"{way} / untracked, {trials} trials: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f});"
        f" a trial at the end / at the beginning: {statistics.median(ends):.2f}"
    )


def main() -> None:
    """Compare the three ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="*", default=[30, 300])
    parser.add_argument("--storage-trials", type=int, nargs="*", default=[30, 60])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path(folder).as_posix()}/mlflow.db"
        experiment_id = mlflow.create_experiment("benchmark", Path(folder).as_uri())
        search(experiment_id, "tracked", 3)  # to warm up
        for trials in options.trials:
            compare(experiment_id, "tracked", trials, options.rounds)
        for trials in options.storage_trials:
            compare(experiment_id, "storage", trials, 1)


if __name__ == "__main__":
    main()
