"""Read batches of rows from the record of a server, and log them as runs.

MLflow's server records neither requests nor answers. Ours does.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import mlflow
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mlflow.entities import LoggedModelInput, Run

from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.monitoring.judge import PREDICTION, Judgement, Reference, add_predictions
from mlflow_lifecycle.serving import read_record
from mlflow_lifecycle.signing.verify import Verified


def read_batch(
    record: Path,
    version: Verified,
    ids: Iterable[str] | None = None,
) -> pd.DataFrame:
    """Return the rows of requests to a version, with its answers in the column ``prediction``.

    Answers of other versions are left out.

    Args:
        record: the folder in which the server records requests and answers.
        version: the version that answered.
        ids: the ids of the answers, in the order wanted. By default all answers, in order of time.

    Returns:
        The rows, with the id of the answer as the index.

    Raises:
        InvalidInputError: an answer is not in the record, or there is none.
    """
    rows = read_record(record)
    statement = version.statement
    same_name = rows["model_name"] == statement.registered_model
    same_version = rows["model_version"] == statement.version
    rows = rows[same_name & same_version].set_index("request_id")
    rows = rows.drop(columns=["request_time", "model_name", "model_version"])
    if rows.empty:
        raise InvalidInputError(f"There is no answer of {version.uri} in the record {record}.")
    # JSON has no dates: the record holds them as text.
    signature = mlflow.models.Model.load(str(version.folder)).signature
    for column in signature.inputs:
        if column.type == mlflow.types.DataType.datetime and column.name in rows:
            rows[column.name] = pd.to_datetime(rows[column.name], format="ISO8601")
    if ids is None:
        return rows
    ids = list(ids)
    missing = [name for name in ids if name not in rows.index]
    if missing:
        raise InvalidInputError(
            f"{len(missing)} of {len(ids)} answers of {version.uri} are not in the record "
            f"{record}, the first is {missing[0]}."
        )
    return rows.loc[ids]


def plot_differences(judgement: Judgement, axes: Axes, title: str = "") -> None:
    """Draw the size of each difference on ``axes`` as a multiple of its limit; alarms are red."""
    differences = judgement.differences[::-1]
    names = []
    for difference in differences:
        names.append(difference.column + ", outside" * difference.outside)
        axes.barh(
            len(names) - 1,
            difference.size / difference.limit,
            color="firebrick" if difference.alarm else "lightsteelblue",
        )
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.axvline(1, color="black", linestyle="--")
    axes.set(xlabel="size as a multiple of its limit", title=title)


def log_batch(
    version: Verified,
    reference: Reference,
    rows: pd.DataFrame,
    judgement: Judgement,
    name: str = "batch",
) -> Run:
    """Log a batch as a run in the active experiment, and return the run.

    Its inputs are the rows and the model that answered. The metric belongs to both.

    Args:
        version: the version that answered.
        reference: what the batch was compared with.
        rows: the batch.
        judgement: the verdict on it.
        name: of the run and of the dataset.
    """
    if judgement.differences:
        rows = add_predictions(reference, rows)
    data = mlflow.data.from_pandas(
        rows,
        name=name,
        targets=reference.target if reference.target in rows else None,
        predictions=PREDICTION if PREDICTION in rows else None,
    )
    model = LoggedModelInput(version.model_id)
    tags = {"verdict": judgement.verdict.value, "model": version.uri}
    if judgement.accepted:
        tags["accepted_change"] = judgement.accepted
    figure = Figure(figsize=(7, 4), layout="constrained")
    plot_differences(judgement, figure.subplots())
    with mlflow.start_run(run_name=name, tags=tags) as run:
        mlflow.log_input(data, context="monitoring", model=model)
        if judgement.performance:
            value = judgement.performance.value
            mlflow.log_metric(judgement.metric, value, model_id=version.model_id, dataset=data)
        mlflow.log_table(rows, "batch.json")
        mlflow.log_dict(asdict(judgement), "judgement.json")
        mlflow.log_figure(figure, "differences.png")
    return run
