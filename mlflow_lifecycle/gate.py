"""The checks that a version must pass before it is released, each with its result.

MLflow evaluates a model and compares numbers with thresholds (``mlflow.validate_evaluation_results``). It does not say
how sure a difference is, whether the model has seen the test rows, or whether its environment can be built.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import MetricThreshold

from mlflow_lifecycle.comparison import Interval, rows_interval
from mlflow_lifecycle.environments import EnvironmentNotBuiltError, PredictionFailedError, built, predict, python_note
from mlflow_lifecycle.tables import as_classes
from mlflow_lifecycle.verification import Verified

PASSED, FAILED, UNCHECKED = "passed", "failed", "not checked"
KNOWN_ROWS = 0.1  # the share of the test rows that may also stand among the training rows: equal rows happen by chance
LOSSES = ("log_loss", "false_positives", "false_negatives")  # of MLflow's metrics, those of which less is better
NO_FLOOR = "State at least one floor, such as accuracy_score=0.9: no holder does not mean that every version passes."


class GateClosedError(RuntimeError):
    """A version may not be released; the message names the checks that it did not pass."""


@dataclass(frozen=True)
class Check:
    """One check: its name, its result (passed, failed, not checked), and what was found."""

    name: str
    result: str
    detail: str


@dataclass(frozen=True)
class Verdict:
    """The checks of a version, its scores on the test rows, and its difference from the present holder, if any."""

    checks: list[Check]
    metrics: dict[str, float]
    difference: Interval | None

    def require(self, *, allow_unchecked: bool = False) -> None:
        """Refuse a version that did not pass.

        Raises:
            GateClosedError: a check failed, or was left out and ``allow_unchecked`` is not set.
        """
        wanted = (FAILED,) if allow_unchecked else (FAILED, UNCHECKED)
        if stopped := [
            f"{check.name} {check.result} ({check.detail})" for check in self.checks if check.result in wanted
        ]:
            raise GateClosedError(f"The version is not released: {'; '.join(stopped)}. The alias stays where it is.")


def check_version(
    candidate: Verified,
    holder: Verified | None,
    rows: pd.DataFrame,
    target: str,
    *,
    floors: dict[str, float],
    allow_equal: bool = False,
    rebuild: bool = True,
    cache: Path | None = None,
) -> Verdict:
    """Check a version on test rows, and log its scores to the active run.

    Args:
        candidate: the version, verified.
        holder: the version that it would replace, verified; None if there is none.
        rows: the test rows, target included, which nobody has learned from.
        target: the column with the classes. Where the candidate learned them as text, they are compared as text: in a
            CSV file, the text 0 and the number are written alike.
        floors: what MLflow's metrics must reach, whoever the holder is, such as ``{"accuracy_score": 0.9}``.
        allow_equal: whether a version passes that is not better than the holder, as long as it is not worse by a
            difference that counts: for the same model with renewed packages.
        rebuild: whether to build the environment; if not, that check is not passed, but left out.
        cache: see ``mlflow_lifecycle.environments.built``.

    Raises:
        ValueError: no floor is stated, or one on a metric of which less is better; the rows lack a column or a
            label; or the version did not learn from the column ``target``.
    """
    rows = fitting_rows(candidate, rows, target, floors)
    checks = [check_signature(candidate), check_example(candidate), check_pins(candidate)]
    checks += [check_rows(candidate, rows, target)]
    metrics, difference = {}, None
    try:
        evaluation = evaluate(candidate, rows, target)
        named_twice = ("score", "example_count")
        metrics = {name: float(value) for name, value in evaluation.metrics.items() if name not in named_twice}
        checks.append(check_floors(evaluation, floors))
        if holder:
            experiment = mlflow.active_run().info.experiment_id
            name = f"holder, version {holder.statement.version}"
            with mlflow.start_run(run_name=name, nested=True, experiment_id=experiment):
                evaluate(holder, rows, target)
            models = [mlflow.sklearn.load_model(str(version.folder)) for version in (candidate, holder)]
            difference = difference_of(models, rows, target)
        checks.append(check_difference(difference, holder, len(rows), allow_equal=allow_equal))
    except Exception as error:  # whatever the model raises
        checks.append(Check("score", FAILED, f"cannot be scored: {' '.join(str(error).split())[:300]}"))
    if any(check.result == FAILED for check in checks):
        checks.append(Check("fresh environment", UNCHECKED, "another check failed"))
    elif rebuild:
        checks.append(check_environment(candidate, rows.drop(columns=target), cache))
    else:
        checks.append(Check("fresh environment", UNCHECKED, "no environment was built, as was asked for"))
    return Verdict(checks, metrics, difference)


def fitting_rows(candidate: Verified, rows: pd.DataFrame, target: str, floors: dict[str, float]) -> pd.DataFrame:
    """Return the test rows, with their labels written as the candidate's classes; refuse what is no test of it.

    The arguments, and what is raised, are those of `check_version`.
    """
    if not floors:
        raise ValueError(NO_FLOOR)
    if losses := [name for name in floors if name in LOSSES]:
        remedy = "A floor needs a metric of which more is better, such as accuracy_score."
        raise ValueError(f"There is no floor for {', '.join(losses)}: less of it is better. {remedy}")
    training = pd.read_parquet(candidate.training_rows)
    if missing := [name for name in training.columns if name not in rows]:
        raise ValueError(f"The test rows lack these columns: {', '.join(missing)}")
    if target not in training:
        raise ValueError(f"The version learned from no column {target!r}. The columns are: {', '.join(training)}")
    if gaps := int(rows[target].isna().sum()):
        raise ValueError(f"The target {target!r} is missing in {gaps} of {len(rows)} test rows (NA counts as missing).")
    return rows.assign(**{target: as_classes(training[target], rows[target])})


def check_signature(candidate: Verified) -> Check:
    """Check that the model names its columns. MLflow logs none, and says nothing, for some nullable columns."""
    signature = mlflow.models.Model.load(str(candidate.folder / "MLmodel")).signature
    names = signature.inputs.input_names() if signature and signature.inputs else []
    return Check("signature", PASSED if names else FAILED, f"{len(names) or 'no'} columns go in")


def check_example(candidate: Verified) -> Check:
    """Check that the model brings rows to try it with."""
    example = mlflow.models.Model.load(str(candidate.folder / "MLmodel")).saved_input_example_info
    return Check("input example", PASSED if example else FAILED, "logged with it" if example else "there is none")


def check_pins(candidate: Verified) -> Check:
    """Check that the hashes of every package were kept."""
    blocks = ("\n" + candidate.packages.read_text(encoding="utf-8").replace("\n    --hash", " --hash")).split("\n")
    pins = [line for line in blocks if line.strip()]
    unsure = [line.split("==")[0] for line in pins if "==" not in line or "--hash=sha256:" not in line]
    found = f"without a hash: {', '.join(unsure)}" if unsure else f"{len(pins)} packages, each with == and its hashes"
    return Check("exact pins", FAILED if unsure or not pins else PASSED, found)


def check_rows(candidate: Verified, rows: pd.DataFrame, target: str) -> Check:
    """Check that the candidate has not learned from the test rows, as far as its own record tells.

    A row counts as known if all its values and its class stand in a training row. Rows that were changed a little, or
    used before the training rows were split off, are not found.
    """
    training = pd.read_parquet(candidate.training_rows)
    try:
        same = rows[training.columns].astype(training.dtypes)
    except (TypeError, ValueError) as error:
        return Check("test rows", FAILED, f"they are of other types than the training rows: {error}")
    known = set(pd.util.hash_pandas_object(training, index=False))
    count = sum(value in known for value in pd.util.hash_pandas_object(same, index=False))
    found = f"{count} of {len(rows)} are among the {len(training)} training rows"
    if unknown := sorted(set(same[target]) - set(training[target]), key=str):
        return Check("test rows", FAILED, f"{found}; it never learned these classes: {', '.join(map(str, unknown))}")
    return Check("test rows", PASSED if count <= KNOWN_ROWS * len(rows) else FAILED, found)


def evaluate(version: Verified, rows: pd.DataFrame, target: str) -> "mlflow.models.EvaluationResult":
    """Return MLflow's evaluation of a classifier on ``rows``, which it logs to the active run."""
    options = {"targets": target, "model_type": "classifier"}
    options["evaluator_config"] = {"log_model_explainability": False}  # which would need shap
    plt.switch_backend(plt.get_backend())  # loaded before MLflow does it, which would undo what loading it sets
    before = set(plt.get_fignums())
    try:
        return mlflow.models.evaluate(str(version.folder), rows, **options)
    finally:
        for number in set(plt.get_fignums()) - before:  # MLflow leaves a figure open, which a notebook would show
            plt.close(number)


def check_floors(evaluation: "mlflow.models.EvaluationResult", floors: dict[str, float]) -> Check:
    """Check by MLflow's own validation that each metric reaches its floor."""
    found = ", ".join(f"{name} {evaluation.metrics.get(name, float('nan')):.4f} of {floors[name]}" for name in floors)
    thresholds = {name: MetricThreshold(threshold=floor, greater_is_better=True) for name, floor in floors.items()}
    try:
        mlflow.validate_evaluation_results(thresholds, evaluation)
    except MlflowException:
        return Check("floor", FAILED, found)
    return Check("floor", PASSED, found)


def scores_per_row(model, rows: pd.DataFrame, target: str, *, probable: bool) -> np.ndarray:
    """Return a score of each row, more is better.

    It is the log of the probability that the model gives to the row's class, which tells apart two models that are
    right as often and not as sure. Where not both models give probabilities, it is 1 for a right answer, and else 0.
    """
    features = rows.drop(columns=target)
    features = features[list(model.feature_names_in_)] if hasattr(model, "feature_names_in_") else features
    if not probable:
        return (model.predict(features) == rows[target]).to_numpy(dtype=float)
    places = pd.Index(model.classes_).get_indexer(rows[target])
    given = np.where(places < 0, 0, model.predict_proba(features)[np.arange(len(rows)), places])
    return np.log(np.clip(given, np.finfo(float).eps, None))


def difference_of(models: Sequence, rows: pd.DataFrame, target: str) -> Interval:
    """Return how much better the first of two models is than the second on the same rows, by log loss, or accuracy."""
    probable = all(hasattr(model, "predict_proba") for model in models)
    return rows_interval(*(scores_per_row(model, rows, target, probable=probable) for model in models))


def check_difference(difference: Interval | None, holder: Verified | None, count: int, *, allow_equal: bool) -> Check:
    """Check by the one decision rule that the candidate may take the holder's place."""
    if difference is None:
        return Check("holder", PASSED, "there is none; the floor decides")
    found = f"{difference} against version {holder.statement.version}, on {count} rows"
    if difference.low > 0 or (allow_equal and difference.high >= 0):
        return Check("holder", PASSED, found)
    return Check("holder", FAILED, f"{found}: not better by a difference that counts, so the holder stays")


def check_environment(candidate: Verified, features: pd.DataFrame, cache: Path | None = None) -> Check:
    """Check that the environment can be built from the recorded packages alone, and gives the same predictions."""
    here = mlflow.pyfunc.load_model(str(candidate.folder)).predict(features).tolist()
    with tempfile.TemporaryDirectory(prefix="gate-") as scratch:
        try:
            requirements = candidate.folder / "requirements.txt"
            python = built(requirements, Path(scratch) / "environment", lock=candidate.packages, cache=cache)
            there = predict(candidate.folder, features, python)
        except (EnvironmentNotBuiltError, PredictionFailedError) as error:
            return Check("fresh environment", FAILED, " ".join(str(error).split()))
    same = sum(one == other for one, other in zip(here, there, strict=True))
    found = [f"{same} of {len(here)} predictions are the same", python_note(candidate.folder)]
    return Check("fresh environment", PASSED if same == len(here) else FAILED, ". ".join(filter(None, found)))
