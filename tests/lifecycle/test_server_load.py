"""A served model under load for a minute."""

import itertools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pandas as pd
import psutil
from asking import FEATURES, PETAL, as_verified, ask, split

from mlflow_lifecycle.serving import read_record, serve_verified

MINUTE = 60


def crowd(server, seconds: float, pause: float) -> list[tuple[str, int, str]]:
    """Let fifty clients ask for flowers, with a pause between; return the ids, which flower it was, and the answers."""
    end = time.monotonic() + seconds

    def client(number: int):
        found = []
        while time.monotonic() < end:
            flower = (number + len(found)) % 150
            status, text = ask(server.address, split(FEATURES.iloc[[flower]]))
            assert status == 200, text
            answer = json.loads(text)
            found.append((answer["id"], flower, answer["predictions"][0]))
            time.sleep(pause)
        return found

    with ThreadPoolExecutor(50) as clients:
        return list(itertools.chain.from_iterable(clients.map(client, range(50))))


def test_fifty_clients_for_a_minute_lose_nothing_and_memory_stays_flat(iris, tmp_path):
    # given a server that has answered fifty clients at once
    with serve_verified(as_verified(iris), python=Path(sys.executable), record=tmp_path / "record") as server:
        memory = psutil.Process(server.process.pid).memory_info
        found = crowd(server, 10, pause=0)
        before = memory().rss
        # when they ask for a minute
        found += crowd(server, MINUTE, pause=0.5)
        assert memory().rss < before + 10_000_000
    # then each was answered rightly, and each answer is in the record, once
    answers = pd.DataFrame(found, columns=["request_id", "flower", "answer"])
    assert (answers["answer"] == mlflow.sklearn.load_model(str(iris)).predict(FEATURES)[answers["flower"]]).all()
    both = answers.merge(read_record(tmp_path / "record"), on="request_id", validate="one_to_one")
    assert len(both) == len(found)
    assert (both["prediction"] == both["answer"]).all()
    assert (both[PETAL] == FEATURES[PETAL].to_numpy()[both["flower"]]).all()
