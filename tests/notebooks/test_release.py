"""Guide 04, as stored: what it releases in an empty store, and that it releases the candidate of guide 03."""

import mlflow
import pytest
from browser import picture
from execution import copy_project, differing_outputs, executed, papermill, text_outputs
from kernels import execute_in

from mlflow_lifecycle.releases.release import history
from mlflow_lifecycle.signing.verify import verified

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


def aliases(client: mlflow.MlflowClient) -> dict[str, str]:
    return {alias: str(number) for alias, number in client.get_registered_model(MODEL).aliases.items()}


def test_better_version_is_in_production_and_verifies(folder, client):
    assert aliases(client) == {"candidate": "2", "production": "2"}
    public_key = folder / "keys/signing_key.pub"
    with verified(f"models:/{MODEL}@production", public_key, purpose="release") as copy:
        assert copy.statement.version == "2"


def test_history_has_two_releases_two_refusals_and_the_way_back_and_forth(client):
    found = [(item.kind, item.version, item.status) for item in reversed(history(MODEL))]
    assert found == [
        ("release", "1", "FINISHED"),
        ("release", "2", "FINISHED"),
        ("release", "4", "FAILED"),
        ("release", "3", "FAILED"),
        ("rollback", "1", "FINISHED"),
        ("rollback", "2", "FINISHED"),
    ]


def test_environment_that_was_not_built_is_said(tmp_path, kernel):
    assert execute_in(kernel, copy_project(tmp_path, GUIDE), tmp_path) == ""
    checks = next(text for text in text_outputs(executed(tmp_path)) if "fresh environment" in text)
    assert "skipped on request" in checks


def test_another_execution_finds_its_candidate_in_production_and_changes_nothing(folder, client, kernel):
    before = aliases(client)
    (folder / "again").mkdir()
    keys = str(folder / "keys")
    assert execute_in(kernel, folder / GUIDE, folder / "again", LIFECYCLE_KEYS=keys) == ""
    assert aliases(client) == before


def test_registered_model_shows_its_versions_and_the_alias(page, interface, pictures):
    page.goto(f"{interface}/#/models/iris_classification_best_model?workflowType=machine_learning")
    page.get_by_text("@ production").wait_for()
    row = page.get_by_role("row").filter(has_text="@ production").inner_text()
    assert "Version 2" in row
    assert "released.production" in row
    assert "Version 3" in page.inner_text("body")
    page.set_viewport_size({"width": 1280, "height": 570})
    picture(page, pictures, "guides_model.png")
