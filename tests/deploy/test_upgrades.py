"""Stores that older MLflow versions have written, brought to today's MLflow as the documentation says."""

import contextlib
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from deployment import SECRETS, Deployment, follow
from execution import ROOT, environment, finished
from old_mlflow import VERSIONS, OldMlflow
from postgresql import postgresql, programs
from store_content import read

pytestmark = [
    pytest.mark.extended,  # it takes long
    pytest.mark.skipif(sys.platform == "win32", reason="the server's image is Linux"),
]
FILE_STORE = next(version for version in VERSIONS if version.startswith("2."))
SQLITE = "sqlite:///mlflow.db"
COUNT = """
import sys, mlflow
for uri in sys.argv[1:]:
    mlflow.set_tracking_uri(uri)
    print(len(mlflow.search_experiments()), flush=True)
"""


@pytest.fixture(scope="module")
def old_mlflow(tmp_path_factory, lacking):
    """Return a function that gives the MLflow of a version. Its environment is built once."""
    folder = tmp_path_factory.mktemp("old")
    built = {}

    def give(version: str) -> OldMlflow:
        if version not in built:
            try:
                built[version] = OldMlflow(version, folder)
            except subprocess.CalledProcessError as error:
                if not re.search("error sending request|dns error", error.stderr):
                    raise
                lacking("a package index", "connect this machine to one")
        return built[version]

    return give


@pytest.fixture(scope="module")
def documented():
    """Return a function that runs the commands of a section of docs/troubleshooting.md in a folder."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")

    def run(section: str, folder: Path) -> None:
        block = re.search(rf"^## {section}\n.*?^```\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)[1]
        for line in block.splitlines():
            command = line.replace(".venv/bin/python", f"'{sys.executable}'")
            process = finished(["bash", "-c", command], folder, environment(folder), limit=120)
            assert process.returncode == 0, process.stderr

    return run


@pytest.fixture(scope="module")
def file_store(old_mlflow, tmp_path_factory):
    """Give a folder with a file store of MLflow 2, and its content."""
    folder = tmp_path_factory.mktemp("file store")
    return folder, old_mlflow(FILE_STORE).write_store(folder)


@pytest.fixture(scope="module")
def migrated(file_store, documented):
    """Give the folder with the file store, which was migrated, and its content."""
    documented("A file store of MLflow 2", file_store[0])
    return file_store


@pytest.fixture
def moved(migrated, tmp_path):
    """Give a copy of the migrated store, while its own folder does not exist, and its content."""
    folder, content = migrated
    shutil.copytree(folder / "mlruns", tmp_path / "mlruns")
    shutil.copy(folder / "mlflow.db", tmp_path)
    aside = folder.rename(folder.with_name("aside"))
    yield tmp_path, content
    aside.rename(folder)


@pytest.fixture
def content_of():
    """Return a function that gives the content of a store, as today's MLflow reads it."""

    def give(uri: str) -> dict:
        mlflow.set_tracking_uri(uri)
        return read()

    yield give
    mlflow.set_tracking_uri(None)


@pytest.fixture
def server(tmp_path, lacking):
    """Give the team's server with empty databases, not started yet."""
    if programs() is None:
        lacking("PostgreSQL", "make postgresql")
    with postgresql(SECRETS["POSTGRES_PASSWORD"]) as database:
        team = Deployment(tmp_path, database)
        yield team
        team.kill()


@pytest.mark.parametrize("version", VERSIONS)
def test_upgraded_sqlite_store_is_complete(version, old_mlflow, tmp_path, documented, content_of):
    # given a store of an older version
    old = old_mlflow(version)
    before = old.write_store(tmp_path, MLFLOW_TRACKING_URI=SQLITE)
    # when it is upgraded as the page says
    documented("A database of an older MLflow", tmp_path)
    # then everything is there, and the models predict the same
    assert content_of(f"sqlite:///{tmp_path}/mlflow.db") == before
    # and the older version reads the copy, and refuses what was upgraded
    process = old.run(["-c", COUNT, f"{SQLITE}.old", SQLITE], tmp_path)
    assert process.stdout == "2\n"
    assert re.search("Detected out-of-date database schema|Can't locate revision identified by", process.stderr)
    # and today's MLflow upgrades the copy, too, as soon as it opens it
    assert content_of(f"sqlite:///{tmp_path}/mlflow.db.old") == before
    assert schema(tmp_path / "mlflow.db.old") == schema(tmp_path / "mlflow.db")


def schema(database: Path) -> str:
    """Return the version of a SQLite database's tables."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT version_num FROM alembic_version").fetchone()[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_upgraded_server_has_all_runs_models_and_users(version, old_mlflow, server, tmp_path, content_of):
    # given a server of an older version, and a user who may read what was logged
    old = old_mlflow(version)
    old.add_users(server)
    with old.serving(server):
        before = old.write_store(tmp_path, MLFLOW_TRACKING_URI=server.address)
    # when it is upgraded as the README says
    follow("Upgrade", server, tmp_path)
    # then the user reads it all with the old password, and the models predict the same
    with server.client("ana"):
        assert content_of(server.address) == before


def test_file_store_is_migrated_completely(migrated, content_of):
    folder, before = migrated
    assert content_of(f"sqlite:///{folder}/mlflow.db") == before


def test_plain_mlflow_uses_a_migrated_store_only_if_it_is_named(migrated):
    folder, _ = migrated
    process = finished([sys.executable, "-c", COUNT, SQLITE, ""], folder, environment(folder), limit=60)
    assert process.stdout == "2\n"
    assert "The filesystem tracking backend (e.g., './mlruns') is in maintenance mode" in process.stderr


def test_migration_does_not_overwrite_a_database_unasked(file_store, tmp_path):
    # given a database that exists
    target = tmp_path / "mlflow.db"
    target.write_text("mine")
    # when nobody answers the question
    command = [sys.executable, "-m", "mlflow", "migrate-filestore", "--source", str(file_store[0]), "--target", SQLITE]
    process = finished(command, tmp_path, environment(tmp_path), limit=60)
    # then it has not changed
    assert "Database file already exists" in process.stdout
    assert process.returncode == 1
    assert target.read_text() == "mine"


def test_migrated_store_that_was_moved_is_repaired(moved, content_of):
    folder, before = moved
    # given that its files are not found
    with pytest.raises(mlflow.MlflowException, match="Failed to download artifacts from path"):
        content_of(f"sqlite:///{folder}/mlflow.db")
    # when
    command = [sys.executable, "-m", "mlflow_lifecycle", "doctor", "--fix"]
    process = subprocess.run(
        command, cwd=folder, env=environment(folder), input="y\n", capture_output=True, encoding="utf-8"
    )
    # then
    assert process.returncode == 0, process.stderr
    assert content_of(f"sqlite:///{folder}/mlflow.db") == before


def test_migrated_store_is_moved_to_the_server(migrated, server, content_of):
    # given a migrated store that SQLite reads also where nothing can be written, and an experiment with a large number
    folder, before = migrated
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert int(before["experiment"][0]) > 2**31
    # when it is moved as the README says
    server.start()
    assert follow("Move a SQLite store here", server, folder) == []
    # then everything is there, and the experiment has a number that PostgreSQL has room for
    with server.client("admin"):
        content = content_of(server.address)
    assert content["experiment"][0] == "1"
    content["experiment"][0] = before["experiment"][0]
    assert content == before
