"""Measure a served version beside `mlflow models serve`: the same model, the same rows, both warm, side by side.

Usage: python benchmarks/serving.py [--rounds 5] [--seconds 2] [--start] [--short]

A classifier, a regressor and an XGBoost classifier are served from this environment: by MLflow, by
`mlflow_lifecycle.serving`, and by the same with a record of what it answers. Clients ask for 1 or 1,000 rows, 1 or 8
clients at once, each on a connection that it keeps, or on a new one for each request (the classifier only). Clients are
threads of this process, which send bytes that are ready. A round runs the servers in turn. A ratio is formed within a
round; its median over the rounds is the figure, with the smallest and the largest. Latency is the median over a round's
requests. The server's own processor time for a request is measured as well: other work on the machine changes the first
two, and this hardly.

The bounds are a latency of at most 0.65 of MLflow's for one client and 0.80 for eight, and 1.5 times its throughput.

Then it measures `/ping` beside a model that needs two seconds for a request.

With `--start` it also prints the seconds from starting a server to its first answer, from an environment that is there,
and with the environment built from its pins, all archives downloaded and verified. With `--short` it measures requests
for one row only, on connections that are kept.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
from mlflow.models import infer_signature
from sklearn.base import BaseEstimator
from sklearn.datasets import load_diabetes, load_iris
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlflow_lifecycle.serving import serve_verified
from mlflow_lifecycle.signing.statement import Statement
from mlflow_lifecycle.signing.verify import Verified

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("classification", "regression", "XGBoost")
CASES = [(rows, clients, kept) for rows in (1, 1000) for clients in (1, 8) for kept in (True, False)]
SHORT = [(1, 1, True), (1, 8, True)]
BUSY_SECONDS = 2


def rows_of(kind: str) -> pd.DataFrame:
    """Return the rows that a model learns from, with the column ``target``."""
    if kind == "regression":
        return load_diabetes(as_frame=True).frame
    iris = load_iris(as_frame=True)
    if kind == "XGBoost":
        return iris.frame
    return iris.data.assign(target=iris.target_names[iris.target])


def estimator_of(kind: str) -> BaseEstimator:
    """Return the estimator of a kind of model."""
    if kind == "XGBoost":
        from xgboost import XGBClassifier

        return XGBClassifier(n_jobs=1)
    last = Ridge() if kind == "regression" else LogisticRegression(max_iter=1000)
    return make_pipeline(StandardScaler(), last)


def save(folder: Path, kind: str = "classification") -> Verified:
    """Save a model, and return it as if it were verified."""
    rows = rows_of(kind)
    return save_fitted(folder, estimator_of(kind), rows, "xgboost" if kind == "XGBoost" else "sklearn")


def save_fitted(folder: Path, estimator: BaseEstimator, rows: pd.DataFrame, flavor: str) -> Verified:
    """Fit an estimator, save it, and return it as if it were verified."""
    features = rows.drop(columns="target")
    estimator.fit(features, rows["target"])
    signature = infer_signature(features, rows["target"])
    requirements = str(ROOT / "model_requirements.txt")
    module = importlib.import_module(f"mlflow.{flavor}")
    module.save_model(estimator, folder, signature=signature, pip_requirements=requirements)
    statement = Statement("benchmark", "1", "", "release", "")
    return Verified("models:/benchmark/1", statement, folder, ROOT / "requirements.txt", folder, "")


@contextlib.contextmanager
def served_by_mlflow(model: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Serve the model by MLflow from this environment; give its port and process once it listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-P",
        "-m",
        "mlflow",
        "models",
        "serve",
        "--model-uri",
        str(model),
        "--env-manager",
        "local",
    ]
    variables = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    with tempfile.TemporaryFile() as log:
        options = {
            "stdout": log,
            "stderr": log,
            "env": variables,
            "start_new_session": True,
        }  # as lifecycle starts its own
        server = psutil.Popen([*command, "--port", str(port)], **options)
        try:
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                if server.poll() is not None:
                    raise RuntimeError("MLflow does not serve the model.")
                time.sleep(0.05)
            yield port, server
        finally:
            for process in [*server.children(recursive=True), server]:
                process.kill()
            server.wait()


def request(rows: int, kind: str = "classification") -> bytes:
    """Return a request for that many rows."""
    features = rows_of(kind).drop(columns="target")
    features = pd.concat([features] * (rows // len(features) + 1)).head(rows)
    body = json.dumps({"dataframe_split": features.to_dict("split", index=False)}).encode()
    head = [
        "POST /invocations HTTP/1.1",
        "Host: here",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def connected(port: int) -> socket.socket:
    """Return a connection that sends at once."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def answer(connection: socket.socket, sent: bytes) -> bytes:
    """Send a request and return the body of the answer."""
    connection.sendall(sent)
    received = b""
    while b"\r\n\r\n" not in received:
        received += some(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head + body
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += some(connection)
    return body


def some(connection: socket.socket) -> bytes:
    """Return what has arrived, at least a byte."""
    received = connection.recv(65_536)
    assert received, "the connection is closed"
    return received


def load(
    port: int, server: psutil.Process, sent: bytes, clients: int, kept: bool, seconds: float
) -> tuple[float, float, float]:
    """Ask for ``seconds``; return median latency (ms), requests answered per second, processor time for one (ms)."""
    times = []
    used = processor_seconds(server)
    end = time.perf_counter() + seconds

    def client() -> None:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(connected(port)) if kept else None
            while (begin := time.perf_counter()) < end:
                if kept:
                    answer(connection, sent)
                else:
                    with connected(port) as own:
                        answer(own, sent)
                times.append(time.perf_counter() - begin)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    throughput = len(times) / (time.perf_counter() - begin)
    return statistics.median(times) * 1000, throughput, (processor_seconds(server) - used) / len(times) * 1000


def processor_seconds(server: psutil.Process) -> float:
    """Return the processor time that a server and its children have used."""
    return sum(sum(process.cpu_times()[:2]) for process in [server, *server.children(recursive=True)])


def compare(
    servers: dict[str, tuple[int, psutil.Process]], kind: str, cases: list[tuple], rounds: int, seconds: float
) -> None:
    """Print a line for each case and server: latency, throughput, processor time, and their ratios to MLflow's."""
    titles = f"{'ms':>8}{'1/s':>7}{'CPU ms':>8}  ratios: latency, throughput, CPU"
    print(f"{kind}:")
    print(f"{'rows':>5}{'clients':>8}  {'connection':<11}{'server':<18}{titles}")
    for rows, clients, kept in cases:
        sent = request(rows, kind)
        measured = {name: [] for name in servers}
        for _ in range(rounds):
            for name, server in servers.items():
                measured[name].append(load(*server, sent, clients, kept, seconds))
        for name, results in measured.items():
            pairs = zip(results, measured["MLflow"], strict=True)
            ratios = zip(*[[new / old for new, old in zip(*pair, strict=True)] for pair in pairs], strict=True)
            words = [f"{statistics.median(part):.2f} ({min(part):.2f} to {max(part):.2f})" for part in ratios]
            latency, throughput, used = (statistics.median(result[part] for result in results) for part in range(3))
            where = f"{rows:>5}{clients:>8}  {'kept' if kept else 'new':<11}{name:<18}"
            figures = f"{latency:>8.2f}{throughput:>7.0f}{used:>8.2f}"
            print(f"{where}{figures}  {', '.join(words) if name != 'MLflow' else ''}", flush=True)


def start(model: Verified, rounds: int) -> None:
    """Print the seconds from the start of a server to its first answer."""
    ways = {
        "MLflow, environment there": lambda: served_by_mlflow(model.folder),
        "lifecycle, environment there": lambda: served_by_lifecycle(model, python=Path(sys.executable)),
        "lifecycle, environment built": lambda: served_by_lifecycle(model),
    }
    for name, way in ways.items():
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            with way() as (port, _), connected(port) as connection:
                answer(connection, request(1))
                times.append(time.perf_counter() - begin)
        print(f"{name}: {statistics.median(times):.1f} s ({min(times):.1f} to {max(times):.1f})", flush=True)


@contextlib.contextmanager
def served_by_lifecycle(model: Verified, **options) -> Iterator[tuple[int, psutil.Process]]:
    """Serve the model by this library; give its port and process once it listens."""
    with serve_verified(model, **options) as server:
        yield int(server.address.rpartition(":")[2]), psutil.Process(server.process.pid)


def ping_beside_a_busy_model(folder: Path, seconds: float) -> None:
    """Print how long `/ping` takes while a model predicts, which needs some seconds for a request."""
    flowers = pd.concat([rows_of("classification")] * 300)
    estimator = KNeighborsClassifier(algorithm="brute")
    model = save_fitted(folder, estimator, flowers, "sklearn")
    features = flowers.drop(columns="target")
    estimator.predict(features.head(2000))  # to warm up
    begin = time.perf_counter()
    estimator.predict(features.head(2000))
    rows = int(2000 * BUSY_SECONDS / (time.perf_counter() - begin))
    pings, busy = [], []
    with served_by_lifecycle(model, python=Path(sys.executable), largest_body=10_000_000) as (port, _):

        def ask() -> None:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                begin = time.perf_counter()
                with connected(port) as connection:
                    answer(connection, request(rows))
                busy.append(time.perf_counter() - begin)

        asking = threading.Thread(target=ask)
        asking.start()
        with connected(port) as connection:
            while asking.is_alive():
                begin = time.perf_counter()
                answer(connection, b"GET /ping HTTP/1.1\r\nHost: here\r\n\r\n")
                pings.append((time.perf_counter() - begin) * 1000)
                time.sleep(0.01)
    figures = (
        f"median {statistics.median(pings):.1f} ms, 95th percentile {statistics.quantiles(pings, n=20)[-1]:.1f} ms"
    )
    print(f"/ping beside a request that takes {statistics.median(busy):.1f} s: {figures}, largest {max(pings):.1f} ms")


def main() -> None:
    """Compare the servers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    here = {"python": Path(sys.executable)}
    with tempfile.TemporaryDirectory() as folder:
        if options.start:
            start(save(Path(folder) / "started"), options.rounds)
        for kind in KINDS:
            if kind == "XGBoost" and importlib.util.find_spec("xgboost") is None:
                print("XGBoost is not installed: not measured")
                continue
            model = save(Path(folder) / kind, kind)
            ways = {
                "MLflow": served_by_mlflow(model.folder),
                "lifecycle": served_by_lifecycle(model, **here),
                "lifecycle, record": served_by_lifecycle(model, **here, record=Path(folder) / "record"),
            }
            cases = CASES if kind == "classification" else [case for case in CASES if case[2]]
            with contextlib.ExitStack() as stack:
                servers = {name: stack.enter_context(way) for name, way in ways.items()}
                for server in servers.values():
                    load(*server, request(1, kind), 1, True, 1)  # to warm up
                compare(servers, kind, SHORT if options.short else cases, options.rounds, options.seconds)
        ping_beside_a_busy_model(Path(folder) / "busy", 10 * options.seconds)


if __name__ == "__main__":
    main()
