"""What the commands share: options, the store of the current folder, and how they print."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import click

FILE = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
DATA = click.option(
    "--data", type=FILE, required=True, metavar="FILE", help="The rows, CSV or Parquet."
)
KEY = click.option("--key", type=FILE, help="The private key. Default: your own, made if needed.")
PUBLIC_KEY = click.option("--public-key", type=FILE, help="The public key. Default: your own.")
TYPES = click.option(
    "--trusted-type",
    "trusted_types",
    multiple=True,
    metavar="TYPE",
    help="Additional type that skops may load (repeatable).",
)
ALIAS = click.option("--alias", default="production", show_default=True, help="The alias to move.")
CACHE = click.option("--cache", type=FILE, metavar="FOLDER", help="Keep downloaded packages there.")


def combine(*options: Callable) -> Callable:
    """Return a decorator that adds several options to a command, in this order."""

    def add(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def use_store() -> None:
    """Make the store of this folder the active one.

    Raises:
        StoreUnusableError: there is none. It is not created.
    """
    import mlflow

    from mlflow_lifecycle.exceptions import StoreUnusableError
    from mlflow_lifecycle.experiments import check_store, tracking_uri

    uri = tracking_uri(Path.cwd())
    if uri.startswith("sqlite") and not Path(uri.partition(":///")[2]).is_file():
        remedy = "Log a model in this folder, or set MLFLOW_TRACKING_URI."
        raise StoreUnusableError(f"There is no store at {uri}.", remedy)
    check_store(uri)
    mlflow.set_tracking_uri(uri)


def print_result(result: object, lines: Iterable[str], as_json: bool) -> None:
    """Print a result as JSON, or the lines that describe it."""
    if as_json:
        click.echo(json.dumps(result, default=asdict))
    else:
        print_lines(lines)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines without control characters, which a value from the store may contain."""
    for line in lines:
        click.echo(printable_line(line))


def printable_line(text: str) -> str:
    """Return a text in one line, without control characters and without secrets."""
    from mlflow_lifecycle.experiments import printable

    words = "".join(character if character.isprintable() else " " for character in text).split()
    return printable(" ".join(words))
