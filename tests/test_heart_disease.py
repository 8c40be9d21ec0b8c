"""Guide 02: how it gets its data, what it logs, and how it chooses between the two models."""

import io
import re
import socket
import subprocess
import sys
from pathlib import Path

import mlflow
import nbformat
import numpy as np
import pandas as pd
import pytest
from execution import ROOT, copy_project, differing_outputs, environment, executed, free_port, papermill, text_outputs
from scipy import stats
from serving import NAME, PUBLIC_ADDRESS, serving
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score, train_test_split

GUIDE = "guides/02_heart_disease.ipynb"
CODES = ["sex", "cp", "fbs", "restecg", "exang", "slope", "thal"]
COLUMNS = ["age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"]
COLUMNS += ["thalach", "exang", "oldpeak", "slope", "ca", "thal", "num"]
FILES = {"LogisticRegression": "logistic_regression", "RandomForest": "random_forest"}
PARAMETERS = {
    "LogisticRegression": {"max_iter": "1000", "C": "1.0", "solver": "lbfgs", "random_state": "42"},
    "RandomForest": {
        "n_estimators": "100",
        "max_depth": "10",
        "min_samples_split": "2",
        "min_samples_leaf": "1",
        "random_state": "42",
    },
}


@pytest.fixture(scope="module")
def served(heart_disease):
    """Give the address of a server that has the data, and the list of requests that it got."""
    with serving(heart_disease) as (address, requests):
        yield address, requests


@pytest.fixture(scope="module")
def folder(tmp_path_factory, served):
    """Give a folder in which the guide has been executed once. No test here writes to its store.

    The address of the data has a password and a token, of which the server takes no notice.
    """
    folder = tmp_path_factory.mktemp("guide")
    address = served[0].replace("//", "//user:hunter2@") + "?token=hunter2"
    cache = str(folder / "cache")
    process = papermill(copy_project(folder, GUIDE), folder, HEART_DISEASE_URL=address, HEART_DISEASE_CACHE=cache)
    assert process.returncode == 0, process.stderr
    return folder


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
    assert differing_outputs(folder, GUIDE) == []


def test_file_is_requested_once_from_the_address_in_the_environment(folder, served, heart_disease):
    assert served[1] == [f"/{NAME}?token=hunter2"]
    assert {path.name: path.read_bytes() for path in (folder / "cache").iterdir()} == {NAME: heart_disease}


def test_public_address_is_the_last_resort():
    assert 'os.environ.get("HEART_DISEASE_URL") or public_address' in download_cell()
    assert f'public_address = "{PUBLIC_ADDRESS}"' in download_cell()


def test_two_runs_are_finished_under_their_names(runs):
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(FILES, "FINISHED")


@pytest.mark.parametrize("name", FILES)
def test_parameters_are_those_of_the_reference(runs, name):
    assert runs[name].data.params == PARAMETERS[name]


@pytest.mark.parametrize("name", FILES)
def test_metrics_are_those_of_the_registered_model_on_the_patients_held_back(client, runs, parts, name):
    # given the registered version and the patients held back
    version = client.get_model_version(f"heart_disease_{FILES[name]}", "1")
    model = mlflow.sklearn.load_model(f"models:/{version.name}/1")
    _, _, features, target = parts
    predictions = model.predict(features)
    probabilities = model.predict_proba(features)[:, list(model.classes_).index("present")]
    # when they are judged anew, the ROC AUC by counting pairs
    ill, well = probabilities[target == "present"][:, None], probabilities[target == "absent"]
    expected = {
        "test_accuracy": accuracy_score(target, predictions),
        "precision": precision_score(target, predictions, pos_label="present"),
        "recall": recall_score(target, predictions, pos_label="present"),
        "f1_score": f1_score(target, predictions, pos_label="present"),
        "roc_auc": ((ill > well) + 0.5 * (ill == well)).mean(),
    }
    # then the run has just these, and those of the cross-validation
    assert version.run_id == runs[name].info.run_id
    logged = runs[name].data.metrics
    cross_validated = {"cv_accuracy_mean", "cv_accuracy_std", "cv_roc_auc_mean", "cv_roc_auc_std"}
    assert set(logged) == {*expected, *cross_validated}
    assert {key: logged[key] for key in expected} == pytest.approx(expected)


@pytest.fixture(scope="module")
def fold_scores(folder, parts):
    """Give accuracy and ROC AUC of each model in each fold, from the registered pipelines fitted anew."""
    features, target = parts[:2]
    splitter = RepeatedStratifiedKFold(n_splits=5, n_repeats=5, random_state=42)
    mlflow.set_tracking_uri(f"sqlite:///{folder.as_posix()}/mlflow.db")
    models = {name: mlflow.sklearn.load_model(f"models:/heart_disease_{file}/1") for name, file in FILES.items()}
    mlflow.set_tracking_uri(None)
    return {
        (name, metric): cross_val_score(model, features, target, cv=splitter, scoring=metric)
        for name, model in models.items()
        for metric in ("accuracy", "roc_auc")
    }


def test_cross_validated_metrics_are_those_of_the_folds(runs, fold_scores):
    for (name, metric), scores in fold_scores.items():
        assert runs[name].data.metrics[f"cv_{metric}_mean"] == pytest.approx(scores.mean())
        assert runs[name].data.metrics[f"cv_{metric}_std"] == pytest.approx(scores.std())


@pytest.mark.parametrize("name", FILES)
def test_run_has_just_the_pictures_of_the_reference(client, runs, name):
    run_id = runs[name].info.run_id
    files = {file.path for file in client.list_artifacts(run_id)}
    expected = {f"roc_curve_{FILES[name]}.png", f"confusion_matrix_{FILES[name]}.png"}
    if name == "RandomForest":
        expected.add("feature_importance_random_forest.png")
    assert files == expected
    for file in files:
        image = np.asarray(mlflow.artifacts.load_image(f"runs:/{run_id}/{file}").convert("L"))
        assert image.shape[1] > 400
        assert 0.01 < (image < 128).mean() < 0.5  # something is drawn


def test_printed_results_are_the_logged_metrics_of_both_models(folder, runs):
    cell = next(cell for cell in executed(folder).cells if "results.loc[" in cell.source)
    table = pd.read_csv(io.StringIO(cell.outputs[-1].data["text/plain"]), sep=r"\s+", index_col=0)
    assert list(table) == list(FILES)
    for name in FILES:
        assert table[name].to_dict() == pytest.approx(runs[name].data.metrics, abs=5.1e-5)


@pytest.mark.parametrize("name", FILES)
def test_datasets_are_inputs_and_name_their_source_without_secrets(runs, served, name):
    inputs = runs[name].inputs.dataset_inputs
    assert {data.dataset.name for data in inputs} == {"heart_disease_train", "heart_disease_test"}
    assert {data.dataset.source for data in inputs} == {f'{{"url": "{served[0]}"}}'}


def test_neither_secret_nor_address_nor_path_is_printed(folder, served):
    printed = "\n".join(text_outputs(executed(folder)))
    for private in ("hunter2", served[0].split("/")[2], str(folder)):
        assert private not in printed


@pytest.mark.parametrize("name", FILES)
def test_registered_model_has_pins_and_trusts_no_more_than_was_reviewed(client, name):
    files = Path(mlflow.artifacts.download_artifacts(f"models:/heart_disease_{FILES[name]}/1"))
    flavor = mlflow.models.Model.load(files).flavors["sklearn"]
    assert flavor["serialization_format"] == "skops"
    trees = ["sklearn.tree._tree.Tree"] if name == "RandomForest" else []
    assert flavor["skops_trusted_types"] == ["numpy.dtype", *trees]
    pins = [
        re.findall(r"^[\w.-]+==[\w.+!-]+", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for path in (files / "requirements.txt", ROOT / "model_requirements.txt")
    ]
    assert pins[0] == pins[1] != []


@pytest.mark.parametrize("name", FILES)
def test_model_scores_rows_with_gaps_in_every_column(client, parts, name):
    # given the row of nobody
    row = parts[2].head(1) * np.nan
    # then it is scored as the middle patient, with the most frequent codes
    model = mlflow.pyfunc.load_model(f"models:/heart_disease_{FILES[name]}/1")
    train = parts[0]
    filled = train.median().to_frame().T
    filled[CODES] = train[CODES].mode().head(1).to_numpy()
    assert model.predict(row)[0] in {"absent", "present"}
    assert model.predict(row) == model.predict(filled)


@pytest.mark.parametrize("name", FILES)
def test_model_leaves_a_code_out_that_it_never_saw(client, parts, name):
    # given patients with codes that no patient had
    model = mlflow.sklearn.load_model(f"models:/heart_disease_{FILES[name]}/1")
    eights, nines = parts[2].assign(cp=8.0, thal=8.0), parts[2].assign(cp=9.0, thal=9.0)
    # then the code makes no difference, though a known one does
    assert (model.predict_proba(eights) == model.predict_proba(nines)).all()
    assert (model.predict_proba(eights) != model.predict_proba(parts[2])).any()
    predictions = mlflow.pyfunc.load_model(f"models:/heart_disease_{FILES[name]}/1").predict(eights)
    assert set(predictions) <= {"absent", "present"}


def test_champion_is_the_simpler_model_where_the_interval_contains_zero(client, fold_scores):
    # given the difference in each fold, and the interval of Nadeau and Bengio, for 5 folds
    difference = fold_scores["RandomForest", "roc_auc"] - fold_scores["LogisticRegression", "roc_auc"]
    error = (difference.var(ddof=1) * (1 / 25 + 1 / 4)) ** 0.5
    lower, upper = stats.t.interval(0.95, 24, difference.mean(), error)
    assert lower < 0 < upper
    # then the alias and the reason, with these numbers, are at the simpler model, and nowhere else
    version = client.get_model_version_by_alias("heart_disease_logistic_regression", "champion")
    assert str(version.version) == "1"
    assert f": {difference.mean():.4f}, 95 % interval from {lower:.4f} to {upper:.4f}. " in version.description
    assert "neither is shown to be better, and the simpler one was taken: LogisticRegression" in version.description
    assert client.get_registered_model("heart_disease_random_forest").aliases == {}


@pytest.fixture(scope="module")
def forest_ahead(tmp_path_factory, folder, served):
    """Give a folder in which the guide was executed with a forest that is far ahead in every fold.

    The other model was the champion before, and the data has been downloaded before.
    """
    ahead = tmp_path_factory.mktemp("ahead")
    client = mlflow.MlflowClient(f"sqlite:///{ahead.as_posix()}/mlflow.db")
    client.create_registered_model("heart_disease_logistic_regression")
    client.create_model_version("heart_disease_logistic_regression", (ahead / "old").as_uri())
    client.set_registered_model_alias("heart_disease_logistic_regression", "champion", "1")
    guide = copy_project(ahead, GUIDE)
    notebook = nbformat.read(guide, as_version=4)
    after = next(number for number, cell in enumerate(notebook.cells) if cell.source.startswith("splitter")) + 1
    notebook.cells.insert(after, nbformat.v4.new_code_cell('scores["RandomForest"]["test_roc_auc"] += 0.3'))
    nbformat.write(notebook, guide)
    cache = str(folder / "cache")
    process = papermill(guide, ahead, HEART_DISEASE_URL=served[0], HEART_DISEASE_CACHE=cache)
    assert process.returncode == 0, process.stderr
    return ahead


def test_champion_is_the_model_that_is_ahead_where_the_interval_leaves_out_zero(forest_ahead):
    client = mlflow.MlflowClient(f"sqlite:///{forest_ahead.as_posix()}/mlflow.db")
    version = client.get_model_version_by_alias("heart_disease_random_forest", "champion")
    assert "It leaves out 0, so one is better: RandomForest." in version.description
    printed = "".join(text_outputs(executed(forest_ahead)))
    assert "The intervals of the two models do not overlap." in printed
    assert "The forest is ahead in 25 of 25 folds." in printed


def test_former_champion_gives_the_alias_up(forest_ahead):
    client = mlflow.MlflowClient(f"sqlite:///{forest_ahead.as_posix()}/mlflow.db")
    former = client.get_registered_model("heart_disease_logistic_regression")
    assert former.aliases == {}
    assert len(client.search_model_versions(f"name = '{former.name}'")) == 2


def test_second_execution_downloads_nothing(forest_ahead, served):
    assert len(served[1]) == 1


def test_numbers_in_the_closing_words_are_those_of_the_data(rows):
    cells = nbformat.read(ROOT / GUIDE, as_version=4).cells
    closing = next(cell.source for cell in cells if "may not be used for" in cell.source)
    words = re.sub(r"\(http.*?\)\)?|\d\. ", "", closing.partition("## In this guide")[0])
    women = rows[rows["sex"] == 0]
    counts = [len(rows), (rows["num"] > 0).sum(), len(women), (women["num"] > 0).sum()]
    assert [int(number) for number in re.findall(r"\b\d{2,3}\b", words)] == counts


def download_cell() -> str:
    """Return the source of the guide's cell that downloads the data."""
    cells = nbformat.read(ROOT / GUIDE, as_version=4).cells
    return next(cell.source for cell in cells if "pooch.retrieve" in cell.source)


def download(folder: Path, address: str = "", prefix: tuple[str, ...] = (), source: str = "") -> str:
    """Run the guide's download cell alone, with a cache in ``folder``, and return its last words.

    Args:
        folder: where the cache is.
        address: what HEART_DISEASE_URL is set to.
        prefix: a command to run it under.
        source: what to run in place of the cell as it is.
    """
    program = "import logging, os, re\nimport pooch\nurl = ''\n" + (source or download_cell())
    variables = {"HEART_DISEASE_URL": address, "HEART_DISEASE_CACHE": str(folder / "cache")}
    command = [*prefix, sys.executable, "-W", "error", "-c", program]
    process = subprocess.run(command, env=environment(folder, **variables), capture_output=True, text=True, timeout=60)
    assert process.stdout == ""
    return process.stderr


def cached(folder: Path) -> list[str]:
    """Return the names of all files in the cache that ``download`` uses."""
    return [path.name for path in (folder / "cache").glob("*")]


def test_download_prints_nothing_and_leaves_one_file(tmp_path, heart_disease):
    with serving(heart_disease) as (address, _):
        assert download(tmp_path, address) == ""
    assert cached(tmp_path) == [NAME]


def test_wrong_bytes_are_refused_before_anything_is_written(tmp_path, heart_disease):
    # given a server whose file differs in its line ends
    notebook = copy_project(tmp_path / "project", GUIDE)
    with serving(heart_disease.replace(b"\n", b"\r\n")) as (address, _):
        # when the guide is executed
        process = papermill(
            notebook, tmp_path / "project", HEART_DISEASE_URL=address, HEART_DISEASE_CACHE=str(tmp_path / "cache")
        )
    # then it says what is wrong and what to do, and leaves neither a file in the cache nor a store
    assert process.returncode != 0
    assert f"Cannot get the data from {address}" in process.stderr
    assert "does not match the known hash" in process.stderr
    assert "let url or HEART_DISEASE_URL name another address" in process.stderr
    assert cached(tmp_path) == []
    assert not (tmp_path / "project" / "mlflow.db").exists()


def test_address_in_the_parameter_goes_before_the_environment_and_its_404_is_told(tmp_path, served):
    # given a server without the file, and another that has it
    notebook = copy_project(tmp_path / "project", GUIDE)
    before = len(served[1])
    with serving(b"", status=404) as (address, requests):
        # when the parameter names the first, the environment the second
        process = papermill(
            notebook,
            tmp_path / "project",
            {"url": address},
            HEART_DISEASE_URL=served[0],
            HEART_DISEASE_CACHE=str(tmp_path / "cache"),
        )
    # then only the first is asked, and its answer told
    assert len(requests) == 1
    assert len(served[1]) == before
    assert process.returncode != 0
    assert f"Cannot get the data from {address} : 404 Client Error" in process.stderr
    assert "let url or HEART_DISEASE_URL name another address" in process.stderr
    assert cached(tmp_path) == []
    assert not (tmp_path / "project" / "mlflow.db").exists()


def test_server_that_is_down_is_named_without_secrets(tmp_path):
    port = free_port()
    told = download(tmp_path, f"http://user:p@hunter2@127.0.0.1:{port}/{NAME}?token=hunter2")
    assert f"Cannot get the data from http://127.0.0.1:{port}/{NAME}" in told
    assert "Check the connection" in told
    assert "hunter2" not in told
    assert cached(tmp_path) == []


def test_server_that_does_not_answer_is_given_up(tmp_path):
    # given a server that takes the request and keeps silent, and a second of patience in place of ten
    source = download_cell().replace("timeout=10", "timeout=1")
    assert source != download_cell()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        told = download(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}/{NAME}", source=source)
    assert "Read timed out" in told
    assert "Check the connection" in told
    assert cached(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are a part of Linux")
def test_without_network_the_public_address_and_the_remedies_are_named(tmp_path, lacking):
    unshare = ("unshare", "--map-root-user", "--net")
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        lacking("the right to make a network namespace", "sysctl kernel.unprivileged_userns_clone=1")
    told = download(tmp_path, prefix=unshare)
    assert f"Cannot get the data from {PUBLIC_ADDRESS}" in told
    assert "Check the connection" in told
    assert "HEART_DISEASE_CACHE" in told
    assert cached(tmp_path) == []


def test_address_that_is_none_is_told(tmp_path):
    assert f"Cannot get the data from {NAME} : Invalid URL" in download(tmp_path, NAME)
    assert cached(tmp_path) == []


def test_spoilt_file_in_the_cache_is_replaced(tmp_path, heart_disease):
    # given a cache whose file was cut off
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / NAME).write_bytes(heart_disease[:1000])
    # when the file is downloaded
    with serving(heart_disease) as (address, _):
        assert download(tmp_path, address) == ""
    # then the cache has it whole
    assert (tmp_path / "cache" / NAME).read_bytes() == heart_disease


def test_file_put_into_the_cache_by_hand_needs_no_server(tmp_path, heart_disease):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / NAME).write_bytes(heart_disease)
    assert download(tmp_path, f"http://127.0.0.1:{free_port()}/{NAME}") == ""
