"""The environment in .venv: when it is made, brought up to date, or made anew, as make says before it does it."""

import os
import re
import shutil
import venv

import pytest
from execution import ROOT, environment, finished


@pytest.fixture
def project(tmp_path, lacking):
    """Give a folder with the Makefile, the locks, and an environment that is half made."""
    if shutil.which("make") is None:
        lacking("make", "apt-get install make (on Debian)")
    for path in (ROOT / "Makefile", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, tmp_path)
    (tmp_path / ".venv").mkdir()
    return tmp_path


def steps(project, target: str) -> str:
    """Return what make would do for ``target``."""
    process = finished(["make", "--dry-run", target], project, environment(project), limit=30)
    assert process.returncode == 0, process.stderr
    return process.stdout


def complete(project, *names: str, age: float = 0) -> None:
    """Mark the environment as complete, as long ago as ``age`` seconds after the locks were written."""
    written = max(path.stat().st_mtime for path in project.glob("requirements*.txt"))
    for name in names:
        (project / ".venv" / name).touch()
        os.utime(project / ".venv" / name, (written + age,) * 2)


@pytest.mark.parametrize("pip", [True, False], ids=["a Python with pip", "a Python without pip"])
def test_environment_is_made_and_holds_just_the_lock(pip, project):
    # given a lock of what it takes to make an environment, and a Python
    lock = (ROOT / "requirements.txt").read_text()
    blocks = [re.search(rf"(?ms)^{name}==.*?(?=^    # via)", lock)[0] for name in ("pip", "setuptools", "uv")]
    (project / "requirements.txt").write_text("    # via\n".join([*blocks, ""]))
    shutil.copy(ROOT / "pyproject.toml", project)
    shutil.copytree(ROOT / "lifecycle", project / "lifecycle")
    venv.create(project / "python", with_pip=pip)
    # when
    command = ["make", f"PYTHON={project / 'python/bin/python'}", ".venv/installed.txt"]
    process = finished(command, project, environment(project), limit=120)
    # then
    assert process.returncode == 0, process.stderr
    found = {path.name for path in project.glob(".venv/lib/*/site-packages/*.dist-info")}
    wanted = {block.split()[0].replace("==", "-") + ".dist-info" for block in blocks}
    assert found == wanted | {"mlflow_quickstart_lifecycle-1.dist-info"}


def test_half_made_environment_is_made_anew_from_nothing(project):
    assert re.search("-m venv .*--clear +.venv", steps(project, "run"))


def test_complete_environment_stays_as_it_is(project):
    complete(project, "installed.txt", age=1)
    assert "-m venv" not in steps(project, "run")


def test_complete_environment_of_an_older_lock_is_brought_up_to_date(project):
    complete(project, "installed.txt", age=-1)
    assert re.search("-m venv --without-pip +.venv", steps(project, "run"))
    assert "pip sync" in steps(project, "run")


@pytest.mark.parametrize("target", ["run", "browser", "scale"])
def test_environment_counts_as_half_made_while_packages_are_installed(project, target):
    # given an environment of older locks
    complete(project, "installed.txt", "development.txt", "scale.txt", age=-1)
    # when it is brought up to date, then each time the mark goes before anything is installed, and comes back after it
    text = steps(project, target)
    found = re.findall("rm -f .venv/installed.txt|pip sync|touch .venv/installed.txt", text)
    assert found == ["rm -f .venv/installed.txt", "pip sync", "touch .venv/installed.txt"] * len(found[::3])
    assert len(found) == {"run": 3, "browser": 6, "scale": 9}[target]
