"""The quickstart stays short, and needs nothing of this project."""

import ast
import io
import re
import tokenize

import nbformat
from execution import ROOT

CELLS = nbformat.read(ROOT / "project.ipynb", as_version=4).cells

CODE = [cell.source for cell in CELLS if cell.cell_type == "code"]
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT}


def count_tokens(source: str) -> int:
    """Return how many tokens ``source`` has, without comments and layout; an f-string is one, in each Python."""
    source = re.sub(r"\bf(?=\")", "", source)
    return sum(token.type not in LAYOUT for token in tokenize.generate_tokens(io.StringIO(source).readline))


def test_code_is_short_and_logs_in_the_first_half():
    assert sum(map(count_tokens, CODE)) <= 1200
    assert max(map(count_tokens, CODE)) <= 130
    code = "\n".join(CODE)
    assert count_tokens(code[: code.index("    with mlflow.start_run(")].rpartition("\n")[0]) < 650


def test_lines_of_code_are_plain_and_fit_the_page():
    lines = [line for source in CODE for line in source.splitlines() if line.strip()]
    assert sum(map(count_tokens, CODE)) <= 8.5 * len(lines)
    assert max(map(len, lines)) <= 88


def test_nothing_of_this_project_and_nothing_private_is_imported():
    names = []
    for node in ast.walk(ast.parse("\n".join(CODE))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    assert names
    assert [name for name in names if name.startswith("mlflow_lifecycle") or re.search(r"(^|\.)_", name)] == []
