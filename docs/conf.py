"""Settings of the site, which `make site` builds from the committed files without executing a notebook.

Sphinx reads the project folder itself, so the links between README, guides and notebooks work on the site. The order
of the pages, the reference of the library and the help of the commands are added when Sphinx reads a page.
"""

import importlib
import inspect
import os
import re
import shutil
import sys
from pathlib import Path

import click
import mlflow  # noqa: F401 - before autodoc replaces pyspark, since MLflow cannot be imported afterwards
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # document the library in this folder

import mlflow_lifecycle  # noqa: E402
from mlflow_lifecycle.cli import main  # noqa: E402

project = html_title = "MLflow quickstart"
root_doc = "README"
include_patterns = ["*.md", "project.ipynb", "guides/README.md", "guides/0*.ipynb", "docs/*.md", "deploy/*.md"]
include_patterns += ["benchmarks/RESULTS.md"]
exclude_patterns = [".*", "build", "mlruns", "reports"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nb_execution_mode = "off"
nb_render_markdown_format = "gfm"
myst_heading_anchors = 2  # links to sections, written as for GitHub
default_role = "code"
smartquotes = False  # the help of a command has options such as --data
highlight_language = "none"  # for code blocks without a language, which hold commands

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_mock_imports = ["pyspark"]  # even if it is installed, so that the site is the same everywhere
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
add_module_names = False
suppress_warnings = ["ref.python"]  # two modules may define a class with the same name
python_maximum_signature_line_length = 80

html_theme = "pydata_sphinx_theme"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_use_index = html_domain_indices = False  # the search covers both
html_sidebars = {"[!g]**": []}  # only the guides have subpages
html_sourcelink_suffix = ""  # offer a notebook for download under its own name
html_context = {"default_mode": "auto"}  # light or dark, as set in the reader's system
html_theme_options = {
    "header_links_before_dropdown": 4,
    "secondary_sidebar_items": ["page-toc", "sourcelink"],
    "footer_start": [],
    "footer_end": [],
}
if "GITHUB_REPOSITORY" in os.environ:
    html_theme_options["github_url"] = f"https://github.com/{os.environ['GITHUB_REPOSITORY']}"


def contents(*pages: str) -> str:
    """Return a table of contents that lists ``pages`` in this order."""
    return "\n\n```{toctree}\n:hidden:\n:glob:\n" + "\n".join(pages) + "\n```\n"


def modules() -> str:
    """Return a section for each module with public names: these, and the classes that they take, return or raise."""
    text = ""
    for section, names in mlflow_lifecycle.MODULES.items():
        module = importlib.import_module(f"mlflow_lifecycle.{section}")
        text += f"\n## {section}\n\n```{{eval-rst}}\n.. automodule:: {module.__name__}\n   :no-members:\n"
        for name, item in vars(module).items():
            is_own_class = inspect.isclass(item) and item.__module__ == module.__name__ and name[0] != "_"
            if is_own_class:
                text += f"\n.. autoclass:: {module.__name__}.{name}\n"
            elif name in names:
                kind, option = ("autofunction", "") if callable(item) else ("autodata", "   :no-value:\n")
                text += f"\n.. {kind}:: {module.__name__}.{name}\n{option}"
        text += "```\n"
    return text


def commands() -> str:
    """Return a section with the help of each command, whose options wrap on a narrow screen."""
    text = ""
    for name, command in sorted(main.commands.items()):
        context = click.Context(command, info_name=f"lifecycle {name}")
        text += f"\n## {name}\n\n```text\n{command.get_usage(context)}\n```\n"
        for paragraph in inspect.cleandoc(command.help).replace("\b\n", "").split("\n\n"):
            before, example, after = paragraph.partition("Example: ")
            continued = " \\\n  ".join(map(str.strip, after.splitlines()))
            text += f"\n```text\n{continued}\n```\n" if example else f"\n{before}\n"
        text += "\n"
        for option in command.get_params(context):
            declaration, help_text = option.get_help_record(context)
            if help_text:
                text += f"- `{declaration}`: {help_text}\n"
    return text


def complete(app: Sphinx, page: str, text: list[str]) -> None:
    """Add the generated part to the ``text`` of a page that Sphinx has just read."""
    if page == "README":
        results = ["Results <benchmarks/RESULTS>"] if "benchmarks/RESULTS" in app.env.found_docs else []
        text[0] += contents(
            "Quickstart <project>",
            "Guides <guides/README>",
            "In your own project <docs/own_project>",
            "Library <docs/api>",
            "Commands <docs/commands>",
            "Team server <deploy/README>",
            "Release by a GitHub action <docs/release_action>",
            "When something fails <docs/troubleshooting>",
            *results,
            "CONTRIBUTING",
            "CHANGELOG",
            "SECURITY",
        )
    elif page == "guides/README":
        text[0] += contents("0*")
    elif page == "deploy/README":
        text[0] += contents("On Kubernetes <kubernetes>")
    elif page == "docs/api":
        text[0] += modules()
    elif page == "docs/commands":
        text[0] += commands()


def link_issues(app: Sphinx, what: str, name: str, of, options, lines: list[str]) -> None:
    """Turn references to MLflow issues in a docstring, such as mlflow#4886, into links."""
    link = r"`mlflow#\1 <https://github.com/mlflow/mlflow/issues/\1>`__"
    lines[:] = [re.sub(r"\bmlflow#(\d+)", link, line) for line in lines]


def show_files(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Make links to other files of the project, such as a picture, open them instead of downloading them."""
    if "body" in context:
        context["body"] = context["body"].replace(' download=""', "")


def open_at_home(app: Sphinx, failure: Exception | None) -> None:
    """Make the README the start page."""
    if failure is None:
        shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    """Connect the functions above to the events of Sphinx."""
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", link_issues)
    app.connect("html-page-context", show_files)
    app.connect("build-finished", open_at_home)
