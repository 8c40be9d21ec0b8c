"""Measure how runs are logged and found: as the notebooks do it, beside one call for each value.

Usage: python benchmarks/store.py [--runs 5000] [--rounds 3]

- ours: `log_params` and `log_metrics`, one call each, as in the notebooks.
- one by one: `log_param` and `log_metric` for each of eight parameters and seven metrics.

The two are logged in turn, a hundred runs of each, and the ratio is formed within a round. Then runs are logged until
there are as many as asked for: is the last tenth as fast as the first? At the end the best run is looked for by its
metric, as the quickstart does, among few runs and among all. On SQLite.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["MLFLOW_LOGGING_LEVEL"] = "ERROR"

import mlflow

PARAMETERS = {f"parameter_{number}": number for number in range(8)}
METRICS = {f"metric_{number}": number / 7 for number in range(7)}


def log_run(way: str, number: int) -> float:
    """Log a run in one of the two ways, and return how many seconds it took."""
    begin = time.perf_counter()
    with mlflow.start_run(run_name=f"run {number}"):
        if way == "ours":
            mlflow.log_params(PARAMETERS)
            mlflow.log_metrics(METRICS | {"score": (number * 7919) % 10_007})
        else:
            for name, value in PARAMETERS.items():
                mlflow.log_param(name, value)
            for name, value in METRICS.items():
                mlflow.log_metric(name, value)
    return time.perf_counter() - begin


def find_best(experiment_id: str) -> float:
    """Look for the best run, and return how many seconds it took: the median of five."""
    taken = []
    for _ in range(5):
        begin = time.perf_counter()
        mlflow.search_runs([experiment_id], order_by=["metrics.score DESC"], max_results=1)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        mlflow.set_tracking_uri(f"sqlite:///{place}/mlflow.db")
        ways = {way: mlflow.create_experiment(way, Path(place).as_uri()) for way in ("ours", "one by one")}
        ratios = []
        for _ in range(settings.rounds):
            medians = {}
            for way, experiment_id in ways.items():
                mlflow.set_experiment(experiment_id=experiment_id)
                medians[way] = statistics.median(log_run(way, number) for number in range(100))
            ratios.append(medians["ours"] / medians["one by one"])
        print(f"a run, ours / one by one: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        grown = mlflow.create_experiment("grown", Path(place).as_uri())
        mlflow.set_experiment(experiment_id=grown)
        taken = [log_run("ours", number) for number in range(10)]
        few = find_best(grown)
        taken += [log_run("ours", number) for number in range(10, settings.runs)]
        tenth = max(len(taken) // 10, 1)
        first, last = statistics.median(taken[:tenth]), statistics.median(taken[-tenth:])
        print(f"a run among {settings.runs}, the last tenth / the first tenth: {last / first:.2f}")
        best = find_best(grown)
        print(f"the best run, among {settings.runs} / among 10: {best / few:.2f} ({few * 1000:.0f} ms among 10)")


if __name__ == "__main__":
    main()
