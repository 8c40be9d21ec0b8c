"""Batches of rows: read from the record of a served version, and logged as runs.

MLflow's server keeps neither requests nor answers. The guard keeps them, and here they become rows again.
"""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lifecycle.monitoring import PREDICTION, Baseline, Judgement, answered
from lifecycle.verification import Verified

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Run


def recorded(record: Path, version: Verified, ids: Iterable[str] | None = None) -> pd.DataFrame:
    """Return rows that a served version was asked about, with what it answered, as the column ``prediction``.

    Args:
        record: the folder in which the server keeps requests and answers.
        version: that was asked. Answers of others do not count.
        ids: of the answers to take, in this order. Those of other clients do not count. By default all, by time.

    Returns:
        A row per row asked, with the ``id`` of the answer as the index. Refused requests are left out.

    Raises:
        ValueError: an answer is not in the record, or there is none.
    """
    texts = [path.read_text(encoding="utf-8") for path in Path(record).glob("requests-*.jsonl")]
    entries = [json.loads(line) for text in texts for line in text.split("\n")[:-1]]  # the last may not be whole yet
    asked = version.statement.registered_model, version.statement.version
    entries = [entry for entry in entries if entry["status"] == 200 and (entry["name"], entry["version"]) == asked]
    found = {entry["id"]: entry for entry in sorted(entries, key=lambda entry: entry["time"])}
    chosen = list(found if ids is None else ids)
    if lacking := [name for name in chosen if name not in found]:
        what = f"{len(lacking)} of {len(chosen)} answers of {version.uri}"
        raise ValueError(f"{what} are not in the record {record}, the first is {lacking[0]}.")
    if not chosen:
        raise ValueError(f"There is no answer of {version.uri} in the record {record}.")
    answers = {name: {PREDICTION: found[name]["predictions"], "id": name} for name in chosen}
    tables = [pd.DataFrame(found[name]["inputs"]).assign(**answer) for name, answer in answers.items()]
    return pd.concat(tables, ignore_index=True).set_index("id")


def picture(judgement: Judgement) -> "Figure":
    """Return a figure of the drift of each column, as a multiple of the size that counts."""
    from matplotlib.figure import Figure

    columns = judgement.drift[::-1]
    figure = Figure(figsize=(7, 0.6 + 0.3 * len(columns)), layout="constrained")
    axes = figure.subplots()
    colours = ["firebrick" if column.alarm else "lightsteelblue" for column in columns]
    axes.barh(
        [column.column for column in columns], [column.size / column.smallest for column in columns], color=colours
    )
    axes.axvline(1, color="black", linestyle="--")
    axes.set_xlabel("size of the drift, in multiples of the smallest that counts; red: an alarm")
    return figure


def log_batch(
    version: Verified, known: Baseline, rows: pd.DataFrame, judgement: Judgement, name: str = "batch"
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
    from mlflow.entities import LoggedModelInput

    with contextlib.suppress(ValueError, KeyError):
        rows = answered(known, rows)
    columns = {"targets": known.target if known.target in rows else None}
    columns["predictions"] = PREDICTION if PREDICTION in rows else None
    data = mlflow.data.from_pandas(rows, name=name, **columns)
    with mlflow.start_run(run_name=name, tags={"verdict": judgement.verdict.value, "model": version.uri}) as run:
        mlflow.log_input(data, context="monitoring", model=LoggedModelInput(version.model_id))
        if judgement.accuracy:
            mlflow.log_metric("accuracy", judgement.accuracy.value, model_id=version.model_id, dataset=data)
        mlflow.log_table(rows, "batch.json")
        mlflow.log_dict(asdict(judgement), "judgement.json")
        mlflow.log_figure(picture(judgement), "drift.png")
    return run
