"""Where the tests get the heart disease data of guide 02 from, and a server that gives a file to whoever asks."""

import contextlib
import functools
import os
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from execution import ROOT

NAME = "processed.cleveland.data"
FILE = ROOT.parent / "shared/data/heart_disease" / NAME
VARIABLE = "HEART_DISEASE_DATA"  # the path or address of a copy
PUBLIC_ADDRESS = f"https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease/{NAME}"


@functools.cache
def heart_disease_data() -> bytes | None:
    """Return the content of the file that guide 02 uses, from its path or address; None where it cannot be had."""
    address = os.environ.get(VARIABLE) or PUBLIC_ADDRESS
    if Path(address).is_file():
        return Path(address).read_bytes()
    with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(address, timeout=10) as answer:
        return answer.read()
    return None


@contextlib.contextmanager
def serving(content: bytes) -> Iterator[tuple[str, list[str]]]:
    """Answer every request on the loopback interface with ``content`` until the end of the block.

    Yields:
        The address, and a list to which the path of each request is added.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{NAME}", requests
        finally:
            server.shutdown()
            thread.join()
