"""Every guide on the team's server: its stored outputs with a user's credentials, and a second execution."""

import sys
import tempfile
from importlib.util import find_spec

import pytest
from deployment import secrets_in
from execution import ROOT, copy_project, differing_outputs, executed, git, papermill, text_outputs
from kernels import execute_in

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the server's image is Linux")
GUIDES = git(ROOT, "ls-files", "guides/*.ipynb").splitlines()
# Guides 04 and 05 build no environments here: test_release.py and test_monitor.py do, and compare what they print.
FIRST = {"04": {}, "05": {}}
# What makes a second execution shorter. Guides 03 to 05 are executed again in test_search.py, test_release.py and
# test_monitor.py, guide 06 with other parameters in test_scale.py; guide 02 logs as guide 01 does.
SECOND = {"01": {"repeats": 1}}


@pytest.fixture(scope="module", params=GUIDES)
def on_the_server(request, team, tmp_path_factory, lacking, kernel):
    """Execute a guide as ana, from a folder that is not the guide's, and some once more with smaller numbers.

    Give the guide's name, the folders in which the executions left their copies, and for each the registered versions
    afterwards, by name and number.
    """
    team.empty()
    name = request.param
    if "pyspark" in (ROOT / name).read_text(encoding="utf-8") and find_spec("pyspark") is None:
        lacking("PySpark", "make scale")
    if "heart_disease" in name:
        request.getfixturevalue("heart_disease")
    # a short name, since guide 06 starts a PostgreSQL in it, and a socket's path has about 100 characters
    folder = tmp_path_factory.mktemp("guide")
    notebook = copy_project(folder / "project", name)
    number = name[7:9]
    folders, versions = [], []
    for parameters in [FIRST.get(number, {}), *([SECOND[number]] if number in SECOND else [])]:
        folders.append(folder / "project" / str(len(folders)))
        folders[-1].mkdir()
        variables = team.as_user("ana") | {"REBUILD_ENVIRONMENT": "off" if number in FIRST else "on"}
        # In a kernel that goes on, Java would outlive guide 06, and the level of MLflow's log is fixed before guide 07.
        if number in ("06", "07"):
            # Not below the folder of pytest, which another worker can close to the user that PostgreSQL runs as.
            with tempfile.TemporaryDirectory() as temporary:
                process = papermill(notebook, folders[-1], parameters, TMPDIR=temporary, **variables)
            error = process.stderr if process.returncode or secrets_in(process.stderr) else ""
        else:
            error = execute_in(kernel, notebook, folders[-1], parameters, **variables)
        assert error == ""
        with team.client("ana") as client:
            found = client.search_model_versions()
        versions.append({(version.name, str(version.version)): version for version in found})
    return name, folders, versions


def test_guide_gives_its_stored_outputs_with_a_users_credentials(on_the_server):
    name, folders, _ = on_the_server
    differing = differing_outputs(folders[0], name)
    if "04" in name:  # the checks of the gate
        (table,) = differing
        assert "skipped on request" in table
    else:
        assert differing == []
    assert secrets_in("".join(text_outputs(executed(folders[0])))) == []


@pytest.mark.parametrize("on_the_server", [name for name in GUIDES if name[7:9] in SECOND], indirect=True)
def test_second_execution_works_and_keeps_the_versions(on_the_server):
    _, _, (before, after) = on_the_server
    assert before
    for key, version in before.items():
        assert after[key].source == version.source
        assert after[key].run_id == version.run_id
