"""Guide 05, serving: what the served model answers, what the guard refuses, and that nothing is left running."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import mlflow
import nbformat
import psutil
import pytest
from execution import ROOT, copy_project, environment, free_port, run_cells, text_outputs
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from serving import serving
from sklearn.datasets import load_iris

pytestmark = pytest.mark.extended  # it takes long

GUIDE = "guides/05_serve_and_monitor.ipynb"
FEATURES = load_iris(as_frame=True).data


def cells_before(start: str) -> list[nbformat.NotebookNode]:
    """Return the guide's cells that come before the one that starts so."""
    cells = nbformat.read(ROOT / GUIDE, as_version=4).cells
    (end,) = [number for number, cell in enumerate(cells) if cell.source.startswith(start)]
    return cells[:end]


def cell(start: str) -> nbformat.NotebookNode:
    """Return the guide's cell that begins so."""
    (found,) = [cell for cell in nbformat.read(ROOT / GUIDE, as_version=4).cells if cell.source.startswith(start)]
    return found


@contextlib.contextmanager
def executed_in_a_kernel(folder, cells):
    """Execute cells in a kernel that lives until the end of the block; give notebook, client and the cell's error."""
    manager = KernelManager(kernel_name="python3", transport_encryption="auto")
    manager.start_kernel(env=environment(folder), cwd=str(folder))
    notebook = nbformat.v4.new_notebook(cells=cells)
    runner, error = NotebookClient(notebook, km=manager), ""
    try:
        try:
            runner.execute()
        except CellExecutionError as failure:
            error = f"{failure.ename}: {failure.evalue}"
        yield notebook, error
    finally:
        runner.kc.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def servers_of(folder) -> list[psutil.Process]:
    """Return the processes that serve a model, or keep one that does, with their temporary files in ``folder``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            started_here = process.environ().get("TMPDIR", "").startswith(str(folder))
            if started_here and any(part == "serve" or "scoring_server" in part for part in process.cmdline()):
                found.append(process)
    return found


def gone(folder, seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while servers_of(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not servers_of(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Give the folder in which the guide serves its champion behind the guard, the two ports, and the notebook."""
    folder = tmp_path_factory.mktemp("served")
    copy_project(folder, GUIDE)
    cells = cells_before("def timed")
    cells.append(nbformat.v4.new_code_cell("print(port, front.server_port)"))
    with executed_in_a_kernel(folder, cells) as (notebook, error):
        assert error == ""
        ports = [int(part) for part in text_outputs(notebook)[-1].split()]
        yield folder, *ports, notebook
    assert gone(folder)  # the kernel was killed, and its server with it


def ask(port: int, body: str | bytes, kind: str | None = "application/json") -> tuple[int, str]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/invocations", body, {"Content-Type": kind} if kind else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def split(rows) -> str:
    return json.dumps({"dataframe_split": rows.to_dict("split", index=False)})


@pytest.mark.parametrize("front", ["MLflow", "guard"])
@pytest.mark.parametrize("form", ["dataframe_split", "dataframe_records", "inputs"])
def test_served_predictions_are_those_in_process(served, front, form):
    # given all 150 flowers in one of the forms, and the champion loaded here
    folder, port, guard, _ = served
    rows = {
        "dataframe_split": FEATURES.to_dict("split", index=False),
        "dataframe_records": FEATURES.to_dict("records"),
        "inputs": FEATURES.to_dict("list"),
    }
    client = mlflow.MlflowClient(f"sqlite:///{folder.as_posix()}/mlflow.db")
    version = client.get_model_version_by_alias("iris_served", "champion")
    location = client.get_logged_model(version.source.removeprefix("models:/")).artifact_location
    expected = mlflow.pyfunc.load_model(location).predict(FEATURES).tolist()
    # when
    status, text = ask({"MLflow": port, "guard": guard}[front], json.dumps({form: rows[form]}))
    # then
    assert status == 200
    assert json.loads(text)["predictions"] == expected


BAD = {
    "missing column": (split(FEATURES.iloc[:2, :3]), 400),
    "column twice": (
        json.dumps({"dataframe_split": {"columns": [*FEATURES, FEATURES.columns[0]], "data": [[1.0] * 5]}}),
        400,
    ),
    "text": (json.dumps({"inputs": [dict.fromkeys(FEATURES, "wide")]}), 400),
    "boolean": (json.dumps({"inputs": [dict.fromkeys(FEATURES, True)]}), 400),
    "null": (json.dumps({"dataframe_records": [dict.fromkeys(FEATURES)]}), 400),
    "NaN": (json.dumps({"instances": [dict.fromkeys(FEATURES, float("nan"))]}), 400),
    "infinity": (json.dumps({"inputs": [dict.fromkeys(FEATURES, float("inf"))]}), 400),
    "overflow": (split(FEATURES.head(1)).replace("5.1", "1e999"), 400),
    "negative": (json.dumps({"inputs": [dict.fromkeys(FEATURES, -999)]}), 400),
    "huge number": (split(FEATURES.head(1)).replace("5.1", "1" + "0" * 5000), 400),
    "0 rows": (split(FEATURES.head(0)), 400),
    "two forms": (json.dumps({"inputs": FEATURES.to_dict("list"), "instances": FEATURES.to_dict("list")}), 400),
    "long row": (json.dumps({"dataframe_split": {"columns": [*FEATURES], "data": [[1.0] * 5]}}), 400),
    "columns of two lengths": (json.dumps({"inputs": FEATURES.to_dict("list") | {FEATURES.columns[0]: [1.0]}}), 400),
    "rows of another form": (json.dumps({"dataframe_records": "rows"}), 400),
    "number": ("3", 400),
    "empty body": ("", 400),
    "array": ("[]", 400),
    "malformed": (split(FEATURES)[:-9], 400),
    "bytes": (b"\xff\xfe\x00{}", 400),
    "900 deep": ('{"inputs":' + "[" * 900 + "]" * 900 + "}", 400),
    "deep": ("[" * 100_000, 400),
    "large": (split(FEATURES.head(1).assign(colour="x" * 8_000_000)), 413),
}


@pytest.mark.parametrize("case", BAD)
def test_guard_answers_a_bad_request_with_a_clear_refusal(served, case):
    body, expected = BAD[case]
    status, text = ask(served[2], body)
    assert status == expected
    assert json.loads(text)["message"]
    assert "Traceback" not in text


@pytest.mark.parametrize("kind", [None, "text/plain", "text/csv"])
def test_guard_refuses_another_content_type(served, kind):
    assert ask(served[2], split(FEATURES), kind)[0] == 415


@pytest.mark.parametrize("model", ["gone", "wrong"])
def test_guard_says_502_if_the_model_behind_it_does_not_answer(model):
    # given the guide's guard before a port on which nothing listens, or something that is no model
    with serving(b"[]") as (address, _):
        port = int(address.split(":")[2].partition("/")[0]) if model == "wrong" else free_port()
        names = {"__name__": "__main__", "port": port, "forms": ["inputs"]}
        run_cells(GUIDE, ["import ", "newer = ", "iris = ", "recorded, guard = "], names)
        for start, function in {"keeper = ": "def ask", "three = ": "def records_of"}.items():
            source = cell(start).source
            exec(source[source.index(function) :], names)
        # when
        answer = names["guard"].test_client().post("/invocations", json={"inputs": FEATURES.to_dict("list")})
    # then
    assert answer.status_code == 502
    assert answer.json == {"message": "the model behind the guard does not answer as it should"}


@pytest.mark.parametrize("rows", [FEATURES.assign(colour="blue"), FEATURES[FEATURES.columns[::-1]]])
def test_extra_and_reordered_columns_change_no_answer(served, rows):
    assert ask(served[2], split(rows)) == ask(served[2], split(FEATURES))


def test_curl_line_can_be_pasted(served, lacking):
    if shutil.which("curl") is None:
        lacking("curl", "apt-get install curl")
    # given the line that the guide prints
    text = next(text for text in text_outputs(served[3]) if "\ncurl " in text)
    line = text[text.index("\ncurl ") + 1 :]
    # when it is pasted into a shell, then it answers what the guide printed for the same rows
    answer = subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout
    assert f"dataframe_split: 200 {answer}\n" in text


def test_servers_listen_on_loopback_only(served):
    _, port, guard, _ = served
    listening = {}
    for connection in psutil.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN:
            listening.setdefault(connection.laddr.port, set()).add(connection.laddr.ip)
    assert listening[port] == listening[guard] == {"127.0.0.1"}


def test_failing_cell_leaves_no_server(served, tmp_path):
    # given a cell that fails after a model is served
    model = next((served[0] / "mlruns").rglob("MLmodel")).parent
    sources = [cell("import ").source, f"rebuild_environment, folder = False, {str(model)!r}"]
    sources += [cell("keeper = ").source, cell("def serve").source, "print(ask(port, path='/ping'))", "1 / 0"]
    # when
    with executed_in_a_kernel(tmp_path, [nbformat.v4.new_code_cell(source) for source in sources]) as (notebook, error):
        # then it did answer, and is gone although the kernel still lives
        assert error.startswith("ZeroDivisionError")
        assert "(200, " in text_outputs(notebook)[-2]
        assert gone(tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the kernel is killed by SIGKILL, which this system lacks")
def test_keeper_ends_its_server_when_the_guide_is_killed(tmp_path):
    # given a process that runs the guide's keeper, under it a server with a child
    source = cell("keeper = ").source
    names = {}
    exec(source[: source.index("servers = ")], names)
    child = "import time; time.sleep(99)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    command = [sys.executable, "-c", names["keeper"], sys.executable, "-c", parent]
    start = f"import subprocess, time; subprocess.Popen({command!r}, stdin=subprocess.PIPE); time.sleep(99)"
    guide = psutil.Popen([sys.executable, "-c", start], env=os.environ | {"TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 30
    while len(below := guide.children(recursive=True)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(below) == 3
    # when
    guide.kill()
    guide.wait()
    # then nothing is left, neither process nor file
    assert psutil.wait_procs(below, timeout=15)[1] == []
    assert list(tmp_path.iterdir()) == []
