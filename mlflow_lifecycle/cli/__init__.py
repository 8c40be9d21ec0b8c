"""The command ``lifecycle``. Each subcommand calls one function of the package.

A subcommand imports what it needs itself, so ``--help`` answers at once.
"""

import os
import sqlite3
import sys
import warnings
from unittest.mock import patch

import click

from mlflow_lifecycle.cli import models, packages, project, releases, serving
from mlflow_lifecycle.cli.options import printable_line
from mlflow_lifecycle.exceptions import LifecycleError

QUIET = {
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
EXTRAS = {
    "model_signing": "sign",
    "OpenSSL": "sign",
    "matplotlib": "report",
    "optuna": "search",
    "pyspark": "spark",
    "fastapi": "all",
}


class Commands(click.Group):
    """The subcommands. An expected error is printed in one line, without secrets."""

    def invoke(self, context: click.Context) -> object:
        """Call the subcommand; with ``--debug`` an expected error keeps its traceback."""
        try:
            with patch.dict(os.environ, QUIET | os.environ), warnings.catch_warnings():
                # The user's own settings win. The warning is for who logs a model.
                warnings.filterwarnings("ignore", "Hint: Inferred schema contains integer column")
                return super().invoke(context)
        except (LifecycleError, OSError, sqlite3.Error, *mlflow_errors()) as error:
            if context.params["debug"]:
                raise
            raise click.ClickException(printable_line(str(error))) from None
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None or context.params["debug"]:
                raise
            remedy = f"pip install 'mlflow-quickstart-lifecycle[{extra}]'"
            raise click.ClickException(f"{error.name} is not installed. Run: {remedy}") from None


def mlflow_errors() -> tuple[type[Exception], ...]:
    """Return the error class of MLflow, if MLflow was imported."""
    mlflow = sys.modules.get("mlflow")
    return (mlflow.MlflowException,) if mlflow else ()


@click.group(cls=Commands)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Release, verify, serve and monitor MLflow models."""


for module in (models, releases, serving, packages, project):
    for command in module.COMMANDS:
        main.add_command(command)
