"""HTTP as this server speaks it: strict about what it reads, and never waiting without a limit."""

import asyncio
import json
import re
import socket
import time

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
LENGTHS = {b"content-length", b"transfer-encoding"}


class StrictParser(h11.Connection):
    """A parser that refuses what a proxy in front of the server could read in another way.

    Otherwise a client could hide a second request in the first one.
    """

    def next_event(self) -> object:
        """Return the next event.

        Raises:
            RemoteProtocolError: a line ends with a bare line feed, or a request has both
                Content-Length and Transfer-Encoding.
        """
        before = self.trailing_data[0]
        event = super().next_event()
        if isinstance(event, h11.Request | h11.EndOfMessage):
            lines = before.removesuffix(self.trailing_data[0])
            if BARE_LINE_FEED.search(lines):
                raise h11.RemoteProtocolError("lines must end with CR LF")
            if dict(event.headers).keys() >= LENGTHS:
                raise h11.RemoteProtocolError("the length of the body is ambiguous")
        return event


class Connection(H11Protocol):
    """A connection of uvicorn that limits how long it waits for its client."""

    waiting_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self.conn = StrictParser(h11.SERVER)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.waiting_since = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Note the time if a request begins here."""
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.waiting_since = time.monotonic()
        super().data_received(data)

    def on_response_complete(self) -> None:
        """Begin to wait for the client to read the answer, and for its next request."""
        self.waiting_since = time.monotonic()
        super().on_response_complete()

    def eof_received(self) -> bool:
        """Refuse an incomplete request if no more is sent; a complete one gets its answer."""
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self.end("400 Bad Request", "the request ends before it is complete")
        return True

    def end_if_slow(self, seconds: float) -> None:
        """Close the connection if it has waited for its client for longer than this."""
        unread = self.transport.get_write_buffer_size()
        waits = unread or self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not waits or time.monotonic() - self.waiting_since <= seconds:
            return
        if unread or self.transport.is_closing():
            self.transport.abort()
        else:
            self.end("408 Request Timeout", f"the request was not complete in {seconds:g} seconds")

    def end(self, status: str, message: str) -> None:
        """Close the connection; first say why if a request has begun and has no answer."""
        begun = self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]
        if begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            text = json.dumps({"message": message})
            head = f"content-type: application/json\r\ncontent-length: {len(text)}\r\n"
            answer = f"HTTP/1.1 {status}\r\n{head}connection: close\r\n\r\n{text}"
            self.transport.write(answer.encode())
        self.transport.close()
