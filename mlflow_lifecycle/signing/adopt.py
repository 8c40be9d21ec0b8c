"""Sign a version that plain MLflow has logged.

``mlflow.sklearn.log_model(..., registered_model_name=...)`` uploads a model before anybody can sign it. So what is
signed here is what the store holds now. A training job that does not trust the store signs what it has saved itself,
with ``mlflow_lifecycle.signing.statement.register_candidate``.
"""

import contextlib
import re
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion

from mlflow_lifecycle.exceptions import InvalidInputError, KeyRefusedError
from mlflow_lifecycle.flavors import stored_task
from mlflow_lifecycle.pins import locked, parse_pins
from mlflow_lifecycle.policy import check_contents
from mlflow_lifecycle.signing.keys import (
    load_private,
    new_key,
    present_public_key,
    public_half,
)
from mlflow_lifecycle.signing.statement import (
    Statement,
    candidate_statement,
    check_name,
    keep_training_rows,
    sign,
)
from mlflow_lifecycle.signing.verify import find_version, verified


def sign_version(
    uri: str,
    *,
    key: Path,
    lock: Path,
    training_data: pd.DataFrame | None = None,
    trusted_types: Collection[str] = (),
) -> Statement:
    """Sign a version as the store holds it now, as a candidate; the model is checked, and not loaded.

    A version that is signed already must verify. Then training data that it lacks is added, and nothing else changes.

    Args:
        uri: ``models:/name/3`` or ``models:/name@champion``.
        key: the private key.
        lock: the list that holds the hashes of the model's packages.
        training_data: the rows that the model learned from, target included. Without them, the gate cannot look for
            test rows among them, and the monitor has nothing to compare with.
        trusted_types: the types that skops may load, as reviewed by the project.

    Returns:
        The statement that is signed now.

    Raises:
        UnreviewedContentError: the model may not be loaded.
        NotVerifiedError: the version is signed already, and is not what was signed.
        KeyRefusedError: the key cannot be used.
        ValueError: a pin has no hash in the lock, the training data does not belong to the model, or is signed already.
    """
    load_private(key)
    name, version, _ = find_version(uri)
    check_name(name)
    if not version.run_id:
        remedy = "Log the model within a run: with mlflow.start_run()"
        raise InvalidInputError(f"Version {version.version} of {name} has no run. {remedy}")
    above = f"signed/{name}/{version.version}"
    if mlflow.MlflowClient().list_artifacts(version.run_id, above):
        return _add_training_data(uri, key, training_data, trusted_types)
    with tempfile.TemporaryDirectory(prefix="signing-") as scratch:
        root = Path(scratch)
        folder = _download(version, root / "model")
        pins = parse_pins(
            (folder / "requirements.txt").read_text(encoding="utf-8"), "requirements.txt"
        )
        (root / "packages.txt").write_text(locked(pins, lock), encoding="utf-8")
        check_contents(folder, root / "packages.txt", trusted_types)
        task = stored_task(folder)
        rows_fingerprint = ""
        if training_data is not None:
            _check_columns(folder, training_data)
            rows_fingerprint = keep_training_rows(training_data, root)
        run = mlflow.get_run(version.run_id)
        statement = candidate_statement(name, str(version.version), run, task, rows_fingerprint)
        sign(root, statement, key)
    return statement


def _add_training_data(
    uri: str,
    key: Path,
    training_data: pd.DataFrame | None,
    trusted_types: Collection[str],
) -> Statement:
    """Verify a version that is signed already, and sign the same again with the training data that it lacks."""
    with tempfile.TemporaryDirectory() as scratch:
        public = public_half(key, Path(scratch))
        with verified(uri, public, trusted_types=tuple(trusted_types)) as copy:
            if training_data is None:
                return copy.statement
            if copy.training_rows:
                raise InvalidInputError(f"{uri} is signed with its training data already.")
            _check_columns(copy.folder, training_data)
            root = copy.folder.parent
            rows_fingerprint = keep_training_rows(training_data, root)
            statement = replace(copy.statement, training_rows=rows_fingerprint)
            sign(root, statement, key)
            return statement


def _download(version: ModelVersion, folder: Path) -> Path:
    """Download the model of a version from the active store.

    Raises:
        ValueError: it is somewhere else. MLflow would send the password of the tracking server there.
    """
    logged = re.fullmatch(r"models:/(m-[\w-]+)", version.source)
    if logged is None:
        raise InvalidInputError(
            f"The version is not a logged model of this store: {version.source}. Log the model again."
        )
    model = mlflow.get_logged_model(logged[1])
    experiment = mlflow.get_experiment(model.experiment_id)
    inside = model.artifact_location.startswith(f"{experiment.artifact_location.rstrip('/')}/")
    elsewhere = re.match(r"(https?|mlflow-artifacts)://[^/]", model.artifact_location)
    if elsewhere or not inside or ".." in model.artifact_location:
        raise InvalidInputError(
            f"The files of the model are outside of this store: {model.artifact_location}"
        )
    folder.mkdir(parents=True)
    mlflow.artifacts.download_artifacts(version.source, dst_path=str(folder))
    (folder / "registered_model_meta").unlink(missing_ok=True)  # MLflow's note of name and number
    return folder


def _check_columns(folder: Path, training_data: pd.DataFrame) -> None:
    """Refuse training data that has other columns than the inputs and one target."""
    signature = mlflow.models.Model.load(str(folder / "MLmodel")).signature
    inputs = signature.inputs.input_names() if signature and signature.inputs else []
    missing = [name for name in inputs if name not in training_data]
    if missing:
        raise InvalidInputError(
            f"These columns are missing in the training data: {', '.join(missing)}"
        )
    others = [str(name) for name in training_data if name not in inputs]
    if len(others) != 1:
        found = ", ".join(others) or "none"
        raise InvalidInputError(
            f"The training data must have one column beside the inputs, the target, got {found}"
        )


def sign_anew(
    names: Iterable[str],
    trusted_types: Collection[str] = (),
) -> tuple[Path, Path, list[Statement]]:
    """Make a new key, and sign with it each version of ``names`` that has an alias.

    All versions are verified with the present key before anything is changed. Its private half may
    be lost.

    Returns:
        The new key, the public half of the one before it, and the statements of the versions.

    Raises:
        NotVerifiedError: a version is not what the present key signed.
        KeyRefusedError: there is no key yet, or it cannot be used.
        mlflow.MlflowException: there is no such model, or the store gives no answer.
    """
    present = present_public_key()
    if present is None:
        raise KeyRefusedError("There is no key yet that could have signed a version.")
    client = mlflow.MlflowClient()
    with contextlib.ExitStack() as stack:
        copies = []
        for name in names:
            for alias in sorted(client.get_registered_model(name).aliases):
                uri = f"models:/{name}@{alias}"
                copy = verified(uri, present, purpose="candidate", trusted_types=trusted_types)
                copies.append(stack.enter_context(copy))
        key, before = new_key()
        for copy in copies:
            sign(copy.folder.parent, copy.statement, key)
    return key, before, [copy.statement for copy in copies]
