"""`make site`: built from what is committed, without a warning, and readable in a real browser."""

import ast
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from execution import ROOT, environment, finished, git

import mlflow_lifecycle
from mlflow_lifecycle.cli import main

pytestmark = pytest.mark.extended  # it takes long

WIDTHS = [400, 1280]


class Links(HTMLParser):
    """What a page refers to, and the places in it that others may refer to."""

    def __init__(self, page: Path) -> None:
        """Read ``page``."""
        super().__init__()
        self.links, self.places, self.text = [], set(), ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        """Keep what an element refers to."""
        values = dict(attributes)
        self.places.add(values.get("id"))
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])

    def handle_data(self, data):
        """Keep the text."""
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory, lacking):
    """Give the site, built by `make site` from a copy of the committed files."""
    if find_spec("sphinx") is None:
        lacking("Sphinx, which builds the site,", "make browser")
    if shutil.which("make") is None:
        lacking("make", "apt-get install make (on Debian)")
    folder = tmp_path_factory.mktemp("site")
    project = folder / "the project"
    for name in filter(None, git(ROOT, "ls-files", "-z").split("\0")):
        if (ROOT / name).is_file():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
    (project / ".venv").symlink_to(sys.prefix)
    for stamp in ("installed.txt", "development.txt"):
        (project / stamp).touch()
    before = set(sources(project))
    # UV and PYTHON, so that make can change nothing in this environment; a store that cannot be reached
    command = ["make", "site", "INSTALLED=installed.txt", "DEVELOPMENT=development.txt", "UV=false", "PYTHON=false"]
    process = finished(command, project, environment(folder, MLFLOW_TRACKING_URI="http://127.0.0.1:1"), limit=300)
    added = set(sources(project)) - before
    return SimpleNamespace(project=project, folder=project / "build/site", process=process, added=added)


def sources(project: Path) -> Iterator[str]:
    """Give the paths of the project's files, less what is built and what Python compiles."""
    for path in project.rglob("*"):
        parts = path.relative_to(project).parts
        if path.is_file() and not {"build", ".venv", "__pycache__"} & set(parts):
            yield "/".join(parts)


@pytest.fixture(scope="module")
def pages(site):
    """Give what each page refers to, by its path."""
    assert site.process.returncode == 0, site.process.stderr
    paths = [path for path in site.folder.rglob("*.html") if "_static" not in path.parts]
    return {path.relative_to(site.folder).as_posix(): Links(path) for path in paths}


@pytest.fixture(scope="module")
def address(site):
    """Give the address at which the site can be read."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site.folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_site_is_built_without_a_warning_or_a_store_and_changes_no_source(site):
    assert (site.process.returncode, site.process.stderr) == (0, "")
    assert site.added == set()


def test_every_link_leads_to_a_page_or_a_file_of_the_site(site, pages):
    broken = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (site.folder / name).parent / unquote(parts.path) if parts.path else site.folder / name
            inside = target.resolve().relative_to(site.folder).as_posix()
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in pages[inside].places):
                broken.append((name, link))
    assert len(pages) > 10
    assert broken == []


def test_api_has_every_public_name_and_no_other_function(pages):
    public = {f"mlflow_lifecycle.{module}.{name}" for name, module in mlflow_lifecycle.PUBLIC.items()}
    assert set(mlflow_lifecycle.__all__) == set(mlflow_lifecycle.PUBLIC)
    assert public - pages["docs/api.html"].places == set()
    functions = {
        f"{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}.{node.name}"
        for path in (ROOT / "mlflow_lifecycle").rglob("[!_]*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert functions & pages["docs/api.html"].places == functions & public


def test_every_command_has_its_help_and_an_example(pages):
    text = pages["docs/commands.html"].text
    assert main.commands
    for name, command in main.commands.items():
        assert f"Usage: lifecycle {name} [OPTIONS]" in text
        assert f"\nlifecycle {name} " in text
        for option in command.params:
            assert not getattr(option, "help", None) or option.help in text, option.name


@pytest.mark.parametrize("width", WIDTHS)
def test_code_is_at_least_13_pixels_high(page, address, width):
    page.set_viewport_size({"width": width, "height": 900})
    for name in ["project.html", "guides/07_keep_pins_current.html", "docs/commands.html"]:
        page.goto(f"{address}/{name}")
        sizes = page.evaluate(
            "[...document.querySelectorAll('pre')].map(e => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert len(sizes) > 10
        assert min(sizes) >= 13, name


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_the_screen(page, address, pages, width):
    # given
    problems = []
    page.on("pageerror", lambda error: problems.append(error.message))
    page.on("response", lambda response: problems.append(response.url) if response.status >= 400 else None)
    page.route("**/favicon.ico", lambda route: route.fulfill(status=204))  # every browser asks, and there is none
    page.set_viewport_size({"width": width, "height": 900})
    for name in pages:
        # when
        page.goto(f"{address}/{name}")
        page.evaluate("for (const picture of document.images) picture.loading = 'eager'")
        page.wait_for_function("[...document.images].every(picture => picture.complete)")
        # then no picture is missing, and the page as a whole does not scroll sideways
        missing = page.evaluate("[...document.images].filter(p => !p.naturalWidth).map(p => p.src)")
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        # and nothing that is wider is cut off where it cannot be scrolled
        if missing or wide or (cut := page.evaluate(CUT_OFF)):
            problems.append((name, missing, wide, cut))
    assert problems == []


# What in the article reaches beyond the window, if nothing around it, in the article, can be scrolled.
CUT_OFF = """
() => [...document.querySelectorAll("article *")].filter(element => {
  if (element.getBoundingClientRect().right <= window.innerWidth + 1 || !element.checkVisibility()) return false;
  for (let around = element; around.tagName !== "ARTICLE"; around = around.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(around).overflowX)) return false;
  return true;
}).map(element => element.outerHTML.slice(0, 100))
"""
