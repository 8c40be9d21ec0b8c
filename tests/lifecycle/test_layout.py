"""The library as a whole: who imports whom, how large it is, and that it can be installed."""

import ast
import shutil
import subprocess
import sys

import pytest
from execution import ROOT, finished

MODULES = {path.stem: path for path in (ROOT / "mlflow_lifecycle").glob("*.py")}
# Each module, and what it may import of ours.
ALLOWED = {
    "__init__": set(),
    "__main__": set(MODULES),
    "pins": set(),
    "adoption": {"flavors", "keys", "pins", "policy", "signing", "tables", "verification"},
    "store": set(),
    "tables": set(),
    "comparison": set(),
    "drift": {"tables"},
    "scoring": {"flavors", "tables"},
    "monitoring_commands": {"batches", "drift", "keys", "monitoring", "shell", "store", "tables", "verification"},
    "monitoring": {"drift", "tables", "verification"},
    "batches": {"monitoring", "serving", "verification"},
    "challenger": {"comparison", "monitoring", "pins", "scoring", "signing", "tables", "verification"},
    "environments": {"pins", "store", "tables", "comparison"},
    "interface": {"store"},
    "check": {"pins", "store"},
    "moved": {"store"},
    "ranking": {"pins", "store", "tables", "comparison"},
    "report": {"pins", "store", "tables", "comparison", "ranking"},
    "search": {"pins", "store", "tables", "comparison"},
    "guard": set(),  # runs where there is no lifecycle
    "serving": {"environments", "verification"},
    "spark": {"environments", "store"},
    "batch": {"spark", "store", "verification"},
    "workers": {"store"},
    "keys": {"store"},
    "flavors": set(),
    "policy": {"flavors", "pins"},
    "signing": {"flavors", "pins", "policy", "store", "tables", "keys"},
    "git_tag": {"store"},
    "card": {"pins", "policy", "gate", "tables", "verification"},
    "gate": {"comparison", "environments", "flavors", "scoring", "tables", "verification"},
    "release_commands": {"adoption", "shell", "gate", "keys", "promotion", "release", "tables", "verification"},
    "shell": {"store"},
    "release": {"card", "gate", "git_tag", "keys", "signing", "store", "tables", "verification"},
    "promotion": {"keys", "release", "signing", "store", "verification"},
    "verification": {"pins", "store", "tables", "keys", "policy", "signing"},
}
# Libraries that take long to import or that not everybody has, and the modules that are about each.
HEAVY = {
    "pyspark": {"spark", "batch"},
    "fastapi": {"guard"},
    "optuna": {"search", "workers"},
    "model_signing": {"signing", "verification"},
}


def imported(module: str) -> list[str]:
    """Return the dotted names that a module imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "written with the full name, so that this test sees it"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    ours = {name.split(".")[1] for name in imported(module) if name.startswith("mlflow_lifecycle.")}
    assert ours <= ALLOWED[module]


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_only_by_the_modules_about_them(module):
    heavy = {name.split(".")[0] for name in imported(module)} & set(HEAVY)
    assert all(module in HEAVY[name] for name in heavy)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_private_of_another_library_is_imported(module):
    assert [name for name in imported(module) if "._" in name and not name.startswith("__future__")] == []


def test_package_can_be_installed_elsewhere_and_has_its_command(tmp_path):
    # given the sources, and an environment that has what the command needs to answer
    source, bare = tmp_path / "a source", tmp_path / "bare"
    shutil.copytree(
        ROOT / "mlflow_lifecycle", source / "mlflow_lifecycle", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", source)
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, bare], check=True)
    python = bare / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    install = [
        *uv,
        "pip",
        "install",
        "--quiet",
        "--python",
        str(python),
        "--constraint",
        str(ROOT / "requirements.txt"),
    ]
    subprocess.run([*install, "click"], check=True)
    # when it is built as a wheel with the setuptools of the lock, and installed there
    build = [*uv, "build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable]
    subprocess.run([*build, "--out-dir", tmp_path / "wheels", source], check=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    subprocess.run([*install, "--no-deps", wheel], check=True)
    # then its command answers, from any folder
    process = finished([str(python.with_name("lifecycle")), "--help"], tmp_path, {}, limit=30)
    assert process.returncode == 0, process.stderr
    assert "check" in process.stdout
