"""What the commands of ``lifecycle`` share: options, errors in one line, and the store of the current folder."""

import contextlib
import functools
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import click

FILE = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
PUBLIC_KEY = click.option("--public-key", type=FILE, help="By default the one beside the store.")
TYPES = click.option("--trusted-type", "trusted_types", multiple=True, help="What the model may hold, as reviewed.")
QUIET = {
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Keep MLflow quiet in the block, and end the command with an expected error in one line, and exit status 1.

    The line holds no secret, whatever the error says.
    """
    with patch.dict(os.environ, QUIET | os.environ):  # the user's own settings win
        import mlflow

        from mlflow_lifecycle.store import printable

        try:
            yield
        except (ValueError, RuntimeError, OSError, sqlite3.Error, mlflow.MlflowException) as error:
            raise click.ClickException(" ".join(printable(str(error)).split())) from None


def use_store() -> None:
    """Make the store of this folder the active one; refuse one that is not there, and make none."""
    import mlflow

    from mlflow_lifecycle.store import StoreUnusableError, check_store, tracking_uri

    uri = tracking_uri(Path.cwd())
    if uri.startswith("sqlite") and not Path(uri.partition(":///")[2]).is_file():
        raise StoreUnusableError(f"There is no store at {uri} yet.", "Make one first: make run")
    check_store(Path.cwd())
    mlflow.set_tracking_uri(uri)


def telling(answer: Callable) -> Callable:
    """Make the body of a command from a function that returns its result and the text that tells it.

    The store of this folder is the active one then. The text is printed, or with ``--json`` the result.
    """

    @JSON
    @functools.wraps(answer)
    def body(as_json: bool, **options) -> None:
        with in_one_line():
            use_store()
            result, text = answer(**options)
        click.echo(json.dumps(result, default=asdict) if as_json else text)

    return body
