"""The model card of a release, as JSON for programs and as Markdown for people.

MLflow has a description per version and no card (mlflow#3613). The intended use and the limits are
written by a person. All other facts come from what was signed, and from the gate. The run is not
read, because anyone with write access to the store can change it.
"""

import json
from typing import TYPE_CHECKING

import mlflow
import pandas as pd

from mlflow_lifecycle.datasets import in_markdown
from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.pins import names_and_versions, read_pins
from mlflow_lifecycle.signing.verify import Verified

ORIGIN = ("task", "saved_at", "run_id", "git_commit", "signed_with")

if TYPE_CHECKING:
    from skops.card import Card

    from mlflow_lifecycle.releases.gate import Verdict


def card_facts(
    copy: Verified, verdict: "Verdict", rows_tested: str, *, intended_use: str, limits: str
) -> dict:
    """Return what the card says, as values that JSON can hold.

    Args:
        copy: the version, verified.
        verdict: what the gate found.
        rows_tested: which test rows those were.
        intended_use: what the model is for; this and the next only a person can know.
        limits: what it is not for.
    """
    statement = copy.statement
    info = mlflow.models.Model.load(str(copy.folder / "MLmodel"))
    sides = info.signature.to_dict() if info.signature else {}
    rows = f"SHA-256 {statement.training_rows}" if statement.training_rows else "not signed"
    return {
        "model_name": statement.registered_model,
        "version": statement.version,
        "task": statement.task or "not recorded",
        "saved_at": f"{info.utc_time_created[:19]} UTC",
        "intended_use": intended_use,
        "limits": limits,
        "run_id": statement.run_id,
        "git_commit": statement.commit or "not recorded",
        "tested": {
            "on": rows_tested,
            "metrics": {name: round(value, 4) for name, value in sorted(verdict.metrics.items())},
            "against_baseline": str(verdict.difference) if verdict.difference else "there was none",
            "checks": {check.name: f"{check.result}: {check.detail}" for check in verdict.checks},
        },
        "metrics": {name: round(value, 4) for name, value in sorted(statement.metrics.items())},
        "parameters": dict(sorted(statement.parameters.items())),
        "data": {"training rows": rows},
        "signature": {
            side: json.loads(columns or "[]") for side, columns in sides.items() if side != "params"
        },
        "environment": {
            "python": info.flavors["python_function"]["python_version"],
            "packages": names_and_versions(read_pins(copy.folder / "requirements.txt")),
        },
        "signed_with": copy.key_fingerprint,
    }


def check_sentences(**sentences: str) -> None:
    """Refuse a card without the sentences that only a person can write.

    Raises:
        ValueError: one of them is empty.
    """
    for name, text in sentences.items():
        if not text.strip():
            what = name.replace("_", " ")
            raise InvalidInputError(
                f"The model card needs a sentence on the {what}; all else is read from MLflow."
            )


def make_card(facts: dict) -> "Card":
    """Return the card as skops makes it; ``render()`` gives its Markdown.

    Args:
        facts: from `card_facts`.
    """
    from skops.card import Card

    title = f"{facts['model_name']}, version {facts['version']}"
    card = Card(None, template=None, model_diagram=False)
    card.add(**{title: f"{facts['intended_use']}\n\nLimits: {facts['limits']}"})
    tested = facts["tested"]
    environment = facts["environment"]
    columns = []
    for side, items in facts["signature"].items():
        for item in items:
            columns.append((side, item.get("name", "(unnamed)"), item["type"]))
    origin = [(name, facts[name]) for name in ORIGIN]
    origin.append(("python", environment["python"]))
    packages = [(package,) for package in environment["packages"]]
    scores = (
        f"By mlflow.models.evaluate, on {tested['on']}. Difference from the baseline, the version "
        f"that it replaced, in the score of a row: {tested['against_baseline']}."
    )
    metrics = f"Metrics of the run {facts['run_id']} when the version was signed."
    sections = (
        ("Scores at the gate", scores, ("metric", "value"), tested["metrics"].items()),
        ("Checks of the gate", None, ("check", "result"), tested["checks"].items()),
        ("Metrics of the run", metrics, ("metric", "value"), facts["metrics"].items()),
        ("Parameters of the run", None, ("parameter", "value"), facts["parameters"].items()),
        ("Data", None, ("dataset", "digest"), facts["data"].items()),
        ("Signature", None, ("side", "column", "type"), columns),
        ("Origin", None, ("fact", "value"), origin),
        ("Packages", None, ("package",), packages),
    )
    for name, description, header, body in sections:
        rows = [[in_markdown(value) for value in row] for row in body]
        cells = pd.DataFrame(rows, columns=header)
        if rows:
            section = f"{title}/{name}"
            card.add_table(**{section: cells}, description=description)
            card.select(section).title = name  # skops 0.16 would print the title of the card, too
    return card
