"""How much the server reads from whom, and how long it waits: little before the password, and then a stated limit."""

import asyncio
import os

from starlette.responses import PlainTextResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

STRANGERS_BYTES = 64 * 1024  # of the body of a request without a password
STRANGERS_SECONDS = 10  # to send that body; and for everybody to send the head of a request
REQUEST_BYTES = 64 * 1024**2  # of a user's request, which MLflow reads into memory
FILES = "/mlflow-artifacts/artifacts/"  # in the path of a file that is read, written or deleted
CREDENTIALS = (b"authorization", b"x-mlflow-authorization")  # the headers that MLflow reads
FILE_BYTES = int(os.environ.get("LARGEST_FILE_BYTES") or 10 * 1024**3)  # of a file, which goes to the disk as it comes


class TooLargeError(Exception):
    """A body is larger than its limit."""


async def read_body(receive, limit: int = REQUEST_BYTES) -> bytes | None:
    """Return a body, or None where the client ends the connection first: half a body must not pass for a whole one.

    Raises:
        TooLargeError: it has more bytes than the limit.
    """
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit:
            raise TooLargeError
    return bytes(body)


def repeat(body: bytes, receive):
    """Return what gives an ASGI app a body that was read, and then what ``receive`` gives."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again():
        return messages.pop() if messages else await receive()

    return again


async def serve_stranger(served, scope, receive, send) -> None:
    """Let an ASGI app answer a request without a password, once its small body is there."""
    try:
        async with asyncio.timeout(STRANGERS_SECONDS):
            body = await read_body(receive, STRANGERS_BYTES)
    except TimeoutError:
        await closing(408, "The request was not complete in time.")(scope, receive, send)
        return
    if body is not None:
        await served(scope, repeat(body, receive), send)


async def serve_user(served, scope, receive, send) -> None:
    """Let an ASGI app answer a request of a user, as long as its body is within the limit."""
    is_file = scope["method"] == "PUT" and FILES in scope["path"]
    limit = FILE_BYTES if is_file else REQUEST_BYTES
    if int(dict(scope["headers"]).get(b"content-length", 0)) > limit:
        raise TooLargeError
    left = limit

    async def receive_limited():
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise TooLargeError
        return message

    async def send_limited(message):
        if left >= 0:  # otherwise it is the app's answer to TooLargeError
            await send(message)

    try:
        await served(scope, receive_limited, send_limited)
    except Exception:
        if left >= 0:
            raise
    if left < 0:
        raise TooLargeError


def closing(status: int, reason: str, **headers: str) -> PlainTextResponse:
    """Return an answer after which the server closes the connection, whatever more the client sends."""
    return PlainTextResponse(reason, status, headers | {"Connection": "close"})


def limit_heads() -> None:
    """Close a connection whose client does not send the head of a request in time, which uvicorn 0.54 waits for."""
    made, received = H11Protocol.connection_made, H11Protocol.data_received

    def wait(connection: H11Protocol) -> None:
        """Start the timer if no request is being answered, and stop it if one is."""
        timer = getattr(connection, "head_timer", None)
        is_waiting = connection.cycle is None or connection.cycle.response_complete
        if not is_waiting and timer:
            timer.cancel()
            connection.head_timer = None
        if is_waiting and not timer:
            connection.head_timer = connection.loop.call_later(STRANGERS_SECONDS, close, connection)

    def close(connection: H11Protocol) -> None:
        connection.head_timer = None
        if connection.cycle is None or connection.cycle.response_complete:
            connection.transport.abort()

    def connection_made(connection: H11Protocol, transport: asyncio.Transport) -> None:
        made(connection, transport)
        wait(connection)

    def data_received(connection: H11Protocol, data: bytes) -> None:
        received(connection, data)
        wait(connection)

    H11Protocol.connection_made = connection_made
    H11Protocol.data_received = data_received
