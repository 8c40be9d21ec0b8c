"""The MLflow interface on the notebook's store, looked at in a real browser.

With ``--pictures FOLDER`` the pages that the tests have checked are saved there; `make screenshots` does it.
"""

import re
import time

import pytest
from browser import picture
from execution import copy_project
from kernels import execute_in

MODE = "workflowType=machine_learning"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, kernel):
    """Give a folder in which the quickstart has been executed. No test here writes to its store."""
    folder = tmp_path_factory.mktemp("interface")
    assert execute_in(kernel, copy_project(folder), folder) == ""
    return folder


@pytest.fixture(scope="module")
def links(folder, interface):
    """Give the links that the interface prints when it is up, by the page that each leads to."""
    log, deadline = folder / "server.log", time.monotonic() + 60
    while "Ctrl+C" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    printed = [line.strip() for line in log.read_text().splitlines() if "/#/" in line]
    assert all(link.startswith(interface) for link in printed)
    return {re.search("/#/([a-z-]+)", link).group(1): link for link in printed}


def test_versions_are_compared_by_the_printed_link(page, links, pictures):
    # when
    page.goto(links["compare-model-versions"])
    # then both versions stand side by side, with the parameters and metrics that differ
    page.get_by_text("Comparing 2 Versions").wait_for()
    page.get_by_text("neg_log_loss").first.wait_for()
    text = page.inner_text("body")
    assert re.search(r"Model Version:\s+1\s+2", text)
    assert re.search(r"Run Name:\s+lbfgs\s+newton-cg, C=0.01", text)
    assert re.search(r"\bC\s+1\.0\s+0\.01", text)
    assert re.search(r'solver\s+"lbfgs"\s+"newton-cg"', text)
    assert "max_iter" not in text  # the same in both
    assert re.search(r"accuracy\s+0\.933\s+0\.8", text)
    assert "Model training" in text
    page.set_viewport_size({"width": 1280, "height": 890})
    picture(page, pictures, "comparison.png")


def test_runs_are_listed_with_names_metrics_and_versions(page, interface, pictures):
    # when the list of runs is opened, and metrics and parameters are ticked in its columns
    page.goto(f"{interface}/#/experiments/1/runs?{MODE}")
    page.get_by_text("2 matching runs").wait_for()
    page.get_by_role("button", name="Columns", exact=True).click()
    page.get_by_text("Metrics (3)").wait_for()
    page.get_by_text("Source", exact=True).last.click()
    page.get_by_text("Dataset", exact=True).last.click()
    page.get_by_text("Metrics (3)").click()
    page.get_by_text("Parameters (5)").click()
    page.keyboard.press("Escape")
    # then both runs show theirs
    page.get_by_text("0.7916666666666666").wait_for()
    text = page.inner_text("body")
    for expected in ["lbfgs", "newton-cg, C=0.01", "0.9333333333333333", "v1", "v2", "with exact requirements"]:
        assert expected in text
    page.set_viewport_size({"width": 1500, "height": 460})
    picture(page, pictures, "runs.png")


def test_registered_model_has_two_versions_and_the_alias(page, links, pictures):
    page.goto(links["models"])
    page.get_by_text("@ champion").wait_for()
    text = page.inner_text("body")
    assert "Version 1" in text
    assert "Version 2" in text
    row = page.get_by_role("row").filter(has_text="champion")
    assert "Version 1" in row.inner_text()
    page.set_viewport_size({"width": 1280, "height": 560})
    picture(page, pictures, "registered_model.png")


def test_logged_model_shows_input_example_and_requirements(page, interface, pictures):
    # given the page of the model, reached from its version
    page.goto(f"{interface}/#/models/tracking_quick_start/versions/1?{MODE}")
    model = page.get_by_role("link", name="model", exact=True).get_attribute("href")
    # when its artifacts are opened
    page.goto(f"{interface}/{model}/artifacts?{MODE}")
    page.get_by_text("input_example.json", exact=True).click()
    # then the example and the pins can be read
    page.get_by_text("sepal length (cm)").first.wait_for()
    page.get_by_text("requirements.txt", exact=True).click()
    page.get_by_text("scikit-learn==").wait_for()
    assert "mlflow-skinny==" in page.inner_text("body")
    picture(page, pictures, "requirements.png")
