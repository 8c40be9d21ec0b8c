"""The commands about a model in use: serve, watch, score."""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    import pandas as pd


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
    help="The port; 0 takes a free one.",
)
@click.option("--record", type=FILE, metavar="FOLDER", help="Record requests and answers there.")
@click.option(
    "--keep-days",
    type=click.IntRange(1),
    default=30,
    show_default=True,
    help="Remove records that are older.",
)
@click.option(
    "--record-limit",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    metavar="MB",
    help="Size limit of the record. The oldest files are removed.",
)
@click.option(
    "--leave-out", multiple=True, metavar="COLUMN", help="Column not to record (repeatable)."
)
@click.option(
    "--limits",
    type=click.FloatRange(0),
    metavar="MARGIN",
    help="Refuse numbers outside the training range.",
)
@click.option(
    "--metrics-address",
    default="",
    metavar="HOST:PORT",
    help="Answer GET /metrics only at this address.",
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
    record_limit: int,
    leave_out: tuple[str, ...],
    limits: float | None,
    metrics_address: str,
    cache: Path | None,
    offline: bool,
) -> None:
    """Serve the release at URI in the environment that it recorded, until Ctrl+C.

    POST rows to /invocations. GET /ping, /version and /metrics (for Prometheus) describe the
    server.

    With --limits 0 a number outside the training range is refused. With --limits 0.5 it may be
    outside by half of that range.

    \b
    Example: lifecycle serve models:/tracking_quick_start@production --record record
    """
    from mlflow_lifecycle.serving import serve
    from mlflow_lifecycle.signing.keys import own_public_key
    from mlflow_lifecycle.ui import is_in_use

    if port and is_in_use(port):
        raise ServingFailedError(f"Port {port} is in use. Choose another one: --port {port + 1}")
    use_store()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # docker stop ends it as Ctrl+C does
    with serve(
        uri,
        public_key or own_public_key(),
        trusted_types=trusted_types,
        host=host,
        port=port,
        record=record,
        keep_days=keep_days,
        record_bytes=record_limit * 1_000_000,
        leave_out=leave_out,
        limits=limits,
        metrics_address=metrics_address,
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
    raise ServingFailedError(f"The server ended with status {status}. The log above says why.")


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
    "--shift", default=0.5, show_default=True, help="Limit of drift, in standard deviations."
)
@click.option(
    "--share", default=0.1, show_default=True, help="Limit of drift, as a share of the rows."
)
@click.option("--loss", default=0.05, show_default=True, help="Limit of the loss of accuracy.")
@click.option(
    "--error", default=0.2, show_default=True, help="Limit of the relative increase of the error."
)
@click.option(
    "--accept-change",
    default="",
    metavar="REASON",
    help="Accept the change, and record the reason.",
)
@click.option(
    "--experiment", default="monitoring", show_default=True, help="The experiment of the run."
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
    error: float,
    accept_change: str,
    experiment: str,
    as_json: bool,
) -> None:
    """Compare rows with the training rows of the version at URI, and log the result as a run.

    The exit status is 0 without an alarm or with an accepted change, 2 for an alarm, 1 for an
    error. If you know that the alarm shows a true change and no fault, accept it with
    --accept-change "the reason". A new model may then learn from these rows.

    \b
    Example: lifecycle watch models:/tracking_quick_start@production --data batch.csv
    """
    from dataclasses import asdict

    from mlflow_lifecycle.datasets import read_table
    from mlflow_lifecycle.experiments import open_experiment
    from mlflow_lifecycle.monitoring.batches import log_batch
    from mlflow_lifecycle.monitoring.drift import Limits
    from mlflow_lifecycle.monitoring.judge import Verdict, judge, load_reference
    from mlflow_lifecycle.signing.keys import own_public_key
    from mlflow_lifecycle.signing.verify import verified

    table = read_table(data)
    use_store()
    limits = Limits(shift=shift, share=share, loss=loss, error=error)
    public_key = public_key or own_public_key()
    with verified(uri, public_key, trusted_types=trusted_types) as version:
        reference = load_reference(version)
        if target:
            table = _rename_target(table, target, reference.target)
        judgement = judge(reference, table, limits, accept_change)
        open_experiment(experiment, "Batches of rows, judged.", Path.cwd())
        run = log_batch(version, reference, table, judgement, data.stem)
    lines = [
        f"{judgement.verdict}: {judgement.rows} rows",
        *judgement.reasons,
        f"recorded in run {run.info.run_id}",
    ]
    print_result(asdict(judgement) | {"run_id": run.info.run_id}, lines, as_json)
    quiet = judgement.verdict in (Verdict.QUIET, Verdict.ACCEPTED)
    raise SystemExit(0 if quiet else 2)


def _rename_target(table: "pd.DataFrame", target: str, known: str) -> "pd.DataFrame":
    """Return the table with its column of labels named as in the training rows."""
    if target not in table:
        columns = ", ".join(table)
        raise InvalidInputError(f"There is no column {target!r}. The columns are: {columns}")
    if target != known and known in table:
        raise InvalidInputError(
            f"There is a column {target!r}, and also {known!r}, the target of the model. "
            f"Omit --target, or remove the column {known!r} from the file."
        )
    return table.rename(columns={target: known})


@click.command(short_help="Score a Parquet dataset.")
@click.argument("uri")
@click.option("--data", required=True, metavar="DIR", help="A Parquet file or a folder of them.")
@click.option("--output", required=True, metavar="DIR", help="The predictions; must not exist.")
@click.option(
    "--key",
    default="id",
    show_default=True,
    metavar="COLUMN",
    help="The column with the integer key of each row.",
)
@click.option("--engine", type=click.Choice(["local", "spark"]), default="local", show_default=True)
@click.option("--master", default="local[*]", show_default=True, help="Spark's address.")
@PUBLIC_KEY
@TYPES
@click.option("--this-environment", is_flag=True, help="Predict in this environment; build none.")
@JSON
def score(
    uri: str,
    data: str,
    output: str,
    key: str,
    engine: str,
    master: str,
    public_key: Path | None,
    trusted_types: tuple[str, ...],
    this_environment: bool,
    as_json: bool,
) -> None:
    """Score a Parquet dataset with the version at URI, in the environment that it recorded.

    The engine local is one process on this machine. The engine spark is for data on a cluster.
    The run is logged in the experiment scoring.

    \b
    Example: lifecycle score models:/penguins@production --data rows --output predictions
    """
    from mlflow_lifecycle.batch import check_output, score
    from mlflow_lifecycle.experiments import open_experiment
    from mlflow_lifecycle.signing.keys import own_public_key

    use_store()
    check_output(output)
    open_experiment("scoring", "Data sets scored by registered models.", Path.cwd())
    scored = score(
        uri,
        data,
        output,
        public_key=public_key or own_public_key(),
        key=key,
        engine=engine,
        master=master,
        trusted_types=trusted_types,
        own_environment=not this_environment,
    )
    text = f"{scored.rows} rows (digest {scored.digest}) scored into {output}, run {scored.run_id}"
    print_result(scored, [text], as_json)


COMMANDS = (serve, watch, score)
