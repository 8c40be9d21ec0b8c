"""`make run` and `make guides`: what tools/run.py prints, what it writes, how it ends, and how its page reads."""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import nbformat
import psutil
import pytest
import run as tool
from execution import ROOT, commit_all, environment, finished, git, make_here, snapshot
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

PROGRAM = [sys.executable, str(ROOT / "tools" / "run.py")]
FAILING = """\
def fall(depth):
    fall(depth - 1) if depth else int("x\\n\\nno number\\nat all")
fall(9)"""


def write(path: Path, **sections: str) -> Path:
    """Write a notebook with one code cell in each section; the first section is the title."""
    cells = []
    for name, source in sections.items():
        cells += [new_markdown_cell(f"{'##' if cells else '#'} {name}"), new_code_cell(source)]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def run(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run the program in ``folder``."""
    return finished([*PROGRAM, *arguments], folder, environment(folder, **variables), limit=300)


@pytest.mark.extended  # it takes long
def test_each_section_is_printed_with_its_seconds(tmp_path):
    # given a notebook whose second section takes half a second
    write(tmp_path / "small.ipynb", Title="1", Second="import time; time.sleep(0.5)", Last="2")
    # when it is executed
    process = run("small.ipynb", folder=tmp_path)
    # then a line per section has its seconds, and the end says where the page is
    assert (process.returncode, process.stderr) == (0, "")
    rows = re.findall(r"  (.+?) +(\d+\.\d) s\n", process.stdout)
    assert [name for name, _ in rows] == ["Title", "Second", "Last"]
    assert 0.5 <= float(rows[1][1]) < 5
    assert "build/small.html" in process.stdout


LINKS = "[a](b.ipynb) [b](a.ipynb) [c](../c.ipynb) [n](../notes%20(1).md) [w](https://example.org/x) [no](no.md)"


def test_page_has_the_new_outputs_and_its_links_lead_to_pages_and_files(tmp_path):
    # given notebooks with a stored output, which link to each other, to a file, to a web page, and to a missing file
    (tmp_path / "guides").mkdir()
    (tmp_path / "notes (1).md").write_text("notes")
    code = new_code_cell("from pathlib import Path; print(Path.cwd().name, 6 * 7)")
    code.outputs = [new_output("stream", text="from before")]
    for name in ("guides/a.ipynb", "guides/b.ipynb", "c.ipynb"):
        nbformat.write(new_notebook(cells=[new_markdown_cell(f"# Title\n\n{LINKS}"), code]), tmp_path / name)
    before = snapshot(tmp_path / "guides")
    # when two of them are executed
    process = run("--output-dir", "some/pages", "guides/a.ipynb", "guides/b.ipynb", folder=tmp_path)
    # then the page has the new output, from a kernel in the notebook's folder, and the notebook has the old one
    assert process.returncode == 0, process.stderr
    text = (tmp_path / "some/pages/a.html").read_text(encoding="utf-8")
    assert "guides 42" in text
    assert "from before" not in text
    assert snapshot(tmp_path / "guides") == before
    # and links to notebooks lead to their pages, links to files to the files, and other links are unchanged
    found = {label: target for target, label in re.findall(r'<a href="([^"]+)">([a-z]+)</a>', text)[-6:]}
    assert found == {
        "a": "b.html",
        "b": "a.html",
        "c": "c.html",
        "n": "../../notes%20%281%29.md",
        "w": "https://example.org/x",
        "no": "no.md",
    }


@pytest.mark.parametrize(("page_time", "is_kept"), [(200, True), (50, False)])
def test_page_of_a_linked_notebook_is_kept_if_it_is_newer(tmp_path, page_time, is_kept):
    # given a chain of notebooks, and a page of the last one
    for name, link in {"a": "[b](b.ipynb)", "b": "[c](c.ipynb)", "c": "[a](a.ipynb)"}.items():
        nbformat.write(new_notebook(cells=[new_markdown_cell(link)]), tmp_path / f"{name}.ipynb")
        os.utime(tmp_path / f"{name}.ipynb", (100, 100))
    (tmp_path / "c.html").write_text("old page")
    os.utime(tmp_path / "c.html", (page_time, page_time))
    # when the pages are written that the first one leads to
    tool.write_linked_pages(tmp_path / "a.ipynb", tmp_path)
    # then there is a page of each, and the one that was there is kept if it is newer than its notebook
    assert {path.name for path in tmp_path.glob("*.html")} == {"b.html", "c.html"}
    assert ((tmp_path / "c.html").read_text(encoding="utf-8") == "old page") == is_kept


@pytest.mark.extended  # it takes long
def test_half_made_store_is_replaced_before_mlflow_opens_it(tmp_path):
    # given a store that a killed process left half made, in which MLflow cannot create its tables
    write(tmp_path / "small.ipynb", Title="import mlflow", Second="mlflow.set_experiment('an experiment').name")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("CREATE TABLE experiments (name TEXT)")
    os.utime(tmp_path / "mlflow.db", (0, 0))  # no process is creating it now
    # when a notebook opens it
    process = run("small.ipynb", folder=tmp_path)
    # then the experiment is there, and the half-made file is kept under another name
    assert process.returncode == 0, process.stderr
    assert "an experiment" in (tmp_path / "build/small.html").read_text(encoding="utf-8")
    made = {"build", "mlflow.db", "mlflow.db.incomplete-1", "tmp"}
    assert {path.name for path in tmp_path.iterdir()} == {"small.ipynb"} | made


def test_mlflow_waits_briefly_for_a_server_unless_the_user_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    variables = tool.kernel_environment(tmp_path / "small.ipynb")
    assert variables["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "30"
    assert variables["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    assert tool.kernel_environment(tmp_path / "small.ipynb")["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"


FAILS = "raise ValueError('wrong')"
IS_INTERRUPTED = "import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(100)"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals as terminals send them")
@pytest.mark.parametrize(
    ("code", "pins", "status", "expected"),
    [
        (FAILS, "numpy", 1, "model_requirements.txt, line 1, leaves the version open: 'numpy'."),
        (IS_INTERRUPTED, "numpy", 130, ""),
    ],
)
@pytest.mark.extended  # it takes long
@pytest.mark.usefixtures("make")
def test_make_run_ends_with_the_problems_found_after_a_failure(tmp_path, code, pins, status, expected):
    # given a notebook that fails or is interrupted, in a project with or without a problem
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "model_requirements.txt").write_text(pins)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    write(tmp_path / "project.ipynb", Title=code)
    # when
    process = finished(make_here("run"), tmp_path, environment(tmp_path), limit=300)
    # then the problem is printed, if there is one and the user did not interrupt, and nothing else
    _, _, after = process.stdout.partition("\n")
    assert after.partition("\n")[0].endswith(expected) if expected else after == ""
    assert f"Error {status}\n" in process.stderr


def test_headings_in_code_blocks_and_without_code_are_no_sections():
    # given a notebook with a comment in a code block that looks like a heading, and an end without code
    cells = [new_code_cell("0"), new_markdown_cell("# Title\n\n```\n## no heading\n```"), new_code_cell("1")]
    cells += [new_markdown_cell("Text\n\n## The `name`\n\n### Below"), new_code_cell("2"), new_markdown_cell("## End")]
    # when its sections are listed
    found = tool.sections(new_notebook(cells=cells))
    # then they are those with code
    assert found == [("Start", [0]), ("Title", [2]), ("The name", [4])]


def test_failure_names_section_and_reason_and_leaves_the_traceback_to_the_page(tmp_path):
    # given a notebook that fails deep down in its second section, has a temporary folder then, and an older output
    title = "import tempfile; folder = tempfile.TemporaryDirectory(); print('done before')"
    path = write(tmp_path / "small.ipynb", Title=title, Data=FAILING, Later="1")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[5].outputs = [new_output("stream", text="from before")]
    nbformat.write(notebook, path)
    # when it is executed in a kernel that would be ended at once if all went well
    process = run("--shutdown", "immediate", "small.ipynb", folder=tmp_path)
    # then it says in which section, why, and where to look, and no more
    assert process.returncode == 1
    reason = r"ValueError: invalid literal for int() with base 10: 'x\n\nno number\nat all'"
    assert process.stderr.splitlines() == [
        f'small.ipynb failed in section "Data": {reason}',
        "The full traceback is in build/small.html",
    ]
    assert [name for name, _ in re.findall(r"  (\w+) +(\d+\.\d) s(?:  failed)?\n", process.stdout)] == ["Title", "Data"]
    # and the page has the traceback and what ran before, and no output that is older
    page = (tmp_path / "build" / "small.html").read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in page
    assert "done before" in page
    assert "from before" not in page
    # and its kernel could clean up
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("a cause\nand a remedy\n", "KeyError: a cause\n  and a remedy"),
        ("first\n\nsecond\nthird\nlast\n", "KeyError: first\n  ...\n  last"),
        ("x" * 5000, "KeyError: " + "x" * 2990 + "..."),
    ],
)
def test_reason_is_short_however_long_the_message(message, expected):
    # given an error with that message, when it is summed up, then the result has few lines and is not too long
    assert tool.summary("KeyError", message) == expected


EMPTY = '{"nbformat": 4, "nbformat_minor": 5, "cells": [], "metadata": {"kernelspec": %s}}'


@pytest.mark.extended  # it takes long
@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that kills")
def test_notebooks_that_fail_are_reported_in_a_line_each_and_do_not_stop_the_others(tmp_path):
    # given notebooks of which only the last is sound
    write(tmp_path / "first.ipynb", Title="1", Data="1 / 0")
    (tmp_path / "text.ipynb").write_text("no JSON")
    (tmp_path / "part.ipynb").write_text(EMPTY % '{"name": "no"}')
    (tmp_path / "kernel.ipynb").write_text(EMPTY % '{"name": "no", "display_name": "No"}')
    write(tmp_path / "dies.ipynb", Title="1", Data="import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    write(tmp_path / "last.ipynb", Title="print(6 * 7)")
    names = ["first", "missing", "text", "part", "kernel", "dies", "last"]
    # when all are executed
    process = run(*(f"{name}.ipynb" for name in names), folder=tmp_path)
    # then each has its line, the sound one is executed, and the end says why the others failed
    assert process.returncode == 1
    rows = re.findall(r"(?m)^(\w+)\.ipynb +\d+\.\d s(  failed)?$", process.stdout)
    assert rows == [*((name, "  failed") for name in names[:-1]), ("last", "")]
    assert "42" in (tmp_path / "build/last.html").read_text(encoding="utf-8")
    assert process.stderr.splitlines() == [
        'first.ipynb failed in section "Data": ZeroDivisionError: division by zero',
        "The full traceback is in build/first.html",
        "missing.ipynb: there is no such file",
        "text.ipynb: this is not a notebook: Notebook does not appear to be JSON: 'no JSON'",
        "part.ipynb: this is not a notebook: 'display_name' is a required property",
        "kernel.ipynb: the kernel did not start: No such kernel named no",
        'dies.ipynb failed in section "Data": the kernel died, perhaps because memory ran out',
    ]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups as terminals use them")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.extended  # it takes long
def test_interrupt_ends_with_one_line_and_no_process_left(tmp_path, number):
    # given a notebook in the middle of a long cell
    write(tmp_path / "small.ipynb", Title="1", Data="import time; time.sleep(100)")
    command = [*PROGRAM, "small.ipynb"]
    options = {"cwd": tmp_path, "env": environment(tmp_path), "start_new_session": True, "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        assert "Title" in process.stdout.readline()
        assert process.stdout.read(6) == "  Data"
        kernel = psutil.Process(process.pid).children(recursive=True)
        assert kernel
        # when Ctrl+C is pressed in its terminal, or it is told to end
        os.killpg(process.pid, number)
        # then it ends with one line, and its kernel is gone
        _, printed = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "Interrupted.\n")
    assert psutil.wait_procs(kernel, timeout=10)[1] == []


@pytest.mark.extended  # it takes long
def test_runs_are_tagged_with_their_source_and_its_commit(tmp_path, empty_store):
    # given a notebook in a folder of a git repository, all committed, that starts a run
    work = tmp_path / "work"
    (work / "notebooks").mkdir(parents=True)
    write(work / "notebooks" / "small.ipynb", Title="import mlflow\nwith mlflow.start_run(): pass")
    commit_all(work)
    # when it is executed
    store = f"sqlite:///{shutil.copy(empty_store, tmp_path)}"
    arguments = ["--output-dir", str(tmp_path), str(work / "notebooks" / "small.ipynb")]
    process = run(*arguments, folder=tmp_path, MLFLOW_TRACKING_URI=store)
    # then the run names the notebook's path in the repository, and the commit
    assert process.returncode == 0, process.stderr
    (finished_run,) = mlflow.MlflowClient(store).search_runs(["0"])
    assert finished_run.data.tags["mlflow.source.name"] == "notebooks/small.ipynb"
    assert finished_run.data.tags["mlflow.source.git.commit"] == git(work, "rev-parse", "HEAD")


def test_run_tags_of_the_user_win(tmp_path, monkeypatch):
    # given run tags that the user has set
    monkeypatch.setenv("MLFLOW_RUN_CONTEXT", '{"team": "a", "mlflow.source.name": "mine"}')
    commit_all(write(tmp_path / "small.ipynb", Title="1").parent)
    # when the tags for the runs are made
    tags = json.loads(tool.kernel_environment(tmp_path / "small.ipynb")["MLFLOW_RUN_CONTEXT"])
    # then they are kept, and only what they leave open is added
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert tags == {"team": "a", "mlflow.source.name": "mine", "mlflow.source.git.commit": commit}


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_run_tags_that_are_none_stay_for_mlflow_to_report(text, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_CONTEXT", text)
    assert tool.kernel_environment(tmp_path / "small.ipynb")["MLFLOW_RUN_CONTEXT"] == text


@pytest.mark.extended  # it takes long
def test_password_in_the_address_of_the_store_is_not_shown(tmp_path):
    # given a notebook whose cell asks a server that is down, and an address whose password HTML writes otherwise
    write(tmp_path / "small.ipynb", Title="import mlflow\n\nmlflow.set_experiment('an experiment')")
    variables = {"MLFLOW_TRACKING_URI": "http://user:<hunter2>&@127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    # when it is executed
    process = run("small.ipynb", folder=tmp_path, **variables)
    # then error and page name the server, without the password
    page = (tmp_path / "build" / "small.html").read_text(encoding="utf-8")
    assert "127.0.0.1" in process.stderr
    assert "127.0.0.1:9/api" in page
    assert "hunter2" not in process.stdout + process.stderr + page
