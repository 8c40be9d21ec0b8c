"""Guide 06, executed: what it refuses before it writes, what it keeps, and that it ends with nothing left behind.

What it calls is tested in tests/lifecycle/test_batch.py and tests/lifecycle/test_workers.py.
"""

import json

import nbformat
import pandas as pd
import psutil
import pytest
from execution import copy_project, edit_cells, execute, executed
from kernels import execute_in, running_kernel
from postgresql import postgresql

GUIDE = "guides/06_scale_out.ipynb"
BROKEN = """
def cv_accuracy(trial):
    raise ValueError("this objective is broken")

digits = None
"""
pytestmark = pytest.mark.usefixtures("spark")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scale") / "a folder of Zoë"


@pytest.fixture(scope="module")
def failed(folder, spark):
    """Give the executed guide, with data and result kept, and a search that failed in a PostgreSQL with a password."""
    notebook = copy_project(folder, GUIDE)
    (folder / "guides" / "06_objective.py").write_text(BROKEN)
    settings = {"experiment_name": "scale_out", "model_name": "iris_at_scale", "master": "local[2]", "rows": 2500}
    settings |= {"data": str(folder / "flowers"), "result": str(folder / "result")}
    settings |= {"trials": 1, "workers": 1, "rehearse": False}
    source = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    edit_cells(notebook, parameters=f'{source}\nstorage = os.environ["SEARCH_STORAGE"]')
    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:  # so that nbconvert writes what there is
        cell.metadata.tags = ["raises-exception"]
    nbformat.write(content, notebook)
    temporary = folder.parent / "tmp"
    temporary.mkdir()
    with postgresql("hidden") as server:
        place = server.variables
        address = f"postgresql://{place['PGUSER']}:hidden@{place['PGHOST']}:{place['PGPORT']}/postgres"
        process = execute(notebook, folder, TMPDIR=str(temporary), SEARCH_STORAGE=address)
    assert process.returncode == 0, process.stderr
    return executed(folder)


def test_search_that_fails_says_why_and_not_the_password_and_a_model_in_this_environment_that_it_is_unchecked(failed):
    outputs = [output for cell in failed.cells for output in cell.get("outputs", [])]
    errors = [output for output in outputs if output.output_type == "error"]
    assert errors[0].evalue.startswith("0 of 1 trials succeeded.\n")
    assert "this objective is broken" in errors[0].evalue
    assert "hidden" not in json.dumps(outputs)
    assert "NOT CHECKED: REBUILD_ENVIRONMENT is off" in json.dumps(outputs)


def test_nothing_is_left_running_or_in_the_temporary_folder(failed, folder):
    left = [process.info for process in psutil.process_iter(["cmdline"]) if str(folder) in str(process.info["cmdline"])]
    assert left == []
    assert list((folder.parent / "tmp").iterdir()) == []


def test_result_is_kept_where_the_user_says(failed, folder):
    flowers = pd.read_parquet(folder / "flowers")
    result = pd.read_parquet(folder / "result")
    assert len(result) == 2500
    assert set(result["id"]) == set(flowers["id"])


@pytest.fixture(scope="module")
def idle(tmp_path_factory, spark):
    """Give a kernel in which the guide can be begun, and the folder where it would leave something."""
    folder = tmp_path_factory.mktemp("idle")
    copy_project(folder, GUIDE)
    (folder / "there").mkdir()
    with running_kernel(folder) as kernel:
        yield kernel, folder


REFUSALS = {
    "no rows": ({"rows": 0}, "rows, trials and workers must be at least 1"),
    "no workers": ({"workers": 0}, "rows, trials and workers must be at least 1"),
    "a result": ({"result": "there"}, "there exists already. Choose another folder"),
    "no PostgreSQL": ({"storage": "sqlite:///search.db"}, "The queue must be in a PostgreSQL"),
    "no server": ({"storage": "postgresql://me:hidden@127.0.0.1:1/x"}, "Cannot use the PostgreSQL of the search: "),
}


@pytest.mark.parametrize(("parameters", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_settings_are_refused_before_anything_is_written(idle, parameters, reason):
    kernel, folder = idle
    error = execute_in(kernel, folder / GUIDE, folder, parameters)
    printed = json.dumps([cell.get("outputs") for cell in executed(folder).cells])
    assert reason in error
    assert "hidden" not in error + printed.replace(json.dumps(parameters), "")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["executed.ipynb", "guides", "model_requirements.txt", "requirements.txt", "there", "tmp"]
    )
