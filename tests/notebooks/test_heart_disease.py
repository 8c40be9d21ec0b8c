"""Guide 02: how it gets its data, what it logs, and how it chooses between the two models."""

import io
import re
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from execution import ROOT, copy_project, differing_outputs, executed, text_outputs
from kernels import execute_in
from scipy import stats
from serving import PUBLIC_ADDRESS
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_score, recall_score
from sklearn.model_selection import train_test_split
from versions import logged_table

from mlflow_lifecycle.comparison import folds_interval
from mlflow_lifecycle.datasets import fingerprint

pytestmark = pytest.mark.extended  # it takes long

HEART = "02_heart_disease"
GUIDE = f"guides/{HEART}.ipynb"
CODES = ["sex", "cp", "fbs", "restecg", "exang", "slope", "thal"]
COLUMNS = ["age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"]
COLUMNS += ["thalach", "exang", "oldpeak", "slope", "ca", "thal", "num"]
PARAMETERS = {
    "logistic_regression": {"max_iter": "1000", "C": "1.0", "solver": "lbfgs", "random_state": "42"},
    "random_forest": {
        "n_estimators": "100",
        "max_depth": "10",
        "min_samples_split": "2",
        "min_samples_leaf": "1",
        "random_state": "42",
    },
}
MEASURES = ["neg_log_loss", "accuracy", "f1_macro", "roc_auc"]


@pytest.fixture(scope="module")
def folder(guides, heart_disease):
    """Give the folder with the store in which the guide has been executed, on a download."""
    return guides


@pytest.fixture
def runs(client):
    """Give the runs of the execution by name."""
    experiment = client.get_experiment_by_name("heart-disease-classification")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.fixture(scope="module")
def rows(heart_disease):
    """Give all patients, the diagnosis as ``num``."""
    return pd.read_csv(io.BytesIO(heart_disease), names=COLUMNS, na_values="?", dtype=float)


@pytest.fixture(scope="module")
def parts(rows):
    """Give features and target of the patients learned from, then of those held back."""
    features, target = rows.drop(columns="num"), np.where(rows["num"] > 0, "present", "absent")
    first, second, *targets = train_test_split(features, target, test_size=0.2, stratify=target, random_state=42)
    return first, targets[0], second, targets[1]


def test_stored_outputs_are_reproduced_from_the_served_file(folder):
    assert differing_outputs(folder / HEART, GUIDE) == []


def test_two_runs_are_children_of_the_comparison_and_all_are_finished(runs):
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(
        ["comparison", *PARAMETERS], "FINISHED"
    )
    for name in PARAMETERS:
        assert runs[name].data.tags["mlflow.parentRunId"] == runs["comparison"].info.run_id


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_reference(runs, name):
    assert runs[name].data.params.items() >= PARAMETERS[name].items()


@pytest.mark.parametrize("name", PARAMETERS)
def test_metrics_are_those_of_the_registered_model_on_the_patients_held_back(client, runs, parts, name):
    # given the registered version and the patients held back
    version = client.get_model_version(f"heart_disease_{name}", "1")
    model = mlflow.sklearn.load_model(f"models:/{version.name}/1")
    _, _, features, target = parts
    predictions = model.predict(features)
    probabilities = model.predict_proba(features)[:, list(model.classes_).index("present")]
    # when they are judged anew, the ROC AUC by counting pairs
    ill, well = probabilities[target == "present"][:, None], probabilities[target == "absent"]
    women = (features["sex"] == 0).to_numpy()
    expected = {
        "test_accuracy": accuracy_score(target, predictions),
        "precision": precision_score(target, predictions, pos_label="present"),
        "recall": recall_score(target, predictions, pos_label="present"),
        "f1_score": f1_score(target, predictions, pos_label="present"),
        "roc_auc": ((ill > well) + 0.5 * (ill == well)).mean(),
        "neg_log_loss": -log_loss(target == "present", probabilities),
        "recall_women": (predictions[women & (target == "present")] == "present").mean(),
        "recall_men": (predictions[~women & (target == "present")] == "present").mean(),
        "false_positive_rate": (predictions[target == "absent"] == "present").mean(),
    }
    # then the run has just these, and those of the cross-validation
    assert version.run_id == runs[name].info.run_id
    logged = runs[name].data.metrics
    cross_validated = {f"cv_{measure}_{kind}" for measure in MEASURES for kind in ("mean", "std")}
    assert set(logged) == {*expected, *cross_validated}
    assert {key: logged[key] for key in expected} == pytest.approx(expected)


def test_every_proportion_of_the_champion_has_its_wilson_interval(runs):
    table = logged_table(runs["comparison"], "test_scores.json").set_index("measure")
    assert len(table) == 6
    for _, row in table.iterrows():
        expected = stats.binomtest(int(row["hits"]), int(row["rows"])).proportion_ci(method="wilson")
        assert row[["low", "high"]].to_list() == pytest.approx([*expected])
        assert row["share"] == pytest.approx(row["hits"] / row["rows"])


def test_champion_has_the_threshold_that_the_costs_give(client, runs, parts):
    # given the champion, as a caller loads it, and the model without a threshold
    features = parts[2]
    champion = mlflow.pyfunc.load_model("models:/heart_disease_best@champion")
    model = mlflow.sklearn.load_model("models:/heart_disease_logistic_regression/1")
    # then it says "present" from 1 / (1 + 5) on
    probabilities = model.predict_proba(features)[:, list(model.classes_).index("present")]
    assert float(runs["comparison"].data.params["threshold"]) == 1 / 6
    assert (champion.predict(features) == np.where(probabilities >= 1 / 6, "present", "absent")).all()
    assert ((probabilities >= 1 / 6) & (probabilities < 0.5)).any()


@pytest.mark.parametrize("name", PARAMETERS)
def test_run_has_just_the_pictures_of_the_reference(client, runs, name):
    run_id = runs[name].info.run_id
    files = {file.path for file in client.list_artifacts(run_id) if file.path.endswith(".png")}
    expected = {f"{kind}_{name}.png" for kind in ("roc_curve", "confusion_matrix", "feature_importance")}
    assert files == expected
    for file in files:
        image = np.asarray(mlflow.artifacts.load_image(f"runs:/{run_id}/{file}").convert("L"))
        assert image.shape[1] > 400
        assert 0.01 < (image < 128).mean() < 0.5  # something is drawn


@pytest.mark.parametrize("name", PARAMETERS)
def test_datasets_are_inputs_with_their_public_source_and_sha256(runs, parts, name):
    inputs = {item.dataset.name: item for item in runs[name].inputs.dataset_inputs}
    rows = {"train": parts[0].assign(disease=parts[1]), "test": parts[2].assign(disease=parts[3])}
    assert set(inputs) == {"heart_disease_train", "heart_disease_test"}
    for part, expected in rows.items():
        item = inputs[f"heart_disease_{part}"]
        assert item.dataset.source == f'{{"url": "{PUBLIC_ADDRESS}"}}'
        assert {tag.key: tag.value for tag in item.tags}["sha256"] == fingerprint(expected)


def test_neither_secret_nor_address_nor_path_is_printed(folder):
    printed = "\n".join(text_outputs(executed(folder / HEART)))
    for private in ("hunter2", "127.0.0.1", str(folder)):
        assert private not in printed


@pytest.mark.parametrize("name", PARAMETERS)
def test_registered_model_has_pins_and_trusts_no_more_than_was_reviewed(client, name):
    files = Path(mlflow.artifacts.download_artifacts(f"models:/heart_disease_{name}/1"))
    flavor = mlflow.models.Model.load(files).flavors["sklearn"]
    assert flavor["serialization_format"] == "skops"
    assert flavor["skops_trusted_types"] == ["numpy.dtype", "sklearn.tree._tree.Tree"]
    pins = [
        re.findall(r"^[\w.-]+==[\w.+!-]+", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for path in (files / "requirements.txt", ROOT / "model_requirements.txt")
    ]
    assert pins[0] == pins[1] != []


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_scores_rows_with_gaps_in_every_column(client, parts, name):
    # given the row of nobody
    row = parts[2].head(1) * np.nan
    # then it is scored as the middle patient, with the most frequent codes
    model = mlflow.pyfunc.load_model(f"models:/heart_disease_{name}/1")
    train = parts[0]
    filled = train.median().to_frame().T
    filled[CODES] = train[CODES].mode().head(1).to_numpy()
    assert model.predict(row)[0] in {"absent", "present"}
    assert model.predict(row) == model.predict(filled)


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_leaves_a_code_out_that_it_never_saw(client, parts, name):
    # given patients with codes that no patient had
    model = mlflow.sklearn.load_model(f"models:/heart_disease_{name}/1")
    eights, nines = parts[2].assign(cp=8.0, thal=8.0), parts[2].assign(cp=9.0, thal=9.0)
    # then the code makes no difference, though a known one does
    assert (model.predict_proba(eights) == model.predict_proba(nines)).all()
    assert (model.predict_proba(eights) != model.predict_proba(parts[2])).any()
    predictions = mlflow.pyfunc.load_model(f"models:/heart_disease_{name}/1").predict(eights)
    assert set(predictions) <= {"absent", "present"}


def test_champion_is_the_simpler_model_where_the_interval_contains_zero(client, runs):
    folds = {name: logged_table(runs[name], "fold_scores.json")["neg_log_loss"] for name in PARAMETERS}
    difference = folds_interval(folds["random_forest"], folds["logistic_regression"], 0.2)
    assert difference.low <= 0 <= difference.high
    version = client.get_model_version_by_alias("heart_disease_best", "champion")
    assert f": {difference}. By the rule: logistic_regression. Threshold: 0.1667." in version.description


def test_data_that_cannot_be_had_is_refused_before_anything_is_written(tmp_path, kernel):
    notebook = copy_project(tmp_path / "project", GUIDE)
    error = execute_in(kernel, notebook, tmp_path / "project", HEART_DISEASE_DATA="nowhere.data")
    assert "InvalidInputError: Cannot use the data at nowhere.data" in error
    assert "set HEART_DISEASE_DATA to the path or the address of a copy" in error
    assert not (tmp_path / "project" / "mlflow.db").exists()
