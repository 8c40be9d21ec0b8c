"""The quickstart stays short, and explains MLflow's words before it uses them."""

import ast
import re

import nbformat
import pytest
from execution import ROOT

CELLS = nbformat.read(ROOT / "project.ipynb", as_version=4).cells
TERMS = ["run", "experiment", "logged model", "signature", "registered model", "version", "alias", "flavor", "digest"]


def code_lines(source: str) -> list[str]:
    """Return the lines of ``source`` that are neither blank nor a comment."""
    return [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]


CODE = [code_lines(cell.source) for cell in CELLS if cell.cell_type == "code"]
PROSE = "\n".join(cell.source for cell in CELLS if cell.cell_type == "markdown")


def test_code_fits_on_two_screens_and_logs_in_the_first_half():
    lines = [line for cell in CODE for line in cell]
    assert len(lines) <= 100
    assert max(map(len, CODE)) <= 18
    assert next(number for number, line in enumerate(lines, 1) if "mlflow.start_run(" in line) <= 50


def test_prose_outweighs_code():
    assert len(PROSE.split()) >= 8 * sum(map(len, CODE))


@pytest.mark.parametrize("term", TERMS)
def test_term_is_explained_once(term):
    assert len(re.findall(rf"(?<!\*)\*{term}\*(?!\*)", PROSE)) == 1


def test_nothing_of_this_project_and_nothing_private_is_imported():
    names = []
    for node in ast.walk(ast.parse("\n".join(line for cell in CODE for line in cell))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    assert names
    assert [name for name in names if name.startswith("lifecycle") or re.search(r"(^|\.)_", name)] == []
