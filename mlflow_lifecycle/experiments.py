"""Open an experiment in MLflow's store, or refuse a store that cannot be used.

MLflow makes the tables of a SQLite store in place: a kill, a full disk or two starts at once leave
a file that refuses every later run. A local store cannot be moved (mlflow#3144, mlflow#8226). For
a server that is down MLflow tries for minutes, and its errors contain passwords.
"""

import contextlib
import html
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch
from urllib.parse import quote, quote_plus, unquote

from mlflow_lifecycle.exceptions import StoreUnusableError

if TYPE_CHECKING:
    from mlflow.entities import Experiment

ELSEWHERE = "or name another store in MLFLOW_TRACKING_URI."
# What an error says, and what to do about it. The first that fits is used.
REMEDIES = {
    r"(?i)\b40[13]\b|unauth|permission_denied": (
        "Check your permissions, MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN."
    ),
    "locked": f"Close the program that locks it and try again, {ELSEWHERE}",
    "disk is full|No space left": "The disk is full. Free 10 MB there and try again.",
    "(?i)read-?only|unable to open|permission denied": (
        f"Make it and its folder writable, {ELSEWHERE}"
    ),
    "not a database|malformed": f"Restore it from a backup or move it away, {ELSEWHERE}",
    "(?i)max retries|connection|timed out|resolve|not known": f"Start the server, {ELSEWHERE}",
}
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def printable(text: str) -> str:
    """Return a text without users, passwords and tokens, those in MLflow's settings included."""
    for secret in _secrets():
        text = text.replace(f"{secret}@", "").replace(secret, "***")
    not_a_file = r"(?<!sqlite)(?<!file)://"
    # A password may contain a space, so the first pattern goes up to the last @.
    text = re.sub(not_a_file + r"[^\s/@:\[]*:(?!\d+(?:[/?#\s]|$)).*@", "://", text)
    text = re.sub(not_a_file + r"\S*@", "://", text)
    value = r"[^&\s'\"]+"
    password = r"(?i)((?:password|passwd|pwd|token|secret|api_?key)[\w-]*=)"
    user = r"(?i)([?&]user(?:name)?=|\buser(?:name)? [\"'])"
    return re.sub(user + value, r"\1***", re.sub(password + value, r"\1***", text))


def _secrets() -> list[str]:
    """Return the secrets in MLflow's settings, in each form that a message may have."""
    scheme, _, address = os.environ.get("MLFLOW_TRACKING_URI", "").partition("://")
    user_info = address.rpartition("@")[0]
    secrets = [user_info.partition(":")[2]]
    if ":" in user_info or scheme.startswith("http"):  # a server takes a token as the user
        secrets.append(user_info)
    secrets += re.findall(r"(?i)(?:password|token)=([^&#]+)", address)
    secrets.append(os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
    secrets.append(os.environ.get("MLFLOW_TRACKING_TOKEN", ""))
    forms = set()
    for secret in filter(None, secrets):
        forms |= {secret, html.escape(secret), quote(secret), quote(secret, safe="")}
        forms |= {quote_plus(secret), unquote(secret)}
    return sorted(forms, key=len, reverse=True)


def tracking_uri(folder: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or the address of the file ``mlflow.db`` in ``folder``."""
    default = Path(folder).resolve() / "mlflow.db"
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{default.as_posix()}"


def open_experiment(name: str, description: str, folder: Path) -> "Experiment":
    """Make an experiment active in this process, in the store that `tracking_uri` names.

    The store and the experiment are created if needed.

    Args:
        name: the name of the experiment.
        description: what MLflow's interface shows above its runs.
        folder: the folder of the default store.

    Raises:
        StoreUnusableError: nothing can be logged there.
    """
    import mlflow

    uri = tracking_uri(folder)
    path = _sqlite_path(uri)
    with _refusing(uri):
        if path:
            make_sqlite_store(path)
            _check_file(path)
        experiment = _find_experiment(uri, name) or create_experiment(uri, name, description)
        location = experiment.artifact_location
        if path:
            _refuse_moved(path, moved_from(path) & {local_path(split_location(location)[0])})
        if path and location.startswith("mlflow-artifacts:"):
            raise _unusable(
                path,
                f"the experiment {name!r} was made by a server, which keeps its files",
                "Set MLFLOW_TRACKING_URI to the server's address, or rename the experiment there.",
            )
        if experiment.lifecycle_stage != "active":
            command = "mlflow experiments restore --experiment-id"
            raise _unusable(
                uri,
                f"the experiment {name!r} is deleted",
                f"Restore it: MLFLOW_TRACKING_URI='{uri}' {command} {experiment.experiment_id}",
            )
        mlflow.set_tracking_uri(uri)
        # By its name MLflow would fail if another process creates it at the same moment.
        return mlflow.set_experiment(experiment_id=experiment.experiment_id)


def check_store(uri: str) -> None:
    """Refuse the store at ``uri`` if nothing can be logged there.

    Nothing is written, and a store that does not exist is not created.

    Raises:
        StoreUnusableError: with the reason and the remedy.
    """
    import mlflow  # noqa: F401 - a missing MLflow is not a fault of the store

    path = _sqlite_path(uri)
    with _refusing(uri):
        if path and not path.exists():
            return
        if path and _read_revision(path) is None:
            raise _unusable(
                path, "MLflow was interrupted while it made the tables", f"Delete it, {ELSEWHERE}"
            )
        if path:
            _check_file(path)
        _find_experiment(uri)
        if path:
            _refuse_moved(path, moved_from(path))


def create_experiment(uri: str, name: str, description: str) -> "Experiment":
    """Create an experiment in the store at ``uri``, or return the existing one.

    Args:
        uri: the store. A SQLite store keeps the files of its runs beside it.
        name: the name of the experiment.
        description: what MLflow's interface shows above its runs.
    """
    import mlflow

    path = _sqlite_path(uri)
    location = (path.parent / "mlruns").as_uri() if path else None  # a server decides for itself
    client = mlflow.MlflowClient(uri)
    failure = mlflow.MlflowException(f"the experiment {name!r} cannot be read")
    try:
        client.create_experiment(name, location, {"mlflow.note.content": description})
    except mlflow.MlflowException as error:  # most often because it exists
        failure = error
    # A server shows an experiment a moment before its creator has permissions for it.
    for pause_seconds in (0.2, 0.5, 1, 0):
        with contextlib.suppress(mlflow.MlflowException):
            experiment = client.get_experiment_by_name(name)
            if experiment:
                return experiment
        time.sleep(pause_seconds)
    raise failure


def prepare_store(folder: Path) -> None:
    """Make the SQLite store that `tracking_uri` names, if it can be used."""
    with contextlib.suppress(StoreUnusableError):
        path = _sqlite_path(tracking_uri(folder))
        if path:
            make_sqlite_store(path)


def make_sqlite_store(path: Path) -> None:
    """Make MLflow's tables in a new SQLite file, all or none; a complete store is left as it is.

    A file that an interrupted MLflow has left is renamed to ``<name>.incomplete-<n>``. The lock is
    SQLite's own, on an empty file beside the store. It works on every system and ends with the
    process.

    Raises:
        StoreUnusableError: the store cannot be made or read, or is incomplete and contains data.
    """
    path = Path(path).resolve()
    lock = path.with_name(f"{path.name}.lock")
    with _refusing(path):
        if _is_complete(path):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(lock, timeout=120)) as database:
            try:
                database.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError:  # also if another process has just removed the lock
                if not _is_complete(path):
                    raise
            if not _is_complete(path):
                _make_tables(path)
        with contextlib.suppress(OSError):  # processes that still wait find the store complete
            lock.unlink(missing_ok=True)


def _make_tables(path: Path) -> None:
    """Make the tables in a folder beside ``path``, then rename the file. The caller locks it."""
    import mlflow

    for leftover in path.parent.glob(f"{path.name}.new-*"):  # of processes that were killed
        shutil.rmtree(leftover, ignore_errors=True)
    # A plain MLflow process may be making the tables right now. It writes several times a second.
    while path.exists() and _read_revision(path) is None:
        age_seconds = time.time() - path.stat().st_mtime
        if not 0 <= age_seconds < 3:
            break
        time.sleep(0.2)
    if _is_complete(path):
        return
    folder = Path(tempfile.mkdtemp(prefix=f"{path.name}.new-", dir=path.parent))
    try:
        tables = folder / "tables.db"
        mlflow.MlflowClient(f"sqlite:///{tables.as_posix()}").search_experiments()
        with contextlib.closing(sqlite3.connect(tables)) as database:  # MLflow keeps it open
            database.execute("VACUUM INTO ?", (str(folder / "copy.db"),))
        if path.exists():
            path.rename(free_name(path, "incomplete"))
        (folder / "copy.db").replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_name(path: Path, suffix: str) -> Path:
    """Return a path beside ``path`` that does not exist: ``<name>.<suffix>-<n>``."""
    number = 1
    while path.with_name(f"{path.name}.{suffix}-{number}").exists():
        number += 1
    return path.with_name(f"{path.name}.{suffix}-{number}")


def _is_complete(path: Path) -> bool:
    """Return whether the store exists and MLflow has made all its tables."""
    return path.exists() and _read_revision(path) is not None


def _read_revision(path: Path) -> str | None:
    """Return the revision of the schema, None if MLflow was interrupted while it made the tables.

    MLflow makes the experiment Default last.

    Raises:
        StoreUnusableError: the tables are incomplete, and contain data.
    """
    rows = {}
    address = f"{path.as_uri()}?mode=rw"
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=5)) as database:
        database.execute("BEGIN IMMEDIATE")  # fails if the store is locked or read-only
        tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in tables:
            rows[name] = database.execute(f'SELECT * FROM "{name}" LIMIT 1').fetchone()
    if rows.get("alembic_version") and rows.get("experiments"):
        return rows["alembic_version"][0]
    for name in ("alembic_version", "experiments", "workspaces"):
        rows.pop(name, None)
    if any(rows.values()):
        raise _unusable(
            path,
            "its tables are not MLflow's complete schema",
            "It contains data, so it is not changed. Restore it from a backup or move it away, "
            + ELSEWHERE,
        )
    return None


def _check_file(path: Path) -> None:
    """Refuse a complete SQLite store in which nothing can be logged, before MLflow opens it."""
    import mlflow
    from alembic.script import ScriptDirectory  # the way in which MLflow finds its schema

    if not os.access(path.parent, os.W_OK):
        raise _unusable(path, "its folder is read-only")
    if shutil.disk_usage(path.parent).free < 2**20:
        raise _unusable(path, "its disk is full")
    revision = _read_revision(path)
    migrations = Path(mlflow.__file__).parent / "store/db_migrations"
    scripts = ScriptDirectory(str(migrations)).walk_revisions()
    known = [script.revision for script in scripts]  # the newest first
    if revision not in known:
        cause = f"a newer MLflow made its schema ({revision})"
        raise _unusable(path, cause, f"Install that MLflow, {ELSEWHERE}")
    if revision != known[0]:
        cause = f"an older MLflow made its schema ({revision})"
        command = f"mlflow db upgrade 'sqlite:///{path.as_posix()}'"
        raise _unusable(path, cause, f"Copy the file, then run: {command}")


def _find_experiment(uri: str, name: str = "") -> "Experiment | None":
    """Return the experiment with this name; without a name, only check that the store answers.

    The timeouts are short, so that a server that is down is reported within seconds.
    """
    import mlflow
    from sqlalchemy.engine import make_url

    if uri.startswith(tuple(DATABASE_PORTS)):  # MLflow would try ten times, for two minutes
        url = make_url(uri)
        if url.host:
            address = (url.host, url.port or DATABASE_PORTS[url.get_backend_name()])
            socket.create_connection(address, timeout=5).close()
    timeouts = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    with patch.dict(os.environ, timeouts | os.environ):  # the user's own settings win
        client = mlflow.MlflowClient(uri)
        if name:
            return client.get_experiment_by_name(name)
        client.search_experiments(max_results=1)
        return None


def _unusable(store: object, cause: object, remedy: str = "") -> StoreUnusableError:
    """Return the error for a store; the remedy is found by what the cause says."""
    cause = str(cause).strip().split("\n")[0][:300].rstrip(". ")
    for pattern, text in REMEDIES.items():
        if not remedy and re.search(pattern, cause):
            remedy = text
    problem = printable(f"Cannot use the MLflow store {store}: {cause}.")
    return StoreUnusableError(problem, printable(remedy or "Check MLFLOW_TRACKING_URI."))


@contextlib.contextmanager
def _refusing(store: object) -> Iterator[None]:
    """Turn any error in the block into one that says what is wrong with the store."""
    try:
        yield
    except StoreUnusableError:
        raise
    except Exception as error:  # of MLflow, SQLAlchemy, Alembic, the database driver or the system
        raise _unusable(store, error) from None


def _sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite address, None for any other store."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///(?!:memory:)(.+)", uri)
    if match is None:
        return None
    if re.search(r"[?]|%[0-9A-Fa-f]{2}", match[1]):
        cause = "MLflow misreads a path with ? or %20"
        raise _unusable(uri, cause, f"Rename the folder, {ELSEWHERE}")
    return Path(match[1]).resolve()


def split_location(location: str) -> tuple[str, str]:
    """Return a local path up to its last folder ``mlruns``, and the rest; else empty texts."""
    match = re.fullmatch(r"((?:file://)?/.*)/(mlruns(?:/.*)?)", location)
    return (match[1], match[2]) if match else ("", "")


def local_path(location: str) -> Path:
    """Return the path of a local location, which MLflow writes as a path or a ``file:`` address."""
    if location.startswith("file:"):
        return Path(unquote(location.removeprefix("file://")))
    return Path(location)


def moved_from(path: Path) -> set[Path]:
    """Return the folders that a SQLite store was moved from.

    The folder ``mlruns`` in them no longer exists, but something was logged there: a model, or
    files that are now beside the store. An experiment without models and files does not count.
    """
    folders = set()
    address = f"{path.as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=5)) as database:
        for table, column in (("logged_models", "artifact_location"), ("runs", "artifact_uri")):
            query = f"SELECT {table}.{column} FROM {table} JOIN experiments USING (experiment_id)"
            query += " WHERE experiments.lifecycle_stage = 'active'"
            for (location,) in database.execute(query):
                root, rest = split_location(location or "")
                folder = local_path(root)
                if not root or folder == path.parent or (folder / "mlruns").exists():
                    continue
                if table == "logged_models" or (path.parent / rest).exists():
                    folders.add(folder)
    return folders


def _refuse_moved(path: Path, folders: set[Path]) -> None:
    """Refuse a SQLite store that was moved from any of ``folders``."""
    if folders:
        place = min(folders) / "mlruns"
        cause = f"its models were in {place}, which no longer exists, so it was moved from there"
        raise _unusable(path, cause, f"Run lifecycle doctor --fix, move it back, {ELSEWHERE}")


def source_tags(source: str, folder: Path) -> dict[str, str]:
    """Return the tags that name the source of a run: a file, and its path and commit in git.

    The settings of the repository start no program. A changed file counts as changed even if a
    filter in the repository would hide the change. Filters in the user's own settings, such as Git
    LFS, are applied.

    Args:
        source: the path of the notebook or program in ``folder``.
        folder: a folder, in a repository or not.
    """
    tags = {"mlflow.source.name": source}
    # There may be no git, no repository, or no commit.
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        tags["mlflow.source.git.commit"] = _git(folder, *_disable_filters(folder), *describe)
        tags["mlflow.source.name"] = _git(folder, "rev-parse", "--show-prefix") + source
    return tags


def _git(folder: Path, *arguments: str) -> str:
    """Return what git prints, without its file system monitor, hooks and downloads."""
    command = ["git", "--no-optional-locks", "-C", str(folder)]
    command += ["-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"]
    child = subprocess.run(
        [*command, *arguments],
        env=os.environ | {"GIT_ALLOW_PROTOCOL": "none", "EMPTY": ""},
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    return child.stdout.strip()


def _disable_filters(folder: Path) -> list[str]:
    """Return the options of git that clear the filters in the repository's own settings."""
    words = _git(folder, "config", "--list", "--show-scope", "--name-only", "-z").split("\0")
    options = []
    for scope, name in zip(words[::2], words[1::2], strict=False):  # the last word is empty
        if scope in ("local", "worktree") and name.startswith("filter."):
            options.append(f"--config-env={name}=EMPTY")  # unlike -c, it allows a name with "="
    return options
