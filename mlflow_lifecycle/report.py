"""The report of an experiment: who wins, who is tied with the winner, and what was left out, with the reason.

MLflow has none, and in one that is written by hand the ties, the failed runs and the repetitions are easily forgotten.
This one needs nothing but what the store holds, and writes nothing there.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pandas as pd
from matplotlib.figure import Figure
from mlflow.entities import Run

from mlflow_lifecycle.datasets import in_markdown
from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.ranking import (
    Combination,
    Score,
    combination_of,
    comparable,
    is_candidate,
    is_final,
    ranked,
    rows_text,
)

ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
CHARTS = {
    "model_comparison.png": "Each model on its best feature set",
    "all_runs_comparison.png": "{metric} of all combinations, by feature set",
}


@dataclass(frozen=True)
class Report:
    """What the store says about an experiment."""

    experiment: str
    metric: str
    winner: str
    tied: list[str]  # with the winner
    rule: str
    combinations: list[Combination]  # the winner first, then by their means
    rows: str  # on which all of them were scored
    data: str  # of the winner
    left_out: dict[str, list[str]]  # the names of runs, by the reason
    final_evaluations: int
    others: int
    final_evaluation: str  # in sentences
    production: str


def make_report(
    experiment: str, metric: str = "validation_f1", registered_model: str | None = None
) -> Report:
    """Return the report of an experiment in the active store.

    Args:
        experiment: its name. Compared are its finished runs with the tags ``model`` and ``feature_set``, scored on the
            same rows, that are neither a child of another run nor a final evaluation (tag ``final_evaluation``).
        metric: what they are compared by. More of it is better.
        registered_model: whose version in production is named; by default ``<experiment>_best_model``.

    Raises:
        InvalidInputError: there is no such experiment, or no run in it that can be compared.
    """
    runs = runs_of(experiment)
    finals = [run for run in runs if is_final(run)]
    candidates = [run for run in runs if is_candidate(run)]
    compared, left_out = comparable(candidates, metric)
    if not compared:
        causes = "; ".join(f"{reason}: {listed(names)}" for reason, names in left_out.items())
        found = f" Left out: {causes}." if causes else ""
        raise InvalidInputError(
            f"{experiment} has no finished run to compare.{found} Execute guide 03 first."
        )
    ranking = ranked(compared, metric)
    first = ranking.combinations[0]
    return Report(
        experiment=experiment,
        metric=metric,
        winner=first.name,
        tied=ranking.tied,
        rule=ranking.rule,
        combinations=ranking.combinations,
        rows=rows_text(compared[-1]),
        data=data_of(
            [run for run in compared if combination_of(run) == (first.model, first.feature_set)]
        ),
        left_out=left_out,
        final_evaluations=len(finals),
        others=len(runs) - len(finals) - len(candidates),
        final_evaluation=final_evaluation(finals, first),
        production=in_production(registered_model or f"{experiment}_best_model"),
    )


def runs_of(experiment: str) -> list[Run]:
    """Return all runs of an experiment that are not deleted, the oldest first."""
    found = mlflow.get_experiment_by_name(experiment)
    if found is None or found.lifecycle_stage != "active":
        names = ", ".join(sorted(other.name for other in mlflow.search_experiments()))
        state = "is deleted" if found else "is not in this store"
        raise InvalidInputError(
            f"The experiment {experiment!r} {state}. Name one that is there: {names}"
        )
    order = ["start_time ASC", "attributes.run_name ASC"]
    return mlflow.search_runs([found.experiment_id], order_by=order, output_format="list")


def final_evaluation(finals: list[Run], winner: Combination) -> str:
    """Return what the newest final evaluation says that is finished and has scores on test rows."""
    for run in reversed(finals):
        scores = {
            name: value for name, value in run.data.metrics.items() if name.startswith("test_")
        }
        measured = ", ".join(
            f"{name} {value:.4f}" for name, value in sorted(scores.items()) if math.isfinite(value)
        )
        if run.info.status == "FINISHED" and measured:
            model, feature_set = (
                run.data.tags.get(tag, "an unknown one") for tag in ("model", "feature_set")
            )
            won = (
                "won"
                if (model, feature_set) == (winner.model, winner.feature_set)
                else "did not win"
            )
            what = f"The newest is {run.info.run_name}: {model} on {feature_set}, which {won} the comparison."
            return f"{what} On the test rows: {measured}. Data: {data_of([run])}."
    return "There is none yet."


def in_production(model: str) -> str:
    """Return which version of a registered model has the alias ``production``, and which run made it."""
    client = mlflow.MlflowClient()
    version = if_there(client.get_model_version_by_alias, model, "production")
    if version is None:
        return f"No version of {model} is in production."
    run = if_there(client.get_run, version.run_id or "")
    maker = run.info.run_name if run else "a run that is not on record"
    return f"Version {version.version} of {model}, made by {maker}, is in production."


def if_there(ask: Callable, *arguments: str) -> object | None:
    """Return MLflow's answer, or None if it is that there is no such name or alias."""
    try:
        return ask(*arguments)
    except mlflow.MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        return None


def data_of(runs: list[Run]) -> str:
    """Return the names and digests of all data that ``runs`` recorded."""
    found = {
        f"{item.dataset.name} {item.dataset.digest}"
        for run in runs
        for item in run.inputs.dataset_inputs
    }
    return ", ".join(sorted(found)) or "not recorded"


def listed(names: list[str]) -> str:
    """Return names in one line, each once, with how often it is there if more than once."""
    return ", ".join(
        name if count == 1 else f"{name} ({count} runs)" for name, count in Counter(names).items()
    )


def verdict(report: Report) -> str:
    """Return who wins, and who is tied with the winner."""
    first = report.combinations[0]
    mean = f", the mean of {first.runs} runs" if first.runs > 1 else ""
    tie = (
        f"Tied with {', '.join(report.tied)}."
        if report.tied
        else "No other combination is tied with it."
    )
    return (
        f"{report.winner} wins with a {report.metric} of {first.scores[report.metric]}{mean}. {tie}"
    )


def table(report: Report) -> pd.DataFrame:
    """Return a row per combination, the winner first, and a column per number."""
    rows = []
    for item in report.combinations:
        row = {
            "combination": item.name,
            "model": item.model,
            "feature_set": item.feature_set,
            "runs": item.runs,
        }
        for metric, score in item.scores.items():
            row |= {
                metric: score.mean,
                f"{metric}_lowest": score.lowest,
                f"{metric}_highest": score.highest,
            }
        if interval := item.against_winner:
            row["minus_winner"] = interval.difference
            row |= {"minus_winner_low": interval.low, "minus_winner_high": interval.high}
        rows.append(row)
    return pd.DataFrame(rows)


def readable(report: Report) -> pd.DataFrame:
    """Return the same as one reads it."""
    rows = []
    for item in report.combinations:
        against = {"minus the winner": item.against_winner} if item.against_winner else {}
        rows.append({"combination": item.name, "runs": item.runs, **item.scores, **against})
    return pd.DataFrame(rows).fillna("").astype(str)


def markdown(report: Report) -> str:
    """Return the report as Markdown, without its charts."""
    cells, count = readable(report), len(report.combinations)
    rows = [cells.columns, ["---"] * cells.shape[1], *cells.to_numpy()]
    runs = sum(item.runs for item in report.combinations)
    left_out = [f"- {reason}: {listed(names)}" for reason, names in report.left_out.items()]
    winner, sentences = (
        in_markdown(report.winner),
        in_markdown(verdict(report).removeprefix(report.winner)),
    )
    paragraphs = [
        f"# Experiment report: {in_markdown(report.experiment)}",
        f"**{winner}** {sentences}",
        f"The rule: {report.rule}. The test rows of the final evaluation play no part in it.",
        f"Compared: {runs} runs of {count} combinations, all scored on the same rows: {in_markdown(report.rows)}.",
        "\n".join(f"| {' | '.join(map(in_markdown, row))} |" for row in rows),
        f"Data of the winner: {in_markdown(report.data)}.",
        "## Left out",
        "\n".join(map(in_markdown, left_out)) or "No run that was meant to be compared.",
        f"Not meant to be compared: final evaluations ({report.final_evaluations}), searches, trials and others "
        f"({report.others}).",
        "## Final evaluation",
        in_markdown(report.final_evaluation),
        in_markdown(report.production),
    ]
    return "\n\n".join(paragraphs)


def write(report: Report, folder: Path) -> None:
    """Write the report with its charts and its table into ``folder``, made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in charts(report).items():
        figure.savefig(folder / name, dpi=100)
    table(report).to_csv(folder / "model_summary.csv", index=False, float_format="%.4f")
    pictures = "\n\n".join(
        f"![{title.format(metric=report.metric)}]({name})" for name, title in CHARTS.items()
    )
    legend = "A bar is the mean of a combination's runs. A line across its end is their range, where they differ."
    text = f"{markdown(report)}\n\n## Charts\n\n{legend}\n\n{pictures}\n"
    (folder / "experiment_report.md").write_text(text, encoding="utf-8")


def charts(report: Report) -> dict[str, Figure]:
    """Return the charts by the names of their files."""
    models = {}
    for item in report.combinations:  # the best first
        models.setdefault(item.model, (f"{item.model}\non {item.feature_set}", item.scores))
    sets = {}
    for item in sorted(report.combinations, key=lambda item: (item.feature_set, item.model)):
        sets.setdefault(item.feature_set, {})[item.model] = item.scores[report.metric]
    groups = [dict(models.values()), sets]
    titles = [title.format(metric=report.metric) for title in CHARTS.values()]
    return {
        name: chart(title, bars) for name, title, bars in zip(CHARTS, titles, groups, strict=True)
    }


def chart(title: str, groups: dict[str, dict[str, Score]]) -> Figure:
    """Draw a bar for each mean, in groups along the axis and with a colour per label, and the ranges as error bars."""
    labels, handles = list(dict.fromkeys(label for bars in groups.values() for label in bars)), []
    figure = Figure(figsize=(max(8, 0.7 * len(groups) * len(labels)), 3.6), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(labels)
    for number, label in enumerate(labels):
        found = [
            (place, bars[label]) for place, bars in enumerate(groups.values()) if label in bars
        ]
        places = [place + (number - (len(labels) - 1) / 2) * width for place, _ in found]
        means = [score.mean for _, score in found]
        ranges = [
            [score.mean - score.lowest for _, score in found],
            [score.highest - score.mean for _, score in found],
        ]
        handles.append(axes.bar(places, means, 0.92 * width, label=label, yerr=ranges))
        axes.bar_label(handles[-1], fmt="%.3f", padding=3, fontsize="small")
    axes.set_xticks(range(len(groups)), list(groups), parse_math=False)
    axes.margins(y=0.15)
    axes.set_title(title)
    for text in figure.legend(handles, labels, loc="outside right center").get_texts():
        text.set_parse_math(False)
    return figure
