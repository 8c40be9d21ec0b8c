"""The road of a model, by the commands as the README and the page about your own project print them."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from execution import ROOT, copy_project, edit_cells, environment, free_port, running
from kernels import execute_in
from test_own_data import DIABETES, PENGUINS
from wheels import build_wheel, install, locked_versions

pytestmark = pytest.mark.extended  # it builds environments
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROAD = README.partition("## Release your own model")[2].partition("\n## ")[0]
PAGE = (ROOT / "docs/own_project.md").read_text(encoding="utf-8")
CANCER = {
    "parameters": """
experiment_name = model_name = "cancer"
data_name = "breast_cancer"
target_name = "diagnosis"
description = "Two boosted trees on breast cancer."
scoring = ["neg_log_loss"]
""",
    "data": """
from sklearn.datasets import load_breast_cancer

data = load_breast_cancer(as_frame=True).frame
data = data.rename(columns={"target": target_name})
data.head()
""",
    "model": """
from xgboost import XGBClassifier


def make_model(**parameters):
    return XGBClassifier(random_state=0, **parameters)


configurations = {"many": {"n_estimators": 100}, "one": {"n_estimators": 1}}
trusted_types = []
""",
}
# The cells, the model, its target, a threshold that a good version reaches, and one that any version reaches.
MODELS = {
    "penguins": (PENGUINS, "penguins", "species", "accuracy_score=0.9", "accuracy_score=0.1"),
    "diabetes": (DIABETES, "diabetes_quick_start", "progression", "mean_absolute_error=60", "mean_absolute_error=900"),
    "cancer": (CANCER, "cancer", "diagnosis", "accuracy_score=0.9", "accuracy_score=0.1"),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Give the programs of an environment that has the wheel with what it needs to release, XGBoost, and no more."""
    folder = tmp_path_factory.mktemp("installed")
    return install(folder / "environment", f"{build_wheel(folder)}[sign]", "xgboost-cpu")


def write_requirements(folder: Path, uv: Path, *more: str) -> None:
    """Write the requirements of the project, and compile them as the page about your own project says."""
    pins = (ROOT / "model_requirements.txt").read_text(encoding="utf-8")
    direct = "mlflow-skinny|scikit-learn|pandas|numpy|skops|pip|setuptools|wheel"
    lines = re.findall(rf"(?m)^(?:{direct})==.*$", pins)
    (folder / "model_requirements.txt").unlink()
    (folder / "model.in").write_text("\n".join([*lines, *more]) + "\n", encoding="utf-8")
    (folder / "requirements.in").write_text("-r model.in\n", encoding="utf-8")
    commands = re.findall(r"(?m)^\.venv/bin/uv (pip compile .*)$", PAGE)
    assert len(commands) == 2
    for command in commands:
        subprocess.run([uv, *shlex.split(command)], cwd=folder, check=True)


@pytest.fixture(scope="module", params=MODELS)
def project(request, installed, tmp_path_factory, kernel):
    """Give a project with two versions that the quickstart has registered, and a function that runs a command there."""
    folder = tmp_path_factory.mktemp(request.param)
    cells, name, target, *thresholds = MODELS[request.param]
    notebook = copy_project(folder)
    shutil.copy(ROOT / "tests/data/penguins.csv", folder)
    edit_cells(notebook, **cells)
    content = nbformat.read(notebook, as_version=4)
    if request.param == "cancer":
        for cell in content.cells:
            if cell.source.startswith("types = "):
                cell.source = ""
            cell.source = cell.source.replace("mlflow.sklearn.", "mlflow.xgboost.")
            cell.source = cell.source.replace("skops_trusted_types=trusted_types", 'model_format="ubj"')
    files = re.search(r"```python\n(data_train.*?)```", ROAD, flags=re.DOTALL)[1]
    content.cells.append(nbformat.v4.new_code_cell(files))
    nbformat.write(content, notebook)
    write_requirements(folder, installed / "uv", *["xgboost-cpu"] * (request.param == "cancer"))
    assert execute_in(kernel, notebook, folder) == ""
    values = {
        "my_model": name,
        "label": target,
        "accuracy_score=0.8 --margin 0.1": f"{thresholds[1]} --margin 1000",  # the second version is much worse
        "accuracy_score=0.8": thresholds[0],
    }
    trusted = ["--trusted-type", "numpy.dtype"] if request.param == "penguins" else []

    def words(start: str) -> list[str]:
        """Return the command of the README that starts so, for this model."""
        (line,) = re.findall(rf"(?m)^{re.escape(start)}.*$", ROAD)
        for old, new in values.items():
            line = line.replace(old, new)
        types = [] if start == "lifecycle history" else trusted
        return [str(installed / "lifecycle"), *shlex.split(line)[1:], *types]

    def run(start: str, status: int = 0) -> str:
        process = subprocess.run(words(start), cwd=folder, env=environment(folder), capture_output=True, text=True)
        assert process.returncode == status, process.stdout + process.stderr
        return process.stdout

    return folder, words, run


def test_model_goes_the_whole_road_by_the_commands_of_the_readme(project):
    folder, words, run = project
    # sign, verify and check
    assert "is signed in its present state, as a candidate" in run("lifecycle sign models:/my_model/1")
    assert "is as it was signed" in run("lifecycle verify")
    checks = run("lifecycle gate")
    assert "failed" not in checks and "not checked" not in checks
    # release one version after the other
    assert "version 1 is production" in run("lifecycle release models:/my_model/1")
    assert "version 1 is production" in run("lifecycle history")
    run("lifecycle sign models:/my_model/2")
    assert "version 2 is production, 1 was" in run("lifecycle release models:/my_model/2")
    # serve and ask, with the columns in another order
    rows = pd.read_parquet(folder / "test.parquet").drop(columns=words("lifecycle gate")[6])
    body = rows[rows.columns[::-1]].to_json(orient="split", index=False).encode()
    port = str(free_port())
    command = [port if word == "5001" else word for word in words("lifecycle serve")]
    variables = environment(folder)
    with running(command, f"http://127.0.0.1:{port}/ping", folder / "server.log", cwd=folder, env=variables):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            b'{"dataframe_split": ' + body + b"}",
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            predictions = json.load(answer)["predictions"]
    assert len(predictions) == len(rows)
    # watch and go back
    assert run("lifecycle watch").startswith("quiet: ")
    assert "rollback of" in run("lifecycle rollback")


@pytest.mark.skipif(sys.platform == "win32", reason="the commands of the page are for a POSIX shell")
def test_page_about_your_own_project_prints_what_its_commands_print(tmp_path):
    # given an empty folder with the wheel, and the versions of the lock, except of what the page raises
    folder = tmp_path / "my_project"
    (folder / "wheels").mkdir(parents=True)
    shutil.move(build_wheel(tmp_path), folder / "wheels")
    old, new = re.search(r"here `(\S+)` to `(\S+)`", PAGE).groups()
    raised = re.match(r"\w+", old)[0]
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(re.sub(rf"(?m)^{raised}==.*\n", "", locked_versions()), encoding="utf-8")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = environment(tmp_path, PATH=path, UV_CONSTRAINT=str(constraints))
    port = str(free_port())

    def run(command: str) -> str:
        process = subprocess.run(command, shell=True, cwd=folder, env=variables, capture_output=True, text=True)
        # whether packages have vulnerabilities, and whether OSV can be reached, is not known here
        statuses = (0, 1, 2) if " audit " in command else (0,)
        assert process.returncode in statuses, process.stdout + process.stderr
        return process.stdout

    printed = ""
    installing = []
    with contextlib.ExitStack() as stack:
        blocks = re.findall(r"(?:([^\n]*)\n)?\n```(\w*)\n(.*?)```\n", PAGE, flags=re.DOTALL)
        for before, language, text in blocks[1:]:  # the first one builds the wheel
            file = re.match(r"`(\w+\.\w+)` ", before)
            commands = text.replace("5001", port).splitlines()
            if file:
                (folder / file[1]).write_text(text, encoding="utf-8")
            elif language == "text":
                # then each command has printed what is below it
                pattern = re.escape(text).replace(re.escape("..."), ".*")
                assert re.fullmatch(pattern, printed, flags=re.DOTALL), printed
            elif " serve " in text:
                log = tmp_path / "server.log"
                command = commands[0].split()
                address = f"http://127.0.0.1:{port}/ping"
                stack.enter_context(running(command, address, log, cwd=folder, env=variables))
            else:
                # when
                if " renew " in text:
                    needed = (folder / "model.in").read_text(encoding="utf-8")
                    (folder / "model.in").write_text(needed.replace(old, new), encoding="utf-8")
                    commands = installing[-3:] + commands
                printed = "".join(run(command).rstrip("\n") + "\n" for command in commands).lstrip("\n")
                installing = installing or commands
