"""Measure what tracking a search costs, against the same search untracked and against MLflow's own Optuna storage.

Usage: python benchmarks/search.py [--trials 30 300] [--rounds 3] [--storage-trials 30 60]

What is measured is guide 03 itself: its cells are executed up to the search, in an empty SQLite store, and then its own
objective is run by its own sampler in three ways:

- untracked: plain Optuna, trials in memory.
- tracked: the same, with the guide's callback, which makes each trial a child run.
- storage: the same, with its trials kept by `mlflow.optuna.storage.MlflowStorage`. Its cost grows with the number of
  trials, so it is measured at other numbers.

A round runs the ways in turn; a ratio is formed within a round, and its median over the rounds is the figure. The last
lines compare the mean cost per trial in the last tenth of a tracked search with that in the first tenth.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

import matplotlib as mpl
import nbformat

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "guides" / "03_search_and_evaluate.ipynb"


def cells_before_the_search() -> list[str]:
    """Return the source of the guide's code cells that stand before the one that runs the search.

    Raises:
        ValueError: not just one cell runs a search.
    """
    notebook = nbformat.read(GUIDE, as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    (position,) = [number for number, source in enumerate(sources) if "study.optimize(" in source]
    return sources[:position]


def search(guide: dict, way: str, trials: int) -> list[float]:
    """Run ``trials`` trials in one of the three ways and return the seconds from the start to the end of each.

    Args:
        guide: the names that the guide's cells define.
        way: "untracked", "tracked" or "storage".
        trials: how many.
    """
    mlflow, optuna = guide["mlflow"], guide["optuna"]
    with mlflow.start_run(run_name=way) as run:
        guide["search_id"], guide["experiment_id"] = run.info.run_id, run.info.experiment_id
        storage = None
        if way == "storage":
            from mlflow.optuna.storage import MlflowStorage

            storage = MlflowStorage(experiment_id=run.info.experiment_id)
        began = time.perf_counter()
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=guide["seed"]), storage=storage)
        ended = []
        callbacks = [guide["log_trial"]] if way == "tracked" else []
        callbacks.append(lambda study, trial: ended.append(time.perf_counter() - began))
        study.optimize(guide["objective"], trials, callbacks=callbacks)
    return ended


def compare(guide: dict, way: str, trials: int, rounds: int) -> None:
    """Print the ratio of ``way`` to the untracked search, at that number of trials."""
    ratios, ends = [], []
    for _ in range(rounds):
        untracked, other = search(guide, "untracked", trials), search(guide, way, trials)
        ratios.append(other[-1] / untracked[-1])
        tenth = max(trials // 10, 1)
        ends.append(((other[-1] - other[-1 - tenth]) / tenth) / (other[tenth] / (tenth + 1)))
    print(
        f"{way} / untracked, {trials} trials: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f});"
        f" a trial at the end / at the beginning: {statistics.median(ends):.2f}"
    )


def main() -> None:
    """Execute the guide's cells and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="*", default=[30, 300])
    parser.add_argument("--storage-trials", type=int, nargs="*", default=[30, 60])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    mpl.use("Agg")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path(folder).as_posix()}/mlflow.db"
        os.chdir(ROOT)
        guide = {"__name__": "guide"}
        with contextlib.redirect_stdout(io.StringIO()):
            for source in cells_before_the_search():
                exec(source, guide)
        guide["optuna"].logging.set_verbosity(guide["optuna"].logging.ERROR)
        search(guide, "tracked", 3)  # to warm up
        for trials in options.trials:
            compare(guide, "tracked", trials, options.rounds)
        for trials in options.storage_trials:
            compare(guide, "storage", trials, 1)


if __name__ == "__main__":
    main()
