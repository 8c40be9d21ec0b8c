"""Sign a model version, together with a statement of what it is.

MLflow has no signatures (mlflow#18889): anyone with write access to the store can change a model
there, or put one version in the place of another. Here the files are signed before they go to the
store. The signatures are made by OpenSSF's model_signing.
"""

import json
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlflow
import model_signing
import pandas as pd
from mlflow.entities import LoggedModelOutput, Run
from mlflow.entities.model_registry import ModelVersion

from mlflow_lifecycle.datasets import fingerprint
from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.flavors import stored_task
from mlflow_lifecycle.pins import locked, read_pins
from mlflow_lifecycle.signing.keys import fingerprint_of, load_private, public_half


@dataclass(frozen=True)
class Statement:
    """What a version is, signed together with its files."""

    registered_model: str
    version: str
    run_id: str
    purpose: str  # "candidate" or "release"
    training_rows: str  # the fingerprint of the rows that it learned from, or empty
    alias: str = ""  # of a release: what it was released as
    released_at: str = ""  # of a release: in UTC, as in 2026-11-21T19:46:18.760257Z
    # Of the model, and of its run when the version was signed. Empty in older statements.
    task: str = ""  # "classification" or "regression"
    commit: str = ""
    parameters: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def register_candidate(
    folder: Path,
    name: str,
    *,
    key: Path,
    lock: Path,
    training_rows: pd.DataFrame | None,
) -> ModelVersion:
    """Log a saved model to the active run, register it as a version of ``name``, and sign it.

    The folder here is signed, not what the store makes of it.

    Args:
        folder: where ``save_model`` has just saved the model. The ids of model and run are added to
            its file MLmodel.
        name: the registered model, which is created if needed.
        key: the private key.
        lock: the lock file with the hashes of the model's packages.
        training_rows: the rows that the model learned from, target included. They are kept with the
            version. None if they are not known.

    Raises:
        KeyRefusedError: the key cannot be used.
        InvalidInputError: a pin has no hash in the lock, no run is active, Parquet cannot hold the
            training rows, or the name is invalid. Then nothing was logged.
    """
    check_name(name)
    load_private(key)
    packages = locked(read_pins(Path(folder) / "requirements.txt"), lock)
    run = mlflow.active_run()
    if run is None:
        raise InvalidInputError(
            "A candidate belongs to a run. Call this within: with mlflow.start_run(...)"
        )
    client = mlflow.MlflowClient()
    run = client.get_run(run.info.run_id)  # with the parameters that were logged since
    task = stored_task(folder)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "version"
        root.mkdir()
        rows_fingerprint = ""
        if training_rows is not None:
            rows_fingerprint = keep_training_rows(training_rows, root)
        model_name = re.sub(r"[/:.%]", "_", name)  # which MLflow takes in a registered model alone
        logged = mlflow.initialize_logged_model(model_name, params=run.data.params)
        description = mlflow.models.Model.load(str(Path(folder) / "MLmodel"))
        description.model_id = logged.model_id
        description.run_id = run.info.run_id
        description.save(str(Path(folder) / "MLmodel"))
        shutil.copytree(folder, root / "model")
        (root / "packages.txt").write_text(packages, encoding="utf-8")
        client.log_model_artifacts(logged.model_id, str(root / "model"))
        mlflow.finalize_logged_model(logged.model_id, "READY")
        client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=0)])
        version = mlflow.register_model(f"models:/{logged.model_id}", name)
        number = str(version.version)
        sign(root, candidate_statement(name, number, run, task, rows_fingerprint), key)
    return version


def check_name(name: str) -> None:
    """Refuse the name of a registered model that cannot be part of a path, an address or a filter.

    Raises:
        InvalidInputError: it has such a character.
    """
    if re.search(r"""[#?@'"\\]""", name) or not name.isprintable():
        raise InvalidInputError(
            f"The name of a registered model must not contain # ? @ \\ quotes or invisible "
            f"characters, got {name!r}"
        )


def keep_training_rows(rows: pd.DataFrame, root: Path) -> str:
    """Write the training rows into the folder of a version, and return their fingerprint.

    Raises:
        InvalidInputError: Parquet cannot hold them.
    """
    path = root / "training_rows.parquet"
    try:
        rows.to_parquet(path, index=False)
    except (TypeError, ValueError, NotImplementedError, OverflowError) as error:
        reason = ". ".join(map(str, error.args))
        raise InvalidInputError(
            f"Parquet cannot hold the training rows: {reason}. "
            "Give each column values of one type, and train the model again."
        ) from None
    return fingerprint(pd.read_parquet(path))


def candidate_statement(
    name: str, number: str, run: Run, task: str, training_rows: str
) -> Statement:
    """Return the statement of a candidate, with what its run holds now.

    Args:
        name: the registered model.
        number: the version.
        run: the run of the version.
        task: see ``mlflow_lifecycle.flavors.task_of``.
        training_rows: the fingerprint of the training rows; empty if none are signed.
    """
    return Statement(
        registered_model=name,
        version=number,
        run_id=run.info.run_id,
        purpose="candidate",
        training_rows=training_rows,
        task=task,
        commit=run.data.tags.get("mlflow.source.git.commit", ""),
        parameters=dict(sorted(run.data.params.items())),
        metrics=dict(sorted(run.data.metrics.items())),
    )


def sign(root: Path, statement: Statement, key: Path) -> None:
    """Sign a version with its statement, and log the evidence to its run.

    Args:
        root: a folder with ``model`` as saved or verified here, and beside it ``packages.txt``,
            ``training_rows.parquet``, and what else belongs to the version.
        statement: what the version is.
        key: the private key.
    """
    text = json.dumps(asdict(statement), indent=2) + "\n"
    (root / "statement.json").write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        public = public_half(key, Path(scratch))
        evidence = Path(scratch) / "evidence"
        shutil.copytree(root, evidence, ignore=shutil.ignore_patterns("model"))
        signer = model_signing.signing.Config().set_hashing_config(every_file())
        signature = evidence / f"{fingerprint_of(public)[:16]}.sig"
        signer.use_elliptic_key_signer(private_key=Path(key)).sign(root, signature)
        client = mlflow.MlflowClient()
        client.log_artifacts(statement.run_id, str(evidence), evidence_place(statement))


def every_file() -> model_signing.hashing.Config:
    """Return how files are hashed: all of them, those that git would ignore, too."""
    return model_signing.hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def evidence_place(statement: Statement) -> str:
    """Return the folder of the evidence among the artifacts of the version's run."""
    folder = "candidate"
    if statement.purpose == "release":
        folder = re.sub("[:.]", "", f"{statement.alias}@{statement.released_at}")
    return f"signed/{statement.registered_model}/{statement.version}/{folder}"
