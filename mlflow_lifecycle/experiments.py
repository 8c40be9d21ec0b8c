"""Open an experiment in MLflow's store, or say at once what is wrong with the store and what to do about it.

MLflow makes the tables of a SQLite store in place: a kill, a full disk or two starts at once leave a file that refuses
every later run. A local store cannot be moved (mlflow#3144, mlflow#8226), MLflow asks a server that is
down for minutes, ``mlflow.set_experiment`` loses the race for a new name without a word, and errors hold passwords.
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
from urllib.parse import quote, quote_plus, unquote

from mlflow_lifecycle.exceptions import StoreUnusableError

if TYPE_CHECKING:
    from mlflow.entities import Experiment

ELSEWHERE = "or name another store in MLFLOW_TRACKING_URI."
REMEDIES = {  # what an error says: what to do; the first that fits
    r"(?i)\b40[13]\b|unauth|permission_denied": "Check your rights, MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN.",
    "locked": f"Another program holds it locked. Close that program and try again, {ELSEWHERE}",
    "disk is full|No space left": "The disk is full. Free 10 MB there and try again.",
    "(?i)read-?only|unable to open|permission denied": f"Make it and its folder writable, {ELSEWHERE}",
    "not a database|malformed": f"Restore it from a backup or move it away, {ELSEWHERE}",
    "(?i)max retries|connection|timed out|resolve|not known": f"Start the server, {ELSEWHERE}",
}


def printable(text: str) -> str:
    """Return ``text`` without the users, passwords and tokens in it or in the settings of MLflow."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "").partition("://")[2]
    user_info = address.rpartition("@")[0]
    secrets = {
        user_info,
        user_info.partition(":")[2],
        *re.findall(r"(?i)(?:password|token)=([^&#]+)", address),
    }
    secrets |= {os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("PASSWORD", "TOKEN")}
    forms = (str, html.escape, quote, lambda secret: quote(secret, safe=""), quote_plus, unquote)
    for secret in sorted(
        {form(secret) for secret in secrets for form in forms} - {""}, key=len, reverse=True
    ):
        text = text.replace(f"{secret}@", "").replace(secret, "***")
    text = re.sub(
        r"(?<!sqlite)(?<!file)://[^\s/@:\[]*:(?!\d+(?:[/?#\s]|$)).*@", "://", text
    )  # spaces, too
    text = re.sub(r"(?<!sqlite)(?<!file)://\S*@", "://", text)
    text = re.sub(
        r"(?i)((?:password|passwd|pwd|token|secret|api_?key)[\w-]*=)[^&\s'\"]+", r"\1***", text
    )
    return re.sub(r"(?i)([?&]user(?:name)?=|\buser(?:name)? [\"'])[^&\s'\"]+", r"\1***", text)


def tracking_uri(folder: Path) -> str:
    """Return the address in MLFLOW_TRACKING_URI, else that of the SQLite file ``mlflow.db`` in ``folder``."""
    return (
        os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{(Path(folder).resolve() / 'mlflow.db').as_posix()}"
    )


def store_folder(folder: Path) -> Path:
    """Return where the store of ``folder`` is: the folder of its SQLite file, or ``folder`` if it is a server's."""
    path = _sqlite_path(tracking_uri(folder))
    return path.parent if path else Path(folder).resolve()


def _unusable(store: object, cause: object, remedy: str = "") -> StoreUnusableError:
    """Return the refusal of ``store``; the remedy for an error is found by what the error says."""
    cause = str(cause).strip().split("\n")[0][:300].rstrip(". ")
    known = (text for pattern, text in REMEDIES.items() if re.search(pattern, cause))
    remedy = remedy or next(
        known, "Check MLFLOW_TRACKING_URI; see 'When something fails' in the README."
    )
    return StoreUnusableError(
        printable(f"Cannot use the MLflow store {store}: {cause}."), printable(remedy)
    )


@contextlib.contextmanager
def _refusing(store: object) -> Iterator[None]:
    """Say what is wrong with ``store``, and what to do, where anything fails in the block."""
    try:
        yield
    except StoreUnusableError:
        raise
    except Exception as error:
        raise _unusable(store, error) from None


def _sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite address, None for any other store."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///(?!:memory:)(.+)", uri)
    if found and re.search(r"[?]|%[0-9A-Fa-f]{2}", found[1]):
        raise _unusable(
            uri, "MLflow misreads a path with ? or %20", f"Rename the folder, {ELSEWHERE}"
        )
    return Path(found[1]).resolve() if found else None


def _read(path: Path) -> tuple[str | None, bool]:
    """Return the schema's revision, None if the store is half made, and whether the file holds anything of a user.

    MLflow makes the experiment Default last, so a file without experiments is half made.
    """
    with contextlib.closing(
        sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=5)
    ) as database:
        names = [
            name
            for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        rows = {
            name: database.execute(f'SELECT * FROM "{name}" LIMIT 2').fetchall() for name in names
        }
        database.execute("BEGIN IMMEDIATE")  # fails if the store is locked or read-only
    revision = rows.pop("alembic_version", [])
    experiments = rows.pop("experiments", [])
    rows.pop("workspaces", None)
    holds = any(rows.values()) or any(str(row[0]) != "0" for row in experiments)
    return (revision[0][0] if revision and experiments else None), holds


def _is_complete(path: Path) -> bool:
    """Tell whether a store is at ``path`` that MLflow made to its end; refuse a half-made one that holds anything."""
    if not path.exists():
        return False
    revision, holds = _read(path)
    if revision is None and holds:
        remedy = f"It holds data, so it stays as it is. Restore it from a backup or move it away, {ELSEWHERE}"
        raise _unusable(path, "its tables are not MLflow's complete schema", remedy)
    return revision is not None


def _replace_half_made(path: Path) -> None:
    """Make the tables in a folder beside ``path``, then put the file in place; the caller holds the lock."""
    import mlflow

    for leftover in path.parent.glob(f"{path.name}.new-*"):  # of attempts that were killed
        shutil.rmtree(leftover, ignore_errors=True)
    # A plain MLflow process may be making it right now: it writes several times a second.
    while path.exists() and not _is_complete(path) and 0 <= time.time() - path.stat().st_mtime < 3:
        time.sleep(0.2)
    if _is_complete(path):
        return
    folder = Path(tempfile.mkdtemp(prefix=f"{path.name}.new-", dir=path.parent))
    try:
        mlflow.MlflowClient(f"sqlite:///{(folder / 'tables.db').as_posix()}").search_experiments()
        with contextlib.closing(
            sqlite3.connect(folder / "tables.db")
        ) as database:  # MLflow keeps that file open
            database.execute("VACUUM INTO ?", (str(folder / "whole.db"),))
        if path.exists():
            aside = (
                path.with_name(f"{path.name}.incomplete-{number}") for number in range(1, 10**6)
            )
            path.rename(next(name for name in aside if not name.exists()))
        (folder / "whole.db").replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_sqlite_store(path: Path) -> None:
    """Make MLflow's tables in a new SQLite file at ``path``, whole or not at all; leave a complete store as it is.

    A half-made file that holds nothing is moved aside to ``<name>.incomplete-<n>``. The lock is SQLite's own, on an
    empty file beside the store: it works on every system and vanishes with the process.

    Raises:
        StoreUnusableError: the store cannot be made or read, or is half made and holds something.
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
            except (
                sqlite3.OperationalError
            ):  # SQLite says so too if another process has finished, and the file is gone
                if not _is_complete(path):
                    raise
            if not _is_complete(path):
                _replace_half_made(path)
        with contextlib.suppress(
            OSError
        ):  # only now: whoever still waits for it finds the store complete
            lock.unlink(missing_ok=True)


def prepare_store(folder: Path) -> None:
    """Make the SQLite store that ``tracking_uri`` names, whole or not at all. Whoever opens it says what is wrong."""
    with contextlib.suppress(StoreUnusableError):
        if path := _sqlite_path(tracking_uri(folder)):
            make_sqlite_store(path)


def _refuse_at_once(path: Path) -> None:
    """Refuse a complete SQLite store in which nothing can be logged, before MLflow opens, upgrades or waits for it."""
    import mlflow
    from alembic.script import ScriptDirectory  # MLflow's own way to its schema

    if not os.access(path.parent, os.W_OK):
        raise _unusable(path, "its folder is read-only")
    if shutil.disk_usage(path.parent).free < 2**20:
        raise _unusable(path, "its disk is full")
    revision, _ = _read(path)
    scripts = ScriptDirectory(str(Path(mlflow.__file__).parent / "store/db_migrations"))
    known = [script.revision for script in scripts.walk_revisions()]  # the newest first
    if revision not in known:
        raise _unusable(
            path,
            f"a newer MLflow made its schema ({revision})",
            f"Install that MLflow, {ELSEWHERE}",
        )
    if revision != known[0]:
        remedy = f"Copy the file, then run: mlflow db upgrade 'sqlite:///{path.as_posix()}'"
        raise _unusable(path, f"an older MLflow made its schema ({revision})", remedy)


def _ask(uri: str, name: str = "") -> "Experiment | None":
    """Return the experiment called ``name``; without a name, ask for any that this user may read.

    The timeouts are short, so that a server that is down is reported within seconds.
    """
    from unittest.mock import patch

    import mlflow
    from sqlalchemy.engine import make_url

    if uri.startswith(
        ("postgresql", "mysql", "mssql")
    ):  # MLflow would try ten times, for two minutes
        url, ports = make_url(uri), {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
        if url.host:
            socket.create_connection(
                (url.host, url.port or ports[url.get_backend_name()]), timeout=5
            ).close()
    hurry = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    with patch.dict(os.environ, hurry | os.environ):  # the user's own settings win
        client = mlflow.MlflowClient(uri)
        if name:
            return client.get_experiment_by_name(name)
        client.search_experiments(max_results=1)
        return None


def create_experiment(uri: str, name: str, description: str) -> "Experiment":
    """Create the experiment in the store at ``uri``, or take the one that is there.

    Args:
        uri: where the store is; a SQLite store keeps the files of its runs beside it.
        name: the experiment's name.
        description: what MLflow's interface shows above its runs.
    """
    import mlflow

    path, client, failure = _sqlite_path(uri), mlflow.MlflowClient(uri), None
    location = (path.parent / "mlruns").as_uri() if path else None  # a server decides for itself
    try:
        client.create_experiment(name, location, {"mlflow.note.content": description})
    except mlflow.MlflowException as error:  # most often because it exists by now
        failure = error
    for pause in (
        0.2,
        0.5,
        1,
        0,
    ):  # a server shows an experiment a moment before its maker has rights to it
        with contextlib.suppress(mlflow.MlflowException):
            if experiment := client.get_experiment_by_name(name):
                return experiment
        time.sleep(pause)
    raise failure or mlflow.MlflowException(
        f"the experiment {name!r} was created and cannot be read"
    )


def split_location(location: str) -> tuple[str, str]:
    """Return a local path up to its last folder ``mlruns``, and the rest; empty texts for any other location."""
    parts = re.fullmatch(r"((?:file://)?/.*)/(mlruns(?:/.*)?)", location)
    return (parts[1], parts[2]) if parts else ("", "")


def local_path(location: str) -> Path:
    """Return the path of a local location, which MLflow writes as a path or as a ``file:`` address."""
    return Path(
        unquote(location.removeprefix("file://")) if location.startswith("file:") else location
    )


def moved_from(path: Path) -> set[Path]:
    """Return the folders that the SQLite store at ``path`` was moved from.

    The folder ``mlruns`` in them no longer exists, but something was logged there: a model, or files that are now
    beside the store. Nothing is lost in an experiment without models and files, so it does not count.
    """
    columns = ("logged_models.artifact_location", "runs.artifact_uri")
    folders = set()
    with contextlib.closing(
        sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=5)
    ) as database:
        for column in columns:
            table = column.partition(".")[0]
            query = f"SELECT {column} FROM {table} JOIN experiments USING (experiment_id)"
            for (location,) in database.execute(
                f"{query} WHERE experiments.lifecycle_stage = 'active'"
            ):
                root, rest = split_location(location or "")
                folder = local_path(root)
                if not root or folder == path.parent or (folder / "mlruns").exists():
                    continue
                if table == "logged_models" or (path.parent / rest).exists():
                    folders.add(folder)
    return folders


def _refuse_moved(path: Path, folders: set[Path]) -> None:
    """Refuse the SQLite store at ``path`` if it was moved from any of ``folders``."""
    if folders:
        cause = f"its models were in {min(folders) / 'mlruns'}, which no longer exists, so it was moved from there"
        raise _unusable(path, cause, f"Run lifecycle check --mend, move it back, {ELSEWHERE}")


def check_store(folder: Path) -> None:
    """Refuse the store that ``tracking_uri`` names if nothing could be logged there; write nothing, and make none.

    Raises:
        StoreUnusableError: with what is wrong, and the remedy.
    """
    import mlflow  # noqa: F401 - if it is not installed, the store is not at fault

    uri = tracking_uri(folder)
    path = _sqlite_path(uri)
    with _refusing(uri):
        if path and not path.exists():
            return
        if path and not _is_complete(path):
            raise _unusable(
                path, "it was left half made, and holds nothing", f"Delete it, {ELSEWHERE}"
            )
        if path:
            _refuse_at_once(path)
        _ask(uri)
        if path:
            _refuse_moved(path, moved_from(path))


def open_experiment(name: str, description: str, folder: Path) -> "Experiment":
    """Make the experiment active in this process, created if need be, in the store that ``tracking_uri`` names.

    Args:
        name: the experiment's name.
        description: what MLflow's interface shows above its runs.
        folder: where the default store is, or will be.

    Raises:
        StoreUnusableError: nothing could be logged there.
    """
    import mlflow

    uri = tracking_uri(folder)
    path = _sqlite_path(uri)
    with _refusing(uri):
        if path:
            make_sqlite_store(path)
            _refuse_at_once(path)
        experiment = _ask(uri, name) or create_experiment(uri, name, description)
        if path:
            root, _ = split_location(experiment.artifact_location)
            _refuse_moved(path, moved_from(path) & {local_path(root)})
        if path and experiment.artifact_location.startswith("mlflow-artifacts:"):
            remedy = "Set MLFLOW_TRACKING_URI to the address of that server, or rename the experiment there."
            raise _unusable(
                path, f"the experiment {name!r} was made by a server, which keeps its files", remedy
            )
        if experiment.lifecycle_stage != "active":
            remedy = f"Restore it: MLFLOW_TRACKING_URI='{uri}' mlflow experiments restore --experiment-id "
            raise _unusable(
                uri, f"the experiment {name!r} is deleted", remedy + experiment.experiment_id
            )
        mlflow.set_tracking_uri(uri)
        return mlflow.set_experiment(
            experiment_id=experiment.experiment_id
        )  # by its name it could lose the race


def source_tags(source: str, folder: Path) -> dict[str, str]:
    """Return the tags that name the source of a run: the file, and in a git repository its path and commit there.

    The settings of the repository start no program. A changed file counts as changed even if a filter that is defined
    in the repository would hide the change. Filters in the user's own settings, such as Git LFS, are applied.

    Args:
        source: the path of the notebook or program in ``folder``.
        folder: a folder, in a repository or not.
    """
    tags = {"mlflow.source.name": source}
    with contextlib.suppress(
        OSError, subprocess.CalledProcessError
    ):  # no git, no repository, or nothing committed
        describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        tags["mlflow.source.git.commit"] = _git(folder, *_disable_filters(folder), *describe)
        tags["mlflow.source.name"] = _git(folder, "rev-parse", "--show-prefix") + source
    return tags


def _git(folder: Path, *arguments: str) -> str:
    """Return what git prints, without its file system monitor, hooks and downloads, which can start programs."""
    command = ["git", "--no-optional-locks", "-C", str(folder)]
    command += ["-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"]
    variables = os.environ | {"GIT_ALLOW_PROTOCOL": "none", "EMPTY": ""}
    child = subprocess.run(
        [*command, *arguments], env=variables, check=True, capture_output=True, encoding="utf-8"
    )
    return child.stdout.strip()


def _disable_filters(folder: Path) -> list[str]:
    """Return the options of git that clear the filters defined in the repository's own settings."""
    words = _git(folder, "config", "--list", "--show-scope", "--name-only", "-z").split("\0")
    options = []
    for scope, name in zip(words[::2], words[1::2], strict=False):  # a last empty word has no name
        if scope in ("local", "worktree") and name.startswith("filter."):
            options.append(f"--config-env={name}=EMPTY")  # unlike -c, it allows a name with "="
    return options
