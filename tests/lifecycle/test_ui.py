"""ui: the links that it prints, what it refuses, and how it ends."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, unquote

import mlflow
import psutil
import pytest
import requests
from execution import environment, finished, free_port

from mlflow_lifecycle.exceptions import ServingFailedError
from mlflow_lifecycle.ui import find_links, running_interface

pytestmark = pytest.mark.extended  # it takes long

COMMAND = [sys.executable, "-P", "-m", "mlflow_lifecycle", "ui"]
END = "Press Ctrl+C to stop the interface.\n"
MODE = "workflowType=machine_learning"


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
    """Give the record of a session: it starts, answers, and ends by Ctrl+C. Its folder has programs of a stranger."""
    for name in ("mlflow", "uvicorn", "psutil"):
        (folder / f"{name}.py").write_text("from pathlib import Path\nPath(f'{__file__}.ran').touch()\n")
    log, port = folder / "session.log", free_port()
    with started(folder, log, "--port", str(port)) as process:
        screen = wait_for(END, log, process)
        api = f"http://127.0.0.1:{port}/ajax-api/2.0/mlflow/experiments"  # what the interface calls
        requests.post(f"{api}/create", json={"name": "made there"}, timeout=60).raise_for_status()
        made = requests.get(f"{api}/get-by-name?experiment_name=made+there", timeout=60).json()["experiment"]
        processes = process.children(recursive=True)
        commands = [each.cmdline() for each in processes]
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(30)
    found = {"port": port, "made": made, "commands": commands, "status": status, "left": still_there(processes)}
    return SimpleNamespace(screen=screen, last_screen=log.read_text(), **found)


def test_links_come_last_when_the_server_answers(session, folder):
    # given the runs of the two newest versions
    versions = mlflow.MlflowClient(store(folder)).search_model_versions("name = 'newer'")
    runs = {version.version: version.run_id for version in versions}
    # then the links stand below everything that the server has printed
    *_, compared, command, model, _ = session.screen.splitlines()
    assert command == "For signed versions: lifecycle compare models:/newer/2 models:/newer/3"
    assert model == f"http://127.0.0.1:{session.port}/#/models/newer?{MODE}"
    assert session.screen.index("Security middleware enabled") < session.screen.index(compared)
    # and the comparison is that of versions 2 and 3
    assert compared.startswith(f"http://127.0.0.1:{session.port}/#/compare-model-versions?")
    assert unquote(compared).endswith(f'runs={{"2": "{runs[2]}", "3": "{runs[3]}"}}&{MODE}')


def test_experiment_that_is_made_in_the_interface_can_be_used_without_it(session, folder):
    assert session.made["artifact_location"].startswith(f"{(folder / 'mlruns').as_uri()}/")


def test_ctrl_c_ends_it_with_nothing_left_and_no_traceback(session):
    assert len(session.commands) == 2  # MLflow's and that of the server under it
    assert session.left == []
    assert session.status == 0
    assert session.last_screen == f"{session.screen}The interface has stopped.\n"
    assert "Traceback" not in session.screen


def test_no_module_of_the_working_directory_is_run(session, folder):
    """Attack 26. The server's own child, uvicorn, puts the working directory first on the path."""
    assert list(folder.glob("*.ran")) == []


def test_address_of_the_store_with_its_password_is_in_no_command_line(session):
    assert "--port" in session.commands[0]
    assert "sqlite" not in str(session.commands)


UNDER_NOHUP = pytest.mark.skipif(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="it outlives it under nohup")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=UNDER_NOHUP)])
def test_it_ends_as_well_while_it_starts(folder, tmp_path, number):
    # given a server that does not answer yet, on a store with a relative address
    log = tmp_path / "log"
    with started(folder, log, "--port", str(free_port()), uri="sqlite:///mlflow.db") as process:
        wait_for("Its links follow", log, process)
        while not process.children():
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        # when
        os.killpg(process.pid, number)
        processes = process.children(recursive=True)
        status = process.wait(30)
    # then
    assert still_there(processes) == []
    assert status == 0
    assert "http://" not in log.read_text()
    assert "Traceback" not in log.read_text()
    assert "KeyboardInterrupt" not in log.read_text()


def test_signal_while_the_server_is_being_made_leaves_nothing(monkeypatch):
    # given a signal that comes after the process exists, and before Popen has returned
    made = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(psutil.Process(self.pid))
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    kept = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    # when
    try:
        with pytest.raises(KeyboardInterrupt), running_interface(free_port()):
            pass
    finally:
        for name, handler in kept.items():
            signal.signal(name, handler)
    # then
    assert len(made) == 1
    assert still_there(made) == []


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
    assert line == "Error: MLflow's server has ended. The reason is above."
    assert still_there(processes) == []


def test_port_in_use_is_refused_with_the_remedy():
    # given a port on which something listens
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # when the interface is started there, then
        with pytest.raises(ServingFailedError) as caught, running_interface(port):
            pass
    assert str(caught.value).startswith(f"Port {port} is in use")
    assert str(caught.value).endswith(f"lifecycle ui --port {port + 1}")


def test_server_that_runs_already_gets_just_its_links_and_keeps_its_password(folder, interface):
    # when the store is a server, and its address has a password
    address = interface.replace("//", "//somebody:hidden@")
    process = finished(COMMAND, folder, environment(folder, MLFLOW_TRACKING_URI=address), 60)
    # then
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert [line.startswith(f"{interface}/#/") for line in lines] == [True, False, True]
    assert lines[1].startswith("For signed versions: lifecycle compare models:/newer/")
    assert "hidden" not in process.stdout + process.stderr


@pytest.fixture
def active(tmp_path, empty_store):
    """Give a folder with an empty store, which is active in the test."""
    shutil.copy(empty_store, tmp_path)
    mlflow.set_tracking_uri(store(tmp_path))
    yield tmp_path
    mlflow.set_tracking_uri(None)


def test_store_without_a_model_has_a_link_to_the_registry(active):
    assert find_links("http://server") == [f"http://server/#/models?{MODE}"]


@pytest.mark.parametrize(("name", "links"), [("it's", 3), ('it\'s the "best"', 1)])
def test_name_with_quotes_leaves_out_only_the_link_that_cannot_be_made(name, links, active):
    register(active, name, 2)
    found = find_links("http://server")
    assert len(found) == links
    assert found[-1] == f"http://server/#/models/{quote(name, safe='')}?{MODE}"


def test_version_whose_run_was_removed_is_not_compared(active):
    # given two versions, of which the newer one has no run any more
    register(active, "half", 1)
    mlflow.MlflowClient().create_model_version("half", "runs:/removed/model", "removed")
    # then
    assert find_links("http://server") == [f"http://server/#/models/half?{MODE}"]
