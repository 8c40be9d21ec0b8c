"""The commands about releases: gate, release, rollback, history, promote, verify, new-key."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lifecycle.shell import in_one_line, use_store

if TYPE_CHECKING:
    from lifecycle.gate import Verdict
    from lifecycle.release import Release

FILE = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
KEY = click.option("--key", type=FILE, help="The private key; by default the one beside the store, made if need be.")
PUBLIC_KEY = click.option("--public-key", type=FILE, help="By default the one beside the store.")
TYPES = click.option("--trusted-type", "trusted_types", multiple=True, help="What the model may hold, as reviewed.")
ALIAS = click.option("--alias", default="production", show_default=True, help="The alias to move.")


GATE = (
    click.option("--rows", required=True, metavar="CSV", help="The test rows, which nobody has learned from."),
    click.option("--target", required=True, metavar="COLUMN", help="The column with the classes."),
    click.option("--floor", "floors", multiple=True, required=True, metavar="METRIC=VALUE", help="At least this."),
    click.option("--allow-equal", is_flag=True, help="Not better than the holder is enough, if it is not worse."),
    click.option("--no-environment", is_flag=True, help="Build no environment; then only the risk is yours."),
    click.option("--cache", type=FILE, help="Keep downloaded packages there."),
    ALIAS,
    TYPES,
    JSON,
)
RELEASE = (
    *GATE,
    click.option("--intended-use", required=True, help="For the model card: what the model is for."),
    click.option("--limits", required=True, help="For the model card: what it is not for."),
    KEY,
)


def with_options(options: tuple[Callable, ...]) -> Callable:
    """Return a decorator that adds ``options`` to a command, in this order."""

    def add(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def floors_of(texts: tuple[str, ...]) -> dict[str, float]:
    """Return the floors in texts such as ``accuracy_score=0.9``.

    Raises:
        ValueError: a text is not a name, an equals sign and a number.
    """
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(
                f"{text!r} is no floor. Write the name of a metric and a number: accuracy_score=0.9"
            ) from None
    return found


def told(verdict: "Verdict") -> str:
    """Return the checks, one a line."""
    return "\n".join(f"{check.name}: {check.result} ({check.detail})" for check in verdict.checks)


@click.command()
@click.argument("uri")
@PUBLIC_KEY
@TYPES
@JSON
def verify(uri: str, public_key: Path | None, trusted_types: tuple[str, ...], as_json: bool) -> None:
    """Say whether the version at URI is what was signed, and as what."""
    with in_one_line():
        from lifecycle.keys import own_public_key
        from lifecycle.verification import verified

        use_store()
        with verified(uri, public_key or own_public_key(Path.cwd()), trusted_types=trusted_types) as copy:
            statement, key = copy.statement, copy.key_fingerprint
    text = f"Version {statement.version} of {statement.registered_model} is as it was signed, as a {statement.purpose}"
    text += f" for {statement.alias}, {statement.released_at}" if statement.alias else ""
    click.echo(json.dumps(asdict(statement) | {"key_fingerprint": key}) if as_json else f"{text}.\nKey: {key}")


@click.command()
@click.argument("uri")
@with_options(GATE)
@PUBLIC_KEY
def gate(uri: str, alias: str, public_key: Path | None, trusted_types: tuple[str, ...], as_json: bool, **gate) -> None:
    """Check the version at URI as a release would, and change nothing; exit status 1 if it would be refused."""
    with in_one_line():
        from lifecycle.keys import own_public_key
        from lifecycle.release import try_gate
        from lifecycle.tables import read_table

        use_store()
        rows, floors = read_table(gate.pop("rows")), floors_of(gate.pop("floors"))
        skipped, target = gate.pop("no_environment"), gate.pop("target")
        public = public_key or own_public_key(Path.cwd())
        options = {"alias": alias, "floors": floors, "rebuild": not skipped, "trusted_types": trusted_types, **gate}
        verdict = try_gate(uri, rows, target, public, **options)
        click.echo(json.dumps(asdict(verdict)) if as_json else told(verdict))
        verdict.require(allow_unchecked=skipped)


@click.command()
@click.argument("uri")
@with_options(RELEASE)
@click.option("--tag", is_flag=True, help="Tag the commit that the version was made from.")
@click.option("--push", default="", metavar="REMOTE", help="Push that tag.")
def release(uri: str, key: Path | None, tag: bool, push: str, as_json: bool, **options) -> None:
    """Let the version at URI take the alias, if it passes the gate. The same command finishes what was cut off."""
    with in_one_line():
        from lifecycle.release import release

        use_store()
        repository = Path.cwd() if tag else None
        settings = release_settings(key, options)
        made = release(uri, **settings, repository=repository, remote=push)
    click.echo(json.dumps(asdict(made)) if as_json else line_of(made))


def release_settings(key: Path | None, options: dict) -> dict:
    """Return the arguments of a release from the options of the command."""
    from lifecycle.keys import own_key
    from lifecycle.tables import read_table

    skipped = options.pop("no_environment")
    rows, floors = read_table(options.pop("rows")), floors_of(options.pop("floors"))
    settings = {"key": key or own_key(Path.cwd()), "rebuild": not skipped, "allow_unchecked": skipped}
    return options | settings | {"rows": rows, "floors": floors}


def line_of(made: "Release") -> str:
    """Return a release as a line."""
    if made.status != "FINISHED":
        return f"not finished: {made.kind} of {made.registered_model}, version {made.version} as {made.alias}"
    before = f", {made.before} was" if made.before else ""
    moment = made.released_at[:19].replace("T", " ")
    what = f"{made.kind} of {made.registered_model}: version {made.version} is {made.alias}{before}"
    return f"{moment} {what} ({made.by})"


@click.command()
@click.argument("name")
@ALIAS
@click.option("--to", default="", metavar="VERSION", help="By default the one that had the alias before.")
@KEY
@TYPES
@JSON
def rollback(name: str, alias: str, to: str, key: Path | None, trusted_types: tuple[str, ...], as_json: bool) -> None:
    """Move the alias of NAME back to a version that was released before."""
    with in_one_line():
        from lifecycle.keys import own_key
        from lifecycle.release import rollback

        use_store()
        made = rollback(name, key=key or own_key(Path.cwd()), alias=alias, to=to, trusted_types=trusted_types)
    click.echo(json.dumps(asdict(made)) if as_json else line_of(made))


@click.command()
@click.argument("name")
@JSON
def history(name: str, as_json: bool) -> None:
    """List the releases and rollbacks of NAME, the newest first."""
    with in_one_line():
        from lifecycle.release import history

        use_store()
        found = history(name)
    lines = [line_of(item) for item in found] or [f"{name} was never released."]
    click.echo(json.dumps([asdict(item) for item in found]) if as_json else "\n".join(lines))


@click.command()
@click.argument("uri")
@click.option("--to", required=True, metavar="SERVER", help="The address of the other tracking server.")
@with_options(RELEASE)
def promote(uri: str, to: str, key: Path | None, as_json: bool, **options) -> None:
    """Release the version at URI on another server, where it passes the gate against the holder there."""
    with in_one_line():
        from lifecycle.promotion import promote

        use_store()
        made = promote(uri, to, **release_settings(key, options))
    click.echo(json.dumps(asdict(made)) if as_json else line_of(made))


@click.command("new-key")
@click.option("--sign-anew", "names", multiple=True, metavar="NAME", help="Sign the versions with an alias anew.")
@TYPES
def new_key(names: tuple[str, ...], trusted_types: tuple[str, ...]) -> None:
    """Make a new key, in place of one that was lost or is to be changed; what the old one signed stays verifiable."""
    with in_one_line():
        from lifecycle.keys import KeyRefusedError, new_key, present_public_key
        from lifecycle.release import check_aliased, sign_anew

        if names:
            use_store()
            present = present_public_key(Path.cwd())
            if present is None:
                raise KeyRefusedError("There is no key yet that could have signed a version. Leave out --sign-anew.")
            for name in names:  # all of them first, because a second attempt would take the new key as the one before
                check_aliased(name, present, trusted_types)
        key, before = new_key(Path.cwd())
        click.echo(f"The new key: {key}")
        if before:
            click.echo(f"What the old one signed still verifies: --public-key {before}")
        for name in names:
            signed = sign_anew(name, before, key, trusted_types)
            click.echo(f"Signed anew: {name}, version {', '.join(signed) or '(none)'}")


COMMANDS = (verify, gate, release, rollback, history, promote, new_key)
