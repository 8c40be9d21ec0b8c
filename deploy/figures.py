"""What Prometheus reads from the server, at an address of its own that only the network of Prometheus reaches.

`mlflow server --expose-prometheus` counts and times the requests that Flask answers, and offers the result to every
user at /metrics. Here are, too: all answers by status, failed logins, and the disk.
"""

import contextlib
import os
import shutil

from prometheus_client import CollectorRegistry, Counter, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

RESPONSES = Counter("team_responses", "Answers of the server, by status.", ["status"])
FAILED_LOGINS = Counter("team_failed_logins", "Requests with a wrong password, or too many of them.")


class Disk:
    """How much room is left where the files are. Artifacts in a bucket need none here."""

    def collect(self):
        """Give the free and the whole size in bytes."""
        usage = shutil.disk_usage(os.environ["ARTIFACTS_FOLDER"])
        yield GaugeMetricFamily("team_disk_free_bytes", "Free bytes of the disk with the artifacts.", usage.free)
        yield GaugeMetricFamily("team_disk_bytes", "Bytes of the disk with the artifacts.", usage.total)


def serve_figures() -> None:
    """Serve the figures of all processes at METRICS_ADDRESS, unless another process of the server does."""
    host, _, port = os.environ["METRICS_ADDRESS"].rpartition(":")
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    registry.register(Disk())
    with contextlib.suppress(OSError):
        start_http_server(int(port), addr=host, registry=registry)
