"""The environment that make installs in .venv, and the settings that make passes on to programs."""

import hashlib
import os
import re
import shutil
import tomllib
import venv
import zipfile

import pytest
from execution import ROOT, environment, finished


@pytest.fixture
def project(tmp_path, make):
    """Give a folder with the Makefile, the locks, and an environment that is half made."""
    project = tmp_path / "project"
    (project / ".venv").mkdir(parents=True)
    for path in (ROOT / "Makefile", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, project)
    return project


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


def small_lock(project, *names: str) -> set[str]:
    """Replace the lock by the part of it with these packages, and return the metadata folders that they install."""
    lock = (ROOT / "requirements.txt").read_text()
    blocks = [re.search(rf"(?ms)^{name}==.*?(?=^    # via)", lock)[0] for name in names]
    (project / "requirements.txt").write_text("    # via\n".join([*blocks, ""]))
    for name in ("pyproject.toml", "uv.toml"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "mlflow_lifecycle", project / "mlflow_lifecycle")
    installed = {block.split()[0].replace("==", "-") + ".dist-info" for block in blocks}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    return installed | {f"mlflow_quickstart_lifecycle-{version}.dist-info"}


def installed(project) -> set[str]:
    """Return the names of the metadata folders in the environment."""
    return {path.name for path in project.glob(".venv/lib/*/site-packages/*.dist-info")}


@pytest.mark.parametrize("pip", [True, False], ids=["a Python with pip", "a Python without pip"])
@pytest.mark.extended  # it takes long
def test_environment_is_made_and_holds_just_the_lock(pip, project):
    # given a lock of what it takes to make an environment, and a Python
    wanted = small_lock(project, "pip", "setuptools", "uv")
    venv.create(project / "python", with_pip=pip)
    # when
    command = ["make", f"PYTHON={project / 'python/bin/python'}", ".venv/installed.txt"]
    process = finished(command, project, environment(project), limit=120)
    # then
    assert process.returncode == 0, process.stderr
    assert installed(project) == wanted


def foreign_requirement(folder, name: str, version: str) -> str:
    """Write a wheel that leaves the file ``name``.ran when Python starts, and return its requirement with its hash."""
    files = {
        f"{name}.pth": f"import pathlib; pathlib.Path({str(folder / name)!r} + '.ran').touch()\n",
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{name}-{version}.dist-info/RECORD"
    files[record] = "".join(f"{path},,\n" for path in [*files, record])
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return f"{name} @ {wheel.as_uri()}#sha256={hashlib.sha256(wheel.read_bytes()).hexdigest()}"


@pytest.mark.extended  # it takes long
def test_no_setting_changes_what_is_installed(tmp_path, project):
    # given wheels that pip and uv install if a setting tells them to
    wanted = small_lock(project, "packaging", "setuptools", "uv")
    version = re.search("^packaging==([0-9.]+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)[1]
    (tmp_path / "for pip.txt").write_text(foreign_requirement(tmp_path, "foreign", "1"))
    (tmp_path / "for uv.txt").write_text(foreign_requirement(tmp_path, "packaging", version))
    # and such settings, and some with which uv installs elsewhere, in variables, in the user's files and in the folder
    elsewhere = '[pip]\ntarget = "elsewhere"\n'
    for name in ("pip", "uv"):
        (tmp_path / "settings" / name).mkdir(parents=True)
    variables = environment(tmp_path, XDG_CONFIG_HOME=str(tmp_path / "settings"))
    variables |= {"PIP_REQUIREMENT": str(tmp_path / "for pip.txt"), "UV_CONSTRAINT": str(tmp_path / "for uv.txt")}
    (tmp_path / "settings/pip/pip.conf").write_text(f"[install]\nrequirement = {tmp_path / 'for pip.txt'}\n")
    (tmp_path / "settings/uv/uv.toml").write_text(elsewhere)
    (project / "uv.toml").write_text(elsewhere)
    # when
    process = finished(["make", ".venv/installed.txt"], project, variables, limit=120)
    # then
    assert process.returncode == 0, process.stderr
    assert installed(project) == wanted
    assert list(tmp_path.glob("*.ran")) == []


def test_only_settings_of_the_network_and_the_cache_reach_pip_and_uv(project):
    # given settings of all kinds, and a target that prints those that programs get
    passed_on = {"PIP_INDEX_URL": "https://a.example/simple", "PIP_CERT": "a.pem", "PIP_NO_INDEX": "1"}
    passed_on |= {"UV_DEFAULT_INDEX": "https://a.example/simple", "UV_INDEX_A_PASSWORD": "b", "UV_OFFLINE": "1"}
    passed_on |= {"UV_CACHE_DIR": "cache", "UV_HTTP_TIMEOUT": "9"}
    others = {"PIP_TARGET": "a", "PIP_CONFIG_FILE": "a", "UV_OVERRIDE": "a", "UV_INDEX_STRATEGY": "unsafe-best-match"}
    others |= {"UV_NO_VERIFY_HASHES": "1", "UV_CONFIG_FILE": "a"}
    (project / "print.mk").write_text("print:\n\t@env\n")
    inherited = {
        name: value for name, value in environment(project).items() if name[:4] != "PIP_" and name[:3] != "UV_"
    }
    # when
    command = ["make", "-f", "Makefile", "-f", "print.mk", "print"]
    process = finished(command, project, inherited | passed_on | others, limit=30)
    # then
    lines = {line for line in process.stdout.splitlines() if re.match("PIP_|UV_", line)}
    assert lines == {f"{name}={value}" for name, value in passed_on.items()} | {f"PIP_CONFIG_FILE={os.devnull}"}


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("report", "EXPERIMENT"),
        ("report", "METRIC"),
        ("ui", "PORT"),
        ("lab", "PORT"),
        ("notebooks", "NOTEBOOKS"),
        ("reproduce", "NOTEBOOKS"),
        ("bench", "ONLY"),
        ("lock", "UPGRADE"),
    ],
)
def test_text_that_a_user_sets_is_not_executed(target, name, project):
    # given a Python and a uv that do nothing, and a text that is a command for make and two for a shell
    for program in ("python", "uv"):
        (project / program).write_text("#!/bin/sh\n")
        (project / program).chmod(0o755)
    text = "a$(shell touch made)$$(touch made)`touch made`;touch made;"
    # when
    command = ["make", target, "INSTALLED=", "DEVELOPMENT=", "BIN=."]
    for arguments, variables in (([f"{name}={text}"], {}), ([], {name: text})):
        process = finished([*command, *arguments], project, environment(project, **variables), limit=30)
        # then
        assert process.returncode == 0, process.stderr
    assert not (project / "made").exists()


def test_half_made_environment_is_made_anew_and_a_complete_one_brought_up_to_date_with_the_lock(project):
    # given an environment that is half made, then it is made anew from nothing
    assert re.search("-m venv .*--clear +.venv", steps(project, "run"))
    # given a complete one, then it stays as it is
    complete(project, "installed.txt", age=1)
    assert "-m venv" not in steps(project, "run")
    # given a complete one of an older lock, then it is kept and brought up to date
    complete(project, "installed.txt", age=-1)
    assert re.search("-m venv --without-pip +.venv", steps(project, "run"))
    assert "pip sync" in steps(project, "run")


def test_environment_counts_as_half_made_while_packages_are_installed(project):
    # given an environment of older locks
    complete(project, "installed.txt", "development.txt", "scale.txt", age=-1)
    # when it is brought up to date, then each time the mark goes before anything is installed, and comes back after it
    found = re.findall("rm -f .venv/installed.txt|pip sync|touch .venv/installed.txt", steps(project, "scale"))
    assert found == ["rm -f .venv/installed.txt", "pip sync", "touch .venv/installed.txt"] * 3
