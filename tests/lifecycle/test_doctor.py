"""doctor: each thing that can be wrong here is said with its remedy."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
from click.testing import CliRunner
from execution import ROOT

from mlflow_lifecycle import doctor
from mlflow_lifecycle.cli import main


def test_packages_that_differ_from_the_lock_are_named(tmp_path):
    # given a lock with a package that is installed at another version, one that is missing, one for another system, and
    # lines that are no requirements
    lock = tmp_path / "requirements.txt"
    lock.write_text(
        "# made by hand\n-r other.txt\ngit+https://example.org/a.git\n./a\n"
        "numpy==0.1 \\\n    --hash=sha256:00\n"
        "no-such-package==1 \\\n    --hash=sha256:00\n"
        "pywin32==1 ; sys_platform == 'none' \\\n    --hash=sha256:00\n"
        f"pandas=={version('pandas')} \\\n    --hash=sha256:00\n"
    )
    # then the first two are
    (problem,) = doctor.check_packages(lock)
    assert problem.what.startswith("2 installed packages differ")
    assert problem.what.endswith(f": numpy is {version('numpy')}, no-such-package is missing.")
    assert problem.remedy == "Run: uv pip install -r requirements.txt"


def test_project_needs_neither_pins_nor_lock(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert doctor.find_problems(tmp_path) == []


def test_full_disk_is_said(tmp_path):
    # given more to be written than any disk holds
    (problem,) = doctor.check_disk(tmp_path, needed_bytes=10**18)
    assert problem.what.startswith(f"The disk of {tmp_path} has ")
    assert "uv cache prune" in problem.remedy


def test_store_that_cannot_be_used_is_said_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_text("no database")
    (problem,) = doctor.check_store_of(tmp_path)
    assert problem.what.endswith("mlflow.db: file is not a database.")
    assert problem.remedy.startswith("Restore it from a backup")


@pytest.fixture
def lifecycle(tmp_path, monkeypatch):
    """Give the command, run in this process and in a folder of its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, arguments)


def test_command_says_each_problem_and_ends_with_status_1(tmp_path, lifecycle):
    # given a project whose pins are loose, and whose lock is not installed
    (tmp_path / "model_requirements.txt").write_text("numpy\n")
    (tmp_path / "requirements.txt").write_text("no-such-package==1\n")
    # when
    answer = lifecycle("doctor", "--quiet")
    # then both are said, each with its remedy
    assert answer.exit_code == 1
    assert "model_requirements.txt, line 1, leaves the version open: 'numpy'.\nEach line must pin" in answer.stdout
    assert "no-such-package is missing.\nRun: uv pip install -r requirements.txt\n" in answer.stdout
    assert answer.stderr == ""
    # and as JSON, too
    answer = lifecycle("doctor", "--json")
    assert [list(problem) for problem in json.loads(answer.stdout)] == [["what", "remedy"]] * 2
    assert answer.exit_code == 1


def test_command_says_so_where_nothing_is_wrong_unless_it_is_quiet(tmp_path, lifecycle):
    for name in ("requirements.txt", "model_requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    answer = lifecycle("doctor")
    assert (answer.exit_code, answer.output) == (0, "No problem was found in packages, pins, store and disk.\n")
    answer = lifecycle("doctor", "--quiet")
    assert (answer.exit_code, answer.output) == (0, "")


def test_import_is_cheap():
    heavy = {"mlflow", "pandas", "sklearn", "numpy", "sqlalchemy", "alembic"}
    code = f"import sys, mlflow_lifecycle.cli, mlflow_lifecycle.experiments; print(sorted({heavy} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"
