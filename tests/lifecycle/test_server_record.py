"""The record of a server: each answer is in it, and it stays within its limits."""

import contextlib
import http.client
import json
import shutil
import signal
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from asking import FEATURES, PETAL, SPECIES, THREE, answered, as_verified, ask, predictor_of, record_entries, split

from mlflow_lifecycle.server.record import Record
from mlflow_lifecycle.serving import read_record, serve_verified

pytestmark = pytest.mark.extended  # it takes long


def test_record_has_each_answer_without_what_is_left_out_for_its_owner_alone(server, record):
    answer = json.loads(ask(server.address, split(THREE), path="/invocations?probabilities=true")[1])
    entries = record_entries(record)
    (entry,) = [entry for entry in entries if entry["id"] == answer["id"]]
    assert entry["inputs"] == THREE.drop(columns="sepal width (cm)").to_dict("list")
    assert {name: entry[name] for name in answer} == answer
    assert (entry["name"], entry["version"]) == ("flowers", "7")
    assert {path.stat().st_mode & 0o077 for path in record.glob("*.jsonl")} == {0}
    # and it has no refusal
    assert ask(server.address, split(THREE.assign(**{PETAL: "my secret"})))[0] == 400
    assert record_entries(record) == entries


def test_killed_server_has_recorded_all_that_it_answered(iris, tmp_path):
    # given clients that ask without pause
    seen, record = set(), tmp_path / "record"
    with serve_verified(as_verified(iris), python=Path(sys.executable), record=record) as server:

        def client():
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                while True:  # until it is killed
                    seen.add(json.loads(ask(server.address, split(THREE))[1])["id"])

        threads = [threading.Thread(target=client) for _ in range(4)]
        for thread in threads:
            thread.start()
        while len(seen) < 100:
            time.sleep(0.01)
        # when it is killed
        server.process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        for thread in threads:
            thread.join()
    # then each answer that arrived is in the record, whole
    kept = read_record(record)
    assert seen <= set(kept["request_id"])
    assert kept["prediction"].tolist() == SPECIES * (len(kept) // 3)


def test_nothing_is_answered_that_cannot_be_recorded(iris, tmp_path):
    resource = pytest.importorskip("resource", reason="Windows has no limits for a process")
    # given a predictor that has answered, and a disk on which only a few more bytes fit
    predictor = predictor_of(iris, record=str(tmp_path))
    assert answered(predictor, {"inputs": THREE.to_dict("list")})[0] == 200
    (file,) = tmp_path.iterdir()
    before, (_, hard) = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    # when it is asked again
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(OSError, match="full"):
            answered(predictor, {"inputs": THREE.to_dict("list")})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    # then it says so, and half a line is not left
    assert file.read_bytes() == before
    assert answered(predictor, {"inputs": THREE.to_dict("list")})[0] == 200
    assert len(record_entries(tmp_path)) == 2


def test_record_and_log_that_cannot_be_written_are_said(iris, tmp_path):
    # given a server whose record is gone, and whose log is on a full disk
    record = tmp_path / "record"
    with (
        Path("/dev/full").open("w") as log,
        serve_verified(as_verified(iris), python=Path(sys.executable), record=record, log=log) as server,
    ):
        shutil.rmtree(record)
        # when it is asked, then it refuses, and goes on
        for _ in range(2):
            status, text = ask(server.address, split(THREE))
            assert (status, "recorded" in json.loads(text)["message"]) == (503, True)


def test_answers_are_recorded_after_somebody_has_removed_the_file(iris, tmp_path):
    # given a predictor whose file was removed
    predictor = predictor_of(iris, record=str(tmp_path / "record"))
    assert answered(predictor, {"inputs": THREE.to_dict("list")})[0] == 200
    next((tmp_path / "record").iterdir()).unlink()
    # then the next answer is in a new one
    assert answered(predictor, {"inputs": THREE.to_dict("list")})[0] == 200
    assert len(record_entries(tmp_path / "record")) == 1


def test_old_file_that_cannot_be_removed_stops_neither_the_server_nor_the_others(tmp_path):
    # given one that cannot be removed, as on Windows one that is open
    (tmp_path / "requests-2020-01-01-aa.jsonl").mkdir()
    (tmp_path / "requests-2020-01-01-bb.jsonl").touch()
    # when
    Record(str(tmp_path), 7, 10**9).remove_old()
    # then
    assert [path.name for path in tmp_path.iterdir()] == ["requests-2020-01-01-aa.jsonl"]


def test_record_is_forgotten_after_its_days(tmp_path):
    # given files of some days
    days = [datetime.now(UTC).date() - timedelta(days=ago) for ago in (0, 6, 7, 8, 400)]
    for day in days:
        (tmp_path / f"requests-{day}-abc.jsonl").touch()
    # when a record is kept there for a week
    Record(str(tmp_path), 7, 10**9)
    # then only what is older than that is gone
    left = {f"requests-{day}-abc.jsonl" for day in days[:3]}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_record_keeps_the_newest_entries_within_its_size_limit(tmp_path):
    """Attack 35."""
    # given a record of at most 100 kB, and large answers
    record = Record(str(tmp_path), 7, 100_000)
    for number in range(200):
        record.add({"number": number, "predictions": ["setosa"] * 500})
        # when old files are removed, as each second
        record.remove_old()
        # then all files together are never larger
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 100_000
    # and the newest entries are there, without a gap
    numbers = sorted(entry["number"] for entry in record_entries(tmp_path))
    assert numbers == [*range(numbers[0], 200)]
    assert len(numbers) >= 10


def test_served_record_stays_within_its_size_limit(iris, tmp_path):
    """Attack 35."""
    body = split(pd.concat([FEATURES] * 10))
    options = {"record": tmp_path / "record", "record_bytes": 500_000}
    with serve_verified(as_verified(iris), python=Path(sys.executable), **options) as server:
        # given more answers than fit
        for _ in range(30):
            assert ask(server.address, body)[0] == 200
        # then old ones are removed
        deadline = time.monotonic() + 60
        while sum(path.stat().st_size for path in (tmp_path / "record").iterdir()) > 500_000:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert record_entries(tmp_path / "record") != []
