"""Execute notebooks into HTML pages, and show how long each section takes.

Usage: python tools/run.py [--output-dir FOLDER] [--shutdown immediate] NOTEBOOK [NOTEBOOK ...]

Each notebook runs in a new kernel, which starts in the notebook's folder. The notebook's file stays as it is. One
notebook prints a line per section, several print a line each. If a cell fails, the page shows what ran and the error.
Libraries are imported where they are used, so that Ctrl+C ends the program quietly while they load, too.
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
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from lifecycle.store import printable, source_tags

if TYPE_CHECKING:
    from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
# Make the store whole, before the notebook opens it, or leave it to the notebook to say why not. Nothing of it is seen.
PREPARE = '__import__("lifecycle.store").store.prepare_store(".")'


class NotebookFailedError(Exception):
    """A notebook did not run to its end."""

    def __init__(self, reason: str, section: str = "", cell: str = "") -> None:
        """Keep the reason, the title of the section, and the id of the cell that has the traceback, if any."""
        super().__init__(reason, section, cell)
        self.reason, self.section, self.cell = reason, section, cell

    def __str__(self) -> str:
        """Return what to print behind the notebook's name."""
        return f' failed in section "{self.section}": {self.reason}' if self.section else f": {self.reason}"


@contextlib.contextmanager
def timed(label: str) -> Iterator[None]:
    """Print ``label`` when the block begins, and the seconds that it took, in the same line, when it ends."""
    print(label, end="", flush=True)
    start, outcome = time.perf_counter(), ""
    try:
        yield
    except BaseException as error:
        outcome = "  interrupted" if isinstance(error, KeyboardInterrupt) else "  failed"
        raise
    finally:
        print(f"{time.perf_counter() - start:8.1f} s{outcome}", flush=True)


def sections(notebook: NotebookNode) -> list[tuple[str, list[int]]]:
    """Return each heading, H1 or H2, that has code below it, with the indices of its code cells."""
    found = [("Start", [])]
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            found[-1][1].append(index)
        elif cell.cell_type == "markdown":
            prose = re.sub(r"^```.*?^```", "", cell.source, flags=re.MULTILINE | re.DOTALL)
            found += [(title.replace("`", ""), []) for title in re.findall(r"^##? +(.+?) *$", prose, re.MULTILINE)]
    return [(title, indices) for title, indices in found if indices]


def summary(name: str, message: str) -> str:
    """Return an error's name and message; of a message with many lines, the first and the last."""
    text = printable(f"{name}: {message}").rstrip(": \n")
    lines = [line.rstrip()[:300] for line in text.splitlines() if line.strip()]
    return "\n  ".join(lines if len(lines) <= 3 else [lines[0], "...", lines[-1]])


def kernel_environment(path: Path) -> dict[str, str]:
    """Return the environment variables for the kernel of the notebook at ``path``.

    MLflow takes run tags from MLFLOW_RUN_CONTEXT. It cannot find out a notebook's name and commit itself, so they are
    added there, unless the user has set them.
    """
    inside = path.is_relative_to(ROOT)
    tags = source_tags(path.relative_to(ROOT).as_posix(), ROOT) if inside else source_tags(path.name, path.parent)
    with contextlib.suppress(ValueError, TypeError):  # what is no JSON object stays as it is: MLflow reports it
        tags |= json.loads(os.environ.get("MLFLOW_RUN_CONTEXT") or "{}")
        return os.environ | {"MLFLOW_RUN_CONTEXT": json.dumps(tags)}
    return dict(os.environ)


def execute(notebook: NotebookNode, path: Path, *, shutdown: str = "graceful", show: bool = False) -> None:
    """Execute ``notebook`` in place.

    Args:
        notebook: what to execute; the outputs that it has are cleared.
        path: its file; the kernel starts in that folder.
        shutdown: how the kernel ends once all has run, "graceful" or "immediate"; after a failure always the former.
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

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    parts = sections(notebook)
    width = max((len(title) for title, _ in parts), default=0)
    title, cell = "", {}
    config = Config(KernelManager={"transport_encryption": "auto"})
    # What the imports bring into memory stays there, so it pays to look for garbage less often.
    options = ["--IPKernelApp.exec_lines=import gc; gc.set_threshold(100_000, 50, 100); del gc"]
    client = NotebookClient(notebook, config=config, store_widget_state=False, extra_arguments=options)
    client.create_kernel_manager()
    # What cells print goes into the notebook. The log has the rest, such as why the kernel did not start.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        # The quickstart's store is made in its kernel, once that has imported MLflow. A guide makes its store itself.
        prepare = parts[0][1][-1] if parts and (path.parent / "model_requirements.txt").exists() else None
        try:
            client.start_new_kernel(cwd=str(path.parent), env=kernel_environment(path), stderr=log)
            import_module("nbconvert.exporters")  # for the page, while the kernel starts, which takes longer
            with client.setup_kernel():
                for title, indices in parts:
                    with timed(f"  {title:<{width}}") if show else contextlib.nullcontext():
                        for index in indices:
                            cell = notebook.cells[index]
                            if index == prepare:
                                client.kc.execute(PREPARE, silent=True, store_history=False, stop_on_error=False)
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
                with contextlib.suppress(InvalidStateError):  # because that is not finished
                    run_sync(client.km.shutdown_kernel)(now=True)


def page(notebook: NotebookNode, title: str, failure: NotebookFailedError | None = None) -> str:
    """Return ``notebook`` with its outputs as an HTML page; a ``failure`` is shown at its top."""
    from nbconvert.exporters import HTMLExporter

    options = {"exclude_input_prompt": True, "exclude_output_prompt": True}
    exporter = HTMLExporter(extra_template_basedirs=[str(ROOT / "tools")], template_name="template", **options)
    return exporter.from_notebook_node(notebook, {"metadata": {"name": title}, "failure": failure})[0]


def relinked(text: str, folder: Path, output_dir: Path, names: set[str]) -> str:
    """Return the page ``text`` with its links to files below ``folder`` written for a page in ``output_dir``.

    A link to a notebook leads to its page, if that is there or its name is among ``names``, which are made now.
    """

    def link(match: re.Match) -> str:
        target = (folder / unquote(match[1])).resolve()
        page_of_it = output_dir / f"{target.stem}.html"
        if target.suffix == ".ipynb" and (page_of_it.name in names or page_of_it.exists()):
            return f'href="{quote(page_of_it.name)}"'
        return f'href="{quote(Path(os.path.relpath(target, output_dir)).as_posix())}"' if target.exists() else match[0]

    return re.sub(r'href="(?![a-z]+:|[#/])([^"#?]+)"', link, text)


def run(path: Path, target: Path, names: set[str], **options) -> None:
    """Execute the notebook at ``path`` into the HTML page ``target``, with the ``options`` of ``execute``.

    ``names`` are those of all pages that are made now.

    Raises:
        NotebookFailedError: it cannot be read, or did not run to its end; the page then shows how far it got.
    """
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except FileNotFoundError:
        raise NotebookFailedError("there is no such file") from None
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise NotebookFailedError(f"this is not a notebook: {str(error).splitlines()[0][:80]}") from error
    failure = None
    try:
        execute(notebook, path.resolve(), **options)
    except NotebookFailedError as error:
        failure = error
    text = relinked(page(notebook, path.stem, failure), path.resolve().parent, target.resolve().parent, names)
    target.write_text(printable(text), encoding="utf-8")
    if failure:
        raise failure


def main() -> None:
    """Execute the notebooks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--output-dir", type=Path, default=Path("build"), metavar="FOLDER", help="default: build")
    parser.add_argument("--shutdown", choices=["graceful", "immediate"], default="graceful", help="of the kernel")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    several = len(arguments.notebooks) > 1
    width = max(len(str(path)) for path in arguments.notebooks)
    failures, names = [], {f"{path.stem}.html" for path in arguments.notebooks}
    for path in arguments.notebooks:
        target = arguments.output_dir / f"{path.stem}.html"
        try:
            with timed(f"{path!s:<{width}}") if several else contextlib.nullcontext():
                run(path, target, names, shutdown=arguments.shutdown, show=not several)
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
    """End the program as Ctrl+C does, without what asyncio would say about tasks that are cut off."""
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
