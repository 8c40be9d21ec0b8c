"""Measure how runs are logged, found and reported: as this project does it, beside a plain way.

Usage: python benchmarks/store.py [--runs 10000] [--rounds 3]

- A run as the notebooks log it, `log_params` and `log_metrics`, beside one call for each of 15 values. The two are
  logged in turn, a hundred runs of each, and the ratio is formed within a round.
- Then runs are logged until there are as many as asked for: is the last tenth as fast as the first?
- The best run, looked for by its metric as the quickstart does, and the champion, by its alias among as many versions:
  among 10, 1,000 and all.
- The report of that experiment by `lifecycle report`, beside `mlflow.search_runs`, which only fetches the same runs:
  seconds, and the most memory, each in a process of its own.

On SQLite, and on PostgreSQL where it is installed.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["MLFLOW_LOGGING_LEVEL"] = "ERROR"

import mlflow
import pandas as pd

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))
PARAMETERS = {f"parameter_{number}": number for number in range(8)}
METRICS = {f"metric_{number}": number / 7 for number in range(6)}
MODELS = ("LogisticRegression", "SVC", "RandomForest")
DATA = mlflow.data.from_pandas(pd.DataFrame({"length": [1.0, 2.0]}), name="validation")
PROGRAMS = {
    "report": "from mlflow_lifecycle.report import make_report; make_report('grown', 'score', 'feature_set')",
    "search_runs": "import mlflow; mlflow.search_runs(experiment_names=['grown'])",
}
MEASURE = """
import time, resource
begin = time.perf_counter()
{}
print(time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def log_run(way: str, number: int) -> float:
    """Log a run in one of the ways, "grown" with its data, and return how many seconds it took."""
    begin = time.perf_counter()
    tags = {"model": MODELS[number % 3], "feature_set": str(number % 7)}
    with mlflow.start_run(run_name=f"run {number}", tags=tags):
        metrics = METRICS | {"score": (number * 7919) % 10_007 / 10_007}
        if way == "one by one":
            for name, value in PARAMETERS.items():
                mlflow.log_param(name, value)
            for name, value in metrics.items():
                mlflow.log_metric(name, value)
        else:
            if way == "grown":
                mlflow.log_input(DATA, context="validation")
            mlflow.log_params(PARAMETERS)
            mlflow.log_metrics(metrics)
    return time.perf_counter() - begin


def milliseconds(look: Callable[[], object]) -> float:
    """Return how long it takes to look for something: the median of five."""
    taken = []
    for _ in range(5):
        begin = time.perf_counter()
        look()
        taken.append(time.perf_counter() - begin)
    return 1000 * statistics.median(taken)


def grow(folder: Path, experiment_id: str, runs: int) -> tuple[list[float], dict[str, dict[int, float]]]:
    """Log runs, each with a version; return the seconds of each run, and what looking for one took among how many."""
    client, taken = mlflow.MlflowClient(), []
    found = {"the best run": {}, "the champion": {}}
    client.create_registered_model("grown")
    for count in sorted({10, min(1000, runs), runs}):
        begin = len(taken)
        taken += [log_run("grown", number) for number in range(begin, count)]
        for _ in range(begin, count):
            client.create_model_version("grown", folder.as_uri())
        client.set_registered_model_alias("grown", "champion", str(count // 2))
        best = partial(mlflow.search_runs, [experiment_id], order_by=["metrics.score DESC"], max_results=1)
        found["the best run"][count] = milliseconds(best)
        found["the champion"][count] = milliseconds(partial(client.get_model_version_by_alias, "grown", "champion"))
    return taken, found


def of_a_process(program: str) -> tuple[float, float]:
    """Return the seconds that a program takes in a process of its own, imports included, and its most memory in MB."""
    command = [sys.executable, "-c", MEASURE.format(PROGRAMS[program])]
    variables = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    done = subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
    seconds, megabytes = map(float, done.stdout.split())
    return seconds, megabytes


def figure(values: list[float]) -> str:
    """Return the median of ratios, and their range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def measure(folder: Path, runs: int, rounds: int) -> None:
    """Measure in the active store, and print the lines."""
    ways = {way: mlflow.create_experiment(way, folder.as_uri()) for way in ("ours", "one by one", "grown")}
    ratios = []
    for _ in range(rounds):
        medians = {}
        for way in ("ours", "one by one"):
            mlflow.set_experiment(experiment_id=ways[way])
            medians[way] = statistics.median(log_run(way, number) for number in range(100))
        ratios.append(medians["ours"] / medians["one by one"])
    print(f"  a run, ours / one by one: {figure(ratios)}")
    mlflow.set_experiment(experiment_id=ways["grown"])
    taken, found = grow(folder, ways["grown"], runs)
    tenth = max(len(taken) // 10, 1)
    first, last = statistics.median(taken[:tenth]), statistics.median(taken[-tenth:])
    print(f"  a run among {runs}, the last tenth / the first tenth: {last / first:.2f}")
    for what, times in found.items():
        print(f"  {what}:", ", ".join(f"{time:.0f} ms among {count}" for count, time in times.items()))
    both = [{program: of_a_process(program) for program in PROGRAMS} for _ in range(rounds)]
    for number, what in enumerate(("seconds", "memory")):
        ours, plain = [[one[program][number] for one in both] for program in PROGRAMS]
        ratios = [one / other for one, other in zip(ours, plain, strict=True)]
        unit = "s" if what == "seconds" else "MB"
        peers = f"{statistics.median(ours):.1f} {unit} and {statistics.median(plain):.1f} {unit}"
        print(f"  the report on {runs} runs / search_runs, {what}: {figure(ratios)}, {peers}")


@contextlib.contextmanager
def stores(folder: Path) -> Iterator[dict[str, str]]:
    """Give the addresses of the stores that can be measured on this machine."""
    from postgresql import postgresql, programs

    found = {"SQLite": f"sqlite:///{folder}/mlflow.db"}
    with contextlib.ExitStack() as stack:
        if programs():
            place = stack.enter_context(postgresql("measured")).variables
            found["PostgreSQL"] = (
                f"postgresql+psycopg2://{place['PGUSER']}:measured@127.0.0.1:{place['PGPORT']}/postgres"
            )
        yield found


def main() -> None:
    """Measure in each store."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, stores(Path(place)) as found:
        for name, uri in found.items():
            print(name)
            mlflow.set_tracking_uri(uri)
            measure(Path(place, name), settings.runs, settings.rounds)


if __name__ == "__main__":
    main()
