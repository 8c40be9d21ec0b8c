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
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_score, recall_score
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from versions import logged_table

from mlflow_lifecycle.comparison import choose, folds_interval
from mlflow_lifecycle.datasets import fingerprint

pytestmark = pytest.mark.extended  # it takes long

MODELS = "01_compare_models"
GUIDE = f"guides/{MODELS}.ipynb"
PREFIX = "ana_iris_csv_"
ESTIMATORS = {
    "LogisticRegression": LogisticRegression(max_iter=1000),
    "SVC": CalibratedClassifierCV(SVC(), ensemble=False),
    "RandomForestClassifier": RandomForestClassifier(random_state=42),
}

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
def rows_test():
    """Give the rows that the guide holds back, as they stand in the file, with the index of the table."""
    table = customers()
    return train_test_split(table, test_size=0.2, stratify=table["left"], random_state=42)[1]


def test_stored_outputs_are_reproduced(guides):
    assert differing_outputs(guides / MODELS, GUIDE) == []


def test_three_models_are_children_of_the_comparison(runs):
    assert set(runs) == {"comparison", "autolog", *ESTIMATORS}
    for name in ESTIMATORS:
        assert runs[name].data.tags["mlflow.parentRunId"] == runs["comparison"].info.run_id
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_all_hyperparameters_are_logged(runs, name):
    expected = {key: str(value) for key, value in ESTIMATORS[name].get_params().items()}
    assert runs[name].data.params == expected


@pytest.mark.parametrize("name", ESTIMATORS)
def test_metrics_are_those_of_the_registered_model_on_the_rows_held_back(client, runs, rows_test, name):
    # given the registered version of that name
    model = mlflow.sklearn.load_model(f"models:/{PREFIX}{name}/1")
    actual, features = rows_test["left"], rows_test.drop(columns="left")
    predicted = model.predict(features)
    # then the metrics of its run are what scikit-learn finds for it
    assert client.get_model_version(f"{PREFIX}{name}", "1").run_id == runs[name].info.run_id
    macro = {"average": "macro"}
    expected = {
        "neg_log_loss": -log_loss(actual, model.predict_proba(features)),
        "accuracy": accuracy_score(actual, predicted),
        "precision_macro": precision_score(actual, predicted, **macro),
        "recall_macro": recall_score(actual, predicted, **macro),
        "f1_macro": f1_score(actual, predicted, **macro),
    }
    logged = runs[name].data.metrics
    assert set(logged) == {*expected, *(f"cv_{measure}" for measure in MEASURES)}
    assert {key: logged[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_scores_of_cross_validation_are_those_of_the_logged_folds(runs, name):
    run = runs[name]
    folds = logged_table(run, "fold_scores.json")
    assert list(folds) == ["repeat", "fold", *MEASURES]
    assert len(folds) == 15
    for measure in MEASURES:
        assert run.data.metrics[f"cv_{measure}"] == pytest.approx(folds[measure].mean())
    assert 0.5 < run.data.metrics["cv_accuracy"] < 1


@pytest.mark.parametrize("name", ESTIMATORS)
def test_model_has_its_test_scores_and_none_of_cross_validation(client, runs, name):
    model = client.get_logged_model(runs[name].outputs.model_outputs[0].model_id)
    measured_on = {metric.key: metric.dataset_name for metric in model.metrics}
    assert measured_on == dict.fromkeys(MEASURES, "iris_csv_test")


def logged_csv(run, name: str) -> pd.DataFrame:
    """Return the CSV file ``name`` among the artifacts of ``run``, its first column as index."""
    return pd.read_csv(io.StringIO(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{name}")), index_col=0)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_run_has_confusion_matrix_evaluation_and_datasets(client, runs, name):
    run = runs[name]
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"confusion_matrix.png", "evaluation.csv"} <= files
    assert mlflow.artifacts.load_image(f"runs:/{run.info.run_id}/confusion_matrix.png").size[0] > 300
    report = logged_csv(run, "evaluation.csv")
    assert list(report.index) == ["no", "yes", "accuracy", "macro avg", "weighted avg"]
    assert report.loc["macro avg", "f1-score"] == pytest.approx(run.data.metrics["f1_macro"])
    assert [dataset.dataset.name for dataset in run.inputs.dataset_inputs] == [
        "iris_csv_train",
        "iris_csv_test",
    ]


@pytest.mark.parametrize("part", ["train", "test"])
def test_dataset_keeps_the_sha256_of_all_its_rows(runs, part):
    # given the rows of the part, made anew
    table = customers()
    rows = train_test_split(table, test_size=0.2, stratify=table["left"], random_state=42)[part == "test"]
    # then their SHA-256 is a tag of the dataset
    (item,) = [item for item in runs["SVC"].inputs.dataset_inputs if item.dataset.name == f"iris_csv_{part}"]
    assert {tag.key: tag.value for tag in item.tags}["sha256"] == fingerprint(rows)


def test_comparison_run_holds_the_intervals_and_their_chart(runs):
    # given the folds that the runs logged
    scores = {name: logged_table(runs[name], "fold_scores.json")["neg_log_loss"] for name in ESTIMATORS}
    # then the intervals in the comparison run are those of these folds
    intervals = logged_table(runs["comparison"], "differences.json").set_index("model")
    for name in ("SVC", "RandomForestClassifier"):
        expected = folds_interval(scores[name], scores["LogisticRegression"], 1 / 5)
        assert intervals.loc[name, ["difference", "low", "high"]].to_list() == pytest.approx(
            [expected.difference, expected.low, expected.high]
        )
    assert mlflow.artifacts.load_image(f"runs:/{runs['comparison'].info.run_id}/model_comparison.png").size[0] > 600


def test_champion_has_one_address_and_the_reason(client, runs):
    # given the folds, and the rule
    scores = {name: logged_table(runs[name], "fold_scores.json")["neg_log_loss"] for name in ESTIMATORS}
    chosen = choose(list(ESTIMATORS), lambda name, other: folds_interval(scores[name], scores[other], 1 / 5))
    # then the champion is a copy of that model's version, and its description gives the intervals
    version = client.get_model_version_by_alias(f"{PREFIX}best", "champion")
    assert version.source == f"models:/{PREFIX}{chosen}/1"
    assert f"By the rule: {chosen}." in version.description
    assert str(folds_interval(scores["SVC"], scores["LogisticRegression"], 1 / 5)) in version.description
    assert (
        mlflow.pyfunc.load_model(f"models:/{PREFIX}best@champion").predict(customers().drop(columns="left")).size == 150
    )


def test_autologged_run_has_scores_and_a_model_with_guessed_packages(client, runs):
    # then it has the scores of fit, and of the later call of score
    names = runs["autolog"].data.metrics
    assert {name.partition("_")[0] for name in names} == {"training", "Pipeline"}
    # and its model is in cloudpickle, with packages that are not the pins
    model = client.get_logged_model(runs["autolog"].outputs.model_outputs[0].model_id)
    files = Path(mlflow.artifacts.download_artifacts(model.model_uri))
    flavor = mlflow.models.Model.load(files).flavors["sklearn"]
    assert flavor["serialization_format"] == "cloudpickle"
    guessed = pinned((files / "requirements.txt").read_text(encoding="utf-8"))
    assert guessed
    assert set(guessed) != set(pinned((ROOT / "model_requirements.txt").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_model_takes_raw_rows_with_gaps_and_categories_never_seen(client, name):
    # given a row with no age and a colour that was not in the table
    rows = pd.DataFrame({"age": [np.nan], "colour": ["violet"], "visits": [3], "member": [True], "city": ["none"]})
    # then
    assert mlflow.pyfunc.load_model(f"models:/{PREFIX}{name}/1").predict(rows)[0] in {"yes", "no"}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_version_carries_the_pins_and_only_the_reviewed_types(client, name):
    model = mlflow.models.get_model_info(f"models:/{PREFIX}{name}/1")
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
    recorded = mlflow.artifacts.load_text(f"models:/{PREFIX}{name}/1/requirements.txt")
    assert pinned(recorded) == pinned((ROOT / "model_requirements.txt").read_text(encoding="utf-8"))


def pinned(text: str) -> list[str]:
    """Return the pins in ``text``, without comments and without the platforms of some."""
    return re.findall(r"^[\w.-]+==[^\s;]+", text, flags=re.MULTILINE)


def test_another_table_called_iris_does_not_mix_with_iris(client):
    names = {model.name for model in client.search_registered_models()}
    assert names == {"iris_best", f"{PREFIX}best", *(f"{PREFIX}{name}" for name in ESTIMATORS)}
    assert client.get_model_version_by_alias("iris_best", "champion").source.endswith("/earlier")
    assert client.get_experiment_by_name("compare_models") is None


@pytest.fixture(scope="module")
def visits(tmp_path_factory, empty_store, kernel):
    """Give a folder in which the guide has been executed on a regression with groups, an id and a date as text."""
    folder = tmp_path_factory.mktemp("visits")
    table = customers().drop(columns="left")
    table["id"] = [f"visit {number}" for number in range(150)]
    table["day"] = pd.date_range("2024-01-01", periods=150).astype(str)
    table["patient"] = np.repeat(range(30), 5)
    table["bill"] = 10 * table["visits"] + table["patient"]
    table.to_csv(folder / "visits.csv", index=False)
    shutil.copy(empty_store, folder / "mlflow.db")
    parameters = {"data": "visits.csv", "target": "bill", "task": "regression", "group": "patient", "repeats": 1}
    assert execute_in(kernel, copy_project(folder, GUIDE), folder, parameters) == ""
    return folder


def test_regression_with_groups_is_compared_by_the_absolute_error(visits):
    # given the execution
    client = mlflow.MlflowClient(f"sqlite:///{visits.as_posix()}/mlflow.db")
    experiment = client.get_experiment_by_name("visits_csv_compare_models")
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    # then there are three regressors, and one of them is the champion
    assert set(found) == {"comparison", "autolog", "Ridge", "SVR", "RandomForestRegressor"}
    assert "cv_neg_mean_absolute_error" in found["Ridge"].data.metrics
    version = client.get_model_version_by_alias("visits_csv_best", "champion")
    assert version.description.startswith("neg_mean_absolute_error on visits_csv, minus that of Ridge.")


def test_group_is_no_feature_and_almost_unique_columns_are_named(visits):
    printed = "\n".join(text_outputs(executed(visits)))
    assert re.findall(r"Warning: '(\w+)' has", printed) == ["id", "day"]
    client = mlflow.MlflowClient(f"sqlite:///{visits.as_posix()}/mlflow.db")
    folder = client.get_model_version("visits_csv_Ridge", "1").source
    model = client.get_logged_model(folder.rpartition("/")[2])
    signature = mlflow.models.Model.load(Path(model.artifact_location.removeprefix("file://"))).signature
    assert signature.inputs.input_names() == ["age", "colour", "visits", "member", "city", "id", "day"]


def test_unusable_table_is_refused_before_anything_is_written(tmp_path, kernel):
    notebook = copy_project(tmp_path, GUIDE)
    error = execute_in(kernel, notebook, tmp_path, {"data": "my.csv", "target": "left"})
    assert "InvalidInputError: Cannot use my.csv: there is no such file" in error
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()
