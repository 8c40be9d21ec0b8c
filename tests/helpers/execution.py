"""Execute a notebook, or start MLflow's server, as a user does: in a process of its own, in a temporary folder."""

import contextlib
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import psutil
from nbval.plugin import coalesce_streams, get_sanitize_patterns

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tracking_quick_start"
NOT_REBUILT = ["NOT CHECKED: REBUILD_ENVIRONMENT is off, so no environment was built.\n"]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Return this process's environment variables for a child that leaves nothing outside ``folder``.

    The store is the default one unless ``variables`` name another. MLflow's usage telemetry is off, and so are the
    links with ids that it prints with a tracking server, and the notebook's step that builds an environment, which
    takes longer than all others together.
    """
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "JPY_", "MAKE"))}
    isolated = {
        "TMPDIR": str(temporary),
        "TEMP": str(temporary),
        "LIFECYCLE_KEYS": str(folder / "keys"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # processes for judging language models
    }
    return inherited | isolated | {"REBUILD_ENVIRONMENT": "off"} | variables


def copy_project(folder: Path, notebook: str = "project.ipynb") -> Path:
    """Copy a notebook, its pins, and the files that belong to it, to ``folder``, and return the path there."""
    (folder / notebook).parent.mkdir(parents=True, exist_ok=True)
    names = [notebook, "model_requirements.txt"]
    if notebook.startswith("guides/"):
        names.append("requirements.txt")
        number = Path(notebook).name[:3]
        parts = [*ROOT.glob(f"guides/{number}*.py"), *ROOT.glob(f"guides/{number}*/*")]
        names += [str(path.relative_to(ROOT)) for path in parts]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder / notebook


def edit_cells(notebook: Path, **sources: str) -> None:
    """Replace the source of the one cell of ``notebook`` that has the tag, for each tag and source.

    Raises:
        ValueError: no cell or more than one has the tag.
    """
    content = nbformat.read(notebook, as_version=4)
    for tag, source in sources.items():
        (cell,) = [cell for cell in content.cells if tag in cell.metadata.get("tags", [])]
        cell.source = source
    nbformat.write(content, notebook)


def finished(command: list[str], folder: Path, variables: dict[str, str], limit: float) -> subprocess.CompletedProcess:
    """Run ``command`` in ``folder`` with just these environment variables, for at most ``limit`` seconds."""
    return subprocess.run(
        command,
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=limit,
    )


def execute(
    notebook: Path,
    folder: Path,
    *,
    prefix: tuple[str, ...] = (),
    working_directory: Path | None = None,
    python: Path | str = sys.executable,
    transport: str = "tcp",
    limit: float = 300,
    **variables: str,
) -> subprocess.CompletedProcess:
    """Execute ``notebook`` headless with nbconvert; the executed copy becomes ``folder / "executed.ipynb"``.

    Args:
        notebook: what to execute; the file stays as it is.
        folder: where the copy and all temporary files go.
        prefix: a command to run nbconvert under.
        working_directory: where nbconvert is started; by default ``folder``.
        python: what runs nbconvert and the kernel.
        transport: how nbconvert talks to the kernel, "tcp" or "ipc".
        limit: seconds after which it counts as hanging.
        variables: environment variables to add.

    Returns:
        The finished process; its ``returncode`` is not 0 if a cell failed, with the traceback in ``stderr``.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``limit``.
    """
    command = [*prefix, str(python), "-m", "nbconvert", "--execute", "--to", "notebook"]
    command += ["--output", str(folder / "executed.ipynb"), f"--KernelManager.transport={transport}"]
    # A kernel that is killed because it stops slowly cannot remove its temporary files.
    command += ["--KernelManager.shutdown_wait_time=60"]
    return finished([*command, str(notebook)], working_directory or folder, environment(folder, **variables), limit)


def papermill(
    notebook: Path, folder: Path, parameters: dict | None = None, *, limit: float = 300, **variables: str
) -> subprocess.CompletedProcess:
    """Execute ``notebook`` by papermill, started in ``folder``; the copy becomes ``folder / "executed.ipynb"``.

    Args:
        notebook: what to execute; the file stays as it is.
        folder: the kernel's working directory, and where the copy and all temporary files go.
        parameters: what to put in place of the defaults in the cell tagged ``parameters``.
        limit: seconds after which it counts as hanging.
        variables: environment variables to add.

    Returns:
        The finished process; its ``returncode`` is not 0 if a cell failed, with the traceback in ``stderr``.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``limit``.
    """
    command = [sys.executable, "-m", "papermill", str(notebook), "executed.ipynb", "--no-progress-bar"]
    for name, value in (parameters or {}).items():
        command += ["-p", name, str(value)]
    return finished(command, folder, environment(folder, **variables), limit)


def executed(folder: Path) -> nbformat.NotebookNode:
    """Return the notebook that ``execute`` left in ``folder``."""
    notebook = nbformat.read(folder / "executed.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = coalesce_streams(cell.outputs)
    return notebook


def text_outputs(notebook: nbformat.NotebookNode) -> list[str]:
    """Return all text that the notebook's cells printed or showed, an item per output.

    Not that of cells with measured times, which nbval is told to ignore. What a cell prints to stderr comes before what
    it prints to stdout: Jupyter keeps no order between the two.
    """
    texts = []
    for cell in notebook.cells:
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            continue
        for output in sorted(cell.get("outputs", []), key=lambda output: output.get("name", "~")):
            data = output.get("data", {})
            texts.append(output.get("text") or data.get("text/markdown") or data.get("text/plain") or "")
    return texts


def differing_outputs(folder: Path, notebook: str = "project.ipynb") -> list[str]:
    """Return the text outputs of the execution in ``folder`` that differ from the committed notebook's, in order.

    If it has more or fewer outputs, all from the first that differs on are returned.
    """
    committed = text_outputs(nbformat.read(ROOT / notebook, as_version=4))
    fresh = text_outputs(executed(folder))
    for pattern, replacement in get_sanitize_patterns((ROOT / "tests/sanitize.cfg").read_text(encoding="utf-8")):
        fresh = [re.sub(pattern, replacement, text) for text in fresh]
    pairs = itertools.zip_longest(fresh, committed, fillvalue="(no output)")
    return [new for new, old in pairs if new != old]


def make_here(target: str, *settings: str) -> list[str]:
    """Return the command that makes ``target`` with this environment in place of the one that make would install."""
    return ["make", target, "INSTALLED=", "DEVELOPMENT=", f"BIN='{Path(sys.executable).parent}'", *settings]


def git(folder: Path, *arguments: str) -> str:
    """Run git in ``folder`` and return what it prints."""
    command = ["git", "-C", folder, "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit_all(folder: Path) -> None:
    """Make ``folder`` a git repository with one commit of everything in it."""
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=Start")


def copy_committed(folder: Path) -> None:
    """Copy all files that git knows to ``folder``."""
    for name in git(ROOT, "ls-files", "-z").strip("\0").split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the content of each file below ``folder`` by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def free_port() -> int:
    """Return a TCP port of the loopback interface on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], bool], limit: float = 120) -> None:
    """Wait until the condition holds, and fail after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def running(command: list[str], address: str, log: Path, **options) -> Iterator[psutil.Popen]:
    """Run a server from when ``address`` answers to the end of the block; then it and all its children are gone.

    Give its process.

    Raises:
        RuntimeError: the server ended before it answered, or did not answer within two minutes; with what it printed.
    """
    with log.open("w") as output:
        server = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **options)
        try:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"No answer from {address}:\n{log.read_text()}")
                time.sleep(0.2)
            yield server
        finally:
            processes = [server, *server.children(recursive=True)] if server.is_running() else [server]
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes)


@contextlib.contextmanager
def tracking_server(folder: Path) -> Iterator[str]:
    """Run a real MLflow tracking server with an empty store in ``folder`` and give its address."""
    address = f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        address.rpartition(":")[2],
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{(folder / 'server.db').as_posix()}",
        "--workers",
        "1",
    ]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with running(command, f"{address}/health", folder / "server.log", cwd=folder, env=environment(folder)):
        yield address
