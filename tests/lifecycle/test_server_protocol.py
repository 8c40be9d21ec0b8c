"""HTTP at the server: slow, half-open and ambiguous clients are refused, and harm no other."""

import contextlib
import json
import re
import time

import pandas as pd
import psutil
import pytest
from asking import FEATURES, SPECIES, THREE, answer_on, ask, connected, message, split

MINUTE = 60


def chunked(size: int):
    """Return a body that is right, in chunks, with white space up to a size."""
    whole = split(THREE).encode().ljust(size)
    return iter([whole[start : start + 65_536] for start in range(0, size, 65_536)])


def test_chunked_body_is_taken_up_to_the_limit_and_refused_beyond(server):
    status, text = ask(server.address, chunked(1_000_000))
    assert (status, json.loads(text)["predictions"]) == (200, SPECIES)
    assert ask(server.address, chunked(1_000_001))[0] == 413
    # and a client is told so although it has sent much more
    assert ask(server.address, b" " * 8_000_000)[0] == 413


def test_chunked_body_without_end_is_refused(server):
    with connected(server.address) as connection:
        connection.sendall(message("", "Transfer-Encoding: chunked"))
        for _ in range(20):
            connection.sendall(b"10000\r\n" + b" " * 65_536 + b"\r\n")
        assert answer_on(connection)[0] == 413


CHUNKS = f"{len(split(THREE)):x}\r\n{split(THREE)}\r\n0\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        message(f"{CHUNKS}\r\n", "Content-Length: 9", "Transfer-Encoding: chunked"),
        message(split(THREE)).replace(b"Host: here\r\n", b"Host: here\n"),
        b"\n" + message(split(THREE)),
        message(f"{CHUNKS}Trailer: a\n\r\n", "Transfer-Encoding: chunked"),
    ],
    ids=["two lengths", "a line", "line before", "trailer"],
)
@pytest.mark.parametrize("before", [b"", message(split(THREE))], ids=["first request", "second request"])
def test_request_that_a_proxy_could_read_in_another_way_is_refused(server, sent, before):
    """Attack 41."""
    with connected(server.address) as connection:
        # when it is sent, then it is refused, and the connection is closed
        connection.sendall(before + sent)
        received = b""
        while part := connection.recv(65_536):
            received += part
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == ([b"200"] if before else []) + [b"400"]


def test_line_feeds_in_a_body_are_taken(server):
    with connected(server.address) as connection:
        connection.sendall(message("\n" + split(THREE) + "\n\n"))
        assert answer_on(connection)[0] == 200


# --- Slow and half-open clients


WHOLE = message(split(THREE))


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"", 0), (WHOLE[:-9], 408)],
    ids=["nothing", "half a body"],
)
@pytest.mark.extended  # it takes long
def test_client_that_stops_in_between_is_refused(hasty, sent, status):
    with connected(hasty.address) as connection:
        connection.sendall(sent)
        assert answer_on(connection)[0] == status
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""


@pytest.mark.parametrize("part", ["head", "body"])
@pytest.mark.extended  # it takes long
def test_client_that_trickles_is_refused_while_others_are_answered(hasty, part):
    # given a client that sends a byte now and then, for longer than the server waits
    start = 5 if part == "head" else len(WHOLE) - 200
    with connected(hasty.address) as connection:
        connection.sendall(WHOLE[:start])
        for number in range(start, start + 100):
            # when another one asks meanwhile, then it is answered
            assert ask(hasty.address, split(THREE))[0] == 200
            try:
                connection.sendall(WHOLE[number : number + 1])
            except ConnectionError:
                break
            time.sleep(0.05)
        else:
            pytest.fail("it may go on")
        # then the slow one is refused before it has sent all
        with contextlib.suppress(ConnectionError):
            assert answer_on(connection)[0] in (408, 0)


@pytest.mark.extended  # it takes long
def test_client_that_reads_no_answer_is_cut_off(hasty):
    # given a client that asks for many answers and takes none
    body = message(split(pd.concat([FEATURES] * 100)))
    with connected(hasty.address) as connection:
        connection.settimeout(5)
        deadline = time.monotonic() + MINUTE
        # when the server has waited, then it closes the connection, although there is something to send
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    connection.sendall(body)
    assert psutil.Process(hasty.process.pid).net_connections("tcp")[0].status == psutil.CONN_LISTEN
