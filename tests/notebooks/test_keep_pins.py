"""Guide 07, as stored: a version that is renewed, one that is not, and what the interface shows of a comparison."""

import mlflow
import pytest
from browser import picture
from execution import copy_project, differing_outputs, executed, papermill, text_outputs
from kernels import execute_in

from mlflow_lifecycle.signing.verify import verified

pytestmark = pytest.mark.extended  # it builds environments

GUIDE = "guides/07_keep_pins_current.ipynb"
MODEL = "diabetes_progression"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give a folder in which the guide has been executed once."""
    folder = tmp_path_factory.mktemp("pins")
    process = papermill(copy_project(folder, GUIDE), folder)
    assert process.returncode == 0, process.stderr
    return folder


def test_stored_outputs_are_reproduced(folder):
    assert differing_outputs(folder, GUIDE) == []


def test_renewed_version_is_in_production_and_leads_back(folder, client):
    with verified(f"models:/{MODEL}@production", folder / "keys/signing_key.pub") as copy:
        assert copy.statement.version == "2"
    assert client.get_model_version(MODEL, "2").tags["renewed_from"] == f"{MODEL}/1"


def test_refused_renewal_has_registered_nothing(client):
    runs = mlflow.search_runs(experiment_names=["renewals"], output_format="list")
    assert [run.info.status for run in runs] == ["FAILED", "FINISHED"]
    numbers = [version.version for version in client.search_model_versions("name = 'tumour_diagnosis'")]
    assert sorted(map(int, numbers)) == [1, 2]  # the second is the one that the guide registers by hand


def test_comparison_is_shown_with_its_changes_and_answers(page, client, interface, pictures):
    experiment = client.get_experiment_by_name("comparisons").experiment_id
    (run,) = client.search_runs([experiment])
    mode = "workflowType=machine_learning"
    page.goto(f"{interface}/#/experiments/{experiment}/runs/{run.info.run_id}/artifacts?{mode}")
    page.get_by_text("difference.md", exact=True).first.click()
    page.get_by_text("package pandas").first.wait_for()
    page.get_by_text("other_answers.json", exact=True).first.click()
    page.get_by_text("hospital").first.wait_for()
    page.set_viewport_size({"width": 1280, "height": 620})
    picture(page, pictures, "guides_difference.png")


def test_second_execution_renews_the_first_version_again(folder, client, kernel):
    (folder / "again").mkdir()
    error = execute_in(kernel, folder / GUIDE, folder / "again", LIFECYCLE_KEYS=str(folder / "keys"))
    assert error == ""
    texts = "".join(text_outputs(executed(folder / "again")))
    assert f"models:/{MODEL}/1 became models:/{MODEL}/3: 309 equal predictions." in texts
    assert str(client.get_model_version_by_alias(MODEL, "production").version) == "3"
