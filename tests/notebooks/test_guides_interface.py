"""The MLflow interface on what the guides log, one after another, in one store, looked at in a real browser.

Guides 05 and 06 log nothing that the interface shows in another way.

With ``--pictures FOLDER`` the pages that the tests have checked are saved there; `make screenshots` does it.
"""

import json
import re
from urllib.parse import quote

import mlflow
import pytest
from browser import picture
from execution import ROOT, copy_project, git, papermill
from sklearn.linear_model import LogisticRegression

GUIDES = git(ROOT, "ls-files", "guides/0[1-4]*.ipynb").splitlines()
MODE = "workflowType=machine_learning"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, heart_disease, request):
    """Give a folder in which these guides have been executed, each copy below. No test here writes to its store."""
    folder = tmp_path_factory.mktemp("guides")
    for name in GUIDES:
        copies = folder / name.removesuffix(".ipynb")
        copies.mkdir(parents=True)
        parameters = {"allow_unchecked": True} if "04" in name else {}  # no environment is built
        if "03" in name and not request.config.getoption("--pictures"):
            parameters = {"n_trials": 6}
        process = papermill(copy_project(folder, name), copies, parameters)
        assert process.returncode == 0, process.stderr
    return folder


def page_of(client: mlflow.MlflowClient, experiment: str, run_name: str) -> str:
    """Return the path in the interface of the page of the run with that name."""
    found = client.get_experiment_by_name(experiment).experiment_id
    (run,) = [run for run in client.search_runs([found]) if run.info.run_name == run_name]
    return f"#/experiments/{found}/runs/{run.info.run_id}"


def test_experiments_are_listed_with_their_descriptions(page, interface, pictures):
    page.goto(f"{interface}/#/experiments?{MODE}")
    for name in ("compare_models", "heart-disease-classification", "iris_classification"):
        page.get_by_role("link", name=name).wait_for()
    text = page.inner_text("body")
    assert "is the better one better?" in text
    assert "Three kinds of model compared on one table." in text
    page.set_viewport_size({"width": 1280, "height": 460})
    picture(page, pictures, "guides_experiments.png")


def test_three_models_of_guide_01_are_compared_side_by_side(page, client, interface, pictures):
    # given the page of the interface that compares runs, for the three nested runs
    found = client.get_experiment_by_name("compare_models").experiment_id
    children = client.search_runs([found], "tags.model != ''", order_by=["start_time ASC"])
    runs = quote(json.dumps([run.info.run_id for run in children]))
    page.goto(f"{interface}/#/compare-runs?runs={runs}&experiments={quote(json.dumps([found]))}&{MODE}")
    page.get_by_text("Comparing 3 Runs from 1 Experiment").wait_for()
    page.get_by_text("f1_macro").first.wait_for()
    text = page.inner_text("body")
    assert re.search(r"Run Name:\s+LogisticRegression\s+SVC\s+RandomForestClassifier", text)
    assert re.search(r"0\.958\s+0\.967\s+0\.956\b", text)
    for section in ("Visualizations", "Parameters"):  # folded, so that names and metrics are seen together
        page.get_by_text(section, exact=True).first.click()
    page.set_viewport_size({"width": 1280, "height": 900})
    picture(page, pictures, "guides_comparison.png")


def test_run_of_guide_02_shows_its_metrics_and_parameters(page, client, interface, pictures):
    page.goto(f"{interface}/{page_of(client, 'heart-disease-classification', 'LogisticRegression')}?{MODE}")
    page.get_by_text("Metrics (10)").wait_for()
    page.get_by_text(f"Parameters ({len(LogisticRegression().get_params())})").wait_for()
    page.get_by_text("heart_disease_logistic_regression").first.wait_for()
    text = page.inner_text("body")
    for name in ("cv_accuracy_mean", "cv_accuracy_std", "test_accuracy", "precision", "recall", "f1_score", "roc_auc"):
        assert name in text
    assert re.search(r"solver\s+lbfgs", text)
    page.set_viewport_size({"width": 1280, "height": 940})
    picture(page, pictures, "guides_run.png")


def test_pictures_of_guide_02_are_visible_among_the_artifacts(page, client, interface, pictures):
    page.goto(f"{interface}/{page_of(client, 'heart-disease-classification', 'RandomForest')}/artifacts?{MODE}")
    for name in ("confusion_matrix_random_forest", "feature_importance_random_forest", "roc_curve_random_forest"):
        page.get_by_text(f"{name}.png", exact=True).first.click()
        page.locator(".image-outer-container img, img[src^='blob:']").first.wait_for()
    page.set_viewport_size({"width": 1280, "height": 760})
    picture(page, pictures, "guides_artifacts.png")


def test_search_of_guide_03_shows_its_picture(page, client, interface, pictures):
    page.goto(
        f"{interface}/{page_of(client, 'iris_classification', 'search LogisticRegression_subset')}/artifacts?{MODE}"
    )
    page.get_by_text("search.png", exact=True).first.click()
    page.locator(".image-outer-container img, img[src^='blob:']").first.wait_for()
    page.set_viewport_size({"width": 1280, "height": 560})
    picture(page, pictures, "guides_search.png")


def test_registered_model_shows_its_versions_and_the_alias(page, interface, pictures):
    page.goto(f"{interface}/#/models/iris_classification_best_model?{MODE}")
    page.get_by_text("@ production").wait_for()
    row = page.get_by_role("row").filter(has_text="@ production").inner_text()
    assert "Version 1" in row
    assert "released.production" in row  # guide 04 has released the candidate of guide 03
    assert "Version 2" in page.inner_text("body")
    page.set_viewport_size({"width": 1280, "height": 570})
    picture(page, pictures, "guides_model.png")
