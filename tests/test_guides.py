"""What holds for every guide: one form, one set-up, and the same outputs on a server, again, and by papermill."""

from pathlib import Path

import mlflow
import nbformat
import pytest
from execution import (
    ROOT,
    copy_project,
    differing_outputs,
    git,
    papermill,
    snapshot,
    tracking_server,
)

NOTEBOOKS = git(ROOT, "ls-files", "*.ipynb", ":!benchmarks").splitlines()
GUIDES = [name for name in NOTEBOOKS if name.startswith("guides/")]


def code_cells(notebook: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(ROOT / notebook, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebook_is_in_its_stable_form(name, monkeypatch):
    code = code_cells(name)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    notebook = nbformat.read(ROOT / name, as_version=4)
    before = nbformat.writes(notebook)
    monkeypatch.syspath_prepend(ROOT / "tools")
    import notebooks

    notebooks.stable(notebook)
    assert nbformat.writes(notebook) == before


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_has_one_title_and_twenty_to_thirty_cells(name):
    cells = nbformat.read(ROOT / name, as_version=4).cells
    titles = [
        line for cell in cells if cell.cell_type == "markdown" for line in cell.source.split("\n") if line[:2] == "# "
    ]
    assert len(titles) == 1
    assert 20 <= len(cells) <= 30


@pytest.mark.parametrize("name", GUIDES)
def test_parameters_stand_in_one_tagged_cell(name):
    tagged = [cell.metadata.get("tags", []) for cell in code_cells(name)]
    assert sum("parameters" in tags for tags in tagged) == 1


@pytest.mark.parametrize("start", ["os.environ", "tracking_uri = "])
def test_shared_cells_are_the_same_in_every_guide(start):
    # given the cell of each guide that begins so: the one that finds the pins, or the one that opens the store
    found = [cell.source for name in GUIDES for cell in code_cells(name) if cell.source.startswith(start)]
    # then there is one per guide, and they do not drift apart
    assert len(found) == len(GUIDES)
    assert len(set(found)) == 1


@pytest.fixture
def open_store(monkeypatch):
    """Give a function that runs the shared cell that opens the store, in this process; it returns the error."""
    cells = [cell.source for cell in code_cells(GUIDES[0])]
    (cell,) = [source for source in cells if source.startswith("tracking_uri = ")]

    def run(project: Path, **variables: str) -> str:
        names = {"project": project, "experiment_name": "an experiment", "description": "What it is for."}
        exec(cells[0], names)  # the imports
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RuntimeError) as error:
            exec(cell, names)
        assert error.value.__suppress_context__ and error.value.__cause__ is None  # whose text would have the password
        return str(error.value)

    yield run
    mlflow.set_tracking_uri(None)


REMEDY = "\nSee 'When something fails' in the README."


@pytest.mark.parametrize("user", ["", "user:p@hunter2@", "user:p/hunter2@"])
def test_unreachable_server_is_named_and_its_password_is_not(user, tmp_path, open_store):
    # given a port on which nothing listens
    error = open_store(tmp_path, MLFLOW_TRACKING_URI=f"http://{user}127.0.0.1:9")
    # then the error names the server and the remedy
    assert error.startswith("Cannot use the MLflow store http://127.0.0.1:9: ")
    assert error.endswith(REMEDY)
    assert "hunter2" not in error
    assert list(tmp_path.iterdir()) == []


def test_moved_store_is_refused_and_unchanged(tmp_path, open_store):
    # given a folder that was moved after something was logged there
    here = tmp_path / "here"
    here.mkdir()
    client = mlflow.MlflowClient(f"sqlite:///{here.as_posix()}/mlflow.db")
    client.create_experiment("an experiment", (here / "mlruns").as_uri())
    there = here.rename(tmp_path / "there")
    before = snapshot(there)
    # when a guide is executed in the new place
    error = open_store(there)
    # then the error says where the models were, and nothing was written in either place
    assert f"its models are in {here.as_uri()}/mlruns, so it was moved from there{REMEDY}" in error
    assert snapshot(there) == before
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.fixture(scope="module", params=GUIDES)
def on_a_server(request, tmp_path_factory):
    """Execute a guide twice on a tracking server, from folders that are not the guide's.

    Give the guide's name, the two finished processes, the folders in which they left their copies, and for each the
    registered versions afterwards, by name and number.
    """
    if "heart_disease" in request.param:
        request.getfixturevalue("heart_disease")
    if "scale_out" in request.param:
        request.getfixturevalue("spark")
    folder = tmp_path_factory.mktemp("server")
    processes, folders, versions = [], [folder / "project/first", folder / "project/second"], []
    notebook = copy_project(folder / "project", request.param)
    with tracking_server(folder) as address:
        client = mlflow.MlflowClient(address)
        for work in folders:
            work.mkdir()
            processes.append(papermill(notebook, work, MLFLOW_TRACKING_URI=address, REBUILD_ENVIRONMENT="on"))
            versions.append(
                {(version.name, str(version.version)): version for version in client.search_model_versions()}
            )
    return request.param, processes, folders, versions


def test_tracking_server_and_papermill_give_the_stored_outputs(on_a_server):
    name, processes, folders, _ = on_a_server
    assert processes[0].returncode == 0, processes[0].stderr
    assert differing_outputs(folders[0], name) == []


def test_second_execution_works_and_keeps_the_versions(on_a_server):
    _, processes, _, (before, after) = on_a_server
    assert processes[1].returncode == 0, processes[1].stderr
    assert before
    for key, version in before.items():
        assert after[key].source == version.source
        assert after[key].run_id == version.run_id
