"""Start the MLflow interface on the quickstart's store and print the links that open its newest comparison.

Usage: python tools/interface.py [--port 5000]

The store is the one that MLFLOW_TRACKING_URI names, else the SQLite file beside the notebook. The server
listens on this machine only, until Ctrl+C. Where MLFLOW_TRACKING_URI is a server already, only the links are printed.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import mlflow

FOLDER = Path(__file__).resolve().parent.parent
# A server that is down should be known within seconds, and not after minutes of retries.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
# The server's background jobs judge language models; without their six processes it is up sooner.
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")


def links(server: str) -> list[str]:
    """Return the addresses, below ``server``, of the model registered last and of its two newest versions compared.

    Raises:
        SystemExit: the store has no registered model.
    """
    client = mlflow.MlflowClient()
    try:
        models = client.search_registered_models()
    except Exception as error:
        sys.exit(re.sub(r"//\S*@", "//", f"The store gives no answer: {error}\nCorrect or unset MLFLOW_TRACKING_URI."))
    if not models:
        sys.exit("No model is registered in this store yet. Make one first: make run")
    name = max(models, key=lambda model: model.last_updated_timestamp).name
    newest = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda version: int(version.version))[-2:]
    runs = {str(version.version): version.run_id for version in newest}
    experiments = sorted({client.get_run(run).info.experiment_id for run in runs.values()})
    pages = {
        "compare-model-versions": {"name": name, "runs": runs},
        "compare-runs": {"runs": list(runs.values()), "experiments": experiments},
        f"models/{name}": {},
    }
    return [
        f"{server}/#/{page}?"
        + "".join(f"{key}={quote(json.dumps(value))}&" for key, value in query.items())
        + "workflowType=machine_learning"
        for page, query in pages.items()
    ]


def main() -> None:
    """Check the store and the port, print the links, and become the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=5000)
    port = parser.parse_args().port
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(FOLDER / 'mlflow.db').as_posix()}"
    if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).exists():
        sys.exit(f"There is no store at {store} yet. Make one first: make run")
    mlflow.set_tracking_uri(store)
    if store.startswith("http"):
        address = re.sub(r"//\S*@", "//", store).rstrip("/")
        print("The MLflow interface is up:", *links(address), sep="\n  ")
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            sys.exit(f"Port {port} is taken (5000 on macOS: by AirPlay). Take another: make ui PORT={port + 1}")
    addresses = links(f"http://127.0.0.1:{port}")
    print("The MLflow interface will be up in some seconds; Ctrl+C stops it.", *addresses, sep="\n  ", flush=True)
    server = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        store,
        "--workers",
        "1",
    ]
    server += ["--host", "127.0.0.1", "--port", str(port)]
    if os.name == "nt":  # no exec there that keeps the terminal
        sys.exit(subprocess.call(server))
    os.execv(sys.executable, server)


if __name__ == "__main__":
    main()
