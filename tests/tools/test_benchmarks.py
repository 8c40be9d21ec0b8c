"""What the benchmarks compare is comparable."""

import ast
import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mlflow
import nbformat
import pytest
from execution import ROOT, environment


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


@pytest.mark.extended  # it takes long
def test_ways_to_search_that_are_measured_run_the_same_trials(monkeypatch, tmp_path):
    # given the three ways, with a store of their own
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path.as_posix()}/mlflow.db")
    import search

    experiment_id = mlflow.create_experiment("benchmark", tmp_path.as_uri())
    tried, objective = {}, search.objective
    for way in ("untracked", "tracked", "storage"):
        tried[way] = []
        monkeypatch.setattr(
            search, "objective", lambda trial, way=way: tried[way].append(objective(trial)) or tried[way][-1]
        )
        # when each makes four trials, then it gives four times, one after the other
        ended = search.search(experiment_id, way, 4)
        assert len(ended) == 4
        assert ended == sorted(ended)
    # and they tried the same
    assert tried["untracked"] == tried["tracked"] == tried["storage"]


@pytest.mark.extended  # it takes long
def test_servers_that_are_measured_give_the_same_answers(tmp_path):
    # given MLflow's server and ours, with the benchmark's model
    benchmark = runpy.run_path(str(ROOT / "benchmarks/serving.py"))
    model, answers = benchmark["save"](tmp_path / "model"), []
    mlflow_server = benchmark["served_by_mlflow"](model.folder)
    with mlflow_server as mlflows, benchmark["served_by_lifecycle"](model, python=Path(sys.executable)) as ours:
        # when both are asked for many flowers
        for port, process in (mlflows, ours):
            with benchmark["connected"](port) as connection:
                answers.append(json.loads(benchmark["answer"](connection, benchmark["request"](1000)))["predictions"])
            # then each gives its times
            assert all(value > 0 for value in benchmark["load"](port, process, benchmark["request"](1), 2, False, 0.5))
    # and the answers are the same
    assert answers[0] == answers[1]
    assert set(answers[0]) == {"setosa", "versicolor", "virginica"}


@pytest.mark.extended  # it takes long
@pytest.mark.parametrize(
    "command",
    [
        "gate.py --rounds 1",
        "reliability.py --moments 1 --changes 1 --only kill-release bytes",
        "verification.py --rounds 1 --megabytes 1",
    ],
)
def test_benchmark_that_uses_the_helpers_of_the_tests_still_runs(tmp_path, command):
    program, *options = command.split()
    process = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / program, *options],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
