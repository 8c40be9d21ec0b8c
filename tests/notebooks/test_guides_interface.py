"""The MLflow interface on what guides 01 to 03 log in one store, looked at in a real browser.

What guide 04 registers is looked at in test_release.py. Guides 05 and 06 log nothing that looks different.

With ``--pictures FOLDER`` the pages that the tests have checked are saved there; `make screenshots` does it.
"""

import json
from urllib.parse import quote

import mlflow
import pytest
from browser import picture

MODE = "workflowType=machine_learning"


@pytest.fixture(scope="module")
def folder(guides, heart_disease):
    """Give the folder with the store in which guides 01 to 03 have been executed."""
    return guides


def page_of(client: mlflow.MlflowClient, experiment: str, run_name: str) -> str:
    """Return the path in the interface of the page of the run with that name."""
    found = client.get_experiment_by_name(experiment).experiment_id
    (run,) = [run for run in client.search_runs([found]) if run.info.run_name == run_name]
    return f"#/experiments/{found}/runs/{run.info.run_id}"


def test_experiments_are_listed_with_their_descriptions(page, interface, pictures):
    page.goto(f"{interface}/#/experiments?{MODE}")
    for name in ("compare_models", "heart-disease-classification", "iris_classification"):
        page.get_by_role("link", name=name).wait_for()
    page.get_by_text("Three kinds of model compared on one table.").wait_for()
    page.set_viewport_size({"width": 1280, "height": 460})
    picture(page, pictures, "guides_experiments.png")


def test_three_models_of_guide_01_are_compared_side_by_side(page, client, interface, pictures):
    # given the page of the interface that compares runs, for the three nested runs
    found = client.get_experiment_by_name("compare_models").experiment_id
    children = client.search_runs([found], "tags.mlflow.parentRunId != ''", order_by=["start_time ASC"])
    runs = quote(json.dumps([run.info.run_id for run in children]))
    page.goto(f"{interface}/#/compare-runs?runs={runs}&experiments={quote(json.dumps([found]))}&{MODE}")
    page.get_by_text("Comparing 3 Runs from 1 Experiment").wait_for()
    page.get_by_text("f1_macro").first.wait_for()
    for section in ("Visualizations", "Parameters"):  # folded, so that names and metrics are seen together
        page.get_by_text(section, exact=True).first.click()
    page.set_viewport_size({"width": 1280, "height": 900})
    picture(page, pictures, "guides_comparison.png")


def test_run_of_guide_02_shows_its_metrics_and_its_model(page, client, interface, pictures):
    page.goto(f"{interface}/{page_of(client, 'heart-disease-classification', 'logistic_regression')}?{MODE}")
    page.get_by_text("Metrics (17)").wait_for()
    page.get_by_text("heart_disease_logistic_regression").first.wait_for()
    page.set_viewport_size({"width": 1280, "height": 940})
    picture(page, pictures, "guides_run.png")


def test_pictures_of_guide_02_are_visible_among_the_artifacts(page, client, interface, pictures):
    page.goto(f"{interface}/{page_of(client, 'heart-disease-classification', 'random_forest')}/artifacts?{MODE}")
    for name in ("confusion_matrix_random_forest", "feature_importance_random_forest", "roc_curve_random_forest"):
        page.get_by_text(f"{name}.png", exact=True).first.click()
        page.locator(".image-outer-container img, img[src^='blob:']").first.wait_for()
    page.set_viewport_size({"width": 1280, "height": 760})
    picture(page, pictures, "guides_artifacts.png")


def test_search_of_guide_03_shows_its_picture(page, client, interface, pictures):
    page.goto(
        f"{interface}/{page_of(client, 'iris_classification', 'search LogisticRegression_squared')}/artifacts?{MODE}"
    )
    page.get_by_text("search.png", exact=True).first.click()
    page.locator(".image-outer-container img, img[src^='blob:']").first.wait_for()
    page.set_viewport_size({"width": 1280, "height": 560})
    picture(page, pictures, "guides_search.png")
