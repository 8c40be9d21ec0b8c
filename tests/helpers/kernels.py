"""Execute notebooks one after the other in one kernel: what they import is imported once, which takes seconds.

For tests of what a notebook logs and prints. How and where it can be executed is tested with processes of its own.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from execution import environment
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

START = """
import os, sys, tempfile
if "mlflow" in sys.modules:
    sys.modules["mlflow"].set_tracking_uri(None)
if "pandas" in sys.modules:
    sys.modules["pandas"].reset_option("^display")
kept = {{name: os.environ[name] for name in ("MPLBACKEND",) if name in os.environ}}
os.environ.clear()
os.environ.update({variables} | kept)
os.chdir({folder!r})
tempfile.tempdir = None
"""


@contextlib.contextmanager
def running_kernel(folder: Path) -> Iterator[KernelManager]:
    """Run a kernel, with ``folder`` as its working directory, to the end of the block; then it is gone."""
    manager = KernelManager(kernel_name="python3", transport_encryption="auto")
    manager.start_kernel(env=environment(folder), cwd=str(folder))
    try:
        yield manager
    finally:
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def execute_in(
    kernel: KernelManager, notebook: Path, folder: Path, parameters: dict | None = None, **variables: str
) -> str:
    """Execute ``notebook`` in an emptied ``kernel``; the copy becomes ``folder / "executed.ipynb"``.

    Args:
        kernel: where to execute it.
        notebook: what to execute; the file stays as it is.
        folder: the working directory, and where the copy and all temporary files go.
        parameters: what to put in place of the defaults in the cell tagged ``parameters``.
        variables: environment variables to add to those of ``execution.environment``, for this execution.

    Returns:
        The traceback of the error that it ended with, or an empty text.
    """
    content = nbformat.read(notebook, as_version=4)
    start = START.format(variables=environment(folder, **variables), folder=str(folder))
    values = "\n".join(f"{name} = {value!r}" for name, value in (parameters or {}).items())
    tagged = next(i for i, cell in enumerate(content.cells) if "parameters" in cell.metadata.get("tags", []))
    content.cells.insert(tagged + 1, nbformat.v4.new_code_cell(values))
    content.cells[:0] = [nbformat.v4.new_code_cell(source) for source in ("%reset -f", start)]
    runner = NotebookClient(content, km=kernel)
    try:
        runner.execute()
    except CellExecutionError as failure:
        return re.sub(r"\x1b\[[0-9;]*m", "", str(failure))  # without colours
    finally:
        runner.kc.stop_channels()
        nbformat.write(content, folder / "executed.ipynb")
    return ""
