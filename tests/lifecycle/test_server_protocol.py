"""HTTP at the server: slow, half-open and ambiguous clients are refused, and harm no other."""

import contextlib
import json
import re
import string
import time

import pandas as pd
import psutil
import pytest
from asking import FEATURES, SPECIES, THREE, answer_on, ask, connected, message, split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MINUTE = 60


def chunked(size: int):
    """Return a body that is right, in chunks, with white space up to a size."""
    whole = split(THREE).encode().ljust(size)
    return iter([whole[start : start + 65_536] for start in range(0, size, 65_536)])


def test_chunked_body_is_taken_up_to_the_limit_and_refused_beyond(server):
    status, text = ask(server.address, chunked(1_000_000))
    assert (status, json.loads(text)["predictions"]) == (200, SPECIES)
    assert ask(server.address, chunked(1_000_001))[0] == 413


def test_chunked_body_without_end_is_refused(server):
    with connected(server.address) as connection:
        connection.sendall(message("", "Transfer-Encoding: chunked"))
        for _ in range(20):
            connection.sendall(b"10000\r\n" + b" " * 65_536 + b"\r\n")
        assert answer_on(connection)[0] == 413


@pytest.mark.parametrize("line", ["Content-Length: 1, 2", " bad: line"])
def test_head_that_is_no_http_is_refused(server, line):
    with connected(server.address) as connection:
        connection.sendall(message(split(THREE), line))
        assert answer_on(connection)[0] == 400


@pytest.mark.parametrize(
    "sent",
    [
        message(
            f"{len(split(THREE)):x}\r\n{split(THREE)}\r\n0\r\n\r\n", "Content-Length: 9", "Transfer-Encoding: chunked"
        ),
        message(split(THREE)).replace(b"\r\n", b"\n"),
        message(split(THREE)).replace(b"Host: here\r\n", b"Host: here\n"),
        message(split(THREE)).replace(b"\r\n\r\n", b"\r\n\n"),
        b"\n" + message(split(THREE)),
        message("0\r\n\n", "Transfer-Encoding: chunked"),
        message("0\r\nTrailer: a\n\r\n", "Transfer-Encoding: chunked"),
    ],
    ids=["two lengths", "all lines", "a line", "last line", "line before", "end of chunks", "trailer"],
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


def closed_after(connection, sent: bytes) -> tuple[int, str]:
    """Send some bytes and nothing more; return the answer, and see that the connection is closed then."""
    connection.sendall(sent)
    answer = answer_on(connection)
    with contextlib.suppress(ConnectionError):
        assert connection.recv(1) == b""
    return answer


BODY = split(THREE).encode()
WHOLE = message(BODY)


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"", 0), (b"POST /invo", 0), (WHOLE[:-9], 408), (message("{}", "Content-Length: 9999"), 408)],
    ids=["nothing", "half a head", "half a body", "less than its length"],
)
@pytest.mark.extended  # it takes long
def test_client_that_stops_in_between_is_refused(hasty, sent, status):
    with connected(hasty.address) as connection:
        assert closed_after(connection, sent)[0] == status


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


MANY = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


printable = st.text(string.printable, max_size=30).map(str.encode)
raw = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda at, part: WHOLE[:at] + part + WHOLE[at:], st.integers(0, len(WHOLE)), st.binary(max_size=9)),
    st.builds(lambda at, to: WHOLE[:at] + WHOLE[to:], st.integers(0, len(WHOLE)), st.integers(0, len(WHOLE))),
    st.builds(lambda name, value: message("{}", (name + b": " + value).decode()), printable, printable),
    st.builds(lambda length: message(split(THREE), f"Content-Length: {length}"), st.integers(-9, 2000)),
    st.builds(lambda body: message(body, "Transfer-Encoding: chunked"), st.binary(max_size=50)),
)


@pytest.mark.extended  # it takes long
def test_thousand_streams_of_bytes_get_an_answer_that_is_no_failure(server):
    @settings(max_examples=1000, **MANY)
    @given(raw)
    def send(sent):
        with connected(server.address) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(sent)
                connection.shutdown(1)
            status, text = answer_on(connection)
        assert status in (0, 200) or 400 <= status < 500, text
        assert "Traceback" not in text

    send()
    assert ask(server.address, split(THREE))[0] == 200
