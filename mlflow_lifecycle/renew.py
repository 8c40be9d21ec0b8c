"""Give a model version new packages, if it still answers the same.

``mlflow models update-pip-requirements`` edits the list of a registered version in place, and tries
nothing. Here the old and the new environment are built, and both predict. Only if their answers are
equal, the same model is registered as a new version.
"""

import platform
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import yaml

from mlflow_lifecycle.environments import own_environment, predict_in
from mlflow_lifecycle.exceptions import InvalidInputError, NotRenewedError, PredictionFailedError
from mlflow_lifecycle.experiments import create_experiment
from mlflow_lifecycle.pins import locked, read_pins
from mlflow_lifecycle.policy import check_contents, environment_files
from mlflow_lifecycle.scoring import (
    Predictions,
    differences,
    equal_rows,
    order_columns,
)
from mlflow_lifecycle.signing.adopt import register_again
from mlflow_lifecycle.signing.keys import public_half
from mlflow_lifecycle.signing.verify import Verified, verified

EXPERIMENT = "renewals"


@dataclass(frozen=True)
class Renewal:
    """A version with new packages, how many rows it answers as before, and the run of it."""

    uri: str
    renewed_from: str
    rows: int
    run_id: str


def renew_version(
    uri: str,
    requirements: Path,
    lock: Path,
    *,
    key: Path,
    rows: pd.DataFrame | None = None,
    tolerance: float = 0.0,
    trusted_types: Collection[str] = (),
    cache: Path | None = None,
) -> Renewal:
    """Register the model of a version with new packages, as a new version, signed as a candidate.

    The rows that both environments predict are the training rows, if they were signed, ``rows``,
    and for each optional column one row in which it is missing.

    Args:
        uri: the version: ``models:/name/3`` or ``models:/name@production``.
        requirements: the new list, one pin a line.
        lock: the lock file with the hashes of the new packages.
        key: the private key, which signed the version and signs the new one.
        rows: more rows to predict, with the columns that the model takes.
        tolerance: by how much a probability may differ, and a number as a share of its size.
        trusted_types: see ``mlflow_lifecycle.signing.verify.verified``.
        cache: see ``mlflow_lifecycle.environments.build_environment``.

    Raises:
        NotRenewedError: an answer differs, or the model cannot be loaded with the new packages.
            Nothing was registered.
        NotVerifiedError: the version is not what was signed.
        EnvironmentNotBuiltError: an environment cannot be built.
        InvalidInputError: the packages are those of the version, a pin has no hash in the lock, or
            there are no rows.
    """
    pins = read_pins(requirements)
    packages = locked(pins, lock)
    with tempfile.TemporaryDirectory(prefix="renewing-") as scratch:
        public = public_half(key, Path(scratch))
        cache = cache or Path(scratch) / "cache"  # both environments have most packages in common
        with verified(uri, public, purpose="candidate", trusted_types=trusted_types) as copy:
            if pins == read_pins(copy.folder / "requirements.txt"):
                raise InvalidInputError(f"{uri} has the packages of {requirements} already.")
            features = collect_rows(copy, rows)
            new_lock = Path(scratch) / "packages.txt"
            new_lock.write_text(packages, encoding="utf-8")
            folder = replace_packages(copy.folder, pins, Path(scratch) / "model")
            check_contents(folder, new_lock, trusted_types)
            name = f"{copy.statement.registered_model}/{copy.statement.version}"
            description = "Each run renews the packages of a version."
            experiment = create_experiment(mlflow.get_tracking_uri(), EXPERIMENT, description)
            with mlflow.start_run(
                experiment_id=experiment.experiment_id,
                run_name=f"renew {name}",
                tags={"renewed_from": name},
                nested=True,
            ) as run:
                with own_environment(copy.folder, copy.packages, cache) as python:
                    before = predict_in(python, copy.folder, features)
                try:
                    with own_environment(folder, new_lock, cache) as python:
                        after = predict_in(python, folder, features)
                except PredictionFailedError as error:
                    raise NotRenewedError(
                        f"The model cannot be used with the new packages. {error}. "
                        "Train it again with these packages."
                    ) from None
                refuse_changes(before, after, features, tolerance)
                tags = {"renewed_from": name, "equal_predictions": str(len(features))}
                version = register_again(copy, folder, key=key, lock=new_lock, tags=tags)
    new = f"models:/{version.name}/{version.version}"
    return Renewal(new, f"models:/{name}", len(features), run.info.run_id)


def collect_rows(copy: Verified, rows: pd.DataFrame | None) -> pd.DataFrame:
    """Return the rows to predict, with the columns that the model takes.

    Raises:
        InvalidInputError: there are none, or a column is missing.
    """
    tables = []
    if copy.training_rows:
        tables.append(order_columns(copy.folder, pd.read_parquet(copy.training_rows)))
    if rows is not None:
        tables.append(order_columns(copy.folder, rows))
    if not sum(map(len, tables)):
        raise InvalidInputError(
            f"There are no rows to predict: no training data was signed with {copy.uri}. "
            "Give some: --data FILE"
        )
    for column in mlflow.models.Model.load(str(copy.folder)).get_input_schema():
        if not column.required:
            probe = tables[0].head(1).astype(object)
            probe[column.name] = None
            tables.append(probe)
    return pd.concat(tables, ignore_index=True)


def replace_packages(folder: Path, pins: list[str], new_folder: Path) -> Path:
    """Copy a saved model, and write other packages and this Python into the copy."""
    shutil.copytree(folder, new_folder)
    python = platform.python_version()
    (new_folder / "requirements.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    for name, content in environment_files(pins, python).items():
        (new_folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")
    description = mlflow.models.Model.load(str(new_folder))
    description.flavors["python_function"]["python_version"] = python
    description.save(str(new_folder / "MLmodel"))
    return new_folder


def refuse_changes(
    before: Predictions, after: Predictions, rows: pd.DataFrame, tolerance: float
) -> None:
    """Refuse new packages with which an answer differs.

    Raises:
        NotRenewedError: with the number of rows, the largest difference, and three rows.
    """
    changed = np.flatnonzero(~equal_rows(before, after, tolerance))
    if not len(changed):
        return
    sizes = differences(before, after)
    largest = sizes.max()
    examples = []
    for place in changed[np.argsort(-sizes[changed], kind="stable")][:3]:
        answers = f"{before.predicted[place]} -> {after.predicted[place]}"
        if before.probabilities is not None and after.probabilities is not None:
            old = before.probabilities[place].round(4).tolist()
            new = after.probabilities[place].round(4).tolist()
            answers += f", probabilities {old} -> {new}"
        examples.append(f"{answers} for {rows.iloc[place].to_dict()}")
    raise NotRenewedError(
        f"{len(changed)} of {len(rows)} rows differ with the new packages, by up to {largest:.2g}. "
        f"Nothing was registered. Train the model again with these packages, or keep the old ones. "
        f"For example: {'; '.join(examples)}"
    )
