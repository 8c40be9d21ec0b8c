"""What holds for the form of every notebook, and what every guide has; nothing is executed here."""

import re
import statistics

import nbformat
import pytest
from execution import ROOT, git
from test_form import count_tokens

NOTEBOOKS = git(ROOT, "ls-files", "*.ipynb", ":!benchmarks").splitlines()
GUIDES = [name for name in NOTEBOOKS if name.startswith("guides/")]
TOKENS = {  # the most that a guide may have
    "guides/01_compare_models.ipynb": 1500,
    "guides/02_heart_disease.ipynb": 1700,
    "guides/03_search_and_evaluate.ipynb": 1700,
    "guides/04_release_and_report.ipynb": 1500,
    "guides/05_serve_and_monitor.ipynb": 1700,
    "guides/06_scale_out.ipynb": 1500,
    "guides/07_keep_pins_current.ipynb": 1500,
}


def code_cells(notebook: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(ROOT / notebook, as_version=4).cells if cell.cell_type == "code"]


def prose_cells(notebook: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(ROOT / notebook, as_version=4).cells if cell.cell_type == "markdown"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebook_is_in_its_stable_form(name, monkeypatch):
    code = code_cells(name)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    notebook = nbformat.read(ROOT / name, as_version=4)
    before = nbformat.writes(notebook)
    monkeypatch.syspath_prepend(ROOT / "tools")
    import notebooks

    notebooks.stable(notebook)
    assert nbformat.writes(notebook) == before


@pytest.mark.parametrize("name", GUIDES)
def test_parameters_stand_in_one_tagged_cell(name):
    tagged = [cell.metadata.get("tags", []) for cell in code_cells(name)]
    assert sum("parameters" in tags for tags in tagged) == 1


@pytest.mark.parametrize(("name", "most"), TOKENS.items())
def test_code_of_a_guide_is_short_and_plain(name, most):
    sources = [cell.source for cell in code_cells(name)]
    lines = [line for source in sources for line in source.splitlines() if line.strip()]
    tokens = [count_tokens(source) for source in sources]
    assert sum(tokens) <= most
    assert sum(tokens) <= 9 * len(lines)
    assert max(tokens) <= 130
    assert statistics.median(tokens) <= 62
    assert max(map(len, lines)) <= 88


@pytest.mark.parametrize("name", GUIDES)
def test_printed_commands_name_the_environment_and_links_lead_to_files(name):
    prose = "\n".join(cell.source for cell in prose_cells(name))
    for block in re.findall(r"```\n(.*?)```", prose, re.DOTALL):
        for command in block.strip().replace("\\\n", " ").splitlines():  # a line may go on after a backslash
            program = next(word for word in command.split() if not re.match(r"[A-Z_]+=", word))
            assert program.startswith(".venv/bin/") or program in ("make", "export")
    for target in re.findall(r"\]\(([^)#]+)", prose):
        if not target.startswith("http"):
            assert (ROOT / "guides" / target).exists(), target
