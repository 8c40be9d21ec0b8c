"""The command about what a served model is asked: watch."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from mlflow_lifecycle.shell import JSON, PUBLIC_KEY, TYPES, in_one_line, use_store


class ErrorIsOne(click.Command):
    """A command that ends with 1 where it was called wrongly; click's 2 would be taken for an alarm."""

    def make_context(self, *arguments, **options) -> click.Context:
        """Return click's own context."""
        try:
            return super().make_context(*arguments, **options)
        except click.UsageError as error:
            error.exit_code = 1
            raise


@click.command(cls=ErrorIsOne)
@click.argument("uri")
@click.option("--rows", required=True, metavar="CSV", help="What the model was asked, with or without labels.")
@click.option("--target", metavar="COLUMN", help="The labels, if the file names them otherwise than the model's rows.")
@PUBLIC_KEY
@TYPES
@click.option("--shift", default=0.5, show_default=True, help="Drift that counts, in standard deviations.")
@click.option("--share", default=0.1, show_default=True, help="Drift that counts, as the share of rows of a category.")
@click.option("--loss", default=0.05, show_default=True, help="Loss of accuracy that counts.")
@click.option("--experiment", default="monitoring", show_default=True, help="Where the run goes.")
@JSON
def watch(
    uri: str,
    rows: str,
    target: str | None,
    public_key: Path | None,
    trusted_types: tuple[str, ...],
    experiment: str,
    as_json: bool,
    **limits,
) -> None:
    """Judge what the version at URI was asked. Exit status: 0 quiet, 2 alarm, 1 error. For cron."""
    with in_one_line():
        from mlflow_lifecycle.batches import log_batch
        from mlflow_lifecycle.drift import Limits
        from mlflow_lifecycle.keys import own_public_key
        from mlflow_lifecycle.monitoring import Verdict, baseline, judge
        from mlflow_lifecycle.store import open_experiment
        from mlflow_lifecycle.tables import read_table
        from mlflow_lifecycle.verification import verified

        table = read_table(rows)
        use_store()
        with verified(uri, public_key or own_public_key(Path.cwd()), trusted_types=trusted_types) as version:
            known = baseline(version)
            if target and target not in table:
                raise ValueError(f"There is no column {target!r} in {rows}. The columns are: {', '.join(table)}")
            if target and target != known.target and known.target in table:
                remedy = f"Leave --target out, or take the column {known.target!r} out of the file."
                raise ValueError(f"{rows} has {target!r} and also {known.target!r}, the model's own labels. {remedy}")
            table = table.rename(columns={target: known.target} if target else {})
            judgement = judge(known, table, Limits(**limits))
            open_experiment(experiment, "Batches of rows, judged.", Path.cwd())
            run = log_batch(version, known, table, judgement, Path(rows).stem)
    lines = [f"{judgement.verdict}: {judgement.rows} rows", *judgement.reasons, f"recorded in run {run.info.run_id}"]
    click.echo(json.dumps(asdict(judgement) | {"run_id": run.info.run_id}) if as_json else "\n".join(lines))
    raise SystemExit(0 if judgement.verdict == Verdict.QUIET else 2)


COMMANDS = (watch,)
