"""The files that GitHub, editors and MLflow look for: valid, in step with the project, and doing what they say."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from execution import ROOT, copy_committed, finished, git
from nbformat import writes
from nbformat.v4 import new_code_cell, new_notebook, new_output

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = git(ROOT, "ls-files").splitlines()
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
SUFFIXES = {"python": ".py", "jupyter": ".ipynb"}
WRONG = {
    "ruff-check": ("module.py", '"""A module."""\n\nimport os\n'),
    "ruff-format": ("module.py", '"""A module."""\n\nnumber  =  1\n'),
    "ruff-format-notebooks": ("guides/08.ipynb", f"print({', '.join(['number'] * 12)})"),  # over 88 and under 120
    "notebook-paths": ("notes.ipynb", "read('/home/ana/data.csv')"),
}
SCHEMAS = {
    "vendor.citation-file-format": "CITATION.cff",
    "vendor.dependabot": ".github/dependabot.yml",
    "vendor.github-actions": ".github/actions/*/action.yml",
    "vendor.github-issue-forms": ".github/ISSUE_TEMPLATE/*.yml",
    "vendor.github-workflows": ".github/workflows/*.yml",
}


def validate(schema: str, files: list[Path], lacking) -> subprocess.CompletedProcess:
    """Check files against a schema."""
    if find_spec("check_jsonschema") is None:
        lacking("check-jsonschema", "make lint")
    command = [sys.executable, "-m", "check_jsonschema", "--default-filetype", "yaml", "--builtin-schema", schema]
    return subprocess.run([*command, *files], capture_output=True, text=True)


@pytest.mark.parametrize(("schema", "pattern"), SCHEMAS.items())
def test_file_follows_its_schema(schema, pattern, lacking):
    files = list(ROOT.glob(pattern))
    assert files
    process = validate(schema, files, lacking)
    assert process.returncode == 0, process.stdout


def test_workflow_on_the_page_of_the_action_follows_its_schema_and_states_what_the_action_requires(tmp_path, lacking):
    page = (ROOT / "docs/release_action.md").read_text(encoding="utf-8")
    text = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1]
    (tmp_path / "release.yml").write_text(text)
    process = validate("vendor.github-workflows", [tmp_path / "release.yml"], lacking)
    assert process.returncode == 0, process.stdout
    stated = yaml.safe_load(text)["jobs"]["release"]["steps"][-1]["with"]
    action = yaml.safe_load((ROOT / ".github/actions/release-model/action.yml").read_text(encoding="utf-8"))
    required = {name for name, settings in action["inputs"].items() if settings.get("required")}
    assert required <= stated.keys() <= action["inputs"].keys()


def test_each_file_of_tests_is_in_exactly_one_tier(tmp_path, make):
    # given the lists of `make test-all` and of the parts of `make test-nightly`
    parts = [*(f"NIGHTLY_{number}" for number in range(1, 9)), "TESTS"]
    (tmp_path / "print.mk").write_text("print:\n" + "".join(f"\t@echo $({name})\n" for name in parts))
    command = ["make", "--no-print-directory", "-f", "Makefile", "-f", str(tmp_path / "print.mk"), "print"]
    process = finished(command, ROOT, dict(os.environ), limit=30)
    # then each file is in one of them
    assert process.returncode == 0, process.stderr
    files = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/*/test_*.py")]
    assert sorted(process.stdout.split()) == sorted(["project.ipynb", *files])


def test_dependabot_renews_actions_alone_and_all_of_them():
    (entry,) = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text(encoding="utf-8"))["updates"]
    assert entry["package-ecosystem"] == "github-actions"
    folders = {f"/{Path(name).parent.as_posix()}" for name in FILES if Path(name).name == "action.yml"}
    assert folders
    assert [folder for folder in folders if not any(Path(folder).match(item) for item in entry["directories"])] == []


def test_newest_release_in_the_changelog_is_the_version_of_the_project():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"(?m)^## \[?([^\]\s]+)\]?(?: - \d{4}-\d\d-\d\d)?$", text)
    assert headings[:2] == ["Unreleased", PROJECT["version"]]


def test_tests_that_the_security_page_names_exist():
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert named
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), name


def test_development_container_has_a_supported_python_and_runs_a_target_of_make(tmp_path, make):
    settings = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    python = re.search(r"python:3\.(\d+)$", settings["image"])[1]
    first, end = map(int, re.findall(r"3\.(\d+)", PROJECT["requires-python"]))
    assert first <= int(python) < end
    # when its command is run in a folder without an environment, then make knows what to do
    for name in ("Makefile", "pyproject.toml", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = settings["postCreateCommand"].split()
    process = finished([*command, "--dry-run"], tmp_path, dict(os.environ), limit=30)
    assert process.returncode == 0, process.stderr
    assert "requirements-dev.txt" in process.stdout


@pytest.fixture
def project(tmp_path):
    """Give a copy of what is committed, with this environment in .venv."""
    copy_committed(tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def run_hook(hook: dict, project: Path, names: list[str]) -> subprocess.CompletedProcess:
    """Run a hook as pre-commit does, on those of the files that it selects."""
    kinds = hook.get("types_or", hook.get("types", SUFFIXES))
    selected = [
        name
        for name in names
        if Path(name).suffix in [SUFFIXES[kind] for kind in kinds] and re.search(hook.get("files", ""), name)
    ]
    assert selected
    return finished([*hook["entry"].split(), *selected], project, dict(os.environ), limit=60)


def test_hooks_install_nothing():
    assert [repository["repo"] for repository in HOOKS] == ["local"]
    assert {hook["language"] for hook in HOOKS[0]["hooks"]} == {"system"}


@pytest.mark.skipif(sys.platform == "win32", reason="the programs in .venv are elsewhere on Windows")
@pytest.mark.parametrize("hook", HOOKS[0]["hooks"], ids=lambda hook: hook["id"])
def test_hook_accepts_what_is_committed_and_stops_what_is_wrong(hook, project, lacking):
    if find_spec("ruff") is None:
        lacking("ruff", "make lint")
    # given what is committed, then the hook accepts it as it is
    names = [name for name in FILES if (project / name).is_file()]
    process = run_hook(hook, project, names)
    assert process.returncode == 0, process.stdout
    assert [name for name in names if (project / name).read_bytes() != (ROOT / name).read_bytes()] == []
    # given a file that is wrong, then it fails, or changes the file, by which pre-commit stops a commit, too
    name, source = WRONG[hook["id"]]
    (project / name).write_text(source if name.endswith(".py") else writes(new_notebook(cells=[new_code_cell(source)])))
    before = (project / name).read_bytes()
    process = run_hook(hook, project, [name])
    assert process.returncode == 1 or (project / name).read_bytes() != before


CELLS = {
    "table": new_code_cell(outputs=[new_output("display_data", {"text/html": "<td>/home/ana/data.csv</td>"})]),
    "Windows": new_code_cell("open('C:\\\\Users\\\\ana')"),
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_path_of_a_machine_is_found_in_a_notebook(cell, tmp_path):
    assert check_paths(cell, tmp_path).returncode == 1


def test_link_a_relative_path_and_a_picture_are_no_path_of_a_machine(tmp_path):
    outputs = [new_output("display_data", {"image/png": "aa/home/b=", "text/plain": "../home/data.csv"})]
    process = check_paths(new_code_cell("'https://example.org/home/x'", outputs=outputs), tmp_path)
    assert process.returncode == 0, process.stdout


def check_paths(cell, folder: Path) -> subprocess.CompletedProcess:
    """Look for paths in a notebook with one cell."""
    (folder / "notes.ipynb").write_text(writes(new_notebook(cells=[cell])), encoding="utf-8")
    return finished([sys.executable, str(ROOT / "tools/notebook_paths.py"), "notes.ipynb"], folder, {}, limit=30)
