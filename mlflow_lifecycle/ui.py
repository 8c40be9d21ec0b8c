"""Start MLflow's interface on the active store, and find the links to its newest comparison.

``mlflow server`` prints no links, opens in a mode without the model registry, and answers Ctrl+C
with a traceback.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

import mlflow

from mlflow_lifecycle.exceptions import ServingFailedError

MODE = "workflowType=machine_learning"


def find_links(address: str) -> list[str]:
    """Return links to the newest comparison, if there is one, and to the model registered last.

    After the first one comes the command that compares packages, data and answers, too.

    Args:
        address: of the server in the links. They are looked up in the active store.
    """
    client = mlflow.MlflowClient()
    models = client.search_registered_models(
        max_results=1, order_by=["last_updated_timestamp DESC"]
    )
    if not models:
        return [f"{address}/#/models?{MODE}"]
    name = models[0].name
    links = [f"{address}/#/models/{quote(name, safe='')}?{MODE}"]
    runs = {}
    with contextlib.suppress(mlflow.MlflowException):  # such as a run that was removed
        versions = client.search_model_versions(
            f"name = {name!r}", max_results=2, order_by=["version_number DESC"]
        )
        for version in reversed(versions):
            runs[str(version.version)] = client.get_run(version.run_id).info.run_id
    if len(runs) == 2:
        compared = urlencode({"name": json.dumps(name), "runs": json.dumps(runs)}, quote_via=quote)
        links.insert(0, f"{address}/#/compare-model-versions?{compared}&{MODE}")
        addresses = [shlex.quote(f"models:/{name}/{number}") for number in runs]
        links.insert(1, f"For signed versions: lifecycle compare {' '.join(addresses)}")
    return links


def is_in_use(port: int) -> bool:
    """Return whether a server listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def running_interface(port: int) -> Iterator[subprocess.Popen]:
    """Run MLflow's server on the active store, and give its process once it answers or has ended.

    SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl+C does. At the end of the block no process
    of the server is left.

    Raises:
        ServingFailedError: the port is in use.
    """
    if is_in_use(port):
        remedy = f"Choose another one: lifecycle ui --port {port + 1}"
        raise ServingFailedError(f"Port {port} is in use (on macOS often by AirPlay). {remedy}")
    store = mlflow.get_tracking_uri()
    packages = Path(mlflow.__file__).parents[1]
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += [f"--uvicorn-opts=--log-level warning --app-dir '{packages}'"]
    if store.startswith("sqlite"):  # so that the runs can be used without the server, too
        folder = Path(store.partition(":///")[2]).resolve().parent
        command += ["--default-artifact-root", (folder / "mlruns").as_uri()]
    variables = {
        "MLFLOW_BACKEND_STORE_URI": store,  # other users can read the command, and not this
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONSAFEPATH": "1",
        "PYTHONWARNINGS": "ignore:starlette.middleware.wsgi is deprecated",
    }
    signals = []
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signals.append(number)
    received = []
    for number in signals:  # an error raised within Popen would leave the server
        signal.signal(number, lambda number, frame: received.append(number))
    # In a session of its own, the server does not receive Ctrl+C.
    server = subprocess.Popen(command, env=os.environ | variables, start_new_session=True)
    try:
        for number in signals:
            signal.signal(number, signal.default_int_handler)
        if received:
            raise KeyboardInterrupt
        while server.poll() is None and not is_in_use(port):
            time.sleep(0.1)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            if os.name == "nt":
                server.kill()
            else:
                os.killpg(server.pid, signal.SIGKILL)
        server.wait()
