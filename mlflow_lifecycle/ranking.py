"""The runs of an experiment that can be compared, and the order of their combinations by the one decision rule.

MLflow sorts runs by a metric. It does not ask whether they were scored on the same rows, takes the best of repeated
runs for the model's score, and shows no tie.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import mlflow
import numpy as np
import pandas as pd
from mlflow.entities import Run

from mlflow_lifecycle.comparison import Interval, choose, folds_interval

# What a dataset was to a run, as in MLflow's tag ``mlflow.data.context``. The first that the run has counts.
SCORED, LEARNED = ("validation", "test", "evaluation"), ("train", "training")
FOLD_SCORES = (
    "fold_scores.json"  # from mlflow.log_table: the columns repeat and fold, and one per score
)
BY_FOLDS = (
    "a difference counts when its 95 % interval, over the same folds, leaves out 0. The simplest combination wins, "
    "unless another is better by a difference that counts; of several such, the one with the largest difference. The "
    "combination that began first is taken for the simplest. How far repeated runs differ is not in the interval, but "
    "in the range"
)
BY_MEANS = (
    "the highest mean wins, and among equals the one that began first, which is taken for the simplest. Not every run "
    "recorded scores of the same folds, so nothing tells whether a difference is more than chance"
)


@dataclass(frozen=True)
class Score:
    """The mean of a metric over the runs of a combination, and their range."""

    mean: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        """Return the mean, and the range if there is one."""
        spread = f" ({self.lowest:.4f} to {self.highest:.4f})" if self.lowest < self.highest else ""
        return f"{self.mean:.4f}{spread}"


@dataclass(frozen=True)
class Combination:
    """A model on a feature set: its scores by metric, and how far it is from the winner, where folds tell that."""

    name: str
    model: str
    feature_set: str
    runs: int
    scores: dict[str, Score]
    against_winner: Interval | None


@dataclass(frozen=True)
class Ranking:
    """The combinations, the winner first and then by their mean; the names of those tied with it; what decided."""

    combinations: list[Combination]
    tied: list[str]
    rule: str


def is_final(run: Run) -> bool:
    """Tell whether ``run`` is a final evaluation. MLflow keeps True as "True", in SQLite also as "1"."""
    return run.data.tags.get("final_evaluation", "").lower() in ("true", "1")


def is_candidate(run: Run) -> bool:
    """Tell whether ``run`` was made to be compared: not as a trial of a search, and not as a final evaluation."""
    tags = run.data.tags
    return (
        {"model", "feature_set"} <= set(tags)
        and "mlflow.parentRunId" not in tags
        and not is_final(run)
    )


def combination_of(run: Run) -> tuple[str, str]:
    """Return the model and the feature set of ``run``."""
    return run.data.tags["model"], run.data.tags["feature_set"]


def recorded_rows(run: Run, contexts: tuple[str, ...] = SCORED) -> dict[str, str]:
    """Return what identifies the rows that ``run`` was scored on, or learned from, and the name of the dataset.

    It is the SHA-256 of the whole table, if the run kept it in the input's tag ``sha256``, else MLflow's digest.
    """
    inputs = [
        (item.dataset, {tag.key: tag.value for tag in item.tags})
        for item in run.inputs.dataset_inputs
    ]
    for context in contexts:
        found = {
            f"SHA-256 {tags['sha256'].lower()}"
            if tags.get("sha256")
            else f"digest {dataset.digest}": dataset.name
            for dataset, tags in inputs
            if tags.get("mlflow.data.context") == context
        }
        if found:
            return found
    return {}


def rows_text(run: Run) -> str:
    """Return the rows that ``run`` was scored on as one reads them: name, and 12 digits of what identifies them."""
    return ", ".join(
        sorted(f"{name} ({identity[:20]})" for identity, name in recorded_rows(run).items())
    )


def comparable(candidates: list[Run], metric: str) -> tuple[list[Run], dict[str, list[str]]]:
    """Return the most runs that were scored on the same rows, and the names of the others, by the reason.

    Of two groups of the same size it is the one with the newest run.

    Args:
        candidates: runs, the oldest first; the runs that are returned keep this order.
        metric: what they are to be compared by.
    """
    groups, reasons = defaultdict(list), {}
    for run in candidates:
        value, rows = run.data.metrics.get(metric), frozenset(recorded_rows(run))
        if run.info.status != "FINISHED":
            reasons[run.info.run_id] = run.info.status.lower()
        elif value is None or not math.isfinite(value):
            reasons[run.info.run_id] = (
                f"no {metric}" if value is None else f"{metric} is not a number"
            )
        elif not rows:
            reasons[run.info.run_id] = "no record of the rows that it was scored on"
        else:
            groups[rows].append(run)
    compared = max(
        groups.values(), key=lambda group: (len(group), group[-1].info.start_time), default=[]
    )
    kept, left_out = {run.info.run_id for run in compared}, defaultdict(list)
    for run in candidates:
        if run.info.run_id not in kept:
            reason = reasons.get(run.info.run_id) or f"scored on other rows: {rows_text(run)}"
            left_out[reason].append(run.info.run_name)
    return compared, dict(left_out)


def score(runs: list[Run], metric: str) -> Score | None:
    """Return mean and range of a metric, to 12 digits, or None if not all of ``runs`` have it."""
    values = [run.data.metrics.get(metric, math.nan) for run in runs]
    if not np.isfinite(values).all():
        return None
    return Score(
        *(round(float(value), 12) for value in (np.mean(values), min(values), max(values)))
    )


def recorded_folds(run: Run, column: str) -> pd.Series | None:
    """Return the score of ``run`` in each repeat and fold of a cross-validation, or None if it recorded none."""
    client, run_id = mlflow.MlflowClient(), run.info.run_id
    if FOLD_SCORES not in [item.path for item in client.list_artifacts(run_id)]:
        return None
    table = pd.DataFrame(**mlflow.artifacts.load_dict(f"runs:/{run_id}/{FOLD_SCORES}"))
    if not {"repeat", "fold", column} <= set(table):
        return None
    return table.astype({column: float}).groupby(["repeat", "fold"])[column].mean()


def fold_scores(
    members: dict[tuple[str, str], list[Run]], metric: str
) -> dict[tuple[str, str], pd.Series] | None:
    """Return each combination's score in each fold, or None if not all runs recorded scores of the same folds.

    Folds with the same numbers hold the same rows only where they divide the same table, so all runs must have recorded
    the same training rows, too. Where a combination has several runs, it is the mean of theirs. The column of
    ``validation_f1`` is ``f1``.
    """
    learned_from = {
        frozenset(recorded_rows(run, LEARNED)) for runs in members.values() for run in runs
    }
    if len(learned_from) > 1 or frozenset() in learned_from:
        return None
    scores = {}
    for key, runs in members.items():
        of_runs = [recorded_folds(run, metric.partition("_")[2] or metric) for run in runs]
        if any(folds is None for folds in of_runs):
            return None
        scores[key] = pd.concat(of_runs, axis=1).mean(axis=1, skipna=False)
    table = pd.concat(scores, axis=1)  # with a gap where a fold is not in all of them
    return (
        scores
        if np.isfinite(table).all(axis=None) and table.index.unique("fold").size > 1
        else None
    )


def decided(
    members: dict[tuple[str, str], list[Run]], metric: str
) -> tuple[tuple, list[tuple], dict, str]:
    """Return the winner, those tied with it, the difference of each other from it where folds tell, and the rule.

    Args:
        members: the runs of each combination, that which began first in front.
        metric: what they are compared by.
    """
    scores = fold_scores(members, metric)
    if scores is None:
        means = {key: score(runs, metric).mean for key, runs in members.items()}
        winner = max(means, key=means.get)  # among equals the first
        return (
            winner,
            [key for key in means if means[key] == means[winner] and key != winner],
            {},
            BY_MEANS,
        )

    def difference(one: tuple[str, str], other: tuple[str, str]) -> Interval:
        folds = scores[one].index.unique("fold").size
        return folds_interval(scores[one], scores[other], test_share=1 / folds)

    winner = choose([*members], difference)
    against = {key: difference(key, winner) for key in members if key != winner}
    return (
        winner,
        [key for key, interval in against.items() if not interval.counts],
        against,
        BY_FOLDS,
    )


def ranked(compared: list[Run], metric: str) -> Ranking:
    """Return the combinations of model and feature set in the order of the one rule.

    Args:
        compared: the runs, the oldest first: the combination that began first is taken for the simplest.
        metric: what they are compared by. More of it is better.
    """
    members = defaultdict(list)
    for run in compared:
        members[combination_of(run)].append(run)
    winner, tied, against, rule = decided(members, metric)
    usual = [
        f"{part}_{measure}" for part in ("validation", "train") for measure in ("f1", "accuracy")
    ]
    combinations = []
    for key, runs in members.items():
        scores = {name: score(runs, name) for name in dict.fromkeys([metric, *usual])}
        scores = {name: value for name, value in scores.items() if value}
        combinations.append(Combination("_".join(key), *key, len(runs), scores, against.get(key)))
    combinations.sort(
        key=lambda item: ((item.model, item.feature_set) != winner, -item.scores[metric].mean)
    )
    return Ranking(combinations, ["_".join(key) for key in tied], rule)
