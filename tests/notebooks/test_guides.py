"""What holds for the form of every notebook, and what every guide has; nothing is executed here."""

import re
import statistics

import nbformat
import pytest
from execution import ROOT, git
from notebooks import stable
from test_form import count_tokens

NOTEBOOKS = git(ROOT, "ls-files", "*.ipynb", ":!benchmarks").splitlines()
GUIDES = [name for name in NOTEBOOKS if name.startswith("guides/")]
LONGER = ["guides/02_heart_disease.ipynb", "guides/03_search_and_evaluate.ipynb", "guides/05_serve_and_monitor.ipynb"]


def code_cells(name: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(ROOT / name, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebook_is_in_its_stable_form(name):
    code = code_cells(name)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    notebook = nbformat.read(ROOT / name, as_version=4)
    before = nbformat.writes(notebook)
    stable(notebook)
    assert nbformat.writes(notebook) == before


@pytest.mark.parametrize("name", GUIDES)
def test_guide_has_one_cell_of_parameters_and_short_and_plain_code(name):
    cells = code_cells(name)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1
    lines = [line for cell in cells for line in cell.source.splitlines() if line.strip()]
    tokens = [count_tokens(cell.source) for cell in cells]
    assert sum(tokens) <= (1700 if name in LONGER else 1500)
    assert sum(tokens) <= 9 * len(lines)
    assert max(tokens) <= 130
    assert statistics.median(tokens) <= 62
    assert max(map(len, lines)) <= 88


@pytest.mark.parametrize("name", GUIDES)
def test_printed_commands_name_the_environment_and_links_lead_to_files(name):
    cells = nbformat.read(ROOT / name, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for block in re.findall(r"```\n(.*?)```", prose, re.DOTALL):
        for command in block.strip().replace("\\\n", " ").splitlines():  # a line may go on after a backslash
            program = next(word for word in command.split() if not re.match(r"[A-Z_]+=", word))
            assert program.startswith(".venv/bin/") or program in ("make", "export")
    for target in re.findall(r"\]\(([^)#]+)", prose):
        if not target.startswith("http"):
            assert (ROOT / "guides" / target).exists(), target
