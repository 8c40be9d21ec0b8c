"""The page of an executed notebook, in a real browser."""

import nbformat
import run
from execution import ROOT
from nbformat.v4 import new_code_cell, new_notebook, new_output


def test_page_needs_no_network_and_its_contents_lead_to_every_section(page, tmp_path):
    # given the quickstart as a page, and a browser that notes what it asks for
    notebook = nbformat.read(ROOT / "project.ipynb", as_version=4)
    (tmp_path / "page.html").write_text(run.page(notebook, "quickstart"), encoding="utf-8")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    # when it is opened, then that is nothing but the page itself, and what is in it
    page.goto((tmp_path / "page.html").as_uri(), wait_until="networkidle")
    assert asked
    assert [address for address in asked if not address.startswith(("file:", "data:"))] == []
    # and each entry of the contents brings its heading in sight
    titles = [title.removesuffix("¶") for title in page.locator("main h2").all_text_contents()]
    links = page.locator("nav a")
    assert links.all_text_contents() == titles
    for link, heading in zip(links.all(), page.locator("main h2").all(), strict=True):
        link.click()
        assert 0 <= heading.bounding_box()["y"] < 800


def test_reason_of_a_failure_leads_to_its_cell(page, tmp_path):
    # given the page of a notebook that failed
    error = new_output("error", ename="ValueError", evalue="no", traceback=["Traceback", "ValueError: no"])
    notebook = new_notebook(cells=[new_code_cell("1", outputs=[error], id="failed")])
    failure = run.NotebookFailedError("ValueError: no", "<Data>", "failed")
    (tmp_path / "page.html").write_text(run.page(notebook, "small", failure), encoding="utf-8")
    # when it is opened
    page.goto((tmp_path / "page.html").as_uri())
    # then the reason stands at the top, with a link to the cell
    assert page.get_by_role("alert").inner_text().startswith('small failed in section "<Data>": ValueError: no')
    page.get_by_role("link", name="Go to the cell").click()
    assert page.locator(":target .jp-OutputArea-output").count() == 1
