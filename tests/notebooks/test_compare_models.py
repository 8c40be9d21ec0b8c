"""Guide 01, on Iris as stored, and on a table of one's own: what it logs, whom it chooses, and what it refuses."""

import io
import re
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from execution import ROOT, copy_project, differing_outputs, executed, text_outputs
from kernels import execute_in
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import check_scoring
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from versions import logged_table

from mlflow_lifecycle.comparison import folds_interval
from mlflow_lifecycle.datasets import fingerprint
from mlflow_lifecycle.pins import read_pins

pytestmark = pytest.mark.extended  # it takes long

MODELS = "01_compare_models"
GUIDE = f"guides/{MODELS}.ipynb"
PREFIX = "ana_iris_csv_"
ESTIMATORS = ("LogisticRegression", "SVC", "RandomForestClassifier")
SVM = CalibratedClassifierCV(SVC(), ensemble=False)
MEASURES = ["neg_log_loss", "accuracy", "f1_macro", "precision_macro", "recall_macro"]


def customers(rows: int = 150) -> pd.DataFrame:
    """Return a table with numbers, whole numbers, few and many categories, truth values, gaps, and classes "left"."""
    rng = np.random.default_rng(0)
    age, colour = rng.normal(40, 10, rows), rng.choice(["red", "green", "blue"], rows)
    table = pd.DataFrame({"age": age.round(1), "colour": colour, "visits": rng.integers(0, 9, rows)})
    table["member"] = rng.random(rows) < 0.5
    table["city"] = [f"city {number}" for number in rng.integers(0, 30, rows)]
    table["left"] = np.where(age + 8 * (colour == "red") + rng.normal(0, 5, rows) > 42, "yes", "no")
    table.loc[rng.choice(rows, 15, replace=False), "age"] = np.nan
    table.loc[rng.choice(rows, 15, replace=False), "colour"] = None
    return table


@pytest.fixture(scope="module")
def folder(tmp_path_factory, empty_store, kernel):
    """Give a folder in which the guide has been executed once on ``customers``. No test here writes to its store.

    The file is called iris.csv, the names get a prefix, and the store has a champion on Iris already.
    """
    folder = tmp_path_factory.mktemp("customers")
    customers().to_csv(folder / "iris.csv", index=False)
    shutil.copy(empty_store, folder / "mlflow.db")
    client = mlflow.MlflowClient(f"sqlite:///{folder.as_posix()}/mlflow.db")
    client.create_registered_model("iris_best")
    client.create_model_version("iris_best", (folder / "earlier").as_uri())
    client.set_registered_model_alias("iris_best", "champion", "1")
    parameters = {"data": "iris.csv", "target": "left", "prefix": "ana_"}
    assert execute_in(kernel, copy_project(folder, GUIDE), folder, parameters) == ""
    return folder


@pytest.fixture
def runs(client):
    """Give the runs of the execution by name."""
    experiment = client.get_experiment_by_name(f"{PREFIX}compare_models")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.fixture
def parts():
    """Give the rows that the guide learns from, and those that it holds back, as they stand in the file."""
    table = customers()
    return train_test_split(table, test_size=0.2, stratify=table["left"], random_state=42)


def test_stored_outputs_are_reproduced(guides):
    assert differing_outputs(guides / MODELS, GUIDE) == []


def test_models_are_children_of_the_comparison_which_holds_the_intervals_and_their_chart(runs):
    # given the folds that the runs logged
    scores = {name: logged_table(runs[name], "fold_scores.json")["neg_log_loss"] for name in ESTIMATORS}
    # then all is finished, and the intervals in the comparison run are those of these folds
    assert set(runs) == {"comparison", "autolog", *ESTIMATORS}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    intervals = logged_table(runs["comparison"], "differences.json").set_index("model")
    for name in ("SVC", "RandomForestClassifier"):
        assert runs[name].data.tags["mlflow.parentRunId"] == runs["comparison"].info.run_id
        expected = folds_interval(scores[name], scores["LogisticRegression"], 1 / 5)
        assert intervals.loc[name, ["difference", "low", "high"]].to_list() == pytest.approx(
            [expected.difference, expected.low, expected.high]
        )
    assert mlflow.artifacts.load_image(f"runs:/{runs['comparison'].info.run_id}/model_comparison.png").size[0] > 600


def test_run_of_a_model_has_its_parameters_and_the_scores_of_cross_validation_and_of_the_rows_held_back(
    client, runs, parts
):
    # given the registered version, and the rows held back
    run = runs["SVC"]
    model = mlflow.sklearn.load_model(f"models:/{PREFIX}SVC/1")
    # then the metrics of its run are what scikit-learn finds for it, and the means of the logged folds
    assert client.get_model_version(f"{PREFIX}SVC", "1").run_id == run.info.run_id
    assert run.data.params == {key: str(value) for key, value in SVM.get_params().items()}
    folds = logged_table(run, "fold_scores.json")
    assert list(folds) == ["repeat", "fold", *MEASURES]
    assert len(folds) == 15
    expected = check_scoring(scoring=MEASURES)(model, parts[1].drop(columns="left"), parts[1]["left"])
    expected |= {f"cv_{measure}": folds[measure].mean() for measure in MEASURES}
    assert run.data.metrics == pytest.approx(expected)
    # and the model has those of the rows held back alone
    logged = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert {metric.key: metric.dataset_name for metric in logged.metrics} == dict.fromkeys(MEASURES, "iris_csv_test")


def test_run_of_a_model_has_confusion_matrix_evaluation_and_datasets_with_the_sha256_of_their_rows(runs, parts):
    run = runs["SVC"]
    assert mlflow.artifacts.load_image(f"runs:/{run.info.run_id}/confusion_matrix.png").size[0] > 300
    text = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/evaluation.csv")
    report = pd.read_csv(io.StringIO(text), index_col=0)
    assert list(report.index) == ["no", "yes", "accuracy", "macro avg", "weighted avg"]
    assert report.loc["macro avg", "f1-score"] == pytest.approx(run.data.metrics["f1_macro"])
    digests = {}
    for item in run.inputs.dataset_inputs:
        digests[item.dataset.name] = {tag.key: tag.value for tag in item.tags}["sha256"]
    assert digests == {"iris_csv_train": fingerprint(parts[0]), "iris_csv_test": fingerprint(parts[1])}


def test_champion_is_a_copy_of_the_chosen_version_with_the_reason(folder, client):
    version = client.get_model_version_by_alias(f"{PREFIX}best", "champion")
    chosen = version.source.removeprefix(f"models:/{PREFIX}").removesuffix("/1")
    assert chosen in ESTIMATORS
    assert f"By the rule: {chosen}." in version.description
    assert version.description in "\n".join(text_outputs(executed(folder)))


def test_model_takes_raw_rows_with_gaps_and_categories_never_seen(client):
    # given a row with no age and a colour that was not in the table
    rows = pd.DataFrame({"age": [np.nan], "colour": ["violet"], "visits": [3], "member": [True], "city": ["none"]})
    # then
    assert mlflow.pyfunc.load_model(f"models:/{PREFIX}SVC/1").predict(rows)[0] in {"yes", "no"}


def test_version_carries_the_pins_and_only_the_reviewed_types(client):
    model = mlflow.models.get_model_info(f"models:/{PREFIX}SVC/1")
    reviewed = [
        "numpy.dtype",
        "pandas._libs.missing.NAType",
        "sklearn.calibration._CalibratedClassifier",
        "sklearn.calibration._SigmoidCalibration",
        "sklearn.tree._tree.Tree",
    ]
    assert model.flavors["sklearn"]["skops_trusted_types"] == reviewed
    assert model.flavors["sklearn"]["serialization_format"] == "skops"
    assert model.saved_input_example_info is not None
    requirements = mlflow.artifacts.download_artifacts(f"models:/{PREFIX}SVC/1/requirements.txt")
    assert read_pins(requirements) == read_pins(ROOT / "model_requirements.txt")


def test_another_table_called_iris_does_not_mix_with_iris(client):
    names = {model.name for model in client.search_registered_models()}
    assert names == {"iris_best", f"{PREFIX}best", *(f"{PREFIX}{name}" for name in ESTIMATORS)}
    assert client.get_model_version_by_alias("iris_best", "champion").source.endswith("/earlier")
    assert client.get_experiment_by_name("compare_models") is None


@pytest.fixture(scope="module")
def visits(tmp_path_factory, empty_store, kernel):
    """Give a folder in which the guide has been executed twice on a regression with groups, an id and a date."""
    folder = tmp_path_factory.mktemp("visits")
    table = customers().drop(columns="left")
    table["id"] = [f"visit {number}" for number in range(150)]
    table["day"] = pd.date_range("2024-01-01", periods=150).astype(str)
    table["patient"] = np.repeat(range(30), 5)
    table["bill"] = 10 * table["visits"] + table["patient"]
    table.to_csv(folder / "visits.csv", index=False)
    shutil.copy(empty_store, folder / "mlflow.db")
    parameters = {"data": "visits.csv", "target": "bill", "task": "regression", "group": "patient", "repeats": 1}
    notebook = copy_project(folder, GUIDE)
    for _ in range(2):
        assert execute_in(kernel, notebook, folder, parameters) == ""
    return folder


def test_regression_with_groups_compares_regressors_and_the_group_is_no_feature(visits):
    # given the execution
    client = mlflow.MlflowClient(f"sqlite:///{visits.as_posix()}/mlflow.db")
    experiment = client.get_experiment_by_name("visits_csv_compare_models")
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    # then there are three regressors, compared by the absolute error, and one of them is the champion
    assert set(found) == {"comparison", "autolog", "Ridge", "SVR", "RandomForestRegressor"}
    version = client.get_model_version_by_alias("visits_csv_best", "champion")
    assert version.description.startswith("neg_mean_absolute_error on visits_csv, minus that of Ridge.")
    # and the group is no feature, and columns that are almost unique are named
    model = client.get_logged_model(found["Ridge"].outputs.model_outputs[0].model_id)
    signature = mlflow.models.Model.load(Path(model.artifact_location.removeprefix("file://"))).signature
    assert signature.inputs.input_names() == ["age", "colour", "visits", "member", "city", "id", "day"]
    printed = "\n".join(text_outputs(executed(visits)))
    assert re.findall(r"Warning: '(\w+)' has", printed) == ["id", "day"]


def test_unusable_table_is_refused_before_anything_is_written(tmp_path, kernel):
    notebook = copy_project(tmp_path, GUIDE)
    error = execute_in(kernel, notebook, tmp_path, {"data": "my.csv", "target": "left"})
    assert "InvalidInputError: Cannot use my.csv: there is no such file" in error
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()
