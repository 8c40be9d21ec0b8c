"""The commands about packages over time: audit, renew, compare."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_lifecycle.cli.options import (
    CACHE,
    FILE,
    JSON,
    KEY,
    PUBLIC_KEY,
    TYPES,
    print_result,
    use_store,
)
from mlflow_lifecycle.exceptions import InvalidInputError, KeyRefusedError

if TYPE_CHECKING:
    from mlflow_lifecycle.audit import Audit

ROWS = click.option("--data", type=FILE, metavar="FILE", help="CSV or Parquet: rows to predict.")


@click.command(short_help="Look for known vulnerabilities in packages.")
@click.argument("name")
@click.option("--all-versions", is_flag=True, help="Audit versions without an alias, too.")
@click.option("--service", default="", metavar="URL", help="A server with OSV's API. Default: OSV.")
@click.option("--database", type=FILE, metavar="ZIP", help="A downloaded copy of OSV's database.")
@click.option("--ignore", multiple=True, metavar="ID", help="Vulnerability to ignore (repeatable).")
@click.option("--markdown", is_flag=True, help="Print the result as a Markdown table.")
@PUBLIC_KEY
@TYPES
@JSON
def audit(
    name: str,
    all_versions: bool,
    service: str,
    database: Path | None,
    ignore: tuple[str, ...],
    markdown: bool,
    public_key: Path | None,
    trusted_types: tuple[str, ...],
    as_json: bool,
) -> None:
    """Look for known vulnerabilities in the packages of each version of NAME with an alias.

    The exit status is 0 if none is known, 1 if there is one or the command fails, and 2 if the
    packages of a version were not looked up. OSV does not know packages that are not on PyPI.

    Example: lifecycle audit tracking_quick_start --database all.zip
    """
    from mlflow_lifecycle.audit import audit_model
    from mlflow_lifecycle.datasets import in_markdown
    from mlflow_lifecycle.signing.keys import own_public_key

    use_store()
    try:
        public_key = public_key or own_public_key()
    except KeyRefusedError:
        public_key = None
    audits = audit_model(
        name,
        public_key,
        all_versions=all_versions,
        service=service,
        database=database,
        ignored=ignore,
        trusted_types=trusted_types,
    )
    rows = [row for result in audits for row in describe(result)]
    lines = [": ".join(row) for row in rows]
    if markdown:
        lines = ["| version | result |", "|---|---|"]
        lines += [f"| {in_markdown(uri)} | {in_markdown(text)} |" for uri, text in rows]
    print_result(audits, lines, as_json)
    status = 1 if any(result.findings for result in audits) else 0
    raise SystemExit(2 if any(result.failure for result in audits) else status)


def describe(result: "Audit") -> list[tuple[str, str]]:
    """Return the version and what was found, for each line to print."""
    texts = []
    for finding in result.findings:
        fixed = " or ".join(finding.fixed_in) or "no version"
        texts.append(f"{finding.id} in {finding.package} {finding.version}, fixed in {fixed}")
    if result.findings:
        command = f"lifecycle renew {result.uri} --requirements FILE --lock FILE"
        texts.append(f"Compile newer packages, then run: {command}")
    elif not result.failure:
        texts.append(f"no known vulnerability in {result.packages} packages")
    if result.failure:
        texts.append(f"not audited: {result.failure}")
    if result.unknown:
        texts.append(f"unknown to OSV: {', '.join(result.unknown)}")
    if result.unsigned:
        texts.append(f"the list of packages is not signed: {result.unsigned}")
    return [(result.uri, text) for text in texts]


@click.command(short_help="Register a version again with new packages.")
@click.argument("uri")
@click.option(
    "--requirements", type=FILE, required=True, metavar="FILE", help="The new list of pins."
)
@click.option("--lock", type=FILE, required=True, metavar="FILE", help="The new lock file.")
@ROWS
@click.option(
    "--tolerance", type=click.FloatRange(0), default=0.0, help="Allowed difference. Default: none."
)
@CACHE
@KEY
@TYPES
@JSON
def renew(
    uri: str,
    requirements: Path,
    lock: Path,
    data: Path | None,
    tolerance: float,
    cache: Path | None,
    key: Path | None,
    trusted_types: tuple[str, ...],
    as_json: bool,
) -> None:
    """Register the model at URI with new packages, if it predicts the same.

    The training rows, the rows in --data, and a row with each optional column missing are
    predicted in the old and in the new environment.

    \b
    Example: lifecycle renew models:/tracking_quick_start@production
             --requirements model_requirements.txt --lock requirements.txt
    """
    from mlflow_lifecycle.datasets import read_table
    from mlflow_lifecycle.renew import renew_version
    from mlflow_lifecycle.signing.keys import own_key

    use_store()
    renewal = renew_version(
        uri,
        requirements,
        lock,
        key=key or own_key(),
        rows=read_table(data) if data else None,
        tolerance=tolerance,
        trusted_types=trusted_types,
        cache=cache,
    )
    same = f"within {tolerance}" if tolerance else "bit by bit"
    lines = [
        f"{renewal.uri} is {renewal.renewed_from} with new packages.",
        f"All {renewal.rows} predictions are the same, {same}.",
        f"Next: lifecycle release {renewal.uri} --same-predictions --data FILE --target COLUMN ...",
    ]
    print_result(renewal, lines, as_json)


@click.command(short_help="Show what differs between two versions.")
@click.argument("first")
@click.argument("second")
@ROWS
@click.option("--target", default="", metavar="COLUMN", help="The true values in --data.")
@click.option("--log", is_flag=True, help="Keep the result as a run.")
@CACHE
@PUBLIC_KEY
@TYPES
@JSON
def compare(
    first: str,
    second: str,
    data: Path | None,
    target: str,
    log: bool,
    cache: Path | None,
    public_key: Path | None,
    trusted_types: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what differs between the versions FIRST and SECOND.

    With --data, each version predicts the rows in its own environment.

    \b
    Example: lifecycle compare models:/tracking_quick_start/1 models:/tracking_quick_start/2
             --data test.csv --target species
    """
    from mlflow_lifecycle.datasets import read_table
    from mlflow_lifecycle.difference import compare_versions, log_difference, summary
    from mlflow_lifecycle.signing.keys import own_public_key

    if target and not data:
        raise InvalidInputError("--target needs rows: --data FILE")
    use_store()
    difference = compare_versions(
        first,
        second,
        public_key or own_public_key(),
        rows=read_table(data) if data else None,
        target=target,
        trusted_types=trusted_types,
        cache=cache,
    )
    lines = summary(difference)
    if log:
        lines.append(f"recorded in run {log_difference(difference).info.run_id}")
    changes = difference.changes.to_dict("records")
    answers = difference.other_answers.astype(str).to_dict("records")
    gain = asdict(difference.gain) if difference.gain else None
    result = vars(difference) | {"changes": changes, "other_answers": answers, "gain": gain}
    print_result(result, lines, as_json)


COMMANDS = (audit, renew, compare)
