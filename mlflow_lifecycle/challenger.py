"""Let a challenger learn from old and new rows, and say whether it is better than the champion by the one rule.

MLflow moves an alias for whoever asks. Here a model that has learned from a few new rows, or from wrong ones, cannot
take the place of one that still answers the usual rows better.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from mlflow_lifecycle.comparison import Interval, choose, rows_interval
from mlflow_lifecycle.datasets import fingerprint
from mlflow_lifecycle.monitoring.judge import Baseline, Verdict, judge, labels_of
from mlflow_lifecycle.pins import find_model_requirements
from mlflow_lifecycle.scoring import measure_of, score_rows
from mlflow_lifecycle.signing.statement import register_candidate
from mlflow_lifecycle.signing.verify import Verified

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


class NoChallengeError(RuntimeError):
    """No model may learn from these rows, or none can be judged by them."""


@dataclass(frozen=True)
class Contest:
    """How much better the challenger is than the champion, and who is chosen.

    It is the difference that the gate looks at, too: of the mean log of the probability given to the right class.

    Attributes:
        usual: on rows as before.
        new: on new rows that the challenger has not learned from.
        both: on all of these.
        winner: "challenger" or "champion".
        rows: those that both were judged on, target included.
    """

    usual: Interval
    new: Interval
    both: Interval
    winner: str
    rows: pd.DataFrame


def challenge(
    version: Verified,
    known: Baseline,
    usual: pd.DataFrame,
    new: pd.DataFrame,
    *,
    key: Path,
    lock: Path,
) -> "tuple[ModelVersion, Contest]":
    """Train a challenger, register and sign it as a candidate, and judge it beside the champion.

    It has the champion's recipe, and learns from the rows that the champion learned from and from one half of the new
    ones. Both models are judged on the usual rows and on the other half. No alias moves: a release moves it.
    It records the project's pins, see ``mlflow_lifecycle.pins.find_model_requirements``.

    Args:
        version: the champion, verified.
        known: its baseline.
        usual: rows as before, with labels, that no model has learned from.
        new: rows that have drifted, with labels.
        key: the private key that signs the candidate.
        lock: the list that holds the hashes of these pins.

    Raises:
        NoChallengeError: the new rows have not drifted, or are broken, or have no or other labels; or the usual ones
            are not as usual.
    """
    import mlflow
    from sklearn.base import clone
    from sklearn.model_selection import train_test_split

    _refuse(known, usual, new)
    columns = [*known.features, known.target]
    usual, new = (
        rows[known.features].assign(**{known.target: labels_of(known, rows)})
        for rows in (usual, new)
    )
    learned, judged = train_test_split(
        new, test_size=0.5, stratify=new[known.target], random_state=0
    )
    rows = pd.concat([known.rows[columns], learned], ignore_index=True)
    model = clone(known.estimator).fit(rows[known.features], rows[known.target])
    name, source = version.statement.registered_model, mlflow.models.Model.load(str(version.folder))
    data = mlflow.data.from_pandas(rows, name="old_and_new_rows", targets=known.target)
    found = contest(known, model, usual, judged)
    with (
        mlflow.start_run(run_name="challenger", tags={"champion": version.uri}),
        tempfile.TemporaryDirectory() as folder,
    ):
        mlflow.log_input(data, context="training", tags={"sha256": fingerprint(rows)})
        mlflow.sklearn.save_model(
            model,
            f"{folder}/model",
            signature=source.signature,
            input_example=rows[known.features].head(3),
            pip_requirements=str(find_model_requirements()),
            skops_trusted_types=source.flavors["sklearn"].get("skops_trusted_types"),
        )
        candidate = register_candidate(
            Path(folder) / "model", name, key=key, lock=lock, training_rows=rows
        )
        differences = {"usual": found.usual, "new": found.new, "both": found.both}
        mlflow.log_dict(
            {rows: asdict(difference) for rows, difference in differences.items()}, "contest.json"
        )
        mlflow.set_tag("winner", found.winner)
    return candidate, found


def contest(known: Baseline, challenger: object, usual: pd.DataFrame, new: pd.DataFrame) -> Contest:
    """Judge a challenger and the champion on the same rows.

    The challenger wins if it is better on all of them by a difference that counts, and not worse on the usual ones by a
    difference that counts.

    Args:
        known: the champion's baseline.
        challenger: a fitted scikit-learn classifier.
        usual: rows as before, with labels, that neither has learned from.
        new: rows that have drifted, with labels, that neither has learned from.
    """
    rows = pd.concat([usual, new], ignore_index=True)
    on_usual = _difference(known, challenger, usual)
    on_new = _difference(known, challenger, new)
    on_both = _difference(known, challenger, rows)
    winner = (
        "champion" if on_usual.high < 0 else choose(["champion", "challenger"], lambda *_: on_both)
    )
    return Contest(on_usual, on_new, on_both, winner, rows)


def _difference(known: Baseline, challenger: object, rows: pd.DataFrame) -> Interval:
    """Return how much better the challenger is than the champion on these rows."""
    measure = measure_of(challenger, known.estimator)
    features = rows[known.features]
    scores = score_rows(challenger, features, rows[known.target], measure)
    champion_scores = score_rows(known.estimator, features, rows[known.target], measure)
    return rows_interval(scores, champion_scores)


def _refuse(known: Baseline, usual: pd.DataFrame, new: pd.DataFrame) -> None:
    """Refuse rows from which nobody may learn, or by which nobody can be judged."""
    for name, rows, wanted in (("usual", usual, Verdict.QUIET), ("new", new, Verdict.DRIFT)):
        if known.target not in rows or rows[known.target].isna().any():
            raise NoChallengeError(
                f"The {name} rows have no labels in {known.target!r}, at least in part. Add them."
            )
        judgement = judge(known, rows)
        if judgement.verdict != wanted:
            said = "; ".join(judgement.reasons) or "nothing has changed"
            raise NoChallengeError(
                f"The {name} rows: {judgement.verdict} ({said}). A challenger needs {wanted} there."
            )
    classes, labels = known.rows[known.target].unique(), labels_of(known, new)
    if few := [str(name) for name in classes if (labels == name).sum() < 2]:
        raise NoChallengeError(
            f"Fewer than two new rows of {', '.join(few)}: one to learn from, one to judge by."
        )
