"""The command ``lifecycle``: one subcommand per task, each a thin shell over a function of this package.

Libraries are imported by the subcommand that needs them, so that ``--help`` answers at once.
"""

import json
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
@click.option("--port", type=click.IntRange(1, 65535), help="5000, or the next free one, if you name none.")
def ui(port: int | None) -> None:
    """Start MLflow's interface on the store of this folder, with links to its newest comparison."""
    from lifecycle.interface import show

    show(Path.cwd(), port)


if __name__ == "__main__":
    main()
