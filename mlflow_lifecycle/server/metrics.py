"""Counts and times of a server, in the text format of Prometheus."""

from collections import Counter

BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
TEMPLATE = """\
# HELP model_requests_total Answers to POST /invocations.
# TYPE model_requests_total counter
{requests}\
# HELP model_rows_total Rows predicted.
# TYPE model_rows_total counter
model_rows_total {rows}
# HELP model_request_seconds Time from the head of a request to POST /invocations to its answer.
# TYPE model_request_seconds histogram
{buckets}\
model_request_seconds_bucket{{le="+Inf"}} {count}
model_request_seconds_sum {seconds}
model_request_seconds_count {count}
"""


class Metrics:
    """What a server has answered since its start."""

    def __init__(self):
        """Start at zero."""
        self.requests = Counter()
        self.buckets = Counter()
        self.rows = 0
        self.seconds = 0.0

    def observe(self, status: int, seconds: float) -> None:
        """Count an answer."""
        self.requests[status] += 1
        self.seconds += seconds
        for bound in BOUNDS:
            if seconds <= bound:
                self.buckets[bound] += 1

    def text(self) -> str:
        """Return all metrics."""
        requests = ""
        for status, count in sorted(self.requests.items()):
            requests += f'model_requests_total{{status="{status}"}} {count}\n'
        buckets = ""
        for bound in BOUNDS:
            buckets += f'model_request_seconds_bucket{{le="{bound}"}} {self.buckets[bound]}\n'
        return TEMPLATE.format(
            requests=requests,
            buckets=buckets,
            rows=self.rows,
            count=self.requests.total(),
            seconds=self.seconds,
        )
