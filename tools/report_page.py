"""Make an HTML page, with the pictures in it, from a report that `lifecycle report` has written.

Usage: python tools/report_page.py FOLDER PAGE
"""

import sys
from pathlib import Path

from nbconvert.exporters import HTMLExporter
from nbformat.v4 import new_markdown_cell, new_notebook

# Table and charts may be wider than the prose.
STYLE = """<style>
.jp-RenderedMarkdown { max-width: none; }
.jp-RenderedMarkdown p:not(:has(img)), .jp-RenderedMarkdown li { max-width: 44rem; }
</style>"""


def page(folder: Path) -> str:
    """Return the page: a notebook of one cell, the report, in the form in which `make run` shows notebooks."""
    text = (folder / "experiment_report.md").read_text(encoding="utf-8")
    templates = {"extra_template_basedirs": [str(Path(__file__).parent)], "template_name": "template"}
    exporter = HTMLExporter(embed_images=True, **templates)
    notebook = new_notebook(cells=[new_markdown_cell(f"{STYLE}\n\n{text}")])
    return exporter.from_notebook_node(notebook, {"metadata": {"name": folder.name, "path": str(folder)}})[0]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    target = Path(sys.argv[2])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(Path(sys.argv[1])), encoding="utf-8")
