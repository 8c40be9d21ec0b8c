"""Measure what the gate takes, beside MLflow's own calls for the same questions.

Usage: python benchmarks/gate.py [--rounds 5]

- scored: all checks but the environment, on the 30 test rows of Iris, against a baseline. The peer evaluates both
  versions by `mlflow.models.evaluate` and compares them by `mlflow.validate_evaluation_results`.
- with the environment: the same and the environment, built from the recorded packages, each downloaded and verified;
  the candidate predicts in it. The peer then calls `mlflow.models.predict(env_manager="uv")`, which takes packages from
  uv's cache as they are, with what Python compiled of them in an earlier round; its environment is a new one, too.

A round runs both, in turn; a ratio is formed within a round, and its median over the rounds is the figure, with the
range. The network is in the second figure.
"""

import argparse
import contextlib
import io
import logging
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ |= {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_LOGGING_LEVEL": "ERROR"}

import matplotlib.pyplot as plt
import mlflow
import pytest
from mlflow.models import MetricThreshold
from sklearn.linear_model import LogisticRegression

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests/helpers"))

from releases import ROWS_TEST, ROWS_TRAIN  # noqa: E402
from versions import register, store_in  # noqa: E402

from mlflow_lifecycle.releases.gate import GateSettings, gate, gate_context  # noqa: E402
from mlflow_lifecycle.signing.keys import own_public_key  # noqa: E402
from mlflow_lifecycle.signing.verify import Verified, verified  # noqa: E402

THRESHOLD = 0.5


def ours(candidate: Verified, baseline: Verified, *, rebuild: bool) -> None:
    """Check a version as a release does."""
    with mlflow.start_run():
        settings = GateSettings({"accuracy_score": THRESHOLD}, rebuild=rebuild)
        context = gate_context(candidate, baseline, ROWS_TEST, "species", settings)
        verdict = gate(context)
    verdict.require()


def peer(candidate: Verified, baseline: Verified, *, rebuild: bool) -> None:
    """Ask MLflow the same as far as it can tell."""
    options = {"targets": "species", "model_type": "classifier"}
    options["evaluator_config"] = {"log_model_explainability": False}
    results = []
    for version in (candidate, baseline):
        with mlflow.start_run():
            results.append(mlflow.models.evaluate(str(version.folder), ROWS_TEST, **options))
    threshold = MetricThreshold(threshold=THRESHOLD, min_absolute_change=0.001, greater_is_better=True)
    mlflow.validate_evaluation_results({"accuracy_score": threshold}, *results)
    plt.close("all")
    if rebuild:
        with tempfile.TemporaryDirectory() as place:
            os.environ |= {"MLFLOW_ENV_ROOT": place, "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
            rows = ROWS_TEST.drop(columns="species")
            mlflow.models.predict(str(candidate.folder), rows, env_manager="uv", output_path=f"{place}/answer.json")


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes, with what it prints kept from the screen."""
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        function()
    return time.perf_counter() - begin


def measure(title: str, ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> None:
    """Run both in turn, and print the line of a table: seconds, and their ratio within a round."""
    taken = []
    for number in range(rounds + 1):
        pair = (seconds(ours), seconds(peer))
        if number:  # the first round imports and fills caches
            taken.append(pair)
    ratios = [own / other for own, other in taken]
    own, other = (statistics.median(times) for times in zip(*taken, strict=True))
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{title:24}{own:14.2f}{other:14.2f}   {spread}", flush=True)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args()
    logging.disable(logging.WARNING)
    with (
        tempfile.TemporaryDirectory() as name,
        pytest.MonkeyPatch.context() as patch,
        contextlib.ExitStack() as stack,
        store_in(Path(name), patch),
    ):
        for strength in (0.01, 1.0):  # the baseline, and a better one
            register(Path(name), LogisticRegression(C=strength, max_iter=1000), ROWS_TRAIN)
        baseline, candidate = (
            stack.enter_context(verified(f"models:/iris/{number}", own_public_key())) for number in (1, 2)
        )
        print(f"{'':24}{'the gate (s)':>14}{'MLflow (s)':>14}   the gate / MLflow")
        for title, rebuild in (("scored", False), ("with the environment", True)):
            measure(
                title,
                partial(ours, candidate, baseline, rebuild=rebuild),
                partial(peer, candidate, baseline, rebuild=rebuild),
                settings.rounds,
            )


if __name__ == "__main__":
    main()
