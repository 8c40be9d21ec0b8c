"""The command ``lifecycle``: one subcommand per task, each a thin shell over a function of this package.

Libraries are imported by the subcommand that needs them, so that ``--help`` answers at once.
"""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import click


@click.group()
def main() -> None:
    """Do what MLflow lacks for model versions that a team can trust."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the problems as JSON.")
@click.option("--mend", is_flag=True, help="Mend a SQLite store that was moved as a whole, after a copy.")
@click.option("--yes", is_flag=True, help="Mend without asking.")
def check(as_json: bool, mend: bool, yes: bool) -> None:
    """Say what is wrong in this folder, and what to do about it; exit status 1 if anything is."""
    from lifecycle.check import problems

    if mend:
        mend_store(yes)
        return
    found = problems(Path.cwd())
    if as_json:
        click.echo(json.dumps([asdict(problem) for problem in found], indent=2))
    elif found:
        click.echo("\n".join(map(str, found)))
    else:
        click.echo("Nothing is wrong with Python, packages, pins, store, disk and port.")
    raise SystemExit(bool(found))


def mend_store(yes: bool) -> None:
    """Show what has to change in a store that was moved, and change it once somebody says yes."""
    from lifecycle.moved import changes, mend
    from lifecycle.store import StoreUnusableError, tracking_uri

    path = Path(tracking_uri(Path.cwd()).removeprefix("sqlite:///"))
    try:
        wanted = changes(path) if path.is_file() else []
    except StoreUnusableError as error:
        raise click.ClickException(str(error)) from None
    if not wanted:
        click.echo(
            "There is nothing to mend: the paths in the store lead to folders that are there, or there is no store."
        )
        return
    click.echo("\n".join(map(str, wanted)))
    if not yes:
        click.confirm("Change these paths, after a copy of the store?", abort=True)
    click.echo(f"Mended. The store as it was: {mend(path, wanted)}")


@main.command()
@click.argument("experiment")
@click.option("--metric", default="validation_f1", show_default=True, help="To compare by. More of it is better.")
@click.option("--registered-model", metavar="NAME", help="To look up in production; EXPERIMENT_best_model by default.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER", help="reports/EXPERIMENT by default.")
@click.option("--json", "as_json", is_flag=True, help="Print what the report says as JSON.")
def report(experiment: str, metric: str, registered_model: str | None, output: Path | None, as_json: bool) -> None:
    """Write the report of EXPERIMENT: who wins, who is tied, what was left out and why; with table and charts."""
    import mlflow

    from lifecycle.report import make_report, verdict, write
    from lifecycle.store import printable

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        use_store()
        made = make_report(experiment, metric, registered_model)
        folder = output or Path("reports") / re.sub(r"[^\w.-]|^[.]+", "_", experiment)
        write(made, folder)
    except (ValueError, RuntimeError, OSError, mlflow.MlflowException) as error:
        raise click.ClickException(" ".join(printable(str(error)).split())) from None
    if as_json:
        click.echo(json.dumps(asdict(made), indent=2))
    else:
        click.echo(f"{verdict(made)}\nThe report: {folder / 'experiment_report.md'}")


def use_store() -> None:
    """Make the store of this folder the active one; refuse one that is not there, and make none."""
    import mlflow

    from lifecycle.store import StoreUnusableError, check_store, tracking_uri

    uri = tracking_uri(Path.cwd())
    if uri.startswith("sqlite") and not Path(uri.partition(":///")[2]).is_file():
        raise StoreUnusableError(f"There is no store at {uri} yet.", "Make one first: make run")
    check_store(Path.cwd())
    mlflow.set_tracking_uri(uri)


@main.command()
@click.option("--port", type=click.IntRange(1, 65535), help="5000, or the next free one, if you name none.")
def ui(port: int | None) -> None:
    """Start MLflow's interface on the store of this folder, with links to its newest comparison."""
    from lifecycle.interface import show

    show(Path.cwd(), port)


if __name__ == "__main__":
    main()
