"""The road of a model, by the commands as the README prints them, in a project that has only the wheel."""

import json
import re
import shlex
import shutil
import subprocess
import urllib.request
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from execution import ROOT, copy_project, edit_cells, environment, free_port, running
from kernels import execute_in
from test_own_data import DIABETES, PENGUINS
from wheels import build_wheel, install

pytestmark = pytest.mark.extended  # it builds environments
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROAD = README.partition("## Release your own model")[2].partition("\n## ")[0]
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
    """Write the requirements of the project, and compile them as the README says."""
    pins = (ROOT / "model_requirements.txt").read_text(encoding="utf-8")
    direct = "mlflow-skinny|scikit-learn|pandas|numpy|skops|pip|setuptools|wheel"
    lines = re.findall(rf"(?m)^(?:{direct})==.*$", pins)
    (folder / "model_requirements.txt").unlink()
    (folder / "requirements.in").write_text("\n".join([*lines, *more]) + "\n", encoding="utf-8")
    for command in re.findall(r"(?m)^uv pip compile .*$", ROAD):
        subprocess.run([uv, *shlex.split(command)[1:], "--quiet"], cwd=folder, check=True)


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
        takes_types = start.split()[1] not in ("history",)
        return [str(installed / "lifecycle"), *shlex.split(line)[1:], *(trusted if takes_types else [])]

    def run(start: str, status: int = 0) -> str:
        process = subprocess.run(words(start), cwd=folder, env=environment(folder), capture_output=True, text=True)
        assert process.returncode == status, process.stdout + process.stderr
        return process.stdout

    return folder, words, run


def test_model_goes_the_whole_road_by_the_commands_of_the_readme(project):
    folder, words, run = project
    # sign, verify and check
    assert "is signed as the store holds it now, as a candidate" in run("lifecycle sign models:/my_model/1")
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
