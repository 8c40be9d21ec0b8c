"""The page of an executed notebook, in a real browser."""

import nbformat
import pytest
from execution import ROOT
from nbformat.v4 import new_code_cell, new_notebook, new_output


@pytest.fixture(scope="module")
def tool():
    """Give the program behind `make run` as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        import run

        return run


@pytest.fixture(scope="module")
def quickstart(tool, tmp_path_factory):
    """Give the address of the quickstart as a page, with its stored outputs."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(tool.page(nbformat.read(ROOT / "project.ipynb", as_version=4), "quickstart"), encoding="utf-8")
    return path.as_uri()


def test_contents_lead_to_every_section(page, quickstart):
    # given the page
    page.goto(quickstart)
    titles = [title.removesuffix("¶") for title in page.locator("main h2").all_text_contents()]
    # when each entry of the contents is followed
    links = page.locator("nav a")
    assert links.all_text_contents() == titles
    for link, heading in zip(links.all(), page.locator("main h2").all(), strict=True):
        link.click()
        # then its heading is in sight
        assert 0 <= heading.bounding_box()["y"] < 800


def test_page_needs_no_network(page, quickstart):
    # given a browser that notes what it asks for
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    # when the page is opened
    page.goto(quickstart, wait_until="networkidle")
    # then that is nothing but the page itself, and what is in it
    assert quickstart in asked
    assert [address for address in asked if not address.startswith(("file:", "data:"))] == []


def test_reason_of_a_failure_leads_to_its_cell(page, tool, tmp_path):
    # given the page of a notebook that failed
    error = new_output("error", ename="ValueError", evalue="no", traceback=["Traceback", "ValueError: no"])
    notebook = new_notebook(cells=[new_code_cell("1", outputs=[error], id="failed")])
    failure = tool.NotebookFailedError("ValueError: no", "<Data>", "failed")
    (tmp_path / "page.html").write_text(tool.page(notebook, "small", failure), encoding="utf-8")
    # when it is opened
    page.goto((tmp_path / "page.html").as_uri())
    # then the reason stands at the top, with a link to the cell
    assert page.get_by_role("alert").inner_text().startswith('small failed in section "<Data>": ValueError: no')
    page.get_by_role("link", name="Go to the cell").click()
    assert page.locator(":target .jp-OutputArea-output").count() == 1
