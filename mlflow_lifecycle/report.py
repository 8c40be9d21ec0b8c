"""Report an experiment: which runs win, which are tied with them, what was left out and why.

MLflow sorts runs by a metric. It takes the best of repeated runs for the score of a model, compares
runs that were scored on different rows, and shows no tie. The report only reads the store.
"""

import dataclasses
import re
import statistics
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from mlflow.entities import Run

from mlflow_lifecycle.comparison import Interval, choose, folds_interval
from mlflow_lifecycle.datasets import in_markdown
from mlflow_lifecycle.exceptions import InvalidInputError

CHART = "comparison.png"
FOLD_SCORES = "fold_scores.json"  # by mlflow.log_table: repeat, fold, and a column per metric
UNKNOWN = "rows that were not recorded"
# The ends of the names of metrics of which less is better. The end of rmse is mse.
LOSSES = ("loss", "error", "mae", "mse", "mape", "false_positives", "false_negatives")
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


@dataclasses.dataclass(frozen=True)
class Report:
    """What the store says about an experiment.

    Attributes:
        metric: what the groups are compared by.
        rows: the datasets on which all of them were scored.
        winner: the name of a group.
        tied: the names of the groups that are tied with the winner.
        rule: how the winner was chosen.
        groups: a row per group, from the best mean to the worst. If folds decide, it says by how
            much a group is better than the winner, with the interval.
        left_out: the names of the runs that cannot be compared, by the reason.
    """

    experiment: str
    metric: str
    rows: str
    winner: str
    tied: list[str]
    rule: str
    groups: pd.DataFrame
    left_out: dict[str, str]


def make_report(experiment: str, metric: str = "", by: str = "mlflow.runName") -> Report:
    """Return the report of an experiment in the active store.

    Finished runs that were scored on the same rows are compared. Child runs, such as the trials of
    a search, are not, and neither are runs with the tag ``final_evaluation``: they scored the test
    rows, which must not choose a winner.

    Args:
        experiment: its name.
        metric: what to compare by. The default is the only log loss or absolute error of the runs.
        by: the tag that groups the runs.

    Raises:
        InvalidInputError: there is no such experiment, or no run that can be compared.
    """
    known = mlflow.get_experiment_by_name(experiment)
    if known is None or known.lifecycle_stage != "active":
        raise InvalidInputError(f"There is no active experiment {experiment!r} in this store.")
    runs = mlflow.search_runs(
        [known.experiment_id],
        "tags.mlflow.parentRunId IS NULL AND tags.final_evaluation IS NULL",
        order_by=["start_time ASC"],
        output_format="list",
    )
    metric = metric or choose_metric(runs)
    table = describe_runs(runs, metric, by)
    is_compared = table["reason"] == ""
    compared = table[is_compared]
    left_out = table[~is_compared].groupby("reason", sort=False)["name"].agg(", ".join)
    if compared.empty:
        reasons = "; ".join(left_out.index + ": " + left_out)
        raise InvalidInputError(f"{experiment} has no finished run to compare. {reasons}".strip())
    groups = compared.groupby("group", sort=False)["value"].agg(
        runs="size",
        mean="mean",
        lowest="min",
        highest="max",
    )
    is_loss = metric.endswith(LOSSES) and "neg_" not in metric
    # Rounded, so that equal means are tied.
    groups = groups.round(12).sort_values("mean", ascending=is_loss, kind="stable")
    folds = read_folds(known.experiment_id, compared, metric)
    if folds is None:
        rule = BY_MEANS
        winner = groups.index[0]
        is_tied = groups["mean"] == groups["mean"].iloc[0]
    else:
        rule = BY_FOLDS.format(folds=len(folds))
        winner, differences = compare_folds(-folds if is_loss else folds)
        groups = groups.join(differences)
        is_tied = (groups["low"] <= 0) & (groups["high"] >= 0)
    return Report(
        experiment=experiment,
        metric=metric,
        rows=compared["rows"].iloc[0],
        winner=winner,
        tied=groups.index[is_tied].drop(winner).to_list(),
        rule=rule,
        groups=groups,
        left_out=left_out.to_dict(),
    )


def choose_metric(runs: list[Run]) -> str:
    """Return the only log loss or absolute error of the runs, on other than training rows."""
    names = set()
    for run in runs:
        names.update(run.data.metrics)
    if not names:
        raise InvalidInputError("No run has logged a metric. Log one: mlflow.log_metric")
    pattern = re.compile("(?!train).*(log_loss|absolute_error)$")
    proper = list(filter(pattern.match, names))
    if len(proper) != 1:
        raise InvalidInputError(f"Choose one with --metric: {', '.join(sorted(names))}")
    return proper[0]


def describe_runs(runs: list[Run], metric: str, by: str) -> pd.DataFrame:
    """Return a row per run, with the reason why it is not compared, or an empty text.

    The most runs that were scored on the same rows are compared. Of two sets of the same size, it
    is the one with the newest run.
    """
    lines = []
    for run in runs:
        group = run.data.tags.get(by, "")
        value = run.data.metrics.get(metric, np.nan)
        reason = ""
        if run.info.status != "FINISHED":
            reason = run.info.status.lower()
        elif "search" in run.data.tags:
            reason = "a search, whose score is that of its best trial"
        elif not np.isfinite(value):
            reason = f"no finite {metric}"
        elif not group:
            reason = f"no tag {by}"
        scored, learned = describe_data(run, metric)
        lines.append(
            (
                run.info.run_id,
                run.info.run_name,
                group,
                value,
                scored,
                learned,
                reason,
            )
        )
    columns = ["run_id", "name", "group", "value", "rows", "learned", "reason"]
    table = pd.DataFrame(lines, columns=columns)
    usable = table.loc[table["reason"] == "", "rows"]
    if len(usable):
        others = usable[usable != statistics.mode(usable[::-1])]
        table.loc[others.index, "reason"] = "scored on " + others
    return table


def describe_data(run: Run, metric: str) -> tuple[str, str]:
    """Return the datasets that a run was scored on, and those that it learned from.

    A metric that begins with ``cv_`` belongs to the context ``cross-validation``, or else to the
    rows that the run learned from. A dataset is identified by the SHA-256 in the tag ``sha256`` of
    the input, or else by MLflow's digest.
    """
    scored = []
    learned = []
    for item in run.inputs.dataset_inputs:
        tags = {tag.key: tag.value for tag in item.tags}
        content = f"digest {item.dataset.digest}"
        if "sha256" in tags:
            content = f"SHA-256 {tags['sha256'][:12]}"
        context = tags.get("mlflow.data.context")
        text = f"{item.dataset.name} ({content})"
        if context in ("train", "training"):
            learned.append(text)
        elif (context == "cross-validation") == metric.startswith("cv_"):
            scored.append(text)
    rows_learned = ", ".join(sorted(learned)) or UNKNOWN
    rows_scored = ", ".join(sorted(scored)) or rows_learned
    return rows_scored, rows_learned


def read_folds(
    experiment_id: str,
    runs: pd.DataFrame,
    metric: str,
) -> pd.DataFrame | None:
    """Return the score of each group in each fold, or None if not all runs recorded the same folds.

    Folds with the same numbers have the same rows only if they divide the same table, so all runs
    must have the same training rows. The column of ``validation_f1`` can also be ``f1``.
    """
    learned = set(runs["learned"])
    if len(learned) > 1 or UNKNOWN in learned:
        return None
    client = mlflow.MlflowClient()
    try:
        table = client.load_table(experiment_id, FOLD_SCORES, extra_columns=["run_id"])
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    column = metric if metric in table else metric.partition("_")[2]
    if not {"repeat", "fold", column} <= set(table):
        return None
    table[column] = table[column].astype(float)
    scores = runs.merge(table, how="left", on="run_id")
    folds = scores.pivot_table(column, ["repeat", "fold"], "group")
    is_complete = len(scores) == len(runs) * len(folds) and np.isfinite(scores[column]).all()
    if not is_complete or folds.index.unique("fold").size < 2:
        return None
    return folds[runs["group"].unique()]


def compare_folds(folds: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Return the winner by the decision rule, and the difference of each group from it.

    Args:
        folds: a column per group, with its score in each fold; more is better.
    """
    share = 1 / folds.index.unique("fold").size

    def difference(name: str, other: str) -> Interval:
        return folds_interval(folds[name], folds[other], share)

    winner = choose(list(folds), difference)
    differences = {}
    for name in folds:
        interval = difference(name, winner)
        differences[name] = dataclasses.astuple(interval)
    columns = ["better_by", "low", "high"]
    return winner, pd.DataFrame.from_dict(differences, "index", columns=columns)


def verdict(report: Report) -> str:
    """Return who wins, by what and on which rows, and who is tied with the winner."""
    best = report.groups.loc[report.winner]
    runs = "1 run" if best["runs"] == 1 else f"{best['runs']:.0f} runs"
    score = f"a mean {report.metric} of {best['mean']:.4f} ({runs})"
    tie = "No other group is tied."
    if report.tied:
        tie = f"Tied with {', '.join(report.tied)}."
    return f"{report.winner} wins with {score} on {report.rows}. {tie}"


def markdown(report: Report) -> str:
    """Return the report as Markdown. Its last line shows the chart."""
    groups = report.groups.reset_index()
    table = [list(groups), ["---"] * len(groups.columns)]
    for row in groups.itertuples(index=False):
        table.append([f"{value:.4f}" if isinstance(value, float) else value for value in row])
    lines = []
    for row in table:
        cells = map(in_markdown, row)
        lines.append(f"| {' | '.join(cells)} |")
    left_out = []
    for reason, names in report.left_out.items():
        left_out.append("- " + in_markdown(f"{reason}: {names}"))
    paragraphs = [
        f"# Experiment report: {in_markdown(report.experiment)}",
        in_markdown(verdict(report)),
        f"The rule: {report.rule}.",
        f"Scores: {in_markdown(report.metric)} on {in_markdown(report.rows)}.",
        "\n".join(lines),
        "## Left out",
        "\n".join(left_out) or "No run.",
        f"![The mean of each group, and the range of its runs]({CHART})\n",
    ]
    return "\n\n".join(paragraphs)


def chart(report: Report) -> Figure:
    """Draw the mean of each group, and the range of its runs as a line, for at most 30 groups."""
    groups = report.groups.head(30)[::-1]
    height = 1 + 0.35 * len(groups)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    places = range(len(groups))
    axes.hlines(places, groups["lowest"], groups["highest"])
    axes.plot(groups["mean"], places, "o")
    axes.set_yticks(places, groups.index, parse_math=False)
    axes.set_xlabel(f"{report.metric} on {report.rows}", parse_math=False)
    return figure


def write_report(report: Report, folder: Path) -> None:
    """Write the report and its chart into ``folder``, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    chart(report).savefig(folder / CHART)
    path = folder / "experiment_report.md"
    path.write_text(markdown(report), encoding="utf-8")
