"""The commands about releases: gate, release, rollback, history, promote."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_lifecycle.cli.options import (
    ALIAS,
    CACHE,
    FILE,
    JSON,
    KEY,
    PUBLIC_KEY,
    TYPES,
    combine,
    print_result,
    use_store,
)
from mlflow_lifecycle.exceptions import InvalidInputError

if TYPE_CHECKING:
    import pandas as pd

    from mlflow_lifecycle.releases.gate import GateSettings
    from mlflow_lifecycle.releases.release import Release

GATE = combine(
    click.option(
        "--data",
        type=FILE,
        required=True,
        metavar="FILE",
        help="CSV or Parquet: the test set, which no model has learned from.",
    ),
    click.option(
        "--target", required=True, metavar="COLUMN", help="The column with the true values."
    ),
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
        help="Accept a version that predicts the same as the baseline.",
    ),
    click.option(
        "--no-environment",
        is_flag=True,
        help="Skip the environment check, at your own risk.",
    ),
    CACHE,
)
CARD = combine(
    click.option("--intended-use", required=True, help="What the model is for."),
    click.option("--limits", required=True, help="What the model is not for."),
)


def gate_options(command: Callable) -> Callable:
    """Add the options of the gate to a command, which gets them as ``rows`` and ``settings``."""

    @GATE
    @functools.wraps(command)
    def wrapper(
        data: Path,
        thresholds: tuple[str, ...],
        minimum_gain: float,
        margin: float | None,
        same_predictions: bool,
        no_environment: bool,
        cache: Path | None,
        **others,
    ) -> None:
        from mlflow_lifecycle.datasets import read_table
        from mlflow_lifecycle.releases.gate import GateSettings

        settings = GateSettings(
            parse_thresholds(thresholds),
            minimum_gain=minimum_gain,
            margin=margin,
            same_predictions=same_predictions,
            rebuild=not no_environment,
            cache=cache,
        )
        use_store()
        command(rows=read_table(data), settings=settings, **others)

    return wrapper


def parse_thresholds(texts: tuple[str, ...]) -> dict[str, float]:
    """Return the thresholds in texts such as ``accuracy_score=0.9``.

    Raises:
        InvalidInputError: a text is not a name, an equals sign and a number.
    """
    thresholds = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            thresholds[name] = float(value)
        except ValueError:
            remedy = "Write the name of a metric and a number: accuracy_score=0.9"
            raise InvalidInputError(f"{text!r} is not a valid threshold. {remedy}") from None
    return thresholds


def describe(release: "Release") -> str:
    """Return a release as a line."""
    what = f"{release.kind} of {release.registered_model}"
    if release.status != "FINISHED":
        status = release.status.lower()  # failed, killed or running
        return f"{status}: {what}, version {release.version} as {release.alias}"
    moment = release.released_at[:19].replace("T", " ")
    before = f", {release.before} was" if release.before else ""
    is_alias = f"version {release.version} is {release.alias}{before}"
    return f"{moment} {what}: {is_alias} ({release.by})"


@click.command(short_help="Check a version as a release would.")
@click.argument("uri")
@gate_options
@click.option(
    "--alias",
    default="production",
    show_default=True,
    help="The alias whose version is the baseline.",
)
@PUBLIC_KEY
@TYPES
@JSON
def gate(
    uri: str,
    rows: "pd.DataFrame",
    target: str,
    settings: "GateSettings",
    alias: str,
    public_key: Path | None,
    trusted_types: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check the version at URI as a release would, and change nothing in the store.

    The exit status is 1 if a release would be refused.

    \b
    Example: lifecycle gate models:/tracking_quick_start/2 --data test.csv
             --target species --threshold accuracy_score=0.9
    """
    from mlflow_lifecycle.releases.release import try_gate
    from mlflow_lifecycle.signing.keys import own_public_key

    verdict = try_gate(
        uri,
        rows,
        target,
        settings,
        public_key=public_key or own_public_key(),
        alias=alias,
        trusted_types=trusted_types,
    )
    lines = [f"{check.name}: {check.result} ({check.detail})" for check in verdict.checks]
    print_result(verdict, lines, as_json)
    verdict.require()


@click.command(short_help="Move an alias to a version that passes the gate.")
@click.argument("uri")
@gate_options
@CARD
@ALIAS
@KEY
@TYPES
@click.option("--tag", is_flag=True, help="Tag the commit that the version was made from.")
@click.option("--push", default="", metavar="REMOTE", help="Make that tag, and push it.")
@JSON
def release(
    uri: str,
    rows: "pd.DataFrame",
    target: str,
    settings: "GateSettings",
    intended_use: str,
    limits: str,
    alias: str,
    key: Path | None,
    trusted_types: tuple[str, ...],
    tag: bool,
    push: str,
    as_json: bool,
) -> None:
    """Move the alias to the version at URI, if it passes the gate.

    The same command finishes a release that was interrupted.

    \b
    Example: lifecycle release models:/tracking_quick_start/2 --data test.csv
             --target species --threshold accuracy_score=0.9
             --intended-use "To learn with." --limits "Iris flowers only."
    """
    from mlflow_lifecycle.releases.release import release
    from mlflow_lifecycle.signing.keys import own_key

    made = release(
        uri,
        rows,
        target,
        settings,
        key=key or own_key(),
        intended_use=intended_use,
        limits=limits,
        alias=alias,
        trusted_types=trusted_types,
        repository=Path.cwd() if tag or push else None,
        remote=push,
    )
    print_result(made, [describe(made)], as_json)


@click.command(short_help="Move an alias back to an earlier release.")
@click.argument("name")
@click.option(
    "--to", default="", metavar="VERSION", help="The version. Default: the release before."
)
@ALIAS
@KEY
@TYPES
@JSON
def rollback(
    name: str,
    to: str,
    alias: str,
    key: Path | None,
    trusted_types: tuple[str, ...],
    as_json: bool,
) -> None:
    """Move the alias of NAME back to a version that was released before.

    Example: lifecycle rollback tracking_quick_start
    """
    from mlflow_lifecycle.releases.release import rollback
    from mlflow_lifecycle.signing.keys import own_key

    use_store()
    key = key or own_key()
    made = rollback(name, key=key, alias=alias, to=to, trusted_types=trusted_types)
    print_result(made, [describe(made)], as_json)


@click.command(short_help="List the releases of a model.")
@click.argument("name")
@JSON
def history(name: str, as_json: bool) -> None:
    """List the releases and rollbacks of NAME, the newest first.

    Example: lifecycle history tracking_quick_start
    """
    from mlflow_lifecycle.releases.release import history

    use_store()
    releases = history(name)
    lines = [describe(item) for item in releases] or [f"{name} was never released."]
    print_result(releases, lines, as_json)


@click.command(short_help="Release a version on another server.")
@click.argument("uri")
@click.option("--to", required=True, metavar="SERVER", help="The other tracking server.")
@gate_options
@CARD
@ALIAS
@KEY
@TYPES
@JSON
def promote(
    uri: str,
    to: str,
    rows: "pd.DataFrame",
    target: str,
    settings: "GateSettings",
    intended_use: str,
    limits: str,
    alias: str,
    key: Path | None,
    trusted_types: tuple[str, ...],
    as_json: bool,
) -> None:
    """Release the version at URI on another server, where it passes the gate, too.

    \b
    Example: lifecycle promote models:/tracking_quick_start@production
             --to https://mlflow.example.com --data test.csv --target species
             --threshold accuracy_score=0.9
             --intended-use "To learn with." --limits "Iris flowers only."
    """
    from mlflow_lifecycle.releases.promote import promote
    from mlflow_lifecycle.signing.keys import own_key

    made = promote(
        uri,
        to,
        rows,
        target,
        settings,
        key=key or own_key(),
        intended_use=intended_use,
        limits=limits,
        alias=alias,
        trusted_types=trusted_types,
    )
    print_result(made, [describe(made)], as_json)


COMMANDS = (gate, release, rollback, history, promote)
