"""The checks that a version must pass before it is released, each with its result.

MLflow evaluates a model and compares numbers with thresholds
(``mlflow.validate_evaluation_results``). It does not say how sure a difference is, whether the
model has seen the test rows, or whether its environment can be built.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import MetricThreshold

from mlflow_lifecycle.comparison import (
    Interval,
    detectable_difference,
    proportion_interval,
    rows_interval,
)
from mlflow_lifecycle.datasets import as_classes, check_columns, check_complete
from mlflow_lifecycle.environments import (
    build_environment,
    own_environment,
    predict_in,
    python_note,
)
from mlflow_lifecycle.exceptions import (
    EnvironmentNotBuiltError,
    GateClosedError,
    InvalidInputError,
    PredictionFailedError,
)
from mlflow_lifecycle.flavors import CLASSIFICATION, load_estimator, task_of
from mlflow_lifecycle.pins import read_pins
from mlflow_lifecycle.scoring import (
    LOWER_IS_BETTER,
    TOLERANCE,
    Predictions,
    differences,
    equal_rows,
    measure_of,
    order_columns,
    predict,
    score_rows,
)
from mlflow_lifecycle.signing.verify import Verified

PASSED, FAILED, UNCHECKED = "passed", "failed", "not checked"
ENVIRONMENT = "fresh environment"
# The share of the test rows that may also be training rows: equal rows happen by chance.
KNOWN_ROWS = 0.1


@dataclass(frozen=True)
class CheckResult:
    """The result of a check (passed, failed, not checked), and the detail that explains it."""

    name: str
    result: str
    detail: str


@dataclass(frozen=True)
class GateSettings:
    """What a version must reach, and how it is checked.

    Attributes:
        thresholds: what MLflow's metrics must reach, such as ``{"accuracy_score": 0.9}``: a
            minimum, or a maximum for a metric of which less is better, such as ``log_loss``.
        minimum_gain: the smallest gain that matters. The lower end of the interval of the
            difference from the baseline must be above it.
        margin: accept a version that is at most this much worse: the lower end must be above
            ``-margin``.
        same_predictions: accept a version that predicts the same, for the same model with renewed
            packages.
        rebuild: whether to build the environment. If not, the result is "not checked", and the
            version passes.
        cache: see ``mlflow_lifecycle.environments.build_environment``.
        checks: the checks; by default ``DEFAULT_CHECKS``.

    Raises:
        InvalidInputError: no threshold is stated, a number is out of its range, or two of minimum
            gain, margin and same predictions are combined.
    """

    thresholds: dict[str, float]
    minimum_gain: float = 0.0
    margin: float | None = None
    same_predictions: bool = False
    rebuild: bool = True
    cache: Path | None = None
    checks: "Sequence[Check] | None" = None

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if not self.thresholds:
            example = "accuracy_score=0.9"
            raise InvalidInputError(
                f"State at least one threshold, such as {example}: a baseline may be missing."
            )
        if not self.minimum_gain >= 0:
            raise InvalidInputError(f"The minimum gain must be 0 or more, got {self.minimum_gain}.")
        if self.margin is not None and not self.margin > 0:
            raise InvalidInputError(f"The margin must be above 0, got {self.margin}.")
        stated = [self.minimum_gain > 0, self.margin is not None, self.same_predictions]
        if sum(stated) > 1:
            raise InvalidInputError(
                "State one of minimum gain, margin and same predictions, not several."
            )


@dataclass
class GateContext:
    """What the checks look at, and what they have found so far. `gate_context` makes one.

    Attributes:
        candidate: the version, verified.
        baseline: the version that it would replace, verified; None if there is none.
        rows: the test rows, with the columns that the candidate takes in the order of its
            signature, and the target.
        all_rows: the test rows with all columns.
        target: the column with the true values.
        settings: what the candidate must reach.
        model: the candidate's model.
        results: those of the checks that were made.
        metrics: the candidate's, on the test rows.
        difference: from the baseline.
    """

    candidate: Verified
    baseline: Verified | None
    rows: pd.DataFrame
    all_rows: pd.DataFrame
    target: str
    settings: GateSettings
    model: object
    results: list[CheckResult] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    difference: Interval | None = None

    @property
    def features(self) -> pd.DataFrame:
        """The test rows without the target."""
        return self.rows.drop(columns=self.target)


Check = Callable[[GateContext], CheckResult]


@dataclass(frozen=True)
class Verdict:
    """The results of the checks, the metrics, and the difference from the baseline."""

    checks: list[CheckResult]
    metrics: dict[str, float]
    difference: Interval | None

    def require(self) -> None:
        """Refuse a version that did not pass.

        Raises:
            GateClosedError: a check failed.
        """
        failed = []
        for check in self.checks:
            if check.result == FAILED:
                failed.append(f"{check.name} {check.result} ({check.detail})")
        if failed:
            reasons = "; ".join(failed)
            raise GateClosedError(
                f"The version is not released: {reasons}. The alias stays where it is."
            )


def gate_context(
    candidate: Verified,
    baseline: Verified | None,
    rows: pd.DataFrame,
    target: str,
    settings: GateSettings,
) -> GateContext:
    """Return what the checks look at; refuse test rows that do not fit the candidate.

    Args:
        candidate: the version, verified.
        baseline: the version that it would replace, verified; None if there is none.
        rows: the test rows, target included, which no model has learned from.
        target: the column with the true values. Where the candidate learned classes as text, they
            are compared as text: a CSV file does not tell the text 0 from the number.
        settings: what the candidate must reach.

    Raises:
        InvalidInputError: a column or a value of the target is missing; the target is not numeric
            for a regressor; or the version did not learn from the column ``target``.
    """
    _refuse_unfit(candidate, rows, target)
    model = load_estimator(candidate.folder)
    if task_of(model) == CLASSIFICATION:
        known = _known_classes(candidate, model, target)
        rows = rows.assign(**{target: as_classes(known, rows[target])})
    elif not pd.api.types.is_numeric_dtype(rows[target]):
        found = rows[target].dtype
        raise InvalidInputError(
            f"The target {target!r} must be numeric for a regressor, got {found}."
        )
    features = order_columns(candidate.folder, rows.drop(columns=target))
    return GateContext(
        candidate=candidate,
        baseline=baseline,
        rows=features.assign(**{target: rows[target]}),
        all_rows=rows,
        target=target,
        settings=settings,
        model=model,
    )


def check_signature(context: GateContext) -> CheckResult:
    """Check that the model names its columns.

    MLflow logs none, and says nothing, for some nullable columns.
    """
    signature = mlflow.models.Model.load(str(context.candidate.folder / "MLmodel")).signature
    is_named = signature and signature.inputs and signature.inputs.has_input_names()
    names = signature.inputs.input_names() if is_named else []
    return _result("signature", bool(names), f"{len(names) or 'no'} input columns")


def check_input_example(context: GateContext) -> CheckResult:
    """Check that the model has an input example."""
    info = mlflow.models.Model.load(str(context.candidate.folder / "MLmodel"))
    detail = "logged with the model" if info.saved_input_example_info else "there is none"
    return _result("input example", bool(info.saved_input_example_info), detail)


def check_exact_pins(context: GateContext) -> CheckResult:
    """Check that every package is recorded with its hashes."""
    text = context.candidate.packages.read_text(encoding="utf-8")
    blocks = ("\n" + text.replace("\n    --hash", " --hash")).split("\n")
    pins = [line for line in blocks if line.strip()]
    unsure = []
    for line in pins:
        if "==" not in line or "--hash=sha256:" not in line:
            unsure.append(line.split("==")[0])
    if unsure:
        return CheckResult("exact pins", FAILED, f"without a hash: {', '.join(unsure)}")
    return _result("exact pins", bool(pins), f"{len(pins)} packages, each with == and its hashes")


def check_test_rows(context: GateContext) -> CheckResult:
    """Check that the candidate has not learned from the test rows, as far as its own record tells.

    A row counts as known if all its values, the target included, are those of a training row. Rows
    that were changed a little, or used before the training rows were split off, are not found.
    """
    if context.candidate.training_rows is None:
        return CheckResult("test rows", UNCHECKED, "no training data was signed")
    training = pd.read_parquet(context.candidate.training_rows)
    try:
        same = context.all_rows[training.columns].astype(training.dtypes)
    except (TypeError, ValueError) as error:
        detail = f"they have other types than the training rows: {error}"
        return CheckResult("test rows", FAILED, detail)
    known = set(pd.util.hash_pandas_object(training, index=False))
    count = sum(value in known for value in pd.util.hash_pandas_object(same, index=False))
    detail = f"{count} of {len(same)} are among the {len(training)} training rows"
    if task_of(context.model) == CLASSIFICATION:
        unknown = sorted(set(same[context.target]) - set(training[context.target]), key=str)
        if unknown:
            detail += f"; it never learned these classes: {', '.join(map(str, unknown))}"
            return CheckResult("test rows", FAILED, detail)
    return _result("test rows", count <= KNOWN_ROWS * len(same), detail)


def check_thresholds(context: GateContext) -> CheckResult:
    """Check by MLflow's own evaluation and validation that each metric reaches its threshold.

    A threshold is compared with the metric alone, so a worse model passes now and then. The
    interval in the detail shows by how much an accuracy on these rows can differ from the true one.
    """
    evaluation = evaluate(context)
    for name, value in evaluation.metrics.items():
        if name not in ("score", "example_count"):
            context.metrics[name] = float(value)
    thresholds = {}
    details = []
    for name, value in context.settings.thresholds.items():
        is_maximum = name in LOWER_IS_BETTER
        thresholds[name] = MetricThreshold(threshold=value, greater_is_better=not is_maximum)
        if name in context.metrics:
            limit = "at most" if is_maximum else "at least"
            found = describe_metric(name, context.metrics[name], len(context.rows))
            details.append(f"{found}, {limit} {value}")
        else:
            details.append(f"{name} is not among: {', '.join(sorted(context.metrics))}")
    try:
        mlflow.validate_evaluation_results(thresholds, evaluation)
    except MlflowException:
        return CheckResult("thresholds", FAILED, "; ".join(details))
    return CheckResult("thresholds", PASSED, "; ".join(details))


def check_baseline(context: GateContext) -> CheckResult:
    """Check by the rule that the candidate may replace the baseline."""
    rule = context.settings
    if context.baseline is None:
        if rule.same_predictions:
            return CheckResult("baseline", FAILED, "there is none to predict the same as")
        return CheckResult("baseline", PASSED, "there is none; the thresholds decide")
    predictions = predict(context.model, context.features)
    other = predict_baseline(context)
    measure = measure_of(predictions, other)
    target = context.rows[context.target]
    scores = score_rows(predictions, target, measure)
    baseline_scores = score_rows(other, target, measure)
    difference = rows_interval(scores, baseline_scores)
    context.difference = difference
    version = f"version {context.baseline.statement.version}"
    if rule.same_predictions:
        passed, detail = compare_predictions(predictions, other)
        return _result("baseline", passed, f"{detail}, compared with {version}")
    detail = f"{measure} {difference} against {version}, on {len(target)} rows"
    detectable = detectable_difference(scores, baseline_scores)
    power = f"these rows show a difference of {detectable:.4f} or more with 80 % power"
    bound = rule.minimum_gain if rule.margin is None else -rule.margin
    if difference.low > bound:
        return CheckResult("baseline", PASSED, f"{detail}; {power}")
    if rule.margin is not None:
        reason = f"it may be worse than the baseline by more than the margin {rule.margin}"
    elif rule.minimum_gain:
        reason = f"a gain of more than {rule.minimum_gain} is not shown"
    else:
        reason = "not better by more than chance, so the baseline stays"
    return CheckResult("baseline", FAILED, f"{detail}: {reason}; {power}")


def predict_baseline(context: GateContext) -> Predictions:
    """Return what the baseline predicts, in its own environment if its packages are others."""
    baseline = context.baseline
    features = order_columns(baseline.folder, context.all_rows.drop(columns=context.target))
    pins = read_pins(baseline.folder / "requirements.txt")
    same_pins = pins == read_pins(context.candidate.folder / "requirements.txt")
    if same_pins or not context.settings.rebuild:
        return predict(load_estimator(baseline.folder), features)
    cache = context.settings.cache
    with own_environment(baseline.folder, baseline.packages, cache) as python:
        return predict_in(python, baseline.folder, features)


def check_fresh_environment(context: GateContext) -> CheckResult:
    """Check that the recorded packages alone give an environment with the same predictions."""
    if any(check.result == FAILED for check in context.results):
        return CheckResult(ENVIRONMENT, UNCHECKED, "another check failed")
    if not context.settings.rebuild:
        return CheckResult(ENVIRONMENT, UNCHECKED, "skipped on request")
    candidate = context.candidate
    here = predict(context.model, context.features)
    requirements = candidate.folder / "requirements.txt"
    with tempfile.TemporaryDirectory(prefix="gate-") as scratch:
        folder = Path(scratch) / "environment"
        try:
            python = build_environment(
                requirements, folder, lock=candidate.packages, cache=context.settings.cache
            )
            there = predict_in(python, candidate.folder, context.features)
        except (EnvironmentNotBuiltError, PredictionFailedError) as error:
            return CheckResult(ENVIRONMENT, FAILED, " ".join(str(error).split()))
    equal = equal_rows(here, there)
    detail = f"{equal.sum()} of {len(equal)} predictions are the same"
    note = python_note(candidate.folder)
    return _result(ENVIRONMENT, bool(equal.all()), f"{detail}. {note}" if note else detail)


#: The checks of the gate, in their order. Each takes a `GateContext` and returns a `CheckResult`.
DEFAULT_CHECKS: tuple[Check, ...] = (
    check_signature,
    check_input_example,
    check_exact_pins,
    check_test_rows,
    check_thresholds,
    check_baseline,
    check_fresh_environment,
)


def gate(context: GateContext) -> Verdict:
    """Return the verdict of the checks, in their order. The evaluation is logged to the active run.

    A check is a function that takes the context and returns a `CheckResult`. Add your own before
    the last of `DEFAULT_CHECKS`, which takes longest. A check that raises an error has failed.
    """
    for check in context.settings.checks or DEFAULT_CHECKS:
        try:
            result = check(context)
        except Exception as error:  # whatever a model raises
            name = getattr(check, "__name__", type(check).__name__)
            name = name.removeprefix("check_").replace("_", " ")
            detail = " ".join(str(error).split())[:300]
            result = CheckResult(name, FAILED, f"{type(error).__name__}: {detail}")
        context.results.append(result)
    return Verdict(context.results, context.metrics, context.difference)


def evaluate(context: GateContext) -> "mlflow.models.EvaluationResult":
    """Return MLflow's evaluation of the candidate, which it logs to the active run."""
    # Loaded before MLflow does it, which would undo what loading it sets.
    plt.switch_backend(plt.get_backend())
    before = set(plt.get_fignums())
    try:
        return mlflow.models.evaluate(
            str(context.candidate.folder),
            context.rows,
            targets=context.target,
            model_type="classifier" if task_of(context.model) == CLASSIFICATION else "regressor",
            evaluator_config={"log_model_explainability": False},  # which would need shap
        )
    finally:
        # MLflow leaves a figure open, which a notebook would show.
        for number in set(plt.get_fignums()) - before:
            plt.close(number)


def describe_metric(name: str, value: float, rows: int) -> str:
    """Return a metric as text, an accuracy with its 95 % interval."""
    if name != "accuracy_score":
        return f"{name} {value:.4f}"
    low, high = proportion_interval(round(value * rows), rows)
    return f"{name} {value:.4f} (95 % interval {low:.4f} to {high:.4f})"


def compare_predictions(first: Predictions, second: Predictions) -> tuple[bool, str]:
    """Return whether two models predict the same up to `TOLERANCE`, and what was found."""
    equal = equal_rows(first, second)
    detail = f"{equal.sum()} of {len(equal)} predictions are the same"
    if first.probabilities is not None and second.probabilities is not None:
        largest = differences(first, second).max()
        detail += f" (probabilities differ by at most {largest:.1g}, allowed are {TOLERANCE:.0e})"
    return bool(equal.all()), detail


def _refuse_unfit(candidate: Verified, rows: pd.DataFrame, target: str) -> None:
    """Refuse test rows in which a column or a value of the target is missing."""
    if rows.empty:
        raise InvalidInputError("There are no test rows.")
    needed = [target]
    if candidate.training_rows:
        needed = list(pd.read_parquet(candidate.training_rows).columns)
    if target not in needed:
        columns = ", ".join(needed)
        raise InvalidInputError(
            f"The training data has no column {target!r}. The columns are: {columns}"
        )
    check_columns(rows, needed)
    check_complete(rows, target)


def _result(name: str, passed: bool, detail: str) -> CheckResult:
    return CheckResult(name, PASSED if passed else FAILED, detail)


def _known_classes(candidate: Verified, model: object, target: str) -> pd.Series:
    """Return the classes that the candidate has learned."""
    if candidate.training_rows:
        return pd.read_parquet(candidate.training_rows)[target]
    return pd.Series(model.classes_)
