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
def check(as_json: bool) -> None:
    """Say what is wrong in this folder, and what to do about it; exit status 1 if anything is."""
    from lifecycle.check import problems

    found = problems(Path.cwd())
    if as_json:
        click.echo(json.dumps([asdict(problem) for problem in found], indent=2))
    elif found:
        click.echo("\n".join(map(str, found)))
    else:
        click.echo("Nothing is wrong with Python, packages, pins, store, disk and port.")
    raise SystemExit(bool(found))


@main.command()
@click.option("--port", type=click.IntRange(1, 65535), help="5000, or the next free one, if you name none.")
def ui(port: int | None) -> None:
    """Start MLflow's interface on the store of this folder, with links to its newest comparison."""
    from lifecycle.interface import show

    show(Path.cwd(), port)


if __name__ == "__main__":
    main()
