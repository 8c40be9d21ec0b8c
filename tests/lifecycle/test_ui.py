"""`make ui`: what it prints, which port it takes, what it refuses, and how it ends."""

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import mlflow
import psutil
import pytest
import requests
from execution import environment, finished, free_port

COMMAND = [sys.executable, "-m", "mlflow_lifecycle", "ui"]
END = "Ctrl+C stops it.\n"


def register(folder: Path, name: str, versions: int) -> None:
    """Register a model with some versions, each with a run, in the store in ``folder``."""
    client = mlflow.MlflowClient(store(folder))
    experiment = client.create_experiment(name, (folder / "mlruns").as_uri())
    client.create_registered_model(name)
    for _ in range(versions):
        run = client.create_run(experiment).info.run_id
        client.create_model_version(name, f"runs:/{run}/model", run)


def store(folder: Path) -> str:
    """Return the address of the store in ``folder``."""
    return f"sqlite:///{folder.as_posix()}/mlflow.db"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, empty_store):
    """Give a folder with a store of two models: "older" with one version, and then "newer" with three."""
    folder = tmp_path_factory.mktemp("the store")
    shutil.copy(empty_store, folder)
    register(folder, "older", 1)
    register(folder, "newer", 3)
    return folder


@pytest.fixture
def labelled_links(monkeypatch):
    """Give the function that finds the links."""
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    from mlflow_lifecycle.ui import labelled_links

    return labelled_links


@contextlib.contextmanager
def started(folder: Path, log: Path, *options: str, uri: str = ""):
    """Start the interface on the store in ``folder``, as the only program of a terminal, and give its process."""
    variables = environment(folder, MLFLOW_TRACKING_URI=uri or store(folder))
    with log.open("w") as output:
        process = psutil.Popen(
            [*COMMAND, *options],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            for each in [*process.children(recursive=True), process]:
                each.kill()
        process.wait()


def wait_for(text: str, log: Path, process: psutil.Popen) -> str:
    """Return what ``process`` has printed to ``log`` once it has printed ``text``.

    Raises:
        AssertionError: it ended before, or took longer than two minutes.
    """
    deadline = time.monotonic() + 120
    while text not in (printed := log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, printed
        time.sleep(0.02)
    return printed


def still_there(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return those of ``processes`` that have not ended ten seconds from now."""
    return psutil.wait_procs(processes, timeout=10)[1]


@pytest.fixture(scope="module")
def session(folder):
    """Give the record of a session on a machine whose port 5000 is taken: it starts, answers, and ends by Ctrl+C."""
    log = folder / "session.log"
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # another program has it: just as well
            taken.bind(("127.0.0.1", 5000))
            taken.listen()
        with started(folder, log) as process:
            screen = wait_for(END, log, process)
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", screen)[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/health")
            answer = connection.getresponse().read().decode()
            connection.close()
            api = f"http://127.0.0.1:{port}/ajax-api/2.0/mlflow/experiments"  # what the interface calls
            requests.post(f"{api}/create", json={"name": "made there"}, timeout=60).raise_for_status()
            made = requests.get(f"{api}/get-by-name?experiment_name=made+there", timeout=60).json()["experiment"]
            processes = process.children(recursive=True)
            commands = [each.cmdline() for each in processes]
            os.killpg(process.pid, signal.SIGINT)
            status = process.wait(30)
    ended = SimpleNamespace(screen=log.read_text(), status=status, left=still_there(processes))
    return SimpleNamespace(screen=screen, port=port, answer=answer, made=made, commands=commands, ended=ended)


def test_links_come_last_and_with_labels_when_the_server_answers(session, folder):
    # given the runs of the two newest versions
    versions = mlflow.MlflowClient(store(folder)).search_model_versions("name = 'newer'")
    runs = {version.version: version.run_id for version in versions}
    # then the links stand below everything that the server has printed, and it answers
    labels = re.findall(r"^(.+):\n  http://", session.screen, flags=re.MULTILINE)
    assert labels == ["The two newest versions compared", "Their runs compared", "The registered model"]
    assert len(re.findall(r"^  http://\S+$", session.screen, flags=re.MULTILINE)) == 3
    assert re.search(rf"\n  http://\S+/models/newer\?\S+\n{re.escape(END)}$", session.screen)
    assert session.screen.index("Security middleware enabled") < session.screen.index("The two newest")
    assert session.answer == "OK"
    # and the comparison is that of versions 2 and 3
    compared, of_runs = re.findall(r"http://\S+/compare-\S+", session.screen)
    assert [runs[2] in compared, runs[3] in compared, runs[1] in compared] == [True, True, False]
    assert [runs[2] in of_runs, runs[3] in of_runs, runs[1] in of_runs] == [True, True, False]


def test_experiment_that_is_made_in_the_interface_can_be_used_without_it(session, folder):
    assert session.made["artifact_location"].startswith(f"{(folder / 'mlruns').as_uri()}/")


def test_store_may_be_named_by_a_relative_path(folder, tmp_path):
    log = tmp_path / "log"
    with started(folder, log, "--port", str(free_port()), uri="sqlite:///mlflow.db") as process:
        assert "http://" in wait_for(END, log, process)


def test_taken_usual_port_is_left_for_the_next_free_one(session):
    assert session.port > 5000
    assert f"\nPort 5000 is taken (on macOS by AirPlay), so this is port {session.port}.\n" in session.screen


def test_ctrl_c_ends_it_with_nothing_left_and_no_traceback(session):
    assert len(session.commands) == 2  # MLflow's and that of the server under it
    assert session.ended.left == []
    assert session.ended.status == 0
    assert session.ended.screen == f"{session.screen}\nThe MLflow interface has stopped.\n"
    assert "Traceback" not in session.screen


def test_address_of_the_store_with_its_password_is_in_no_command_line(session):
    assert "--port" in session.commands[0]
    assert "sqlite" not in str(session.commands)


UNDER_NOHUP = pytest.mark.skipif(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="it outlives it under nohup")


@pytest.mark.extended
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=UNDER_NOHUP)])
def test_it_ends_as_well_while_it_starts(folder, tmp_path, number):
    # given a server that does not answer yet
    log = tmp_path / "log"
    with started(folder, log, "--port", str(free_port())) as process:
        wait_for("its links follow", log, process)
        time.sleep(1)
        processes = process.children(recursive=True)
        # when
        os.killpg(process.pid, number)
        status = process.wait(30)
    # then
    assert processes != []
    assert still_there(processes) == []
    assert status == 0
    assert "http://" not in log.read_text()
    assert "Traceback" not in log.read_text()
    assert "KeyboardInterrupt" not in log.read_text()


@pytest.mark.extended
def test_it_ends_as_well_before_it_has_read_the_store(folder, tmp_path):
    # given a process that imports MLflow
    log = tmp_path / "log"
    with started(folder, log, "--port", str(free_port())) as process:
        time.sleep(0.5)
        # when
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(30)
    # then
    assert status == 0
    assert "http://" not in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.extended
def test_death_of_the_server_is_reported_and_leaves_nothing(folder, tmp_path):
    # given
    log = tmp_path / "log"
    with started(folder, log, "--port", str(free_port())) as process:
        screen = wait_for(END, log, process)
        processes = process.children(recursive=True)
        # when MLflow's command dies, and with it nobody who would end the server under it
        process.children()[0].kill()
        status = process.wait(30)
    # then
    assert status == 1
    (line,) = log.read_text().removeprefix(screen).splitlines()
    assert line.startswith("The MLflow server has ended by itself")
    assert still_there(processes) == []


def test_taken_port_that_was_asked_for_is_refused_with_the_remedy(folder):
    # given a port on which something listens
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # when the interface is started there
        variables = environment(folder, MLFLOW_TRACKING_URI=store(folder))
        process = finished([*COMMAND, "--port", str(port)], folder, variables, 60)
    # then
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert re.fullmatch(rf"Port {port} is taken\. Take another: make ui PORT=(\d+) \(without make: --port \1\)", line)
    assert process.stdout == ""


@pytest.mark.extended
@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_impossible_port_is_refused(folder, port):
    process = finished([*COMMAND, "--port", port], folder, environment(folder), 60)
    assert process.returncode == 2
    assert "is not in the range 1<=x<=65535" in process.stderr


@pytest.mark.extended
def test_server_that_runs_already_gets_just_its_links_and_keeps_its_password(folder, interface):
    # when the store is a server, and its address has a password
    address = interface.replace("//", "//somebody:hidden@")
    process = finished(COMMAND, folder, environment(folder, MLFLOW_TRACKING_URI=address), 60)
    # then
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0] == "The MLflow interface is up."
    assert [line for line in lines if line.startswith(f"  {interface}/#/")] == lines[2::2]
    assert len(lines[2::2]) == 3
    assert "hidden" not in process.stdout + process.stderr


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["http", "postgresql+nosuchdriver"])
def test_store_that_gives_no_answer_is_reported_without_its_password(folder, kind):
    # given
    address = f"{kind}://somebody:hidden@127.0.0.1:{free_port()}/mlflow?password=hidden"
    # when
    process = finished(COMMAND, folder, environment(folder, MLFLOW_TRACKING_URI=address), 60)
    # then
    assert process.returncode == 1
    lines = process.stderr.splitlines()
    assert lines[0].startswith("The store gives no answer: ")
    assert lines[-1] == "Correct or unset MLFLOW_TRACKING_URI."
    assert "Traceback" not in process.stderr
    assert "hidden" not in process.stdout + process.stderr


def test_missing_store_is_reported_with_the_remedy(tmp_path):
    process = finished(COMMAND, tmp_path, environment(tmp_path, MLFLOW_TRACKING_URI=store(tmp_path)), 60)
    assert process.returncode == 1
    assert process.stderr == f"There is no store at {store(tmp_path)} yet. Make one first: make run\n"
    assert not (tmp_path / "mlflow.db").exists()


def test_store_without_a_model_is_reported_with_the_remedy(tmp_path, labelled_links, empty_store):
    shutil.copy(empty_store, tmp_path)
    with pytest.raises(SystemExit, match=r"^No model is registered in this store yet\. Make one first: make run$"):
        labelled_links(store(tmp_path), "http://server")


def test_only_version_has_nothing_to_be_compared_with(tmp_path, labelled_links, empty_store):
    # given a model whose name needs quoting
    shutil.copy(empty_store, tmp_path)
    register(tmp_path, "only one", 1)
    # then
    expected = "The registered model:\n  http://server/#/models/only%20one?workflowType=machine_learning"
    assert labelled_links(store(tmp_path), "http://server") == expected


@pytest.mark.parametrize(("name", "links"), [("it's", 3), ('the "best"', 3), ('it\'s the "best"', 1)])
def test_name_with_quotes_leaves_out_only_the_links_that_cannot_be_made(
    name, links, tmp_path, labelled_links, empty_store
):
    shutil.copy(empty_store, tmp_path)
    register(tmp_path, name, 2)
    lines = labelled_links(store(tmp_path), "http://server").splitlines()
    assert len(lines[1::2]) == links
    assert lines[-1] == f"  http://server/#/models/{quote(name, safe='')}?workflowType=machine_learning"


def test_version_whose_run_was_removed_is_not_compared(tmp_path, labelled_links, empty_store):
    # given that `mlflow gc` has removed the run of the older one of two versions
    shutil.copy(empty_store, tmp_path)
    register(tmp_path, "half", 2)
    client = mlflow.MlflowClient(store(tmp_path))
    client.delete_run(client.get_model_version("half", "1").run_id)
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", store(tmp_path)]
    process = finished(command, tmp_path, environment(tmp_path, MLFLOW_TRACKING_URI=store(tmp_path)), 60)
    assert process.returncode == 0, process.stderr
    # then
    expected = "The registered model:\n  http://server/#/models/half?workflowType=machine_learning"
    assert labelled_links(store(tmp_path), "http://server") == expected
