"""Guide 01 on tables of one's own: what it logs, whom it chooses, and what it refuses."""

import io
import json
import re

import mlflow
import numpy as np
import pandas as pd
import pytest
from execution import ROOT, copy_project, papermill, refusal
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

GUIDE = "guides/01_compare_models.ipynb"
ESTIMATORS = {
    "LogisticRegression": LogisticRegression(max_iter=1000, random_state=42),
    "SVC": SVC(random_state=42),
    "RandomForestClassifier": RandomForestClassifier(random_state=42),
}


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
def folder(tmp_path_factory):
    """Give a folder in which the guide has been executed once on ``customers``. No test here writes to its store."""
    folder = tmp_path_factory.mktemp("customers")
    customers().to_csv(folder / "customers.csv", index=False)
    process = papermill(copy_project(folder, GUIDE), folder, {"data": "customers.csv", "target": "left"})
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture
def runs(client):
    """Give the runs of the execution by name."""
    experiment = client.get_experiment_by_name("compare_models")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.fixture
def rows_test():
    """Give the rows that the guide holds back, as they stand in the file, with the index of the table."""
    table = customers()
    return train_test_split(table, test_size=0.2, stratify=table["left"], random_state=42)[1]


def test_three_models_are_children_of_the_comparison(runs):
    assert set(runs) == {"comparison", *ESTIMATORS}
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
    actual, predicted = (
        rows_test["left"],
        mlflow.pyfunc.load_model(f"models:/{name}/1").predict(rows_test.drop(columns="left")),
    )
    # then the metrics of its run are what scikit-learn finds for it
    assert client.get_model_version(name, "1").run_id == runs[name].info.run_id
    macro = {"average": "macro"}
    expected = {
        "test_accuracy": accuracy_score(actual, predicted),
        "precision_macro": precision_score(actual, predicted, **macro),
        "recall_macro": recall_score(actual, predicted, **macro),
        "f1_macro": f1_score(actual, predicted, **macro),
    }
    logged = runs[name].data.metrics
    assert set(logged) == {"cv_accuracy_mean", "cv_accuracy_std", *expected}
    assert {key: logged[key] for key in expected} == pytest.approx(expected)
    assert 0.5 < logged["cv_accuracy_mean"] < 1


@pytest.mark.parametrize("name", ESTIMATORS)
def test_metrics_tell_on_which_rows_they_were_measured(client, runs, name):
    model = client.get_logged_model(runs[name].outputs.model_outputs[0].model_id)
    measured_on = {metric.key: metric.dataset_name for metric in model.metrics}
    training = {key for key, dataset in measured_on.items() if dataset == "customers_train"}
    assert training == {"cv_accuracy_mean", "cv_accuracy_std"}
    assert set(measured_on.values()) == {"customers_train", "customers_test"}


def logged_table(run, name: str) -> pd.DataFrame:
    """Return the CSV file ``name`` among the artifacts of ``run``, its first column as index."""
    return pd.read_csv(io.StringIO(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{name}")), index_col=0)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_run_has_confusion_matrix_evaluation_and_datasets(client, runs, name):
    run = runs[name]
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"confusion_matrix.png", "evaluation.csv"} <= files
    assert mlflow.artifacts.load_image(f"runs:/{run.info.run_id}/confusion_matrix.png").size[0] > 300
    report = pd.read_csv(
        io.StringIO(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/evaluation.csv")), index_col=0
    )
    assert list(report.index) == ["no", "yes", "macro avg", "weighted avg"]
    assert report.loc["macro avg", "f1-score"] == pytest.approx(run.data.metrics["f1_macro"])
    assert [dataset.dataset.name for dataset in run.inputs.dataset_inputs] == ["customers_train", "customers_test"]


def test_comparison_run_holds_chart_and_table_of_all_metrics(client, runs):
    comparison = runs["comparison"]
    assert json.loads(comparison.data.tags["compared_runs"]) == {name: runs[name].info.run_id for name in ESTIMATORS}
    assert mlflow.artifacts.load_image(f"runs:/{comparison.info.run_id}/model_comparison.png").size[0] > 600
    text = mlflow.artifacts.load_text(f"runs:/{comparison.info.run_id}/model_comparison.csv")
    table = pd.read_csv(io.StringIO(text), index_col=0)
    for name in ESTIMATORS:
        assert table.loc[name, list(runs[name].data.metrics)].to_dict() == pytest.approx(
            runs[name].data.metrics, abs=1e-4
        )


def test_best_in_cross_validation_is_champion_with_the_reason(client, runs):
    scores = {name: runs[name].data.metrics["cv_accuracy_mean"] for name in ESTIMATORS}
    best = max(scores, key=scores.get)
    champions = {name for name in ESTIMATORS if "champion" in client.get_registered_model(name).aliases}
    assert champions == {best}
    description = client.get_model_version(best, "1").description
    assert f"cross-validated accuracy on customers: {scores[best]:.4f}" in description
    assert "Tied" not in description


@pytest.mark.parametrize("name", ESTIMATORS)
def test_model_takes_raw_rows_with_gaps_and_categories_never_seen(client, name):
    # given a row with no age and a colour that was not in the table
    rows = pd.DataFrame({"age": [np.nan], "colour": ["violet"], "visits": [3], "member": [True], "city": ["none"]})
    # then
    assert mlflow.pyfunc.load_model(f"models:/{name}/1").predict(rows)[0] in {"yes", "no"}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_version_carries_the_pins_and_only_the_reviewed_types(client, name):
    model = mlflow.models.get_model_info(f"models:/{name}/1")
    reviewed = ["numpy.dtype", "pandas._libs.missing.NAType"] + ["sklearn.tree._tree.Tree"] * (
        name == "RandomForestClassifier"
    )
    assert model.flavors["sklearn"]["skops_trusted_types"] == reviewed
    assert model.flavors["sklearn"]["serialization_format"] == "skops"
    assert model.saved_input_example_info is not None
    recorded = mlflow.artifacts.load_text(f"models:/{name}/1/requirements.txt")
    assert pinned(recorded) == pinned((ROOT / "model_requirements.txt").read_text(encoding="utf-8"))


def pinned(text: str) -> list[str]:
    """Return the pins in ``text``, without comments and without the platforms of some."""
    return re.findall(r"^[\w.-]+==[^\s;]+", text, flags=re.MULTILINE)


def test_tie_goes_to_the_simplest_and_is_named(tmp_path):
    # given a table that all three models learn without a fault, and a champion of an earlier comparison
    table = customers().assign(age=lambda rows: np.where(rows["left"] == "yes", 90, 10))
    table[["age", "left"]].to_csv(tmp_path / "easy.csv", index=False)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path.as_posix()}/mlflow.db")
    client.create_registered_model("SVC")
    client.create_model_version("SVC", (tmp_path / "earlier").as_uri())
    client.set_registered_model_alias("SVC", "champion", "1")
    # when
    process = papermill(copy_project(tmp_path, GUIDE), tmp_path, {"data": "easy.csv", "target": "left"})
    # then
    assert process.returncode == 0, process.stderr
    version = client.get_model_version_by_alias("LogisticRegression", "champion")
    assert version.description.endswith("Tied with SVC, RandomForestClassifier; the simplest of them was taken.")
    assert not client.get_registered_model("SVC").aliases


def repeated_names(table: pd.DataFrame) -> str:
    return table.to_csv(index=False).replace("colour", "age", 1)


REFUSED = {
    "empty": (b"", "the file is empty"),
    "an image": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\xff" * 9, "this is not a CSV file"),
    "prose": (b"Dear all,\nthis is, as you see, a letter.\n", "more fields than its header"),
    "no target": (
        customers().drop(columns="left"),
        "no column 'left'; the columns are: age, colour, visits, member, city",
    ),
    "one class": (customers().assign(left="no"), "has one class only: no"),
    "rare class": (
        customers().assign(left=["yes"] * 4 + ["no"] * 146),
        "class yes of 'left' has 4 rows, too few for 5",
    ),
    "target with gaps": (
        customers().assign(left=[None] * 7 + ["yes", "no", "no"] * 47 + ["no"] * 2),
        "missing in 7 of 150",
    ),
    "repeated names": (repeated_names(customers()).encode(), "more than once: age"),
    "infinite values": (customers().replace({"visits": {0: np.inf}}), "infinite values: visits"),
    "semicolons": (customers().to_csv(index=False, sep=";").encode(), "columns beside the target, separated by commas"),
    "in another encoding": ("größe,left\n1,yes\n".encode("latin-1"), "this is not a CSV file in UTF-8"),
    "no rows": (customers().head(0), "there must be rows"),
    "target alone": (customers()[["left"]], "columns beside the target"),
    "absent": (None, "there is no such file (looked for "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_table_is_refused_with_the_reason(tmp_path, monkeypatch, case):
    # given a table that cannot be used, or none
    content, message = REFUSED[case]
    if content is not None:
        text = content if isinstance(content, bytes) else content.to_csv(index=False).encode()
        (tmp_path / "my.csv").write_bytes(text)
    monkeypatch.chdir(tmp_path)
    # then
    told = refusal(GUIDE, data="my.csv", target="left")
    assert told.startswith("Cannot use my.csv: ")
    assert message in told


def test_share_that_has_no_room_for_the_classes_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    customers().to_csv("my.csv", index=False)
    told = refusal(GUIDE, data="my.csv", target="left", test_share=0.01)
    assert "a test_share of 0.01 of 150 rows is too small for 2 classes" in told


def test_unusable_table_is_refused_before_anything_is_written(tmp_path):
    notebook = copy_project(tmp_path, GUIDE)
    process = papermill(notebook, tmp_path, {"data": "my.csv", "target": "left"})
    assert process.returncode != 0
    assert "ValueError: Cannot use my.csv: there is no such file" in process.stderr
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()
