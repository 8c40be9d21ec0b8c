"""Execute notebooks into HTML pages, and print how long each section takes.

Usage: python tools/run.py [--output-dir FOLDER] [--shutdown immediate] NOTEBOOK [NOTEBOOK ...]

Each notebook runs in a new kernel, in the notebook's folder. Its file does not change. One notebook prints a line per
section, several print a line each. If a cell fails, the page shows the outputs so far and the error. The notebooks that
a page links to get a page, too, with their stored outputs.

Libraries are imported inside functions, so that Ctrl+C also ends the program quietly while they load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from mlflow_lifecycle.experiments import printable, source_tags

if TYPE_CHECKING:
    from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
# MLflow by itself waits minutes for a tracking server that is down or silent.
TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
# Creates the tables of a new SQLite store, all or none. If that fails, the notebook's own cell shows the error.
PREPARE = '__import__("mlflow_lifecycle.experiments").experiments.prepare_store(".")'
MESSAGE_LENGTH = 3000


class NotebookFailedError(Exception):
    """A notebook could not be read or executed."""

    def __init__(self, reason: str, section: str = "", cell: str = "") -> None:
        """Keep the reason, the section's title, and the id of the cell that failed, if any."""
        super().__init__(reason, section, cell)
        self.reason, self.section, self.cell = reason, section, cell

    def __str__(self) -> str:
        """Return the text that follows the notebook's name."""
        return f' failed in section "{self.section}": {self.reason}' if self.section else f": {self.reason}"


@contextlib.contextmanager
def timed(label: str) -> Iterator[None]:
    """Print ``label`` when the block starts, and on the same line its seconds when it ends."""
    print(f"{label:<36}", end="", flush=True)
    start, outcome = time.perf_counter(), ""
    try:
        yield
    except BaseException as error:
        outcome = "  interrupted" if isinstance(error, KeyboardInterrupt) else "  failed"
        raise
    finally:
        print(f"{time.perf_counter() - start:8.1f} s{outcome}", flush=True)


def sections(notebook: NotebookNode) -> list[tuple[str, list[int]]]:
    """Return the title of each H1 or H2 that has code below it, with the indices of its code cells."""
    found = [("Start", [])]
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            found[-1][1].append(index)
        elif cell.cell_type == "markdown":
            prose = re.sub(r"^```.*?^```", "", cell.source, flags=re.MULTILINE | re.DOTALL)
            found += [(title.replace("`", ""), []) for title in re.findall(r"^##? +(.+?) *$", prose, re.MULTILINE)]
    return [(title, indices) for title, indices in found if indices]


def summary(name: str, message: str) -> str:
    """Return an error's name and message, at most MESSAGE_LENGTH characters; of more than three lines, two."""
    text = printable(f"{name}: {message}").rstrip(": \n")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if len(lines) > 3:
        lines = [lines[0], "...", lines[-1]]
    text = "\n  ".join(lines)
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}..."


def kernel_environment(path: Path) -> dict[str, str]:
    """Return the environment variables for the kernel of the notebook at ``path``. The user's own settings win.

    MLflow takes run tags from MLFLOW_RUN_CONTEXT. In a kernel it cannot find the notebook's name and commit itself.
    """
    tags = source_tags(path.name, path.parent)
    variables = TIMEOUTS | os.environ
    with contextlib.suppress(ValueError, TypeError):  # MLflow reports a value that is not a JSON object
        tags |= json.loads(variables.get("MLFLOW_RUN_CONTEXT") or "{}")
        variables["MLFLOW_RUN_CONTEXT"] = json.dumps(tags)
    return variables


def execute(notebook: NotebookNode, path: Path, *, shutdown: str, show: bool) -> None:
    """Execute ``notebook`` in place.

    Args:
        notebook: what to execute; its stored outputs are cleared.
        path: its file; the kernel starts in that folder.
        shutdown: how the kernel ends after the last cell, "graceful" or "immediate"; after a failure always "graceful".
        show: print each section and its seconds.

    Raises:
        NotebookFailedError: a cell failed, or the kernel died or did not start.
    """
    from asyncio import InvalidStateError

    from jupyter_client.kernelspec import NoSuchKernel
    from jupyter_core.utils import run_sync
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from traitlets.config import Config

    def prepare_store(cell: NotebookNode, **_) -> None:
        if "mlflow.set_experiment(" in cell.source:
            client.kc.execute(PREPARE, silent=True, store_history=False, stop_on_error=False)

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    title, cell = "", {}
    config = Config(KernelManager={"transport_encryption": "auto"})
    client = NotebookClient(notebook, config=config, store_widget_state=False, on_cell_execute=prepare_store)
    # The notebook has what its cells print. The log has the rest, such as why the kernel did not start.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            with client.setup_kernel(cwd=str(path.parent), env=kernel_environment(path), stderr=log):
                for title, indices in sections(notebook):
                    with timed(f"  {title}") if show else contextlib.nullcontext():
                        for index in indices:
                            cell = notebook.cells[index]
                            client.execute_cell(cell, index)
                client.shutdown_kernel = shutdown
        except CellExecutionError as error:
            raise NotebookFailedError(summary(error.ename, error.evalue), title, cell.get("id", "")) from error
        except DeadKernelError as error:
            raise NotebookFailedError("the kernel died, perhaps because memory ran out", title) from error
        except (NoSuchKernel, RuntimeError) as error:
            log.seek(0)
            reason = (log.read().strip() or str(error)).splitlines()[-1]
            raise NotebookFailedError(f"the kernel did not start: {reason}") from error
        finally:
            if client.km is not None and client.km.has_kernel:  # interrupted while it started or ended
                with contextlib.suppress(InvalidStateError):
                    run_sync(client.km.shutdown_kernel)(now=True)


def page(notebook: NotebookNode, title: str, failure: NotebookFailedError | None = None) -> str:
    """Return ``notebook`` with its outputs as an HTML page, with the ``failure`` at its top."""
    from nbconvert.exporters import HTMLExporter

    options = {"exclude_input_prompt": True, "exclude_output_prompt": True}
    exporter = HTMLExporter(extra_template_basedirs=[str(ROOT / "tools")], template_name="template", **options)
    return exporter.from_notebook_node(notebook, {"metadata": {"name": title}, "failure": failure})[0]


def relink(text: str, folder: Path, output_dir: Path) -> str:
    """Return a page with its links to files below ``folder`` written for ``output_dir``; notebooks become pages."""

    def link(match: re.Match) -> str:
        target = (folder / unquote(match[1])).resolve()
        if not target.exists():
            return match[0]
        if target.suffix == ".ipynb":
            target = output_dir / f"{target.stem}.html"
        return f'href="{quote(Path(os.path.relpath(target, output_dir)).as_posix())}"'

    return re.sub(r'href="(?![a-z]+:|[#/])([^"#?]+)"', link, text)


def write_page(notebook: NotebookNode, path: Path, target: Path, failure: NotebookFailedError | None = None) -> None:
    """Write ``notebook``, whose file is ``path``, as the page ``target``."""
    text = relink(page(notebook, path.stem, failure), path.parent, target.parent)
    target.write_text(printable(text), encoding="utf-8")


def write_linked_pages(path: Path, output_dir: Path) -> None:
    """Write a page for each notebook that ``path`` links to, directly or through others, from its stored outputs.

    A page that is newer than its notebook is kept.
    """
    import nbconvert.exporters  # noqa: F401 - the page of the notebook at ``path`` needs it in any case
    import nbformat

    notebooks = [path]
    for notebook in notebooks:
        for link in re.findall(r"\]\(([^()]+\.ipynb)\)", notebook.read_text(encoding="utf-8")):
            linked = (notebook.parent / unquote(link)).resolve()
            if linked.exists() and linked not in notebooks:
                notebooks.append(linked)
    for notebook in notebooks[1:]:
        target = output_dir / f"{notebook.stem}.html"
        if not target.exists() or target.stat().st_mtime < notebook.stat().st_mtime:
            write_page(nbformat.read(notebook, as_version=4), notebook, target)


def run(path: Path, target: Path, *, shutdown: str, show: bool) -> None:
    """Execute the notebook at ``path`` into the HTML page ``target``.

    Raises:
        NotebookFailedError: it cannot be read, or a cell failed; in the latter case the page shows the outputs so far.
    """
    import nbclient  # noqa: F401 - before the thread imports it
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except FileNotFoundError:
        raise NotebookFailedError("there is no such file") from None
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise NotebookFailedError(f"this is not a notebook: {str(error).splitlines()[0][:80]}") from error
    path, target, failure = path.resolve(), target.resolve(), None
    thread = threading.Thread(target=write_linked_pages, args=(path, target.parent), daemon=True)
    thread.start()  # most of the time this process waits for the kernel
    try:
        execute(notebook, path, shutdown=shutdown, show=show)
    except NotebookFailedError as error:
        failure = error
    thread.join()
    write_page(notebook, path, target, failure)
    if failure:
        raise failure


def main() -> None:
    """Execute the notebooks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--output-dir", type=Path, default=Path("build"), metavar="FOLDER", help="default: build")
    parser.add_argument("--shutdown", choices=["graceful", "immediate"], default="graceful", help="how the kernel ends")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    several = len(arguments.notebooks) > 1
    failures = []
    for path in arguments.notebooks:
        target = arguments.output_dir / f"{path.stem}.html"
        try:
            with timed(str(path)) if several else contextlib.nullcontext():
                run(path, target, shutdown=arguments.shutdown, show=not several)
        except NotebookFailedError as failure:
            where = f"\nThe full traceback is in {target.as_posix()}" if failure.cell else ""
            failures.append(f"{path.as_posix()}{failure}{where}")
    if failures:
        sys.exit("\n".join(failures))
    if several:
        folder = arguments.output_dir.as_posix()
        print(f"The executed guides are in {folder}/, their runs and models in the MLflow interface: make ui")
    else:
        print(f"The executed notebook: {target.as_posix()}. Open it in a browser.")
        print("The runs and the model versions in the MLflow interface: make ui")


def interrupt(*_) -> None:
    """End the program as Ctrl+C does, without asyncio's messages about cancelled tasks."""
    logging.getLogger("asyncio").disabled = True
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr, flush=True)
        os._exit(130)  # at once: ZeroMQ would wait for the kernel, which is gone
    except OSError as error:  # the page cannot be written
        sys.exit(str(error))
