"""Read batches of rows from the record of a server, and log them as runs.

MLflow's server records neither requests nor answers. Ours does.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import mlflow
import pandas as pd
from matplotlib.axes import Axes
from mlflow.entities import LoggedModelInput, Run

from mlflow_lifecycle.monitoring.judge import Judgement, Reference, add_predictions
from mlflow_lifecycle.serving import read_record
from mlflow_lifecycle.signing.verify import Verified


def read_batch(
    record: Path,
    version: Verified,
    ids: Iterable[str] | None = None,
) -> pd.DataFrame:
    """Return the rows of requests to a version, with its answers in the column ``prediction``.

    Answers of other versions are left out. Dates are text, as in JSON.

    Args:
        record: the folder in which the server records requests and answers.
        version: the version that answered.
        ids: the ids of the answers, in the order wanted. By default all answers, in order of time.

    Returns:
        The rows, with the id of the answer as the index.

    Raises:
        KeyError: an answer is not in the record.
    """
    statement = version.statement
    rows = read_record(record).set_index("request_id")
    same_name = rows["model_name"] == statement.registered_model
    same_version = rows["model_version"] == statement.version
    rows = rows[same_name & same_version]
    rows = rows.drop(columns=["request_time", "model_name", "model_version"])
    return rows if ids is None else rows.loc[list(ids)]


def plot_differences(
    judgement: Judgement,
    axes: Axes,
    title: str = "",
) -> None:
    """Draw the size of each difference on ``axes`` as a multiple of its limit; alarms are red."""
    names = []
    for place, difference in enumerate(reversed(judgement.differences)):
        color = "firebrick" if difference.alarm else "lightsteelblue"
        axes.barh(place, difference.size / difference.limit, color=color)
        names.append(difference.column + ", outside" * difference.outside)
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
    data = mlflow.data.from_pandas(rows, name=name)
    tags = {"verdict": judgement.verdict.value, "model": version.uri}
    if judgement.accepted:
        tags["accepted_change"] = judgement.accepted
    with mlflow.start_run(run_name=name, tags=tags) as run:
        mlflow.log_input(data, "monitoring", model=LoggedModelInput(version.model_id))
        if judgement.performance:
            mlflow.log_metric(
                judgement.metric,
                judgement.performance.value,
                model_id=version.model_id,
                dataset=data,
            )
        mlflow.log_table(rows, "batch.json")
        mlflow.log_dict(asdict(judgement), "judgement.json")
    return run
