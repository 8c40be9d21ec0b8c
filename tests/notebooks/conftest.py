"""Guides 01 to 03, executed once for all the tests that only read what they print and log."""

import pytest
from execution import copy_project, papermill
from kernels import execute_in
from serving import heart_disease_data, serving

SEARCH, HEART, MODELS = "03_search_and_evaluate", "02_heart_disease", "01_compare_models"


@pytest.fixture(scope="session")
def guides(tmp_path_factory, kernel):
    """Give a folder with the store of guides 01 to 03, which nobody writes to, and each execution in a folder below.

    Guide 03 comes first: it says which runs have used its test rows before, and guide 01 has the same ones. Guide 02 is
    there only where its data can be had. Its address has a password and a token, of which the server takes no notice.
    """
    folder = tmp_path_factory.mktemp("guides")
    with serving(heart_disease_data() or b"") as (address, _):
        address = address.replace("//", "//user:hunter2@") + "?token=hunter2"
        data = {"XDG_CACHE_HOME": str(folder / "cache"), "HEART_DISEASE_DATA": address}
        for name in (SEARCH, HEART, MODELS) if heart_disease_data() else (SEARCH, MODELS):
            (folder / name).mkdir()
            notebook = copy_project(folder, f"guides/{name}.ipynb")
            if name == MODELS:  # as the page of the guides says
                process = papermill(notebook, folder / name, **data)
                assert process.returncode == 0, process.stderr
            else:
                assert execute_in(kernel, notebook, folder / name, **data) == ""
    return folder
