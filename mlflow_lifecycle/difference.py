"""Compare two model versions: packages, data, origin, and what they answer.

MLflow's interface compares the parameters and metrics of two runs. It does not show that packages
or training rows differ, or which rows the two versions answer differently.
"""

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.entities import Run

from mlflow_lifecycle.comparison import Interval, rows_interval
from mlflow_lifecycle.datasets import check_columns, check_complete, in_markdown
from mlflow_lifecycle.environments import own_environment, predict_in
from mlflow_lifecycle.experiments import create_experiment
from mlflow_lifecycle.pins import names_and_versions, read_pins
from mlflow_lifecycle.scoring import (
    Predictions,
    differences,
    equal_rows,
    measure_of,
    order_columns,
    score_rows,
)
from mlflow_lifecycle.signing.verify import Verified, verified

EXPERIMENT = "comparisons"


@dataclass(frozen=True)
class Difference:
    """What differs between two versions.

    Attributes:
        first: the address of a version.
        second: the address of the other one.
        changes: a row per fact that differs: what it is, its name, and its value in each version.
        rows: the number of rows that both predicted.
        measure: what the rows were scored by; empty without a target.
        gain: the mean score of the second version minus that of the first; None without a target.
        other_answers: the rows that the two answer differently, the answers first.
    """

    first: str
    second: str
    changes: pd.DataFrame
    rows: int
    measure: str
    gain: Interval | None
    other_answers: pd.DataFrame


def compare_versions(
    first: str,
    second: str,
    public_key: Path,
    *,
    rows: pd.DataFrame | None = None,
    target: str = "",
    trusted_types: Collection[str] = (),
    cache: Path | None = None,
) -> Difference:
    """Return what differs between two versions. Each predicts in its own environment.

    Args:
        first: a version: ``models:/name/3`` or ``models:/name@production``.
        second: the other one.
        public_key: the public half of the key that signed both.
        rows: rows that both predict; without them no environment is built.
        target: the column with the true values, if there is one.
        trusted_types: see ``mlflow_lifecycle.signing.verify.verified``.
        cache: see ``mlflow_lifecycle.environments.build_environment``.

    Raises:
        NotVerifiedError: a version is not what was signed.
        EnvironmentNotBuiltError: an environment cannot be built.
        PredictionFailedError: a version cannot predict the rows.
        InvalidInputError: a column or a value of the target is missing, or the tasks of the
            versions differ.
    """
    with (
        tempfile.TemporaryDirectory(prefix="comparing-") as scratch,
        verified(first, public_key, purpose="candidate", trusted_types=trusted_types) as one,
        verified(second, public_key, purpose="candidate", trusted_types=trusted_types) as other,
    ):
        changes = find_changes(describe(one), describe(other))
        if rows is None:
            return Difference(first, second, changes, 0, "", None, pd.DataFrame())
        if target:
            check_columns(rows, [target])
            check_complete(rows, target)
        cache = cache or Path(scratch)  # versions with equal packages share an environment
        before = predict_in_own(one, rows, cache)
        after = predict_in_own(other, rows, cache)
    measure = ""
    gain = None
    if target:
        measure = measure_of(before, after)
        scores = score_rows(before, rows[target], measure)
        gain = rows_interval(score_rows(after, rows[target], measure), scores)
    other_answers = find_other_answers(before, after, rows)
    return Difference(first, second, changes, len(rows), measure, gain, other_answers)


def describe(copy: Verified) -> dict[tuple[str, str], str]:
    """Return the facts about a version, by what they are and their name."""
    statement = copy.statement
    facts = {
        ("task", ""): statement.task,
        ("training rows", "SHA-256"): statement.training_rows[:12],
        ("commit", ""): statement.commit,
    }
    for pin in names_and_versions(read_pins(copy.folder / "requirements.txt")):
        name, _, version = pin.partition("==")
        facts["package", name] = version
    signature = mlflow.models.Model.load(str(copy.folder)).signature
    for column in signature.inputs if signature else []:
        facts["input column", column.name] = column.type.name
    for name, value in statement.parameters.items():
        facts["parameter", name] = value
    for name, value in statement.metrics.items():
        facts["metric", name] = f"{value:.4f}"
    return facts


def find_changes(
    first: dict[tuple[str, str], str], second: dict[tuple[str, str], str]
) -> pd.DataFrame:
    """Return the facts that differ, a row per fact. A missing fact is empty."""
    changes = []
    for key in dict.fromkeys([*first, *second]):
        before = first.get(key, "")
        after = second.get(key, "")
        if before != after:
            changes.append((*key, before, after))
    return pd.DataFrame(changes, columns=["what", "name", "first", "second"])


def predict_in_own(copy: Verified, rows: pd.DataFrame, cache: Path) -> Predictions:
    """Return what a version predicts in its own environment."""
    features = order_columns(copy.folder, rows)
    with own_environment(copy.folder, copy.packages, cache) as python:
        return predict_in(python, copy.folder, features)


def find_other_answers(before: Predictions, after: Predictions, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that two versions answer differently, the largest difference first."""
    answers = pd.DataFrame({"first": before.predicted, "second": after.predicted}, rows.index)
    answers["difference"] = differences(before, after)
    table = pd.concat([answers, rows], axis=1)
    changed = table[~equal_rows(before, after)]
    return changed.sort_values("difference", ascending=False, kind="stable")


def summary(difference: Difference) -> list[str]:
    """Return what differs, in a sentence per line."""
    lines = []
    for change in difference.changes.itertuples(index=False):
        what = f"{change.what} {change.name}".strip()
        lines.append(f"{what}: {change.first or '(none)'} -> {change.second or '(none)'}")
    if difference.gain:
        lines.append(f"{difference.measure}: {difference.gain}, second minus first")
    if difference.rows:
        other = difference.other_answers
        count = (other["first"] != other["second"]).sum()
        lines.append(
            f"{len(other)} of {difference.rows} rows are answered differently, "
            f"{count} with another prediction."
        )
    return lines or ["Nothing differs."]


def log_difference(difference: Difference) -> Run:
    """Log a difference as a run, with files that MLflow's interface shows, and return the run."""
    description = "Each run compares two versions."
    experiment = create_experiment(mlflow.get_tracking_uri(), EXPERIMENT, description)
    title = f"{difference.first} and {difference.second}"
    lines = [f"# {in_markdown(title)}", *(f"- {in_markdown(line)}" for line in summary(difference))]
    with mlflow.start_run(
        experiment_id=experiment.experiment_id, run_name=title, nested=True
    ) as run:
        mlflow.log_text("\n".join(lines) + "\n", "difference.md")
        mlflow.log_table(difference.changes, "changes.json")
        if len(difference.other_answers):
            mlflow.log_table(difference.other_answers.astype(str), "other_answers.json")
    return run
