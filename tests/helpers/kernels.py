"""Execute a notebook's cells again and again in one kernel: what they import is imported once."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import nbformat
from execution import environment
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


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
    kernel: KernelManager,
    notebook: nbformat.NotebookNode,
    folder: Path,
    variables: dict[str, str] | None = None,
    parameters: dict | None = None,
) -> str:
    """Execute ``notebook`` in place, in an emptied ``kernel``, and return its error, or nothing.

    Args:
        kernel: where to execute it.
        notebook: what to execute; three cells go into it that set what follows.
        folder: the working directory.
        variables: environment variables to set for this execution.
        parameters: what to put in place of the defaults in the cell tagged ``parameters``.
    """
    start = f"import os\nos.chdir({str(folder)!r})\nos.environ.update({variables or {}})"
    for name in {"MLFLOW_TRACKING_URI", "JPY_SESSION_NAME"} - set(variables or {}):  # of an earlier execution
        start += f"\nos.environ.pop({name!r}, None)"
    values = "\n".join(f"{name} = {value!r}" for name, value in (parameters or {}).items())
    tagged = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(tagged + 1, nbformat.v4.new_code_cell(values))
    notebook.cells[:0] = [nbformat.v4.new_code_cell(source) for source in ("%reset -f", start)]
    runner = NotebookClient(notebook, km=kernel)
    try:
        runner.execute()
        return ""
    except CellExecutionError as failure:
        return f"{failure.ename}: {failure.evalue}"
    finally:
        runner.kc.stop_channels()
