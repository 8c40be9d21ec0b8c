"""The quickstart with other data and models: only the three tagged cells are edited, each is executed twice."""

import ast
import builtins
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
NAMES = {"experiment_name", "model_name", "data_name", "target_name", "description", "scoring"}
NAMES |= {"data", "make_model", "configurations", "trusted_types"}


def readme_examples() -> list[dict[str, str]]:
    """Return the examples that the README gives: each has the sources of three cells, by their tags."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Use it for your own model")[2].partition("\n## ")[0]
    sources = re.findall("```python\n(.*?)```", section, flags=re.DOTALL)
    return [dict(zip(TAGS, sources[first : first + 3], strict=True)) for first in range(0, len(sources), 3)]


PENGUINS = {
    "parameters": """
experiment_name = model_name = "penguins"
data_name = "penguins"
target_name = "species"
description = "Two logistic regressions on penguins."
scoring = ["neg_log_loss", "accuracy"]
""",
    "data": """
import pandas as pd

data = pd.read_csv("penguins.csv")
data.head()
""",
    "model": """
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler


def make_model(**parameters):
    columns = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["island", "sex"]),
        remainder=make_pipeline(SimpleImputer(), StandardScaler()),
    )
    return make_pipeline(columns, LogisticRegression(**parameters))


configurations = {"weak": {"C": 1.0}, "strong": {"C": 0.001}}
trusted_types = ["numpy.dtype"]
""",
}
CUSTOMERS = {
    "parameters": """
experiment_name = model_name = "customers"
data_name = "customers"
target_name = "left"
description = "Do customers leave?"
scoring = ["roc_auc"]
""",
    "data": """
import numpy as np
import pandas as pd

generator = np.random.default_rng(0)
data = pd.DataFrame(generator.normal(size=(300, 15)), columns=[f"usage {number}" for number in range(15)])
data.insert(0, "id", range(300))
data["since"] = pd.Timestamp("2020-01-01") + pd.to_timedelta(generator.integers(0, 1000, 300), unit="D")
data["plan"] = generator.choice(["basic", "extra"], 300)
data["age"] = generator.integers(18, 90, 300)
data["left"] = generator.random(300) < 1 / (1 + np.exp(-2 * data["usage 0"]))
data["last call"] = data["since"].where(data["usage 1"] > 0)
data.head()
""",
    "model": """
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder


def make_model(**parameters):
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    columns = make_column_transformer(
        ("drop", ["id", "last call"]),
        (encoder, ["plan", "since"]),
        remainder="passthrough",
    )
    return make_pipeline(columns, HistGradientBoostingClassifier(random_state=0, **parameters))


configurations = {"stumps": {"max_depth": 1}, "one tree": {"max_iter": 1}}
trusted_types = ["sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor"]
""",
}
WINE, DIABETES = readme_examples()
# The cells, the scorer that ranks, and what the new environment must say.
CASES = {
    "wine": (WINE, "accuracy", "the same 36 predictions", "Model is missing inputs ['proline']."),
    "diabetes": (DIABETES, "neg_mean_absolute_error", "the same 89 predictions", "Model is missing inputs ['s6']."),
    "penguins": (PENGUINS, "neg_log_loss", "the same 69 predictions", "Model is missing inputs ['year']."),
    "customers": (CUSTOMERS, "roc_auc", "the same 60 predictions", "Model is missing inputs ['age']."),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, kernel):
    """Give the name of a case and the folder where the quickstart was executed twice with its three cells."""
    folder = tmp_path_factory.mktemp(request.param)
    notebook = copy_project(folder)
    shutil.copy(ROOT / "tests/data/penguins.csv", folder)
    edit_cells(notebook, **CASES[request.param][0])
    for _ in range(2):
        assert execute_in(kernel, notebook, folder, REBUILD_ENVIRONMENT="on") == ""
    return request.param, folder


def versions_of(name: str, folder: Path) -> tuple[mlflow.MlflowClient, list]:
    """Return a client of the store in ``folder``, and the versions that were registered there, the oldest first."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    versions = client.search_model_versions()
    assert {version.name for version in versions} == {ast.literal_eval(model_name_of(name))}
    return client, sorted(versions, key=lambda version: int(version.version))


def model_name_of(name: str) -> str:
    """Return the model's name as the case's settings give it."""
    return re.search(r'model_name = (".*")', CASES[name][0]["parameters"])[1]


def test_every_step_passes_and_prints_what_follows_from_the_three_cells(case):
    name, folder = case
    outputs = "\n".join(text_outputs(executed(folder)))
    _, _, predictions, missing = CASES[name]
    assert f"The new environment gives {predictions}." in outputs
    assert missing in outputs
    assert "Warning" not in outputs
    assert not re.search(r"\biris|setosa|petal", outputs)


def test_champion_is_the_best_by_the_first_score_and_the_oldest_in_a_tie(case):
    name, folder = case
    # given four versions, of which the last two repeat the first two
    client, versions = versions_of(name, folder)
    assert [version.version for version in versions] == [1, 2, 3, 4]
    scores = [client.get_run(version.run_id).data.metrics[CASES[name][1]] for version in versions]
    assert scores[:2] == scores[2:]
    assert scores[0] != scores[1]
    # then
    champion = client.get_model_version_by_alias(versions[0].name, "champion")
    assert champion.version == versions[scores.index(max(scores))].version


def names(source: str, context: type) -> set[str]:
    """Return the names that ``source`` stores or loads, whichever ``context`` says."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    return {node.id for node in nodes if isinstance(node.ctx, context)}


def test_other_cells_read_no_other_names_of_the_three():
    # given what the three cells set, and what the other cells read and do not set themselves
    cells = [cell for cell in nbformat.read(ROOT / "project.ipynb", as_version=4).cells if cell.cell_type == "code"]
    edited = "\n".join(cell.source for cell in cells if set(TAGS) & set(cell.metadata.get("tags", [])))
    others = "\n".join(cell.source for cell in cells if not set(TAGS) & set(cell.metadata.get("tags", [])))
    # then all of it is named in the settings, the data and the models
    imports = re.findall(r"(?m)^(?:import|from [\w.]+ import) (.+)$", others)
    imported = {name for line in imports for name in line.split(", ")}
    assert names(edited, ast.Store) - {"parameters"} | {"make_model"} == NAMES
    unset = names(others, ast.Load) - names(others, ast.Store) - imported - {"error", *dir(builtins)}
    assert unset <= NAMES


def test_outputs_are_written_anew_as_the_readme_says(tmp_path):
    # given the quickstart with the README's first example
    edit_cells(copy_project(tmp_path), **WINE)
    for name in ("tools", "tests"):
        (tmp_path / name).mkdir()
    for name in ("Makefile", "requirements.txt", "tools/notebooks.py", "tests/sanitize.cfg"):
        shutil.copy(ROOT / name, tmp_path / name)
    # when
    command = ["make", "notebooks", "NOTEBOOKS=project.ipynb", "INSTALLED=", f"BIN='{Path(sys.executable).parent}'"]
    process = finished(command, tmp_path, environment(tmp_path, REBUILD_ENVIRONMENT="on"), limit=300)
    # then
    assert process.returncode == 0, process.stderr
    outputs = "\n".join(text_outputs(nbformat.read(tmp_path / "project.ipynb", as_version=4)))
    assert "The new environment gives the same 36 predictions." in outputs


def test_line_of_the_readme_removes_a_model_with_its_versions(tmp_path, empty_store):
    # given a store with a version that a failed attempt left behind
    shutil.copy(empty_store, tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model("wine_quick_start")
    client.create_model_version("wine_quick_start", tmp_path.as_uri())
    # when
    program = re.search(r'-c "(import mlflow;.*delete.*)"', (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    process = finished([sys.executable, "-c", program], tmp_path, environment(tmp_path), limit=60)
    # then
    assert process.returncode == 0, process.stderr
    assert client.search_registered_models() == []
