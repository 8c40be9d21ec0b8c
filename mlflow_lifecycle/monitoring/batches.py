"""Batches of rows: read from the record of a served version, and logged as runs.

MLflow's server keeps neither requests nor answers. The guard keeps them, and here they become rows again.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from mlflow.models import Model

from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.monitoring.judge import PREDICTION, Baseline, Judgement, answered
from mlflow_lifecycle.serving import read_record
from mlflow_lifecycle.signing.verify import Verified

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from mlflow.entities import Run


def recorded(record: Path, version: Verified, ids: Iterable[str] | None = None) -> pd.DataFrame:
    """Return rows that a served version was asked about, with what it answered, as the column ``prediction``.

    Args:
        record: the folder in which the server keeps requests and answers.
        version: that was asked. Answers of others do not count.
        ids: of the answers to take, in this order. Those of other clients do not count. By default all, by time.

    Returns:
        A row per row asked, with the id of the answer as the index. Refused requests are left out.

    Raises:
        ValueError: an answer is not in the record, or there is none.
    """
    rows, asked = (
        read_record(record),
        (version.statement.registered_model, version.statement.version),
    )
    rows = rows[(rows["model_name"] == asked[0]) & (rows["model_version"] == asked[1])].set_index(
        "request_id"
    )
    rows = rows.drop(columns=["request_time", "model_name", "model_version"])
    signature = Model.load(str(version.folder)).signature
    for column in signature.inputs if signature else ():
        if getattr(column.type, "name", "") == "datetime" and column.name in rows:
            rows[column.name] = pd.to_datetime(rows[column.name], format="ISO8601")  # JSON has text
    if rows.empty:
        raise InvalidInputError(f"There is no answer of {version.uri} in the record {record}.")
    if ids is None:
        return rows
    chosen, known = list(ids), set(rows.index)
    if lacking := [name for name in chosen if name not in known]:
        what = f"{len(lacking)} of {len(chosen)} answers of {version.uri}"
        raise InvalidInputError(
            f"{what} are not in the record {record}, the first is {lacking[0]}."
        )
    return rows.loc[chosen]


def plot_drift(judgement: Judgement, axes: "Axes", title: str = "") -> None:
    """Draw the drift of each column on ``axes``, as a multiple of the size that counts; red is an alarm."""
    columns = judgement.drift[::-1]
    colours = ["firebrick" if column.alarm else "lightsteelblue" for column in columns]
    sizes = [column.size / column.smallest for column in columns]
    axes.barh(range(len(columns)), sizes, color=colours)
    axes.set_yticks(range(len(columns)), [column.column for column in columns], parse_math=False)
    axes.axvline(1, color="black", linestyle="--")
    axes.set(xlabel="size of the drift, 1 counts", title=title)


def log_batch(
    version: Verified,
    known: Baseline,
    rows: pd.DataFrame,
    judgement: Judgement,
    name: str = "batch",
) -> "Run":
    """Log a batch as a run in the active experiment, and return the run.

    The batch is its input, together with the model that answered. The accuracy belongs to both.

    Args:
        version: the version that was asked.
        known: what the batch was compared with.
        rows: the batch.
        judgement: on the batch.
        name: of the run and of the dataset.
    """
    import mlflow
    from matplotlib.figure import Figure
    from mlflow.entities import LoggedModelInput

    with contextlib.suppress(ValueError, KeyError):
        rows = answered(known, rows)
    columns = {"targets": known.target if known.target in rows else None}
    columns["predictions"] = PREDICTION if PREDICTION in rows else None
    data = mlflow.data.from_pandas(rows, name=name, **columns)
    figure = Figure(figsize=(7, 3), layout="constrained")
    plot_drift(judgement, figure.subplots())
    with mlflow.start_run(
        run_name=name, tags={"verdict": judgement.verdict.value, "model": version.uri}
    ) as run:
        mlflow.log_input(data, context="monitoring", model=LoggedModelInput(version.model_id))
        if judgement.accuracy:
            mlflow.log_metric(
                "accuracy", judgement.accuracy.value, model_id=version.model_id, dataset=data
            )
        mlflow.log_table(rows, "batch.json")
        mlflow.log_dict(asdict(judgement), "judgement.json")
        mlflow.log_figure(figure, "drift.png")
    return run
