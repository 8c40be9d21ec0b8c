"""How much the team's server reads before it knows who asks, and how long it waits."""

import concurrent.futures
import socket
import sys
import time

import psutil
import pytest
import requests
from deployment import PASSWORDS, deployed
from postgresql import programs

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the server's image is Linux")
PATH = "/api/2.0/mlflow/experiments/search"
HEADERS = {
    "a stranger": "",
    "who guesses": "Authorization: Basic YW5hOndyb25n\r\n",
}


@pytest.fixture(scope="module")
def team(tmp_path_factory, lacking):
    """Give a server that takes files of at most 1 MB."""
    if programs() is None:
        lacking("PostgreSQL", "make postgresql")
    with deployed(tmp_path_factory.mktemp("team"), {"LARGEST_FILE_BYTES": "1000000"}) as team:
        yield team


def connect(team) -> socket.socket:
    return socket.create_connection(("127.0.0.1", team.port), timeout=30)


def head(team, header: str, length: int, path: str = PATH, method: str = "POST") -> bytes:
    host = f"Host: 127.0.0.1:{team.port}"
    return f"{method} {path} HTTP/1.1\r\n{host}\r\n{header}Content-Length: {length}\r\n\r\n".encode()


def answer(connection: socket.socket) -> str:
    """Return what the server answers until it closes the connection; it may close it without an answer."""
    received = b""
    try:
        while part := connection.recv(65_536):
            received += part
    except ConnectionError:
        pass
    return received.decode()


def memory(team) -> int:
    """Return the memory of the server's processes in bytes."""
    processes = [process for process in psutil.Process().children(recursive=True) if process.is_running()]
    served = [process for process in processes if "server_app:create_app" in " ".join(process.cmdline())]
    assert served
    return sum(child.memory_info().rss for process in served for child in [process, *process.children()])


@pytest.mark.parametrize("who", HEADERS)
def test_much_from_who_has_no_password_takes_no_memory(who, team):
    """Attack 31."""
    # given
    before = memory(team)
    with connect(team) as connection:
        # when somebody sends 200 MB
        connection.sendall(head(team, HEADERS[who], 200_000_000))
        sent, block = 0, bytes(1_000_000)
        try:
            while sent < 200:
                connection.sendall(block)
                sent += 1
        except OSError:
            pass
        # then the server has closed the connection, and kept nothing
        assert sent < 20
    assert memory(team) - before < 20_000_000


def test_stranger_may_send_a_small_body_and_is_told_that_another_is_too_large(team):
    assert requests.post(f"{team.address}{PATH}", data=bytes(60_000), timeout=30).status_code == 401
    assert requests.post(f"{team.address}{PATH}", data=bytes(70_000), timeout=30).status_code == 413


@pytest.mark.parametrize("part", ["nothing", "half a head", "half a body", "half a second head"])
def test_who_sends_no_whole_request_is_soon_cut_off_and_shuts_nobody_out(part, team):
    """Attack 31."""
    # given 50 connections that send a part and then nothing more
    many = [connect(team) for _ in range(50)]
    parts = {
        "nothing": b"",
        "half a head": head(team, "", 10)[:40],
        "half a body": head(team, "", 10) + b"{",
        "half a second head": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /health HTTP/1.1\r\n",
    }
    began = time.monotonic()
    for connection in many:
        connection.sendall(parts[part])
    # when a user works
    user = ("ana", PASSWORDS["ana"])
    worked = requests.post(f"{team.address}{PATH}", json={"max_results": 1}, auth=user, timeout=30)
    # then he is answered, and all of them are closed
    assert worked.status_code == 200
    with concurrent.futures.ThreadPoolExecutor(50) as executor:
        answers = list(executor.map(answer, many))
    assert time.monotonic() - began < 25
    assert all("408" in text for text in answers) or part != "half a body"
    for connection in many:
        connection.close()


def test_user_may_send_as_much_as_the_stated_limit(team):
    # given a run of ana's
    user = ("ana", PASSWORDS["ana"])
    with team.client("ana") as client:
        run = client.create_run(client.create_experiment("limits")).info
    place = run.artifact_uri.removeprefix("mlflow-artifacts:/")
    address = f"{team.address}/api/2.0/mlflow-artifacts/artifacts/{place}"
    # when she uploads files, with and without their length ahead
    statuses = {}
    for size in (1_000_000, 1_000_001):
        statuses[size] = requests.put(f"{address}/{size}", data=bytes(size), auth=user, timeout=30).status_code
        blocks = iter([bytes(size)])
        streamed = requests.put(f"{address}/{size} streamed", data=blocks, auth=user, timeout=30).status_code
        assert streamed == statuses[size]
    # then what is too large is refused, and no part of it is kept
    assert statuses == {1_000_000: 200, 1_000_001: 413}
    kept = [path.name for path in (team.artifacts / place).iterdir()]
    assert sorted(kept) == ["1000000", "1000000 streamed"]


def test_request_that_is_no_file_is_limited_too(team):
    user = ("ana", PASSWORDS["ana"])
    with connect(team) as connection:
        credentials = requests.Request("GET", team.address, auth=user).prepare().headers["Authorization"]
        connection.sendall(head(team, f"Authorization: {credentials}\r\n", 65 * 1024**2))
        assert " 413 " in answer(connection).partition("\r\n")[0]
