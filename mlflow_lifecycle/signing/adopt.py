"""Sign versions that are registered already.

``mlflow.sklearn.log_model(..., registered_model_name=...)`` uploads a model before anyone can sign
it, so its present state in the store is signed here. A training job that must not trust the store
signs what it has saved itself, with ``register_candidate``.
"""

import contextlib
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion

from mlflow_lifecycle.datasets import check_columns
from mlflow_lifecycle.exceptions import InvalidInputError, KeyRefusedError
from mlflow_lifecycle.flavors import stored_task
from mlflow_lifecycle.pins import locked, read_pins
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
    keep_training_rows,
    register_candidate,
    sign,
)
from mlflow_lifecycle.signing.verify import (
    Verified,
    download_model,
    find_version,
    open_model,
    verified,
)


def sign_version(
    uri: str,
    *,
    key: Path,
    lock: Path,
    training_data: pd.DataFrame | None = None,
    trusted_types: Collection[str] = (),
) -> Statement:
    """Sign a version in its present state in the store, as a candidate.

    The model is checked, and not loaded. A version that is signed already must verify. It is signed
    again only to add training data.

    Args:
        uri: ``models:/name/3`` or ``models:/name@champion``.
        key: the private key.
        lock: the lock file with the hashes of the model's packages.
        training_data: the rows that the model learned from, target included. Without them the gate
            cannot look for test rows among them, and the monitor has nothing to compare with.
        trusted_types: additional types that skops may load.

    Returns:
        The statement that is signed now.

    Raises:
        UnreviewedContentError: the model may not be loaded.
        NotVerifiedError: the version is signed already, and is not what was signed.
        KeyRefusedError: the key cannot be used.
        InvalidInputError: a pin has no hash in the lock, or the training data does not belong to
            the model or is signed already.
    """
    load_private(key)
    version, _ = find_version(uri)
    if not version.run_id:
        raise InvalidInputError(
            f"Version {version.version} of {version.name} has no run. Log the model within a run: "
            "with mlflow.start_run()"
        )
    evidence = f"signed/{version.name}/{version.version}"
    is_signed = mlflow.MlflowClient().list_artifacts(version.run_id, evidence)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="signing-")))
        if is_signed:
            public = public_half(key, scratch)
            copy = stack.enter_context(
                verified(uri, public, purpose="candidate", trusted_types=trusted_types)
            )
            root = copy.folder.parent
            statement = copy.statement
            if training_data is None:
                return statement
            if statement.training_rows:
                raise InvalidInputError(f"{uri} is signed with its training data already.")
        else:
            root = scratch
            statement = _check_model(version, root, lock, trusted_types)
        if training_data is not None:
            _check_columns(root / "model", training_data)
            rows_fingerprint = keep_training_rows(training_data, root)
            statement = replace(statement, training_rows=rows_fingerprint)
        sign(root, statement, key)
    return statement


def _check_model(
    version: ModelVersion, root: Path, lock: Path, trusted_types: Collection[str]
) -> Statement:
    """Download a model into ``root``, check it, and return its statement without training rows."""
    folder = root / "model"
    download_model(open_model(version), folder)
    pins = read_pins(folder / "requirements.txt")
    (root / "packages.txt").write_text(locked(pins, lock), encoding="utf-8")
    check_contents(folder, root / "packages.txt", trusted_types)
    run = mlflow.get_run(version.run_id)
    return candidate_statement(version.name, str(version.version), run, stored_task(folder), "")


def _check_columns(folder: Path, training_data: pd.DataFrame) -> None:
    """Refuse training data that has other columns than the inputs and one target."""
    signature = mlflow.models.Model.load(str(folder / "MLmodel")).signature
    inputs = signature.inputs.input_names() if signature and signature.inputs else []
    check_columns(training_data, inputs)
    targets = [str(name) for name in training_data if name not in inputs]
    if len(targets) != 1:
        found = ", ".join(targets) or "none"
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


def register_again(
    copy: Verified, folder: Path, *, key: Path, lock: Path, tags: dict[str, str]
) -> ModelVersion:
    """Log a verified version to the active run, with what was signed of its own, and register it.

    Args:
        copy: the version, verified.
        folder: a copy of its model. The ids of model and run are added to its file MLmodel.
        key: the private key.
        lock: the lock file with the hashes of its packages.
        tags: of the run and of the new version.

    Raises:
        KeyRefusedError: the key cannot be used.
    """
    statement = copy.statement
    rows = pd.read_parquet(copy.training_rows) if copy.training_rows else None
    mlflow.set_tags(tags | {"mlflow.source.git.commit": statement.commit})
    mlflow.log_params(statement.parameters)
    mlflow.log_metrics(statement.metrics)
    name = statement.registered_model
    version = register_candidate(folder, name, key=key, lock=lock, training_rows=rows)
    for tag, value in tags.items():
        mlflow.MlflowClient().set_model_version_tag(name, version.version, tag, value)
    return version
