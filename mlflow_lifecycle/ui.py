"""Start MLflow's interface on the store of this folder, and print the links that open its newest comparison.

`mlflow server` prints no links, opens in a mode without the model registry, takes no other port where its own is taken,
and answers Ctrl+C with a traceback.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from mlflow_lifecycle.experiments import printable, tracking_uri


def labelled_links(store: str, server: str) -> str:
    """Return the links, below ``server``, to the model registered last and to its two newest versions compared.

    Where these cannot be compared, only the link to the model is there.

    Raises:
        SystemExit: the store gives no answer, or has no registered model.
    """
    import mlflow  # here, because it takes seconds, and Ctrl+C must end the program during them, too

    try:
        client = mlflow.MlflowClient(store)
        models = client.search_registered_models(
            max_results=1, order_by=["last_updated_timestamp DESC"]
        )
        if not models:
            sys.exit("No model is registered in this store yet. Make one first: make run")
        name, runs, experiments = models[0].name, {}, []
        with contextlib.suppress(mlflow.MlflowException):  # a run was removed
            versions = client.search_model_versions(f"name = {name!r}")
            newest = sorted(versions, key=lambda version: int(version.version))[-2:]
            found = {
                str(version.version): client.get_run(version.run_id)
                for version in newest
                if version.run_id
            }
            runs = {version: run.info.run_id for version, run in found.items()}
            experiments = sorted({run.info.experiment_id for run in found.values()})
    except Exception as error:
        sys.exit(
            printable(f"The store gives no answer: {error}\nCorrect or unset MLFLOW_TRACKING_URI.")
        )
    pages = []
    if len(runs) == 2:
        pages += [
            (
                "The two newest versions compared",
                "compare-model-versions",
                {"name": name, "runs": runs},
            ),
            (
                "Their runs compared",
                "compare-runs",
                {"runs": list(runs.values()), "experiments": experiments},
            ),
        ]
    pages += [("The registered model", f"models/{quote(name, safe='')}", {})]
    return "\n".join(
        f"{label}:\n  {server}/#/{page}?"
        + "".join(f"{key}={quote(json.dumps(value))}&" for key, value in query.items())
        + "workflowType=machine_learning"
        for label, page, query in pages
    )


def is_free(port: int) -> bool:
    """Return whether a server can listen on ``port`` of this machine."""
    with socket.socket() as probe:
        if (
            os.name != "nt"
        ):  # where it would let two servers share a port; elsewhere MLflow's server sets it, too
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def answers(port: int) -> bool:
    """Return whether MLflow's server answers on ``port``."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", port, timeout=2
    )  # which no proxy setting diverts
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def on_request_to_end(action: Callable) -> None:
    """Call ``action`` when the user presses Ctrl+C or closes the terminal, or another process asks this one to end."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):  # no system has all of them
        number = getattr(signal, name, None)
        if number and not (
            name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN
        ):  # nohup
            signal.signal(number, action)


def stop(server: subprocess.Popen) -> None:
    """End the server and the processes that it has started."""
    if os.name == "nt":
        subprocess.run(
            ["taskkill", "/F", "/T", "/PID", str(server.pid)], capture_output=True, check=False
        )
        return
    for number in (
        signal.SIGTERM,
        signal.SIGKILL,
    ):  # politely first; the second ends what the first did not
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            os.killpg(server.pid, number)
            server.wait(10)


def serve(store: str, port: int, text: str) -> None:
    """Run MLflow's server until somebody asks this process to end, and print ``text`` as soon as the server answers.

    Raises:
        SystemExit: the server ended by itself.
    """
    asked = []
    on_request_to_end(lambda *_: asked.append(True))
    print("The MLflow interface starts; its links follow in some seconds.", flush=True)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--workers",
        "1",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    # A line for each request would push the links off the screen.
    command += ["--uvicorn-opts=--log-level warning"]
    if store.startswith(
        "sqlite:///"
    ):  # so that what is made in the interface can be used without it, too
        models = Path(store.removeprefix("sqlite:///")).resolve().parent / "mlruns"
        command += ["--default-artifact-root", models.as_uri()]
    variables = {
        "MLFLOW_BACKEND_STORE_URI": store,  # not an option of the command, which every user of the machine can read
        "PYTHONWARNINGS": "ignore:starlette.middleware.wsgi is deprecated",  # addressed to MLflow's authors
    }
    # In a process group of its own, Ctrl+C does not reach the server, which would answer it with a traceback.
    group = (
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        if os.name == "nt"
        else {"start_new_session": True}
    )
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env=os.environ | variables, **group
    )
    try:
        while not asked and server.poll() is None:
            if text and answers(port):
                print(text, flush=True)
                text = ""
            time.sleep(0.05)
    finally:
        stop(server)
    if not asked:
        sys.exit(
            "The MLflow server has ended by itself; above is what it printed last. Start it again: make ui"
        )
    print("\nThe MLflow interface has stopped.")


def show(folder: Path, asked_port: int | None = None) -> None:
    """Run the interface until Ctrl+C, or print just the links if MLFLOW_TRACKING_URI is a server already.

    Args:
        folder: where the SQLite file ``mlflow.db`` is, unless MLFLOW_TRACKING_URI names another store.
        asked_port: the port to listen on; by default 5000 or the next free one.

    Raises:
        SystemExit: there is no store or no model in it, the port is taken, or the server ended by itself.
    """
    # A short timeout, so that a tracking server that is down is reported within seconds.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # The server's background jobs judge language models; without their six processes it starts sooner.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    on_request_to_end(lambda *_: sys.exit(0))
    store = tracking_uri(folder)
    if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).exists():
        sys.exit(f"There is no store at {store} yet. Make one first: make run")
    if store.startswith("http"):
        address = printable(store).rstrip("/")
        print("The MLflow interface is up.", labelled_links(store, address), sep="\n")
        return
    first = asked_port or 5000
    port = next(port for port in (*range(first, 65536), *range(5000, 65536)) if is_free(port))
    if asked_port and port != asked_port:
        sys.exit(
            f"Port {asked_port} is taken. Take another: make ui PORT={port} (without make: --port {port})"
        )
    moved = (
        f"Port {first} is taken (on macOS by AirPlay), so this is port {port}.\n"
        if port != first
        else ""
    )
    text = f"\n{moved}{labelled_links(store, f'http://127.0.0.1:{port}')}\nCtrl+C stops it."
    serve(store, port, text)
