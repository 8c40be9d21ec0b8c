"""Execute notebooks in a fresh store and write them back in one stable form.

Usage: python tools/notebooks.py NOTEBOOK [NOTEBOOK ...]

Each notebook runs as for a reader on a new machine: in a new kernel, with an empty store, in a temporary folder that
holds what the notebook reads. What is written back depends on nothing but the notebook's source and what it
prints: outputs with the rules of tests/sanitize.cfg applied, execution counts from 1, the metadata that a reader needs,
and cell ids derived from the source. So nobody edits an output by hand, and a diff shows only what changed. Measured
times cannot repeat: a cell that nbval is told to ignore keeps the outputs that it has, until its source changes.
"""

import hashlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor
from nbval.plugin import coalesce_streams, get_sanitize_patterns
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = ROOT / "tests" / "sanitize.cfg"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def execute(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Execute ``notebook``, read from ``path``, in place, in a fresh copy of the project's files that it needs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / path.resolve().parent.relative_to(ROOT)
        work.mkdir(exist_ok=True)
        beside = [file for file in path.resolve().parent.iterdir() if file.is_file() and "mlflow.db" not in file.name]
        for file in beside:
            shutil.copy(file, work)
        for part in path.resolve().parent.glob(f"{path.name[:3]}*/"):  # such as guides/07_pins
            shutil.copytree(part, work / part.name)
        for name in ("model_requirements.txt", "requirements.txt"):
            shutil.copy(ROOT / name, folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path(folder).as_posix()}/mlflow.db"
        executor = ExecutePreprocessor(config=Config(KernelManager={"transport_encryption": "auto"}))
        executor.preprocess(notebook, {"metadata": {"path": str(work)}})


def sanitized(value):
    """Return ``value`` with every rule of the sanitize file applied, where it is text."""
    for pattern, replacement in get_sanitize_patterns(SANITIZE.read_text(encoding="utf-8")):
        value = re.sub(pattern, replacement, value) if isinstance(value, str) else value
    return value


def stable(notebook: nbformat.NotebookNode) -> None:
    """Bring ``notebook`` in place into the form in which it is committed."""
    notebook.metadata = nbformat.from_dict(METADATA)
    names = set()
    for cell in notebook.cells:
        cell.id = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        while cell.id in names:  # the same source twice
            cell.id = hashlib.sha256(cell.id.encode()).hexdigest()[:8]
        names.add(cell.id)
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
        if cell.cell_type == "code":
            cell.outputs = coalesce_streams(cell.outputs)
            for output in cell.outputs:
                output.update({key: sanitized(value) for key, value in output.items()})
                if "data" in output:
                    output.metadata = nbformat.from_dict({})
                    output.data.update({kind: sanitized(value) for kind, value in output.data.items()})


def measured(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return the cells whose outputs nbval is told to ignore."""
    return [cell for cell in notebook.cells if "nbval-ignore-output" in cell.metadata.get("tags", [])]


def main(paths: list[str]) -> None:
    """Execute and write back each of ``paths``; one that fails is left as it was."""
    if not paths:
        sys.exit(__doc__)
    for path in map(Path, paths):
        notebook = nbformat.read(path, as_version=4)
        kept = {cell.source: cell.outputs for cell in measured(notebook) if cell.outputs}
        execute(notebook, path)
        for cell in measured(notebook):
            cell.outputs = kept.get(cell.source, cell.outputs)
        stable(notebook)
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        print(f"{path}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells executed")


if __name__ == "__main__":
    main(sys.argv[1:])
