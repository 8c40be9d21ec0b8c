"""The commands about a model in use: serve, watch, score."""

import sys
from pathlib import Path

import click

from mlflow_lifecycle.cli.options import (
    CACHE,
    DATA,
    FILE,
    JSON,
    PUBLIC_KEY,
    TYPES,
    print_lines,
    print_result,
    use_store,
)
from mlflow_lifecycle.exceptions import InvalidInputError, ServingFailedError


@click.command(short_help="Serve a release over HTTP.")
@click.argument("uri")
@PUBLIC_KEY
@TYPES
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=5001,
    show_default=True,
    help="0 takes a free port.",
)
@click.option("--record", type=FILE, metavar="FOLDER", help="Keep requests and answers there.")
@click.option(
    "--keep-days",
    type=click.IntRange(1),
    default=30,
    show_default=True,
    help="Remove older records.",
)
@click.option(
    "--leave-out", multiple=True, metavar="COLUMN", help="Not recorded, such as personal data."
)
@click.option(
    "--limits",
    type=click.FloatRange(0),
    metavar="MARGIN",
    help="Refuse numbers outside the training range.",
)
@CACHE
@click.option("--offline", is_flag=True, help="Take all packages from the cache.")
def serve(
    uri: str,
    public_key: Path | None,
    trusted_types: tuple[str, ...],
    host: str,
    port: int,
    record: Path | None,
    keep_days: int,
    leave_out: tuple[str, ...],
    limits: float | None,
    cache: Path | None,
    offline: bool,
) -> None:
    """Serve the release at URI in the environment that it recorded, until Ctrl+C.

    With --limits 0 a number outside the training range is refused. With --limits 0.5 it may be
    outside by half of that range.

    Example: lifecycle serve models:/tracking_quick_start@production --record record
    """
    from mlflow_lifecycle.serving import serve
    from mlflow_lifecycle.signing.keys import own_public_key

    use_store()
    with serve(
        uri,
        public_key or own_public_key(),
        trusted_types=trusted_types,
        host=host,
        port=port,
        record=record,
        keep_days=keep_days,
        leave_out=leave_out,
        limits=limits,
        cache=cache,
        offline=offline,
        log=sys.stderr,
    ) as server:
        address = f"{server.address}/invocations"
        print_lines([f"Version {server.version} of {server.name} answers: {address}"])
        try:
            status = server.process.wait()
        except KeyboardInterrupt:
            print_lines(["Ended."])
            return
    raise ServingFailedError(f"The server has ended with status {status}. The reason is above.")


class ErrorIsOne(click.Command):
    """A command with exit status 1 for a usage error, because 2 means an alarm."""

    def make_context(self, *arguments, **options) -> click.Context:
        """Return the context of click."""
        try:
            return super().make_context(*arguments, **options)
        except click.UsageError as error:
            error.exit_code = 1
            raise


@click.command(cls=ErrorIsOne, short_help="Compare rows with the training rows.")
@click.argument("uri")
@DATA
@click.option(
    "--target", metavar="COLUMN", help="The labels. Default: the name in the training rows."
)
@PUBLIC_KEY
@TYPES
@click.option(
    "--shift", default=0.5, show_default=True, help="Drift that counts, in standard deviations."
)
@click.option(
    "--share", default=0.1, show_default=True, help="Drift that counts, as a share of the rows."
)
@click.option("--loss", default=0.05, show_default=True, help="Loss of accuracy that counts.")
@click.option(
    "--experiment", default="monitoring", show_default=True, help="Where the run is logged."
)
@JSON
def watch(
    uri: str,
    data: Path,
    target: str | None,
    public_key: Path | None,
    trusted_types: tuple[str, ...],
    shift: float,
    share: float,
    loss: float,
    experiment: str,
    as_json: bool,
) -> None:
    """Judge the rows that the version at URI was asked about, and log the result as a run.

    The exit status is 0 if nothing has changed, 2 for an alarm and 1 for an error.

    Example: lifecycle watch models:/tracking_quick_start@production --data batch.csv
    """
    from dataclasses import asdict

    from mlflow_lifecycle.datasets import read_table
    from mlflow_lifecycle.experiments import open_experiment
    from mlflow_lifecycle.monitoring.batches import log_batch
    from mlflow_lifecycle.monitoring.drift import Limits
    from mlflow_lifecycle.monitoring.judge import Verdict, baseline, judge
    from mlflow_lifecycle.signing.keys import own_public_key
    from mlflow_lifecycle.signing.verify import verified

    table = read_table(data)
    use_store()
    public_key = public_key or own_public_key()
    with verified(uri, public_key, trusted_types=trusted_types) as version:
        known = baseline(version)
        if target and target not in table:
            columns = ", ".join(table)
            raise InvalidInputError(
                f"There is no column {target!r} in {data}. The columns are: {columns}"
            )
        if target and target != known.target and known.target in table:
            raise InvalidInputError(
                f"{data} has {target!r} and also {known.target!r}, the model's own labels. "
                f"Leave --target out, or take the column {known.target!r} out of the file."
            )
        if target:
            table = table.rename(columns={target: known.target})
        judgement = judge(known, table, Limits(shift=shift, share=share, loss=loss))
        open_experiment(experiment, "Batches of rows, judged.", Path.cwd())
        run = log_batch(version, known, table, judgement, data.stem)
    lines = [
        f"{judgement.verdict}: {judgement.rows} rows",
        *judgement.reasons,
        f"recorded in run {run.info.run_id}",
    ]
    print_result(asdict(judgement) | {"run_id": run.info.run_id}, lines, as_json)
    raise SystemExit(0 if judgement.verdict == Verdict.QUIET else 2)


@click.command(short_help="Score a Parquet data set.")
@click.argument("uri")
@click.option("--data", required=True, metavar="DIR", help="A Parquet file or a folder of them.")
@click.option("--output", required=True, metavar="DIR", help="The predictions; must not exist.")
@click.option("--key", default="id", show_default=True, help="The column of unique integers.")
@click.option("--master", default="local[*]", show_default=True, help="Spark's address.")
@PUBLIC_KEY
@TYPES
@click.option("--this-environment", is_flag=True, help="Build no environment.")
@click.option("--experiment", default="scoring", show_default=True, help="Where the run is logged.")
@JSON
def score(
    uri: str,
    data: str,
    output: str,
    key: str,
    master: str,
    public_key: Path | None,
    trusted_types: tuple[str, ...],
    this_environment: bool,
    experiment: str,
    as_json: bool,
) -> None:
    """Score a Parquet data set with the version at URI, in the environment that it recorded.

    Example: lifecycle score models:/digits@production --data rows --output predictions
    """
    from mlflow_lifecycle.batch import check_result, score
    from mlflow_lifecycle.experiments import open_experiment
    from mlflow_lifecycle.signing.keys import own_public_key

    use_store()
    check_result(output)
    public_key = public_key or own_public_key()
    open_experiment(experiment, "Data sets scored by registered models.", Path.cwd())
    scored = score(
        uri,
        data,
        output,
        key=key,
        master=master,
        public_key=public_key,
        trusted_types=trusted_types,
        own_environment=not this_environment,
    )
    text = f"{scored.rows} rows (digest {scored.digest}) scored into {output}, run {scored.run_id}"
    print_result(scored, [text], as_json)


COMMANDS = (serve, watch, score)
