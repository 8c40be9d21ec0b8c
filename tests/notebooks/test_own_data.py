"""The quickstart with other data and another estimator: only the three tagged cells are edited."""

import re
import shutil
import sys
from pathlib import Path

import mlflow
import nbformat
import pytest
from execution import ROOT, copy_project, edit_cells, environment, executed, finished, text_outputs
from kernels import execute_in

pytestmark = pytest.mark.extended  # it takes long
TAGS = ("parameters", "data", "model")

FRUIT = {
    "parameters": """
experiment_name = model_name = "fruit"
data_name = "fruit"
target_name = "kind"
description = "Apples and pears."
""",
    "data": """
import pandas as pd

data = pd.read_csv("fruit.csv")
data.head()
""",
    "model": """
from sklearn.compose import make_column_transformer
from sklearn.preprocessing import OneHotEncoder


def make_model(**parameters):
    columns = make_column_transformer((OneHotEncoder(), ["colour"]), remainder=StandardScaler())
    return make_pipeline(columns, LogisticRegression(**parameters))


configurations = {"strong": {"C": 0.1}, "weak": {"C": 10.0}, "none": {"C": 1e6, "max_iter": 1000}}
trusted_types = ["numpy.dtype"]
""",
}


def readme_example() -> dict[str, str]:
    """Return the three cells that the README gives as an example, by their tags."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Use it for your own model")[2].partition("\n## ")[0]
    return dict(zip(TAGS, re.findall("```python\n(.*?)```", section, flags=re.DOTALL), strict=True))


def test_wine_and_a_random_forest_as_the_readme_says(tmp_path):
    # given the quickstart with the README's three cells: thirteen other columns, other classes, another estimator
    edit_cells(copy_project(tmp_path), **readme_example())
    for name in ("tools", "tests"):
        (tmp_path / name).mkdir()
    for name in ("Makefile", "requirements.txt", "tools/notebooks.py", "tests/sanitize.cfg"):
        shutil.copy(ROOT / name, tmp_path / name)
    # when its outputs are written anew, as the README says
    command = ["make", "notebooks", "NOTEBOOKS=project.ipynb", "INSTALLED=", f"BIN='{Path(sys.executable).parent}'"]
    process = finished(command, tmp_path, environment(tmp_path, REBUILD_ENVIRONMENT="on"), limit=300)
    # then all cells pass, and what they print follows from the three
    assert process.returncode == 0, process.stderr
    outputs = "\n".join(text_outputs(nbformat.read(tmp_path / "project.ipynb", as_version=4)))
    assert "models:/wine_quick_start/2: same predictions, same probabilities" in outputs
    assert "params.n_estimators" in outputs
    assert "The new environment gives the same 36 predictions." in outputs
    assert "Model is missing inputs ['proline']." in outputs
    assert not re.search("iris|setosa|petal", outputs)


def test_two_classes_with_text_columns_of_ones_own(tmp_path, kernel):
    # given a table from a file, with a number, a text and a truth value per row, and two classes
    notebook = copy_project(tmp_path)
    rows = ["weight,colour,ripe,kind"]
    for number in range(60):
        kind = "apple" if number % 2 else "pear"
        rows.append(f"{100 + number * (1 + number % 2)}.5,{['red', 'green'][number % 3 == 0]},{number % 5 == 0},{kind}")
    (tmp_path / "fruit.csv").write_text("\n".join(rows))
    edit_cells(notebook, **FRUIT)
    # when
    error = execute_in(kernel, notebook, tmp_path, REBUILD_ENVIRONMENT="on")
    # then
    assert error == ""
    outputs = "\n".join(text_outputs(executed(tmp_path)))
    assert "models:/fruit/3: same predictions" in outputs
    assert "The new environment gives the same 12 predictions." in outputs
    assert "Model is missing inputs ['ripe']." in outputs
    # and the runs carry the names of the data
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("fruit")
    assert experiment.tags["mlflow.note.content"] == "Apples and pears."
    for run in client.search_runs([experiment.experiment_id]):
        assert {data.dataset.name for data in run.inputs.dataset_inputs} == {"fruit_train", "fruit_test"}
