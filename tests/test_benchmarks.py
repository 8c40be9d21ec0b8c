"""What the benchmarks compare is comparable."""

import ast
import re
from collections import Counter

import nbformat
from execution import ROOT


def mlflow_calls(source: str) -> Counter[str]:
    """Count the calls in ``source`` of functions that are reached through ``mlflow``, by their dotted names."""
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return Counter(call for call in calls if re.fullmatch(r"mlflow(\.\w+)+", call))


def test_plain_script_makes_the_notebooks_mlflow_calls():
    # given the calls in the notebook
    notebook = nbformat.read(ROOT / "project.ipynb", as_version=4)
    calls = mlflow_calls("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code"))
    # then the script has the same, as often
    assert mlflow_calls((ROOT / "benchmarks/plain_script.py").read_text()) == calls
    assert calls["mlflow.sklearn.log_model"] == 1


def test_search_that_is_measured_is_the_guides(monkeypatch):
    # given what the benchmark executes of guide 03
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import search

    cells = search.cells_before_the_search()
    # then objective and callback are in it, and the guide runs its own search with just these
    for definition in ("def objective(trial):", "def log_trial(study, trial):"):
        assert sum(definition in cell for cell in cells) == 1
    guide = nbformat.read(search.GUIDE, as_version=4)
    (cell,) = [cell.source for cell in guide.cells if "study.optimize(" in cell.source]
    assert "study.optimize(objective, " in cell
    assert '"callbacks": [log_trial]' in cell
