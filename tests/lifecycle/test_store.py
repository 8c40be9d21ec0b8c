"""store: a store is made whole or not at all, and each store that cannot be used is refused at once."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from execution import ROOT, commit_all, environment, free_port, git, snapshot

from mlflow_lifecycle.exceptions import StoreUnusableError
from mlflow_lifecycle.experiments import (
    check_store,
    make_sqlite_store,
    open_experiment,
    prepare_store,
    printable,
    source_tags,
    tracking_uri,
)

OPEN = """
import sys
import mlflow
from pathlib import Path
from mlflow_lifecycle.experiments import open_experiment
print(open_experiment("an experiment", "What it is for.", Path(sys.argv[1])).experiment_id)
with mlflow.start_run() as run:
    print(run.info.experiment_id)
"""
UNSHARE = ["unshare", "--map-root-user", "--mount"]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MLFLOW_TRACKING")]:
        monkeypatch.delenv(name)
    yield
    mlflow.set_tracking_uri(None)


@pytest.fixture
def store(tmp_path, empty_store):
    """Give the path of a complete store of this test."""
    return Path(shutil.copy(empty_store, tmp_path / "mlflow.db"))


def change(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


def make_old(path: Path) -> None:
    """Make the file look as if nobody had written to it for an hour."""
    os.utime(path, (time.time() - 3600,) * 2)


def refused(folder: Path) -> str:
    """Return what the refusal of the store of ``folder`` says, within 20 seconds."""
    start = time.monotonic()
    with pytest.raises(StoreUnusableError) as error:
        open_experiment("an experiment", "What it is for.", folder)
    assert time.monotonic() - start < 20
    assert error.value.__cause__ is None  # whose text would have the password
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return str(error.value)


def start(folder: Path) -> subprocess.Popen:
    """Start a process that opens the experiment in ``folder`` and logs a run."""
    (folder.parent / "work").mkdir(exist_ok=True)
    variables = environment(folder.parent / "work", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", OPEN, str(folder)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- a new store


def test_new_store_has_the_experiment_active_with_its_description_and_its_models_beside_the_file(store, tmp_path):
    # when
    experiment = open_experiment("an experiment", "What it is for.", tmp_path)
    # then
    assert experiment.artifact_location == (tmp_path / "mlruns").as_uri()
    assert experiment.tags == {"mlflow.note.content": "What it is for."}
    assert mlflow.get_tracking_uri() == tracking_uri(tmp_path) == f"sqlite:///{tmp_path.as_posix()}/mlflow.db"
    with mlflow.start_run() as run:
        assert run.info.experiment_id == experiment.experiment_id
    # and the second time it is the same one
    assert open_experiment("an experiment", "Other.", tmp_path).experiment_id == experiment.experiment_id


def test_complete_store_is_left_as_it_is(store, tmp_path):
    before = snapshot(tmp_path)
    make_sqlite_store(store)
    assert snapshot(tmp_path) == before


@pytest.mark.extended  # it takes long
def test_several_starts_at_once_on_no_store_share_one_experiment(tmp_path):
    # given no store
    folder = tmp_path / "project"
    folder.mkdir()
    # when
    processes = [start(folder) for _ in range(4)]
    outputs = [process.communicate(timeout=120) for process in processes]
    # then
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert {output for output, _ in outputs} == {"1\n1\n"}
    assert names(folder) == ["mlflow.db"]


@pytest.mark.extended  # it takes long
def test_start_succeeds_after_starts_that_were_killed_while_they_made_the_store(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    # given starts that are killed at several moments after they began to make the tables
    for moment in (0, 0.4, 1):
        process = start(folder)
        while not list(folder.glob("mlflow.db.new-*/tables.db")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        # then none leaves a store that is not whole
        if (folder / "mlflow.db").exists():
            break
    # when
    _, printed = (process := start(folder)).communicate(timeout=60)
    # then it succeeds and clears up what the others left
    assert process.returncode == 0, printed
    assert names(folder) == ["mlflow.db"]


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:///what?/mlflow.db", "sqlite:///{folder}/notes.txt"])
def test_nothing_is_prepared_for_a_server_or_a_store_that_cannot_be_read(uri, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("no database")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(folder=tmp_path))
    prepare_store(tmp_path)
    assert names(tmp_path) == ["notes.txt"]


# --- a half-made store


@pytest.mark.parametrize(
    "statements",
    [
        [
            "CREATE TABLE alembic_version (version_num TEXT)",
            "INSERT INTO alembic_version VALUES ('451aebb31d03')",
            "CREATE TABLE experiments (experiment_id INTEGER)",
        ],
        [],
    ],
    ids=["migrations begun", "empty file"],
)
def test_half_made_store_is_moved_aside_and_replaced(statements, tmp_path):
    # given a file that a killed process left
    path = tmp_path / "mlflow.db"
    path.touch()
    change(path, *statements)
    make_old(path)
    before = path.read_bytes()
    # when
    prepare_store(tmp_path)
    # then
    assert names(tmp_path) == ["mlflow.db", "mlflow.db.incomplete-1"]
    assert (tmp_path / "mlflow.db.incomplete-1").read_bytes() == before
    check_store(tracking_uri(tmp_path))


@pytest.mark.extended  # it takes long
def test_store_that_a_killed_mlflow_left_is_replaced_without_loss_of_the_first_one_moved_aside(tmp_path):
    # given MLflow itself, killed while it makes the tables, and a file moved aside before
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "mlflow.db.incomplete-1").write_text("an earlier one")
    code = "import mlflow, sys; mlflow.MlflowClient(sys.argv[1]).search_experiments()"
    command = [sys.executable, "-c", code, f"sqlite:///{folder}/mlflow.db"]
    process = subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.DEVNULL)
    while not (folder / "mlflow.db").exists() or not (folder / "mlflow.db").stat().st_size:
        time.sleep(0.01)
    time.sleep(0.3)
    process.kill()
    process.wait()
    make_old(folder / "mlflow.db")
    # when
    open_experiment("an experiment", "What it is for.", folder)
    # then
    assert names(folder) == ["mlflow.db", "mlflow.db.incomplete-1", "mlflow.db.incomplete-2"]


def test_half_made_store_that_holds_a_run_is_refused_and_unchanged(store, tmp_path):
    change(store, "DELETE FROM alembic_version", "INSERT INTO tags (key, value, run_uuid) VALUES ('a', 'b', 'c')")
    before = snapshot(tmp_path)
    message = refused(tmp_path)
    assert "It contains data, so it is not changed. Restore it from a backup" in message
    assert snapshot(tmp_path) == before


# --- stores that cannot be used


@pytest.mark.parametrize(("scheme", "user"), [("http", "u:p@hunter2 x"), ("postgresql+psycopg2", "u:hunter2")])
def test_server_that_is_down_is_refused_without_its_password(scheme, user, tmp_path, monkeypatch):
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://{user}@{address}/db")
    before = dict(os.environ)
    message = refused(tmp_path)
    assert f"{scheme}://{address}/db: " in message
    assert "hunter2" not in message
    assert message.endswith("Start the server, or name another store in MLFLOW_TRACKING_URI.")
    assert dict(os.environ) == before
    assert names(tmp_path) == []


def test_server_that_never_answers_is_refused(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # the user's own setting
        assert "ReadTimeoutError" in refused(tmp_path)


def open_and_move(store: Path, artifact: str = "") -> tuple[Path, Path]:
    """Open an experiment in a folder with the store, log a run, move the folder, and return the old and new one."""
    here = store.parent / "here"
    here.mkdir()
    store.rename(here / "mlflow.db")
    open_experiment("an experiment", "What it is for.", here)
    with mlflow.start_run():
        if artifact:
            mlflow.log_text("text", artifact)
    mlflow.set_tracking_uri(None)  # which also takes it out of the environment, where MLflow puts it
    return here, here.rename(store.parent / "there")


def test_moved_store_is_refused_and_unchanged(store, tmp_path):
    # given a folder that was moved after a file was logged there
    here, there = open_and_move(store, "notes.txt")
    before = snapshot(tmp_path)
    # when, then
    message = refused(there)
    assert f"its models were in {here}/mlruns, which no longer exists, so it was moved from there." in message
    assert message.endswith("Run lifecycle doctor --fix, move it back, or name another store in MLFLOW_TRACKING_URI.")
    assert snapshot(tmp_path) == before


def test_moved_store_without_models_and_files_is_used(store):
    # given a folder that was moved after a run without files
    _, there = open_and_move(store)
    # then
    check_store(tracking_uri(there))
    assert open_experiment("an experiment", "What it is for.", there).experiment_id == "1"


def test_store_elsewhere_than_the_working_directory_is_used(store, tmp_path, monkeypatch):
    # given a run logged as in the quickstart: MLflow keeps its files in the working directory
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(tmp_path))
    mlflow.set_experiment("an experiment")
    with mlflow.start_run() as run:
        mlflow.log_text("text", "notes.txt")
    assert run.info.artifact_uri.startswith(f"{work}/mlruns/")
    # then
    check_store(tracking_uri(work))
    for name in ("an experiment", "a new experiment"):
        assert open_experiment(name, "What it is for.", work).name == name


def test_experiment_that_a_server_made_is_no_sign_of_a_moved_store(store, tmp_path):
    # given an experiment as `mlflow server` makes it, and one in a cloud
    client = mlflow.MlflowClient(f"sqlite:///{store.as_posix()}")
    client.create_experiment("a server's", "mlflow-artifacts:/1")
    client.create_experiment("in a cloud", "s3://bucket/1")
    # then the store can be used, and only the server's experiment cannot, without that server
    check_store(tracking_uri(tmp_path))
    assert open_experiment("in a cloud", "What it is for.", tmp_path).name == "in a cloud"
    mlflow.set_tracking_uri(None)
    with pytest.raises(StoreUnusableError, match="made by a server, which keeps its files"):
        open_experiment("a server's", "What it is for.", tmp_path)


@pytest.mark.extended  # it takes long
def test_deleted_experiment_is_refused_with_the_command_that_restores_it(store, tmp_path):
    experiment = open_experiment("an experiment", "What it is for.", tmp_path)
    mlflow.delete_experiment(experiment.experiment_id)
    message = refused(tmp_path)
    assert message.endswith(f"mlflow experiments restore --experiment-id {experiment.experiment_id}")
    # and the command as it is printed restores it
    command = message.partition("Restore it: ")[2].replace("mlflow exp", f"{shlex.quote(sys.executable)} -m mlflow exp")
    subprocess.run(command, shell=True, check=True, capture_output=True, env=environment(tmp_path))
    open_experiment("an experiment", "What it is for.", tmp_path)


@pytest.mark.parametrize(
    ("revision", "cause"),
    [
        ("fedcba987654", "a newer MLflow made its schema (fedcba987654). Install that MLflow"),
        ("451aebb31d03", "an older MLflow made its schema (451aebb31d03). Copy the file, then run: mlflow db upgrade"),
    ],
)
def test_store_of_another_mlflow_is_refused_and_unchanged(revision, cause, store, tmp_path):
    change(store, f"UPDATE alembic_version SET version_num = '{revision}'")
    before = snapshot(tmp_path)
    assert cause in refused(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.extended  # it takes long
def test_locked_store_is_refused(store, tmp_path):
    with contextlib.closing(sqlite3.connect(store)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert "database is locked. Close the program that locks it" in refused(tmp_path)


def test_file_that_is_no_database_is_refused_and_unchanged(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database" * 100)
    assert "file is not a database. Restore it from a backup" in refused(tmp_path)
    assert names(tmp_path) == ["mlflow.db"]


@pytest.mark.parametrize("name", ["what?", "a%20b"])
def test_path_that_mlflow_misreads_is_refused_before_anything_is_written(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    assert "MLflow misreads a path with ? or %20" in refused(folder)
    assert names(tmp_path) == [name] and names(folder) == []


def test_other_paths_are_taken(empty_store, tmp_path):
    folder = tmp_path / "a b#c'ä"
    folder.mkdir()
    shutil.copy(empty_store, folder)
    open_experiment("an experiment", "What it is for.", folder)
    with mlflow.start_run():
        mlflow.log_text("text", "a.txt")
    assert len(list(folder.glob("mlruns/*/artifacts/a.txt"))) == 1


REFUSE = """
import sys
from pathlib import Path
from mlflow_lifecycle.exceptions import StoreUnusableError
from mlflow_lifecycle.experiments import open_experiment
for folder in sys.argv[1:]:
    try:
        open_experiment("an experiment", "What it is for.", Path(folder))
    except StoreUnusableError as error:
        print(Path(folder).name, error, *sorted(path.name for path in Path(folder).iterdir()), sep=";")
"""
MOUNTED = {  # how, what is there, and what the refusal says
    "a store that nobody can write to": ("-o bind,ro", ["mlflow.db"], "Make it and its folder writable, or name"),
    "no store, read-only": ("-o bind,ro", [], "Make it and its folder writable, or name another store"),
    "a disk full before the tables are made": ("-t tmpfs -o size=400k", [], "disk is full. Free 10 MB there"),
    "a disk full once they are made": ("-t tmpfs -o size=1500k", [], "disk is full. Free 10 MB there and try again."),
}


@pytest.fixture(scope="module")
def mounted(tmp_path_factory, empty_store, lacking):
    """Give what the refusal of the store in each mounted folder says, and what is in it afterwards."""
    if sys.platform != "linux":
        pytest.skip("mounts are made with Linux's unshare")
    if subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0:
        lacking("the right to make a mount namespace", "sysctl kernel.unprivileged_userns_clone=1")
    folder = tmp_path_factory.mktemp("mounted")
    mounts = []
    for name, (how, content, _) in MOUNTED.items():
        (folder / name).mkdir()
        if content:
            shutil.copy(empty_store, folder / name)
        mounts.append(f"mount {how} {shlex.quote(name)} {shlex.quote(name)}")
    command = [*UNSHARE, "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh", sys.executable, "-c", REFUSE, *MOUNTED]
    (folder / "work").mkdir()
    variables = environment(folder / "work", PYTHONPATH=str(ROOT))
    process = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return {name: rest for name, *rest in (line.split(";") for line in process.stdout.splitlines())}


@pytest.mark.parametrize("name", MOUNTED)
@pytest.mark.extended  # it takes long
def test_read_only_folder_and_full_disk_are_refused_and_nothing_is_left(mounted, name):
    _, content, reason = MOUNTED[name]
    message, *left = mounted[name]
    assert reason in message.replace("The disk", "disk")
    assert [path for path in left if path not in ("mlflow.db.lock", "mlflow.db.lock-journal")] == content


# --- secrets


@pytest.mark.parametrize(
    "text",
    [
        "http://user:p@hunter2@host:5000: refused",
        "http://hunter2@host:5000: refused",
        "http://host:5000/a?b=c&password=hunter2&d=e: refused",
        'host:5000: password authentication failed for user "hunter2"',
    ],
)
def test_secret_in_any_address_is_not_printed(text):
    assert "hunter2" not in printable(text)
    assert "host:5000" in printable(text)


@pytest.mark.parametrize(
    "address",
    [
        "http://user:1/hunter2 x@host",
        "http://user:a'b\"hunter2&<@host",
        "http://user:a%40hunter2@host",
        "http://host?password=hunter2 with space",
    ],
)
def test_secret_of_the_tracking_address_is_not_printed_in_any_form(address, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    secret = address.partition("user:")[2].rpartition("@")[0] or "hunter2 with space"
    for form in (f"{address}/x refused", f"wrong: {secret}", f"wrong: {secret.replace('%40', '@')}"):
        assert "hunter2" not in printable(form)
        assert "space" not in printable(form)


def test_user_of_a_database_without_a_password_is_no_secret(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow@host/mlflow")
    assert printable("Run: mlflow db upgrade") == "Run: mlflow db upgrade"


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"])
def test_secret_in_the_settings_is_not_printed(name, monkeypatch):
    monkeypatch.setenv(name, "hunter2 &x")
    for form in ("hunter2 &x", "hunter2%20%26x", "hunter2+%26x", "hunter2 &amp;x"):
        assert "hunter2" not in printable(f"wrong: {form}.")


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/me@work/mlflow.db",
        "file:///home/me@work/mlruns",
        "http://127.0.0.1:9/api failed: models:/name@champion",
    ],
)
def test_text_without_a_secret_stays_as_it_is(text):
    assert printable(text) == text


# --- the source of a run


def test_source_is_named_by_its_path_and_commit_in_the_repository(tmp_path):
    # given
    (tmp_path / "guides").mkdir()
    (tmp_path / "guides/a.ipynb").touch()
    commit_all(tmp_path)
    commit = git(tmp_path, "rev-parse", "HEAD")
    tags = {"mlflow.source.name": "guides/a.ipynb", "mlflow.source.git.commit": commit}
    # then
    assert source_tags("a.ipynb", tmp_path / "guides") == tags
    assert source_tags("guides/a.ipynb", tmp_path) == tags
    # and a change that is not committed shows
    (tmp_path / "guides/a.ipynb").write_text("changed")
    tags["mlflow.source.git.commit"] += "-dirty"
    assert source_tags("a.ipynb", tmp_path / "guides") == tags


def test_source_outside_a_repository_has_its_name_alone(tmp_path, monkeypatch):
    assert source_tags("a.ipynb", tmp_path) == {"mlflow.source.name": "a.ipynb"}
    monkeypatch.setenv("PATH", str(tmp_path))  # nor where there is no git
    assert source_tags("a.ipynb", ROOT) == {"mlflow.source.name": "a.ipynb"}


def program(folder, name: str) -> str:
    """Return the path of a program in ``folder`` that only leaves the file ``name``.ran beside it."""
    path = folder / name
    path.write_text('#!/bin/sh\ntouch "$0.ran"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="the programs are shell scripts")
@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("core.fsmonitor", "monitor"),
        ("filter.a=b.clean", "filter"),
        ("filter.a=b.process", "filter"),
        ("core.hooksPath", "post-index-change"),
    ],
)
def test_naming_the_source_starts_no_program_that_the_repository_names(setting, name, tmp_path):
    """Attack 42."""
    # given a repository whose own settings name a program, and a file that git has to read again
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / ".gitattributes").write_text("* filter=a=b\n")
    (repository / "a.ipynb").write_text("committed")
    commit_all(repository)
    commit = git(repository, "rev-parse", "HEAD")
    path = program(tmp_path, name)
    git(repository, "config", setting, str(tmp_path) if setting == "core.hooksPath" else path)
    git(repository, "config", "filter.a=b.required", "true")
    os.utime(repository / "a.ipynb", (0, 0))
    # when
    tags = source_tags("a.ipynb", repository)
    # then
    assert not (tmp_path / f"{name}.ran").exists()
    assert tags == {"mlflow.source.name": "a.ipynb", "mlflow.source.git.commit": commit}


@pytest.mark.skipif(sys.platform == "win32", reason="the program is a shell script")
def test_naming_the_source_downloads_nothing_from_where_the_repository_says(tmp_path):
    # given a repository that lacks its objects, and names a program that is to fetch them
    (tmp_path / "a.ipynb").touch()
    commit_all(tmp_path)
    for path in (tmp_path / ".git/objects").rglob("*"):
        if path.is_file():
            path.unlink()
    git(tmp_path, "config", "core.repositoryFormatVersion", "1")
    git(tmp_path, "config", "extensions.partialClone", "origin")
    git(tmp_path, "config", "remote.origin.url", str(tmp_path))
    git(tmp_path, "config", "remote.origin.uploadpack", program(tmp_path, "fetch"))
    # when
    tags = source_tags("a.ipynb", tmp_path)
    # then
    assert not (tmp_path / "fetch.ran").exists()
    assert tags == {"mlflow.source.name": "a.ipynb"}


def test_filter_in_the_settings_of_the_user_is_applied(tmp_path, monkeypatch):
    # given a file that a filter in the user's settings shortens in each commit, as Git LFS does
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "settings"))
    git(tmp_path, "config", "--global", "filter.strip.clean", "sed /output/d")
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / ".gitattributes").write_text("*.ipynb filter=strip\n")
    (repository / "a.ipynb").write_text("code\noutput\n")
    commit_all(repository)
    # when git has to read the file again
    os.utime(repository / "a.ipynb", (0, 0))
    # then it is as committed
    commit = git(repository, "rev-parse", "HEAD")
    assert source_tags("a.ipynb", repository)["mlflow.source.git.commit"] == commit


# --- checking, without opening


def test_check_makes_no_store_and_says_that_one_was_left_half_made(tmp_path):
    check_store(tracking_uri(tmp_path))
    assert names(tmp_path) == []
    change(tmp_path / "mlflow.db", "CREATE TABLE experiments (experiment_id INTEGER)")
    with pytest.raises(StoreUnusableError, match="MLflow was interrupted while it made the tables"):
        check_store(tracking_uri(tmp_path))


def test_secrets_are_looked_for_in_time_that_grows_with_the_text_alone():
    # given long lines without a space, as a picture in a page has
    short, long = "x1" * 20_000, "x1" * 200_000

    def seconds(text: str) -> float:
        begin = time.process_time()
        assert printable(text) == text
        return time.process_time() - begin

    # then ten times the length takes about ten times as long, and not a hundred times
    assert min(seconds(long) for _ in range(3)) < 40 * min(seconds(short) for _ in range(3))
