"""The command ``lifecycle``: one subcommand per task, each a thin shell over a function of this package.

Libraries are imported by the subcommand that needs them, so that ``--help`` answers at once.
"""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_lifecycle import monitoring_commands, release_commands
from mlflow_lifecycle.shell import FILE, JSON, PUBLIC_KEY, TYPES, in_one_line, telling, use_store

if TYPE_CHECKING:
    from mlflow_lifecycle.batch import Scored
    from mlflow_lifecycle.report import Report


@click.group()
def main() -> None:
    """Do what MLflow lacks for model versions that a team can trust."""


@main.command()
@JSON
@click.option("--mend", is_flag=True, help="Mend a SQLite store that was moved as a whole, after a copy.")
@click.option("--yes", is_flag=True, help="Mend without asking.")
@click.option("--quiet", is_flag=True, help="Print nothing if no problem is found.")
def check(as_json: bool, mend: bool, yes: bool, quiet: bool) -> None:
    """Print what is wrong in this folder, and how to fix it. The exit status is 1 if there is a problem."""
    from mlflow_lifecycle.check import problems

    if mend:
        mend_store(yes)
        return
    found = problems(Path.cwd())
    if as_json:
        click.echo(json.dumps([asdict(problem) for problem in found], indent=2))
    elif found:
        click.echo("\n".join(map(str, found)))
    elif not quiet:
        click.echo("Nothing is wrong with Python, packages, pins, store and disk.")
    raise SystemExit(bool(found))


def mend_store(yes: bool) -> None:
    """Show the paths to change in a store that was moved, and change them after confirmation."""
    from mlflow_lifecycle.moved import mend, moved_folders
    from mlflow_lifecycle.store import tracking_uri

    path = Path(tracking_uri(Path.cwd()).removeprefix("sqlite:///"))
    with in_one_line():
        folders = moved_folders(path) if path.is_file() else {}
    if not folders:
        click.echo("There is nothing to mend: there is no store, or the folders that it names exist.")
        return
    click.echo("\n".join(f"{old} -> {new}" for old, new in folders.items()))
    if not yes:
        click.confirm("Change these paths, after a copy of the store?", abort=True)
    with in_one_line():
        copy = mend(path, folders)
    click.echo(f"Mended. The store as it was: {copy}")


@main.command()
@click.argument("experiment")
@click.option("--metric", default="validation_f1", show_default=True, help="To compare by. More of it is better.")
@click.option("--registered-model", metavar="NAME", help="To look up in production; EXPERIMENT_best_model by default.")
@click.option("--output", type=FILE, metavar="FOLDER", help="reports/EXPERIMENT by default.")
@telling
def report(experiment: str, metric: str, registered_model: str | None, output: Path | None) -> "tuple[Report, str]":
    """Write the report of EXPERIMENT: who wins, who is tied, what was left out and why; with table and charts."""
    from mlflow_lifecycle.report import make_report, verdict, write

    made = make_report(experiment, metric, registered_model)
    folder = output or Path("reports") / re.sub(r"[^\w.-]|^[.]+", "_", experiment)
    write(made, folder)
    return made, f"{verdict(made)}\nThe report: {folder / 'experiment_report.md'}"


@main.command()
@click.option("--port", type=click.IntRange(1, 65535), help="5000, or the next free one, if you name none.")
def ui(port: int | None) -> None:
    """Start MLflow's interface on the store of this folder, with links to its newest comparison."""
    from mlflow_lifecycle.interface import show

    show(Path.cwd(), port)


@main.command()
@click.argument("uri")
@click.option("--rows", required=True, metavar="PARQUET", help="A Parquet file or a folder of them.")
@click.option("--result", required=True, metavar="FOLDER", help="Where keys and predictions go; not there yet.")
@click.option("--key", default="id", show_default=True, help="The column of integers that tells the rows apart.")
@click.option("--master", default="local[*]", show_default=True, help="Spark's address.")
@PUBLIC_KEY
@TYPES
@click.option("--this-environment", is_flag=True, help="Score in this environment, and build none.")
@click.option("--experiment", default="scoring", show_default=True, help="Where the run goes.")
@telling
def score(
    uri: str, rows: str, result: str, experiment: str, public_key: Path | None, this_environment: bool, **settings
) -> "tuple[Scored, str]":
    """Score a Parquet data set with the signed version at URI on Spark, in the environment that it recorded."""
    from mlflow_lifecycle.batch import check_result, score
    from mlflow_lifecycle.keys import own_public_key
    from mlflow_lifecycle.store import open_experiment

    check_result(result)
    key = public_key or own_public_key(Path.cwd())
    open_experiment(experiment, "Data sets scored by registered models.", Path.cwd())
    scored = score(uri, rows, result, public_key=key, own_environment=not this_environment, **settings)
    text = f"{scored.rows} rows (digest {scored.digest}) scored into {result}, recorded in run {scored.run_id}"
    return scored, text


@main.command()
@click.argument("uri")
@PUBLIC_KEY
@TYPES
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=5001, show_default=True, help="0 takes a free one.")
@click.option("--record", type=FILE, metavar="FOLDER", help="Keep requests and answers there.")
@click.option("--keep-days", type=click.IntRange(1), default=30, show_default=True, help="Then they are removed.")
@click.option("--leave-out", multiple=True, metavar="COLUMN", help="Not kept, such as what tells a person.")
@click.option("--limits", type=click.FloatRange(0), metavar="MARGIN", help="Refuse numbers beyond the training rows'.")
@click.option("--cache", type=FILE, help="Keep downloaded packages there.")
@click.option("--offline", is_flag=True, help="Take all packages from the cache.")
def serve(uri: str, public_key: Path | None, **settings) -> None:
    """Serve the release at URI in the environment that it recorded, until Ctrl-C.

    --limits 0 refuses a number that is lower or higher than all that the version learned from; --limits 0.5 lets it be
    beyond by half of their range.
    """
    import sys

    with in_one_line():
        from mlflow_lifecycle.keys import own_public_key
        from mlflow_lifecycle.serving import ServingFailedError, serve

        use_store()
        with serve(uri, public_key or own_public_key(Path.cwd()), log=sys.stderr, **settings) as server:
            click.echo(f"Version {server.version} of {server.name} answers: {server.address}/invocations")
            try:
                status = server.process.wait()
            except KeyboardInterrupt:
                click.echo("Ended.")
                return
        raise ServingFailedError(f"The server ended by itself, with status {status}. It says why above.")


@main.command()
@click.argument("run_id")
@click.option("--objective", required=True, metavar="FILE.py:FUNCTION", help="Takes a trial, returns its value.")
def search_worker(run_id: str, objective: str) -> None:
    """Run trials of the search RUN_ID until its queue, in the PostgreSQL that SEARCH_STORAGE names, is empty."""
    with in_one_line():
        from mlflow_lifecycle.workers import load_objective, work

        if "SEARCH_STORAGE" not in os.environ:
            raise ValueError("SEARCH_STORAGE must name the PostgreSQL of the search: postgresql://user@host/database")
        use_store()
        work(run_id, load_objective(objective), os.environ["SEARCH_STORAGE"], objective.rpartition(":")[0])


for command in (*release_commands.COMMANDS, *monitoring_commands.COMMANDS):
    main.add_command(command)

if __name__ == "__main__":
    main()
