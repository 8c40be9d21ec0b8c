"""HTTP as this server speaks it: strict about what it reads, and never waiting without a limit."""

import re
import time

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


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
            if re.search(rb"(?<!\r)\n", lines):
                raise h11.RemoteProtocolError("lines must end with CR LF")
            if {b"content-length", b"transfer-encoding"} <= dict(event.headers).keys():
                raise h11.RemoteProtocolError("the length of the body is ambiguous")
        return event


class Connection(H11Protocol):
    """A connection of uvicorn that limits how long it waits for its client."""

    def __init__(self, *args, **kwargs):
        """Begin to wait for a request."""
        super().__init__(*args, **kwargs)
        self.conn = StrictParser(h11.SERVER)
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

    def abort_if_slow(self, seconds: float) -> None:
        """Abort the connection if it has waited for longer than this.

        While the application answers a request, it limits the time itself.
        """
        is_unread = self.transport.get_write_buffer_size() > 0
        is_waiting = is_unread or self.conn.our_state is not h11.SEND_RESPONSE
        waited = time.monotonic() - self.waiting_since
        if is_waiting and waited > seconds:
            self.transport.abort()
