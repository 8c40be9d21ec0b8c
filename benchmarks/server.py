"""Measure the team's server under load, beside `mlflow server` on SQLite.

Usage: python benchmarks/server.py [--clients 50] [--seconds 120]

Each client is a user who logs run after run, as MLflow's own client does: start a run, five parameters, twenty metrics
one by one, a batch of ten, a file, end. It waits for each answer, and sends the next request at once. A request counts
as an error where its answer is not 200. The servers are measured one after the other on this machine, which runs the
clients, too:

- team: as deploy/compose.yaml starts it, with authentication and PostgreSQL, two processes. Without containers.
- team s3: the same, with its files in the S3 store of deploy/compose.yaml.
- sqlite: `mlflow server` on SQLite, two processes, without authentication.

Afterwards, what each server acknowledged is counted in its store: runs, and the steps of each run's metric.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests

sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))
PROCESSES = 4  # in which the clients are threads
STEPS = 20


@dataclass(frozen=True)
class Load:
    """What the clients of one process have seen: seconds per request, statuses that were not 200, and finished runs."""

    seconds: list[float]
    errors: list[str]
    runs: list[str]


def log_until(end: float, address: str, auth: tuple[str, str] | None) -> Load:
    """Log run after run until the time ``end``, as one client."""
    seconds, errors, runs = [], [], []
    with requests.Session() as session:
        session.auth = auth

        def send(path: str, method: str = "POST", **body) -> dict:
            began = time.perf_counter()
            try:
                answer = session.request(method, f"{address}/api/2.0/{path}", timeout=120, **body)
                if answer.status_code != 200:
                    errors.append(f"{answer.status_code} {path}")
                return answer.json() if answer.ok and method == "POST" else {}
            except requests.RequestException as error:
                errors.append(type(error).__name__)
                return {}
            finally:
                seconds.append(time.perf_counter() - began)

        while time.time() < end:
            run = send("mlflow/runs/create", json={"experiment_id": "0"}).get("run", {}).get("info")
            if run is None:
                continue
            before, number = len(errors), {"run_id": run["run_id"], "timestamp": int(time.time() * 1000)}
            for name in "abcde":
                send("mlflow/runs/log-parameter", json={"run_id": run["run_id"], "key": name, "value": "1"})
            for step in range(STEPS):
                send("mlflow/runs/log-metric", json=number | {"key": "loss", "value": 1 / (step + 1), "step": step})
            batch = [{"key": f"metric {n}", "value": n, "step": 0, "timestamp": number["timestamp"]} for n in range(10)]
            send("mlflow/runs/log-batch", json={"run_id": run["run_id"], "metrics": batch})
            send(f"mlflow-artifacts/artifacts/0/{run['run_id']}/artifacts/notes.txt", "PUT", data=b"x" * 10_000)
            send("mlflow/runs/update", json={"run_id": run["run_id"], "status": "FINISHED"})
            if len(errors) == before:
                runs.append(run["run_id"])
    return Load(seconds, errors, runs)


def clients(number: int, end: float, address: str, auth: tuple[str, str] | None, results) -> None:
    """Be ``number`` clients, each a thread, and put what they have seen into the queue ``results``."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(number) as executor:
        for load in executor.map(lambda _: log_until(end, address, auth), range(number)):
            results.put(load)


def measure(name: str, number: int, duration: float, address: str, auth: tuple[str, str] | None) -> None:
    """Put a server under load, and print what it has done.

    Raises:
        RuntimeError: something that it acknowledged is not in its store.
    """
    queue, end = multiprocessing.Queue(), time.time() + duration
    shares = [number // PROCESSES + (index < number % PROCESSES) for index in range(PROCESSES)]
    workers = [multiprocessing.Process(target=clients, args=(n, end, address, auth, queue)) for n in shares if n]
    for worker in workers:
        worker.start()
    loads = [queue.get() for _ in range(number)]
    took = time.time() - end + duration
    for worker in workers:
        worker.join()
    seconds = [second for load in loads for second in load.seconds]
    errors, runs = [error for load in loads for error in load.errors], [run for load in loads for run in load.runs]
    lost = [run for run in runs if not kept(address, auth, run)]
    hundredths = statistics.quantiles(seconds, n=100)
    print(
        f"{name:7} {len(seconds) / took:6.0f} requests/s, median {1000 * hundredths[49]:.0f} ms, p99 "
        f"{1000 * hundredths[98]:.0f} ms, {len(errors)} errors, {len(runs)} runs of which {len(lost)} incomplete",
        flush=True,
    )
    if errors:
        print("       ", ", ".join(f"{errors.count(error)} x {error}" for error in sorted(set(errors))))
    if lost:
        raise RuntimeError(f"{name} acknowledged what it does not have: {lost[:3]}")


def kept(address: str, auth: tuple[str, str] | None, run_id: str) -> bool:
    """Return whether a run is in the store with all that was logged to it."""
    path = f"{address}/api/2.0/mlflow/metrics/get-history?run_id={run_id}&metric_key=loss"
    run = requests.get(f"{address}/api/2.0/mlflow/runs/get?run_id={run_id}", auth=auth, timeout=120).json()["run"]
    steps = requests.get(path, auth=auth, timeout=120).json().get("metrics", [])
    complete = len(run["data"]["params"]) == 5 and len(run["data"]["metrics"]) == 11
    return complete and len(steps) == STEPS and run["info"]["status"] == "FINISHED"


@contextlib.contextmanager
def sqlite(folder: Path) -> Iterator[str]:
    """Run `mlflow server` on SQLite, and give its address."""
    from execution import environment, free_port, running

    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", f"--port={port}", "--workers=2", "--serve-artifacts"]
    command += [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/artifacts"]
    address = f"http://127.0.0.1:{port}"
    with running(command, f"{address}/health", folder / "server.log", cwd=folder, env=environment(folder)):
        yield address


def main() -> None:
    """Measure both servers, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    from deployment import PASSWORDS, deployed
    from object_store import object_store, program
    from postgresql import programs

    if programs() is None or program() is None:
        print("Left out: benchmarks/server.py. It needs PostgreSQL and SeaweedFS: make postgresql")
        return
    print(f"{options.clients} clients for {options.seconds:.0f} s on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder, deployed(Path(folder)) as team:
        measure("team", options.clients, options.seconds, team.address, ("admin", PASSWORDS["admin"]))
    with (
        tempfile.TemporaryDirectory() as folder,
        object_store(Path(folder) / "store") as store,
        deployed(Path(folder), store.settings) as team,
    ):
        measure("team s3", options.clients, options.seconds, team.address, ("admin", PASSWORDS["admin"]))
    with tempfile.TemporaryDirectory() as folder, sqlite(Path(folder)) as address:
        measure("sqlite", options.clients, options.seconds, address, None)


if __name__ == "__main__":
    main()
