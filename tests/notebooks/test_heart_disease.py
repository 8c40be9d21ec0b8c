"""Guide 02: how it gets its data, what it logs, and how it chooses between the two models."""

import io
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from execution import ROOT, copy_project, differing_outputs, executed, text_outputs
from kernels import execute_in
from serving import PUBLIC_ADDRESS
from sklearn.metrics import accuracy_score, check_scoring, f1_score, precision_score, recall_score
from sklearn.model_selection import train_test_split
from versions import logged_table

from mlflow_lifecycle.datasets import fingerprint
from mlflow_lifecycle.pins import read_pins

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


def test_comparison_has_the_threshold_and_tables_and_two_children_with_the_parameters_of_the_reference(client, runs):
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(
        ["comparison", *PARAMETERS], "FINISHED"
    )
    comparison = runs["comparison"]
    for name in PARAMETERS:
        assert runs[name].data.tags["mlflow.parentRunId"] == comparison.info.run_id
        assert runs[name].data.params.items() >= PARAMETERS[name].items()
    assert float(comparison.data.params["threshold"]) == 1 / 6
    tables = {file.path for file in client.list_artifacts(comparison.info.run_id)}
    assert tables == {"calibration.json", "calibration_test.json", "test_scores.json"}


def test_metrics_are_those_of_the_registered_model_on_the_patients_held_back_and_of_the_folds(client, runs, parts):
    # given the registered version and the patients held back
    run = runs["random_forest"]
    model = mlflow.sklearn.load_model("models:/heart_disease_random_forest/1")
    _, _, features, target = parts
    predictions = model.predict(features)
    # when they are judged anew
    women = (features["sex"] == 0).to_numpy()
    ill = target == "present"
    expected = check_scoring(scoring=["neg_log_loss", "roc_auc"])(model, features, target)
    expected |= {
        "test_accuracy": accuracy_score(target, predictions),
        "precision": precision_score(target, predictions, pos_label="present"),
        "recall": recall_score(target, predictions, pos_label="present"),
        "f1_score": f1_score(target, predictions, pos_label="present"),
        "recall_women": (predictions[women & ill] == "present").mean(),
        "recall_men": (predictions[~women & ill] == "present").mean(),
        "false_positive_rate": (predictions[~ill] == "present").mean(),
    }
    folds = logged_table(run, "fold_scores.json")
    for measure in MEASURES:
        expected |= {f"cv_{measure}_mean": folds[measure].mean(), f"cv_{measure}_std": folds[measure].std()}
    # then the run has just these
    assert client.get_model_version("heart_disease_random_forest", "1").run_id == run.info.run_id
    assert run.data.metrics == pytest.approx(expected)


def test_run_has_the_pictures_of_the_reference_and_datasets_with_their_public_source_and_sha256(client, runs, parts):
    run = runs["random_forest"]
    files = {file.path for file in client.list_artifacts(run.info.run_id) if file.path.endswith(".png")}
    assert files == {f"{kind}_random_forest.png" for kind in ("roc_curve", "confusion_matrix", "feature_importance")}
    rows = {"train": parts[0].assign(disease=parts[1]), "test": parts[2].assign(disease=parts[3])}
    inputs = {item.dataset.name: item for item in run.inputs.dataset_inputs}
    assert set(inputs) == {"heart_disease_train", "heart_disease_test"}
    for part, expected in rows.items():
        item = inputs[f"heart_disease_{part}"]
        assert item.dataset.source == f'{{"url": "{PUBLIC_ADDRESS}"}}'
        assert {tag.key: tag.value for tag in item.tags}["sha256"] == fingerprint(expected)


def test_neither_secret_nor_address_nor_path_is_printed(folder):
    printed = "\n".join(text_outputs(executed(folder / HEART)))
    for private in ("hunter2", "127.0.0.1", str(folder)):
        assert private not in printed


def test_registered_model_has_pins_and_trusts_no_more_than_was_reviewed(client):
    files = Path(mlflow.artifacts.download_artifacts("models:/heart_disease_random_forest/1"))
    flavor = mlflow.models.Model.load(files).flavors["sklearn"]
    assert flavor["serialization_format"] == "skops"
    assert flavor["skops_trusted_types"] == ["numpy.dtype", "sklearn.tree._tree.Tree"]
    assert read_pins(files / "requirements.txt") == read_pins(ROOT / "model_requirements.txt")


def test_model_scores_gaps_as_the_middle_patient_and_leaves_out_codes_that_it_never_saw(client, parts):
    train, _, test, _ = parts
    model = mlflow.sklearn.load_model("models:/heart_disease_logistic_regression/1")
    # given the row of nobody, then it is scored as the middle patient, with the most frequent codes
    filled = train.median().to_frame().T
    filled[CODES] = train[CODES].mode().head(1).to_numpy()
    assert model.predict_proba(test.head(1) * np.nan) == pytest.approx(model.predict_proba(filled))
    # given patients with codes that no patient had, then the code makes no difference, though a known one does
    eights, nines = test.assign(cp=8.0, thal=8.0), test.assign(cp=9.0, thal=9.0)
    assert (model.predict_proba(eights) == model.predict_proba(nines)).all()
    assert (model.predict_proba(eights) != model.predict_proba(test)).any()


def test_champion_has_the_derived_threshold_and_the_reason(folder, client, parts):
    version = client.get_model_version_by_alias("heart_disease_best", "champion")
    assert "By the rule: logistic_regression. Threshold: 0.1667." in version.description
    assert version.description.removesuffix(" Threshold: 0.1667.") in "\n".join(text_outputs(executed(folder / HEART)))
    # given patients with a probability of disease from 1 / (1 + 5) to 1 / 2, then it says "present"
    model = mlflow.sklearn.load_model("models:/heart_disease_logistic_regression/1")
    probabilities = model.predict_proba(parts[2])[:, 1]
    doubtful = parts[2][(probabilities >= 1 / 6) & (probabilities < 0.5)]
    assert set(mlflow.pyfunc.load_model("models:/heart_disease_best@champion").predict(doubtful)) == {"present"}


def test_data_that_cannot_be_had_is_refused_before_anything_is_written(tmp_path, kernel):
    notebook = copy_project(tmp_path / "project", GUIDE)
    error = execute_in(kernel, notebook, tmp_path / "project", HEART_DISEASE_DATA="nowhere.data")
    assert "InvalidInputError: Cannot use the data at nowhere.data" in error
    assert "set HEART_DISEASE_DATA to the path or the address of a copy" in error
    assert not (tmp_path / "project" / "mlflow.db").exists()
