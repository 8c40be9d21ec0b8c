"""Report an experiment: which runs win, which are tied with them, what was left out and why.

MLflow sorts runs by a metric. It takes the best of repeated runs for the score of a model, compares
runs that were scored on different rows, and shows no tie. The report only reads the store.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from mlflow.entities import Run

from mlflow_lifecycle.comparison import Interval, choose, folds_interval
from mlflow_lifecycle.datasets import in_markdown
from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.releases.gate import LOWER_IS_BETTER

CHART = "comparison.png"
FOLD_SCORES = "fold_scores.json"  # by mlflow.log_table: repeat, fold, and a column per metric
PROPER_SCORE = "(?!train).*(log_loss|absolute_error)$"
SCORED = ("validation", "test", "evaluation")  # contexts of datasets, the first that a run has
LEARNED = ("train", "training")
UNKNOWN = "rows that were not recorded"
BY_FOLDS = (
    "a difference counts if its 95 % interval, over the same {folds} folds, excludes 0. The "
    "group that began first is the first choice, and a later one replaces the current choice if it "
    "is better by a difference that counts. The interval ignores variation between repeated runs; "
    "the range of their scores shows it"
)
BY_MEANS = (
    "the best mean wins. Not every run recorded scores of the same folds, so chance alone could "
    "explain each difference"
)


@dataclass(frozen=True)
class Report:
    """What the store says about an experiment.

    Attributes:
        metric: what the groups are compared by.
        rows: the dataset on which all of them were scored.
        winner: the name of a group.
        tied: the names of the groups that are tied with the winner.
        rule: how the winner was chosen.
        groups: a row per group, the winner first and then from the best mean to the worst. If folds
            decide, it says by how much a group is better than the winner, with the interval.
        left_out: the names of the runs that cannot be compared, by the reason.
        final_evaluation: what the newest run with the tag ``final_evaluation`` scored.
    """

    experiment: str
    metric: str
    rows: str
    winner: str
    tied: list[str]
    rule: str
    groups: pd.DataFrame
    left_out: dict[str, str]
    final_evaluation: str


def make_report(experiment: str, metric: str = "", by: str = "mlflow.runName") -> Report:
    """Return the report of an experiment in the active store.

    Finished runs that were scored on the same rows are compared. Child runs, such as the trials of
    a search, are not, and neither are runs with the tag ``final_evaluation``.

    Args:
        experiment: its name.
        metric: what to compare by. The default is the only log loss or absolute error of the runs.
        by: the tag that groups the runs.

    Raises:
        InvalidInputError: there is no such experiment, or no run that can be compared.
    """
    candidates = []
    final_evaluation = "There is none."
    for run in find_runs(experiment):
        if run.data.tags.get("final_evaluation", "").lower() in ("true", "1"):
            final_evaluation = describe_test_scores(run) or final_evaluation
        elif "mlflow.parentRunId" not in run.data.tags:
            candidates.append(run)
    metric = metric or choose_metric(candidates)
    runs = describe_runs(candidates, metric, by)
    compared = runs[runs["reason"] == ""]
    left_out = runs[runs["reason"] != ""].groupby("reason", sort=False)["name"].agg(", ".join)
    if compared.empty:
        reasons = "; ".join(f"{reason}: {names}" for reason, names in left_out.items())
        raise InvalidInputError(f"{experiment} has no finished run to compare. {reasons}".strip())
    groups = compared.groupby("group", sort=False)["value"].agg(
        runs="size", mean="mean", lowest="min", highest="max"
    )
    groups["mean"] = groups["mean"].round(12)
    is_loss = metric.endswith(tuple(LOWER_IS_BETTER)) and "neg_" not in metric
    sign = -1 if is_loss else 1
    folds = read_folds(candidates[0].info.experiment_id, compared, metric)
    if folds is None:
        winner = (sign * groups["mean"]).idxmax()
        is_tied = groups["mean"] == groups["mean"][winner]
    else:
        winner = compare_folds(groups, sign * folds)
        is_tied = (groups["low"] <= 0) & (groups["high"] >= 0)
    others = groups.drop(winner).sort_values("mean", ascending=is_loss, kind="stable")
    groups = pd.concat([groups.loc[[winner]], others])
    return Report(
        experiment=experiment,
        metric=metric,
        rows=compared["rows"].iloc[0],
        winner=winner,
        tied=[name for name in groups.index if is_tied[name] and name != winner],
        rule=BY_MEANS if folds is None else BY_FOLDS.format(folds=len(folds)),
        groups=groups,
        left_out=left_out.to_dict(),
        final_evaluation=final_evaluation,
    )


def find_runs(experiment: str) -> list[Run]:
    """Return the runs of an experiment that are not deleted, the oldest first."""
    known = mlflow.get_experiment_by_name(experiment)
    if known is None or known.lifecycle_stage != "active":
        raise InvalidInputError(f"There is no active experiment {experiment!r} in this store.")
    order = ["start_time ASC", "attributes.run_name ASC"]
    return mlflow.search_runs([known.experiment_id], order_by=order, output_format="list")


def choose_metric(runs: list[Run]) -> str:
    """Return the only log loss or absolute error of the runs, on other than training rows."""
    names = set()
    for run in runs:
        names.update(run.data.metrics)
    proper = [name for name in names if re.match(PROPER_SCORE, name)]
    if len(proper) == 1:
        return proper[0]
    raise InvalidInputError(f"Choose one with --metric: {', '.join(sorted(names))}")


def describe_runs(candidates: list[Run], metric: str, by: str) -> pd.DataFrame:
    """Return a row per run, with the reason why it is not compared, or an empty text.

    The most runs that were scored on the same rows are compared. Of two sets of the same size, it
    is the one with the newest run.
    """
    table = []
    for run in candidates:
        reason = ""
        value = run.data.metrics.get(metric, np.nan)
        if run.info.status != "FINISHED":
            reason = run.info.status.lower()
        elif not np.isfinite(value):
            reason = f"no finite {metric}"
        elif by not in run.data.tags:
            reason = f"no tag {by}"
        name = run.info.run_name
        rows = describe_data(run, SCORED + LEARNED)  # cross-validation scores the training rows
        group = run.data.tags.get(by, "")
        table.append(
            (run.info.run_id, name, group, value, rows, describe_data(run, LEARNED), reason)
        )
    columns = ["run_id", "name", "group", "value", "rows", "learned", "reason"]
    runs = pd.DataFrame(table, columns=columns)
    usable = runs.loc[runs["reason"] == "", "rows"]
    if len(usable):
        rows, _ = Counter(reversed(list(usable))).most_common(1)[0]
        others = usable[usable != rows]
        runs.loc[others.index, "reason"] = "scored on " + others
    return runs


def describe_data(run: Run, contexts: tuple[str, ...]) -> str:
    """Return the datasets of a run in the first of the contexts that it has, by name and content.

    The content is the SHA-256 in the tag ``sha256`` of the input, or else MLflow's digest.
    """
    datasets = {}
    for item in run.inputs.dataset_inputs:
        tags = {tag.key: tag.value for tag in item.tags}
        sha256 = tags.get("sha256", "").lower()[:12]
        content = f"SHA-256 {sha256}" if sha256 else f"digest {item.dataset.digest}"
        known = datasets.setdefault(tags.get("mlflow.data.context"), [])
        known.append(f"{item.dataset.name} ({content})")
    for context in contexts:
        if context in datasets:
            return ", ".join(sorted(datasets[context]))
    return UNKNOWN


def read_folds(experiment_id: str, runs: pd.DataFrame, metric: str) -> pd.DataFrame | None:
    """Return the score of each group in each fold, or None if not all runs recorded the same folds.

    Folds with the same numbers have the same rows only if they divide the same table, so all runs
    must have the same training rows. The column of ``validation_f1`` can also be ``f1``.
    """
    ids = list(runs["run_id"])
    try:
        client = mlflow.MlflowClient()
        table = client.load_table(experiment_id, FOLD_SCORES, extra_columns=["run_id"])
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    column = metric if metric in table else metric.partition("_")[2]
    if not {"repeat", "fold", column} <= set(table):
        return None
    table[column] = table[column].astype(float)
    table = table[table["run_id"].isin(ids)]
    folds = table.pivot_table(column, ["repeat", "fold"], "run_id", dropna=False)
    learned = set(runs["learned"])
    if UNKNOWN in learned or len(learned) > 1 or folds.index.unique("fold").size < 2:
        return None
    if len(folds.columns) < len(ids) or not np.isfinite(folds).all(axis=None):
        return None
    return folds[ids].T.groupby(list(runs["group"]), sort=False).mean().T


def compare_folds(groups: pd.DataFrame, folds: pd.DataFrame) -> str:
    """Return the winner by the decision rule, and add the difference of each group from it.

    Args:
        groups: a row per group. It gets the columns better_by, low and high.
        folds: a column per group, with its score in each fold; more is better.
    """

    def difference(name: str, other: str) -> Interval:
        share = 1 / folds.index.unique("fold").size
        return folds_interval(folds[name], folds[other], test_share=share)

    winner = choose(list(folds), difference)
    for name in folds:
        interval = difference(name, winner)
        values = [interval.difference, interval.low, interval.high]
        groups.loc[name, ["better_by", "low", "high"]] = values
    return winner


def describe_test_scores(run: Run) -> str:
    """Return the metrics of a finished run on test rows, or an empty text if it has none."""
    scores = []
    for name, value in sorted(run.data.metrics.items()):
        if name.startswith("test_") and np.isfinite(value):
            scores.append(f"{name} {value:.4f}")
    if run.info.status != "FINISHED" or not scores:
        return ""
    return f"{run.info.run_name}: {', '.join(scores)}, on {describe_data(run, SCORED)}."


def verdict(report: Report) -> str:
    """Return who wins, by what and on which rows, and who is tied with the winner."""
    best = report.groups.loc[report.winner]
    tie = f"Tied with {', '.join(report.tied)}." if report.tied else "No other group is tied."
    runs = "1 run" if best["runs"] == 1 else f"{best['runs']:.0f} runs"
    score = f"a mean {report.metric} of {best['mean']:.4f} ({runs})"
    return f"{report.winner} wins with {score} on {report.rows}. {tie}"


def markdown(report: Report) -> str:
    """Return the report as Markdown, without its chart."""
    table = report.groups.reset_index()
    lines = [list(table), ["---"] * len(table.columns)]
    for row in table.itertuples(index=False):
        lines.append([f"{value:.4f}" if isinstance(value, float) else value for value in row])
    cells = [f"| {' | '.join(in_markdown(value) for value in line)} |" for line in lines]
    left_out = [f"- {in_markdown(f'{key}: {names}')}" for key, names in report.left_out.items()]
    paragraphs = [
        f"# Experiment report: {in_markdown(report.experiment)}",
        in_markdown(verdict(report)),
        f"The rule: {report.rule}.",
        f"Scores: {in_markdown(report.metric)} on {in_markdown(report.rows)}.",
        "\n".join(cells),
        "## Left out",
        "\n".join(left_out) or "No run.",
        "## Final evaluation",
        in_markdown(report.final_evaluation),
    ]
    return "\n\n".join(paragraphs)


def chart(report: Report) -> Figure:
    """Draw the mean of each group, and the range of its runs as a line, for at most 30 groups."""
    groups = report.groups.head(30)[::-1]
    figure = Figure(figsize=(8, 1 + 0.35 * len(groups)), layout="constrained")
    axes = figure.subplots()
    places = range(len(groups))
    axes.hlines(places, groups["lowest"], groups["highest"])
    axes.plot(groups["mean"], places, "o")
    axes.set_yticks(places, groups.index, parse_math=False)
    axes.set_xlabel(f"{report.metric} on {report.rows}", parse_math=False)
    return figure


def write_report(report: Report, folder: Path) -> None:
    """Write the report and its chart into ``folder``, which is created."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chart(report).savefig(folder / CHART)
    text = f"{markdown(report)}\n\n![The mean of each group, and the range of its runs]({CHART})\n"
    (folder / "experiment_report.md").write_text(text, encoding="utf-8")
