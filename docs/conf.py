"""The site, which `make site` builds from what is committed: no notebook is executed, and no store is needed.

Sphinx reads the project's own folder, so links between README, guides and notebooks lead to the site's pages. What
these files cannot say themselves, such as the order of the pages, is added to their text when Sphinx reads it.
"""

import os
import pkgutil
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import click
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the library is the one beside the pages

import lifecycle  # noqa: E402
from lifecycle.__main__ import main  # noqa: E402

project = html_title = "MLflow quickstart"
root_doc = "README"
include_patterns = ["*.md", "project.ipynb", "guides/README.md", "guides/0*.ipynb", "docs/*.md", "deploy/README.md"]
include_patterns += ["benchmarks/RESULTS.md"]
exclude_patterns = [".*", "build", "mlruns", "reports"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nb_execution_mode = "off"
nb_render_markdown_format = "gfm"
default_role = "code"
highlight_language = "none"  # of what names no language: commands

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_mock_imports = [name for name in ("pyspark",) if find_spec(name) is None]  # only guide 06 needs it
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
add_module_names = False
suppress_warnings = ["ref.python"]  # two modules may each have a class of that name
python_maximum_signature_line_length = 80

html_theme = "pydata_sphinx_theme"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_use_index = html_domain_indices = False  # the search finds the same
html_sidebars = {"[!g]**": []}  # only the guides have pages below them
html_sourcelink_suffix = ""  # so that a notebook is offered under its own name
html_context = {"default_mode": "auto"}  # light or dark as the reader's system says
html_theme_options = {
    "header_links_before_dropdown": 4,
    "secondary_sidebar_items": ["page-toc", "sourcelink"],
    "footer_start": [],
    "footer_end": [],
}
if "GITHUB_REPOSITORY" in os.environ:
    html_theme_options["github_url"] = f"https://github.com/{os.environ['GITHUB_REPOSITORY']}"


def contents(*pages: str) -> str:
    """Return the directive that says which pages follow, and in which order."""
    return "\n\n```{toctree}\n:hidden:\n:glob:\n" + "\n".join(pages) + "\n```\n"


def modules() -> str:
    """Return a section for each module of the library, with its docstrings, but for those of the commands."""
    names = sorted(module.name for module in pkgutil.iter_modules(lifecycle.__path__))
    names = [name for name in names if name != "__main__" and not name.endswith("_commands")]
    return "".join(f"\n## {name}\n\n```{{eval-rst}}\n.. automodule:: lifecycle.{name}\n```\n" for name in names)


def commands() -> str:
    """Return a section for each command, with its own help."""
    text = ""
    for name, command in sorted(main.commands.items()):
        context = click.Context(command, info_name=f"lifecycle {name}", max_content_width=80, terminal_width=80)
        text += f"\n## {name}\n\n```text\n{command.get_help(context)}\n```\n"
    return text


def complete(app: Sphinx, page: str, text: list[str]) -> None:
    """Add to the ``text`` of a page, just read, what its file cannot say itself."""
    if page == "README":
        results = ["Results <benchmarks/RESULTS>"] if "benchmarks/RESULTS" in app.env.found_docs else []
        text[0] += contents(
            "Quickstart <project>",
            "Guides <guides/README>",
            "Library <docs/api>",
            "Commands <docs/commands>",
            "Team server <deploy/README>",
            "When something fails <docs/troubleshooting>",
            *results,
            "CONTRIBUTING",
        )
    elif page == "guides/README":
        text[0] += contents("0*")
    elif page == "docs/api":
        text[0] += modules()
    elif page == "docs/commands":
        text[0] += commands()


def link_issues(app: Sphinx, what: str, name: str, of, options, lines: list[str]) -> None:
    """Make links of MLflow's issues in a docstring, such as mlflow#4886."""
    link = r"`mlflow#\1 <https://github.com/mlflow/mlflow/issues/\1>`__"
    lines[:] = [re.sub(r"\bmlflow#(\d+)", link, line) for line in lines]


def show_files(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Let links to the project's other files show them, such as a picture, and not download them."""
    if "body" in context:
        context["body"] = context["body"].replace(' download=""', "")


def open_at_home(app: Sphinx, failure: Exception | None) -> None:
    """Make README what opens when no page is named."""
    if failure is None:
        shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    """Connect the functions above to Sphinx."""
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", link_issues)
    app.connect("html-page-context", show_files)
    app.connect("build-finished", open_at_home)
