"""A served model under load for a minute."""

import sys
import time
from pathlib import Path

import mlflow
import psutil
from asking import as_verified
from test_server_app import check_crowd, crowd

from mlflow_lifecycle.serving import serve_verified

MINUTE = 60


def test_fifty_clients_for_a_minute_lose_nothing_and_memory_stays_flat(iris, tmp_path):
    model = mlflow.sklearn.load_model(str(iris))
    with serve_verified(as_verified(iris), python=Path(sys.executable), record=tmp_path / "record") as server:
        memory = psutil.Process(server.process.pid).memory_info
        crowd(server, 50, lambda count: count < 20)
        before, end = memory().rss, time.monotonic() + MINUTE
        found = crowd(server, 50, lambda _: time.monotonic() < end, pause=0.5)
        assert memory().rss < before + 10_000_000
    check_crowd(found, tmp_path / "record", model)
