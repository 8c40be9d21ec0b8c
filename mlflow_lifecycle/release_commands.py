"""The commands about releases: gate, release, rollback, history, promote, verify, new-key."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_lifecycle.shell import FILE, JSON, PUBLIC_KEY, TYPES, in_one_line, telling, use_store

if TYPE_CHECKING:
    from mlflow_lifecycle.release import Release

KEY = click.option("--key", type=FILE, help="The private key; by default the one beside the store, made if need be.")
ALIAS = click.option("--alias", default="production", show_default=True, help="The alias to move.")
GATE = (
    click.option("--rows", required=True, metavar="CSV", help="The test rows, which no model has learned from."),
    click.option("--target", required=True, metavar="COLUMN", help="The column with the true values."),
    click.option(
        "--threshold",
        "thresholds",
        multiple=True,
        required=True,
        metavar="METRIC=VALUE",
        help="Minimum METRIC value, or maximum if less is better (repeatable).",
    ),
    click.option(
        "--minimum-gain",
        type=float,
        default=0.0,
        metavar="GAIN",
        help="Require that the version is better than the baseline by more than GAIN.",
    ),
    click.option(
        "--margin",
        type=float,
        metavar="MARGIN",
        help="Accept a version that is at most MARGIN worse than the baseline.",
    ),
    click.option(
        "--same-predictions",
        is_flag=True,
        help="Accept a version that predicts the same as the baseline, for renewed packages.",
    ),
    click.option("--no-environment", is_flag=True, help="Skip the environment check, at your own risk."),
    click.option("--cache", type=FILE, help="Keep downloaded packages there."),
    ALIAS,
    TYPES,
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


def thresholds_of(texts: tuple[str, ...]) -> dict[str, float]:
    """Return the thresholds in texts such as ``accuracy_score=0.9``.

    Raises:
        ValueError: a text is not a name, an equals sign and a number.
    """
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            remedy = "Write the name of a metric and a number: accuracy_score=0.9"
            raise ValueError(f"{text!r} is not a valid threshold. {remedy}") from None
    return found


@click.command(short_help="Sign a version that plain MLflow has logged.")
@click.argument("uri")
@click.option("--training-data", type=FILE, help="The rows it learned from, target included.")
@click.option("--lock", type=FILE, default="requirements.txt", show_default=True, help="The pins with hashes.")
@KEY
@TYPES
@telling
def sign(
    uri: str,
    training_data: Path | None,
    lock: Path,
    key: Path | None,
    trusted_types: tuple[str, ...],
) -> tuple[dict, str]:
    """Sign the version at URI as the store holds it now.

    The model is checked, and not loaded. Its training data is a CSV or Parquet file.

    lifecycle sign models:/tracking_quick_start@champion --training-data train.csv
    """
    from mlflow_lifecycle.adoption import sign_version
    from mlflow_lifecycle.keys import own_key
    from mlflow_lifecycle.tables import read_table

    statement = sign_version(
        uri,
        key=key or own_key(Path.cwd()),
        lock=lock,
        training_data=read_table(training_data) if training_data else None,
        trusted_types=trusted_types,
    )
    what = f"Version {statement.version} of {statement.registered_model}"
    lines = [f"{what} is signed as the store holds it now, as a {statement.purpose}."]
    address = f"models:/{statement.registered_model}/{statement.version}"
    if not statement.training_rows:
        command = f"lifecycle sign {address} --training-data FILE"
        lines.append(f"No training data was signed. Add it: {command}")
    lines.append(f"Next: lifecycle verify {address}")
    return asdict(statement), "\n".join(lines)


@click.command()
@click.argument("uri")
@PUBLIC_KEY
@TYPES
@telling
def verify(uri: str, public_key: Path | None, trusted_types: tuple[str, ...]) -> tuple[dict, str]:
    """Say whether the version at URI is what was signed, and as what."""
    from mlflow_lifecycle.keys import own_public_key
    from mlflow_lifecycle.verification import verified

    with verified(uri, public_key or own_public_key(Path.cwd()), trusted_types=trusted_types) as copy:
        statement, key = copy.statement, copy.key_fingerprint
    text = f"Version {statement.version} of {statement.registered_model} is as it was signed, as a {statement.purpose}"
    text += f" for {statement.alias}, {statement.released_at}" if statement.alias else ""
    rows = "" if statement.training_rows else "\nNo training data was signed."
    return asdict(statement) | {"key_fingerprint": key}, f"{text}.{rows}\nKey: {key}"


@click.command(short_help="Check a version as a release would.")
@click.argument("uri")
@with_options(GATE)
@PUBLIC_KEY
@JSON
def gate(
    uri: str,
    public_key: Path | None,
    as_json: bool,
    rows: str,
    target: str,
    thresholds: tuple[str, ...],
    minimum_gain: float,
    margin: float | None,
    same_predictions: bool,
    no_environment: bool,
    **options,
) -> None:
    """Check the version at URI as a release would, and change nothing in the store.

    The exit status is 1 if a release would be refused.

    Example: lifecycle gate models:/iris/2 --rows test.csv --target species
    --threshold accuracy_score=0.9
    """
    with in_one_line():
        from mlflow_lifecycle.gate import Rule
        from mlflow_lifecycle.keys import own_public_key
        from mlflow_lifecycle.release import try_gate
        from mlflow_lifecycle.tables import read_table

        use_store()
        verdict = try_gate(
            uri,
            read_table(rows),
            target,
            public_key or own_public_key(Path.cwd()),
            thresholds=thresholds_of(thresholds),
            rule=Rule(minimum_gain, margin, same_predictions),
            rebuild=not no_environment,
            **options,
        )
        lines = [f"{check.name}: {check.result} ({check.detail})" for check in verdict.checks]
        click.echo(json.dumps(asdict(verdict)) if as_json else "\n".join(lines))
        verdict.require(allow_unchecked=no_environment)


@click.command()
@click.argument("uri")
@with_options(RELEASE)
@click.option("--tag", is_flag=True, help="Tag the commit that the version was made from.")
@click.option("--push", default="", metavar="REMOTE", help="Push that tag.")
@telling
def release(uri: str, tag: bool, push: str, **options) -> "tuple[Release, str]":
    """Let the version at URI take the alias, if it passes the gate. The same command finishes what was cut off."""
    from mlflow_lifecycle.release import release

    repository = Path.cwd() if tag else None
    made = release(uri, **release_settings(**options), repository=repository, remote=push)
    return made, line_of(made)


def release_settings(
    rows: str,
    thresholds: tuple[str, ...],
    minimum_gain: float,
    margin: float | None,
    same_predictions: bool,
    key: Path | None,
    no_environment: bool,
    **options,
) -> dict:
    """Return the arguments of a release from the options of the command."""
    from mlflow_lifecycle.gate import Rule
    from mlflow_lifecycle.keys import own_key
    from mlflow_lifecycle.tables import read_table

    options["rows"] = read_table(rows)
    options["thresholds"] = thresholds_of(thresholds)
    options["rule"] = Rule(minimum_gain, margin, same_predictions)
    options["key"] = key or own_key(Path.cwd())
    options["rebuild"] = not no_environment
    options["allow_unchecked"] = no_environment
    return options


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
@telling
def rollback(name: str, key: Path | None, **options) -> "tuple[Release, str]":
    """Move the alias of NAME back to a version that was released before."""
    from mlflow_lifecycle.keys import own_key
    from mlflow_lifecycle.release import rollback

    made = rollback(name, key=key or own_key(Path.cwd()), **options)
    return made, line_of(made)


@click.command()
@click.argument("name")
@telling
def history(name: str) -> "tuple[list[Release], str]":
    """List the releases and rollbacks of NAME, the newest first."""
    from mlflow_lifecycle.release import history

    found = history(name)
    return found, "\n".join(map(line_of, found)) or f"{name} was never released."


@click.command()
@click.argument("uri")
@click.option("--to", required=True, metavar="SERVER", help="The address of the other tracking server.")
@with_options(RELEASE)
@telling
def promote(uri: str, to: str, **options) -> "tuple[Release, str]":
    """Release the version at URI on another server, where it passes the gate against the baseline there."""
    from mlflow_lifecycle.promotion import promote

    made = promote(uri, to, **release_settings(**options))
    return made, line_of(made)


@click.command("new-key")
@click.option("--sign-anew", "names", multiple=True, metavar="NAME", help="Sign the versions with an alias anew.")
@TYPES
def new_key(names: tuple[str, ...], trusted_types: tuple[str, ...]) -> None:
    """Make a new key, in place of one that was lost or is to be changed; what the old one signed stays verifiable."""
    with in_one_line():
        from mlflow_lifecycle.keys import new_key
        from mlflow_lifecycle.release import sign_anew

        if names:
            use_store()
            key, before, signed = sign_anew(names, Path.cwd(), trusted_types)
        else:
            (key, before), signed = new_key(Path.cwd()), []
    click.echo(f"The new key: {key}")
    if before:
        click.echo(f"What the old one signed still verifies: --public-key {before}")
    for statement in signed:
        click.echo(f"Signed anew: {statement.registered_model}, version {statement.version}")


COMMANDS = (sign, verify, gate, release, rollback, history, promote, new_key)
