"""The commands about signatures: sign, verify, new-key."""

from dataclasses import asdict
from pathlib import Path

import click

from mlflow_lifecycle.cli.options import (
    FILE,
    JSON,
    KEY,
    PUBLIC_KEY,
    TYPES,
    print_lines,
    print_result,
    use_store,
)


@click.command(short_help="Sign a registered version.")
@click.argument("uri")
@click.option(
    "--training-data", type=FILE, help="The training rows, CSV or Parquet, target included."
)
@click.option(
    "--lock",
    type=FILE,
    default="requirements.txt",
    show_default=True,
    help="The lock file with the hashes of the packages.",
)
@KEY
@TYPES
@JSON
def sign(
    uri: str,
    training_data: Path | None,
    lock: Path,
    key: Path | None,
    trusted_types: tuple[str, ...],
    as_json: bool,
) -> None:
    """Sign the version at URI in its present state. Use it for versions that plain MLflow logged.

    The model is checked, and not loaded. The training data is signed with it.

    Example: lifecycle sign models:/tracking_quick_start@champion --training-data train.csv
    """
    from mlflow_lifecycle.datasets import read_table
    from mlflow_lifecycle.signing.adopt import sign_version
    from mlflow_lifecycle.signing.keys import own_key

    use_store()
    statement = sign_version(
        uri,
        key=key or own_key(),
        lock=lock,
        training_data=read_table(training_data) if training_data else None,
        trusted_types=trusted_types,
    )
    address = f"models:/{statement.registered_model}/{statement.version}"
    what = f"Version {statement.version} of {statement.registered_model}"
    lines = [f"{what} is signed in its present state, as a {statement.purpose}."]
    if not statement.training_rows:
        command = f"lifecycle sign {address} --training-data FILE"
        lines.append(f"No training data was signed. Add it: {command}")
    types = "".join(f" --trusted-type {name}" for name in trusted_types)
    lines.append(f"Next: lifecycle verify {address}{types}")
    print_result(statement, lines, as_json)


@click.command(short_help="Check that a version is unchanged since it was signed.")
@click.argument("uri")
@PUBLIC_KEY
@TYPES
@JSON
def verify(
    uri: str,
    public_key: Path | None,
    trusted_types: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check that the version at URI is unchanged since it was signed.

    The output says whether it was signed as a candidate or as a release.

    Example: lifecycle verify models:/tracking_quick_start/1
    """
    from mlflow_lifecycle.signing.keys import own_public_key
    from mlflow_lifecycle.signing.verify import verified

    use_store()
    public_key = public_key or own_public_key()
    with verified(uri, public_key, trusted_types=trusted_types) as copy:
        statement = copy.statement
        fingerprint = copy.key_fingerprint
    what = f"Version {statement.version} of {statement.registered_model}"
    text = f"{what} is as it was signed, as a {statement.purpose}"
    if statement.alias:
        text += f" for {statement.alias}, {statement.released_at}"
    lines = [f"{text}."]
    if not statement.training_rows:
        lines.append("No training data was signed.")
    lines.append(f"Key: {fingerprint}")
    print_result(asdict(statement) | {"key_fingerprint": fingerprint}, lines, as_json)


@click.command("new-key", short_help="Replace your own key by a new one.")
@click.option(
    "--sign-anew",
    "names",
    multiple=True,
    metavar="NAME",
    help="Sign each version of NAME that has an alias with the new key (repeatable).",
)
@TYPES
def new_key(names: tuple[str, ...], trusted_types: tuple[str, ...]) -> None:
    """Replace your own key by a new one, for example after it was lost.

    Versions that the old key signed still verify with its public half.

    Example: lifecycle new-key --sign-anew tracking_quick_start
    """
    from mlflow_lifecycle.signing.adopt import sign_anew
    from mlflow_lifecycle.signing.keys import new_key

    signed = []
    if names:
        use_store()
        key, before, signed = sign_anew(names, trusted_types)
    else:
        key, before = new_key()
    lines = [f"The new key: {key}"]
    if before:
        lines.append(f"Versions that the old key signed still verify: --public-key {before}")
    for statement in signed:
        lines.append(f"Signed anew: {statement.registered_model}, version {statement.version}")
    print_lines(lines)


COMMANDS = (sign, verify, new_key)
