"""Guide 04, as stored: what it releases in an empty store, and that it releases the candidate of guide 03."""

import pytest
from browser import picture
from execution import copy_project, differing_outputs, papermill
from kernels import execute_in

pytestmark = pytest.mark.extended  # it takes long

GUIDE = "guides/04_release_and_report.ipynb"
MODEL = "iris_classification_best_model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give a folder in which the guide has been executed once, its environments built."""
    folder = tmp_path_factory.mktemp("release")
    process = papermill(copy_project(folder, GUIDE), folder, REBUILD_ENVIRONMENT="on")
    assert process.returncode == 0, process.stderr
    return folder


def test_stored_outputs_are_reproduced(folder):
    assert differing_outputs(folder, GUIDE) == []


def test_another_execution_finds_its_candidate_in_production_and_changes_nothing(folder, client, kernel):
    (folder / "again").mkdir()
    keys = str(folder / "keys")
    assert execute_in(kernel, folder / GUIDE, folder / "again", LIFECYCLE_KEYS=keys) == ""
    aliases = client.get_registered_model(MODEL).aliases
    assert {alias: str(number) for alias, number in aliases.items()} == {"candidate": "2", "production": "2"}


def test_registered_model_shows_the_alias(page, interface, pictures):
    page.goto(f"{interface}/#/models/iris_classification_best_model?workflowType=machine_learning")
    page.get_by_text("@ production").wait_for()
    page.set_viewport_size({"width": 1280, "height": 570})
    picture(page, pictures, "guides_model.png")
