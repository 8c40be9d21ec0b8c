"""A version served: verified, in an environment of its own, and nothing of it left when whoever started it is gone."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import mlflow
import pandas as pd
import psutil
import pytest
from asking import as_verified, ask, split
from click.testing import CliRunner
from execution import ROOT, environment, wait_until
from sklearn.ensemble import RandomForestClassifier
from versions import iris_rows, register, save, store_in

from mlflow_lifecycle.cli import main
from mlflow_lifecycle.exceptions import NotVerifiedError, ServingFailedError
from mlflow_lifecycle.serving import SERVER, read_record, serve, serve_verified, training_limits
from mlflow_lifecycle.signing.keys import own_key, own_public_key
from mlflow_lifecycle.signing.statement import sign
from mlflow_lifecycle.signing.verify import release_tag, released_now, verified

HERE = {"python": Path(sys.executable)}  # an environment that is there
FEATURES = iris_rows().drop(columns="species")
TREE = "sklearn.tree._tree.Tree"


@pytest.fixture(scope="module")
def iris(tmp_path_factory):
    """Give a saved model of Iris, as if verified, with the rows it learned from."""
    return as_verified(save(tmp_path_factory.mktemp("iris") / "model"), iris_rows())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give a folder with a store: version 1 of iris is released as champion, version 2 is a candidate, both forests."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as monkeypatch, store_in(folder, monkeypatch):
        for _ in range(2):
            register(folder, RandomForestClassifier(3, random_state=0), skops_trusted_types=[TREE])
        with verified("models:/iris/1", own_public_key(), trusted_types=[TREE]) as version:
            moment = released_now("iris", "champion", own_public_key())
            statement = replace(version.statement, purpose="release", alias="champion", released_at=moment)
            sign(version.folder.parent, statement, own_key())
        client = mlflow.MlflowClient()
        client.set_registered_model_alias("iris", "champion", "1")
        client.set_model_version_tag("iris", "1", release_tag("champion"), moment)
    return folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Give the folder in which this process and its children make their temporary files; empty at the end."""
    place = tmp_path / "temporary files"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield place
    assert list(place.iterdir()) == []


def processes_in(place: Path) -> list[psutil.Process]:
    """Return the processes whose temporary files go to ``place`` or below."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR", "").startswith(str(place)):
                found.append(process)
    return found


@pytest.mark.extended  # it takes long
def test_server_answers_until_the_block_ends_with_an_error_and_leaves_nothing(iris, temporary):
    with pytest.raises(InterruptedError), serve_verified(iris, **HERE) as server:
        status, text = ask(server.address, split(FEATURES))
        assert (status, json.loads(text)["predictions"][:2]) == (200, ["setosa", "setosa"])
        assert (server.name, server.version) == ("flowers", "7")
        assert list(temporary.iterdir()) != []
        # and only on the loopback interface
        listening = [c for c in psutil.Process(server.process.pid).net_connections("inet") if c.status == "LISTEN"]
        assert [connection.laddr.ip for connection in listening] == ["127.0.0.1"]
        raise InterruptedError
    # then it has ended by itself when it was asked to, and was not killed
    assert server.process.returncode == -signal.SIGTERM


STARTED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from asking import as_verified
from mlflow_lifecycle.serving import serve_verified
python = Path(sys.executable) if sys.argv[3] == "here" else None
with serve_verified(as_verified(Path(sys.argv[2])), python=python) as server:
    print(server.address, flush=True)
    time.sleep(999)
"""


@pytest.mark.extended  # it takes long
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signal")
@pytest.mark.parametrize("moment", ["serving", "building"])
def test_nothing_outlives_a_caller_that_is_killed(iris, temporary, moment):
    # given a process that serves, or builds the environment to serve from
    command = [sys.executable, "-c", STARTED, ROOT / "tests/helpers", iris.folder]
    command.append("here" if moment == "serving" else "built")
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as caller:
        if moment == "serving":
            assert caller.stdout.readline().startswith(b"http://127.0.0.1:")
        else:
            wait_until(lambda: list(temporary.glob("serving-*/packages-*/*")))
        assert len(processes_in(temporary)) >= 2
        # when it is killed
        caller.kill()
    # then its processes end, and its files go
    wait_until(lambda: not processes_in(temporary))
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"leave_out": ("colour",)}, "leave_out must name columns of the signature, got 'colour'"),
        ({"python": Path("/usr/bin/false")}, r"is not served\. See its log\."),
    ],
    ids=["a setting that does not fit", "no word"],
)
@pytest.mark.extended  # it takes long
def test_server_that_cannot_start_is_said_in_one_line(iris, temporary, options, told):
    with (
        pytest.raises(ServingFailedError, match=told) as error,
        serve_verified(iris, **HERE | options),
    ):
        pass
    assert "\n" not in str(error.value)


def test_no_temporary_folder_is_said_and_the_present_one_left_alone(iris, tmp_path, monkeypatch):
    # given a folder with files of somebody, and a full disk
    (tmp_path / "settings.json").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlflow_lifecycle.serving.KEEPER", "raise SystemExit('No usable temporary directory found')")
    # when
    with pytest.raises(ServingFailedError, match="No temporary folder can be made"), serve_verified(iris, **HERE):
        pass
    # then
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"settings.json": "mine"}


@pytest.mark.extended  # it takes long
def test_code_of_the_working_directory_is_not_imported(iris, tmp_path, monkeypatch):
    """Attack 26."""
    # given files with the names of modules that the server and its keeper import
    for name in ("psutil", "tempfile", "json", "mlflow", "uvicorn", "metrics", "schema"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    # when a model is served from their folder, then it answers
    with serve_verified(iris, **HERE) as server:
        assert ask(server.address, path="/ping")[0] == 200


@pytest.mark.extended  # it takes long
def test_port_in_use_is_said(iris):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ServingFailedError, match="already in use"),
        serve_verified(iris, **HERE, port=taken.getsockname()[1]),
    ):
        pass


def test_command_says_that_its_port_is_in_use_before_it_builds_anything():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        answer = CliRunner().invoke(main, ["serve", "models:/iris/1", "--port", str(port)])
    assert answer.exit_code == 1
    assert answer.stderr == f"Error: Port {port} is in use. Choose another one: --port {port + 1}\n"


def test_limits_come_from_the_training_rows(iris):
    # given the margin of half a range beyond
    limits = training_limits(iris, 0.5)
    # then a limit is as far from the values that the version learned from
    assert limits["petal length (cm)"] == pytest.approx([1.0 - 0.5 * 5.9, 6.9 + 0.5 * 5.9])
    assert set(limits) == set(FEATURES)


def written(folder: Path, inputs: dict[str, list]) -> Path:
    """Write a record of one request with these columns, and a line that was only begun; return its folder."""
    entry = {"time": "2026-01-31T12:00:00.000+00:00", "id": "id", "name": "flowers", "version": "7"}
    entry |= {"inputs": inputs, "predictions": ["setosa"] * len(next(iter(inputs.values())))}
    (folder / "requests-2026-01-31-aa.jsonl").write_text(json.dumps(entry) + '\n{"id": "half')
    return folder


def test_record_is_read_as_rows_with_their_answers(tmp_path):
    rows = read_record(written(tmp_path, FEATURES.head(2).to_dict("list")))
    first = ["request_id", "request_time", "model_name", "model_version"]
    assert [*rows] == [*first, *FEATURES, "prediction"]
    pd.testing.assert_frame_equal(rows[[*FEATURES]], FEATURES.head(2))
    assert rows["request_time"].tolist() == [pd.Timestamp("2026-01-31T12:00:00Z")] * 2


def test_record_with_gaps_is_read_as_the_model_got_it(tmp_path):
    rows = read_record(written(tmp_path, {"long": [2**53 + 1, None], "text": ["a", None], "double": [0.5, None]}))
    # then a whole number has all its digits, and a gap in text is the one that the server gives to the model
    assert rows["long"].dtype == "Int64"
    assert rows["long"][0] == 2**53 + 1
    assert rows["text"][1] is not None
    assert rows.isna().loc[1, ["long", "text", "double"]].all()


def test_column_that_is_called_as_what_is_told_of_answers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"columns overlap.*'prediction'"):
        read_record(written(tmp_path, {"prediction": [1.5]}))


def test_candidate_and_unreviewed_type_are_not_served(folder, temporary, monkeypatch):
    with store_in(folder, monkeypatch):
        for uri, trusted in (("models:/iris/2", (TREE,)), ("models:/iris@champion", ())):
            with pytest.raises(NotVerifiedError), serve(uri, own_public_key(), trusted_types=trusted):
                pass


@pytest.mark.extended  # it builds the environment
def test_command_serves_a_release_in_its_own_environment_until_it_is_interrupted(folder, tmp_path):
    # given the command, with packages from the index
    record = tmp_path / "record"
    command = [sys.executable, "-m", "mlflow_lifecycle", "serve", "models:/iris@champion", "--trusted-type", TREE]
    command += ["--port", "0", "--record", record, "--record-limit", "50"]
    command += ["--leave-out", "petal width (cm)", "--limits", "0.5"]
    store = f"sqlite:///{folder.as_posix()}/mlflow.db"
    variables = environment(tmp_path, MLFLOW_TRACKING_URI=store, LIFECYCLE_KEYS=str(folder / "keys"))
    child = subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    limit = threading.Timer(300, child.kill)  # without it, a command that prints nothing would keep the test waiting
    limit.start()
    try:
        line = child.stdout.readline()
        address = re.fullmatch(r"Version 1 of iris answers: (http://127.0.0.1:\d+)/invocations\n", line)
        assert address, line + child.stderr.read()
        # then the server is run by an environment that holds the recorded packages and not this library
        (server,) = [p for p in psutil.Process(child.pid).children() if str(SERVER) in p.cmdline()]
        assert (tmp_path / "tmp") in Path(server.cmdline()[0]).parents
        status, text = ask(address[1], split(FEATURES))
        assert (status, json.loads(text)["predictions"]) == (200, iris_rows()["species"].tolist())
        assert "petal width (cm)" not in read_record(record)
        assert ask(address[1], split(FEATURES * 10))[0] == 400
        assert [path.name[:8] for path in (tmp_path / "tmp").iterdir()] == ["serving-"]  # nothing of the verification
        # when it is ended as by `docker stop`
        child.send_signal(signal.SIGTERM)
        output, errors = child.communicate(timeout=60)
    finally:
        limit.cancel()
        child.kill()
        child.communicate()
    # then it ends well, and nothing is left
    assert (child.returncode, output, errors) == (0, "Ended.\n", "")
    assert not server.is_running()
    assert list((tmp_path / "tmp").iterdir()) == []
