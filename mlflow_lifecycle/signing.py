"""Sign a model version as it was saved here, with a statement of what it is.

MLflow has no signatures (mlflow#18889): whoever can write to the store can change a model there, or put one version in
another's place. Here the files are signed before they go to the store. OpenSSF's model_signing makes the signatures.
"""

import json
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import mlflow
import model_signing
import pandas as pd
from mlflow.entities import LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion

from mlflow_lifecycle.keys import fingerprint_of, load_private, public_half
from mlflow_lifecycle.pins import locked, read_pins
from mlflow_lifecycle.tables import fingerprint


@dataclass(frozen=True)
class Statement:
    """What a version is, signed together with its files."""

    registered_model: str
    version: str
    run_id: str
    purpose: str  # "candidate" or "release"
    training_rows: str  # the fingerprint of the rows that it learned from, see mlflow_lifecycle.tables
    alias: str = ""  # of a release: what it was released as
    released_at: str = ""  # of a release: in UTC, as in 2026-11-21T19:46:18.760257Z


def register_candidate(folder: Path, name: str, *, key: Path, lock: Path, training_rows: pd.DataFrame) -> ModelVersion:
    """Log a model saved in ``folder`` to the active run, register it as a version of ``name``, and sign it.

    What is signed is the folder here, not what the store makes of it.

    Args:
        folder: where ``mlflow.sklearn.save_model`` has just saved the model. Its MLmodel gets the ids of model and run.
        name: the registered model, which is made if need be.
        key: the private key.
        lock: the list that holds the hashes of the model's packages.
        training_rows: the rows that the model learned from, target included. They are kept with the version.

    Raises:
        KeyRefusedError: the key cannot be used.
        ValueError: a pin has no hash in the lock, no run is active, Parquet cannot hold the training rows, or MLflow
            could not look up a version of this name, or its files. Then nothing was logged.
    """
    if re.search(r"""[#?@'"\\\n]""", name):
        raise ValueError(f"A registered model's name must have no # ? @ \\ quote or new line: {name!r}")
    load_private(key)
    packages, run = locked(read_pins(Path(folder) / "requirements.txt"), lock), mlflow.active_run()
    if run is None:
        raise ValueError("A candidate belongs to a run. Call this within: with mlflow.start_run(...)")
    client, run_id = mlflow.MlflowClient(), run.info.run_id
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "version"
        root.mkdir()
        try:
            training_rows.to_parquet(root / "training_rows.parquet", index=False)
        except (TypeError, ValueError, NotImplementedError, OverflowError) as error:
            told = f"Parquet cannot hold the training rows: {'. '.join(map(str, error.args))}"
            raise ValueError(f"{told}. Give each column values of one type, and train the model again.") from None
        logged = mlflow.initialize_logged_model(name, params=client.get_run(run_id).data.params)
        model = mlflow.models.Model.load(str(Path(folder) / "MLmodel"))
        model.model_id, model.run_id = logged.model_id, run_id
        model.save(str(Path(folder) / "MLmodel"))
        shutil.copytree(folder, root / "model")
        (root / "packages.txt").write_text(packages, encoding="utf-8")
        client.log_model_artifacts(logged.model_id, str(root / "model"))
        mlflow.finalize_logged_model(logged.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        version = mlflow.register_model(f"models:/{logged.model_id}", name)
        number = str(version.version)
        statement = Statement(
            name, number, run_id, "candidate", fingerprint(pd.read_parquet(root / "training_rows.parquet"))
        )
        sign(root, statement, key)
    return version


def sign(root: Path, statement: Statement, key: Path) -> None:
    """Sign the version in ``root``, with ``statement``, and log the evidence to its run.

    Args:
        root: a folder with ``model`` as saved or verified here, and beside it ``packages.txt``,
            ``training_rows.parquet``, and what else belongs to the version.
        statement: what the version is.
        key: the private key.
    """
    (root / "statement.json").write_text(json.dumps(asdict(statement), indent=2) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        public, evidence = public_half(key, Path(scratch)), Path(scratch) / "evidence"
        shutil.copytree(root, evidence, ignore=shutil.ignore_patterns("model"))
        signer = model_signing.signing.Config().set_hashing_config(every_file())
        signature = evidence / f"{fingerprint_of(public)[:16]}.sig"
        signer.use_elliptic_key_signer(private_key=Path(key)).sign(root, signature)
        mlflow.MlflowClient().log_artifacts(statement.run_id, str(evidence), evidence_place(statement))


def every_file() -> model_signing.hashing.Config:
    """Return how files are hashed: all of them, those that git would ignore, too."""
    return model_signing.hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def evidence_place(statement: Statement) -> str:
    """Return where the evidence is, among the artifacts of the version's run."""
    last = "candidate" if statement.purpose == "candidate" else f"{statement.alias}@{statement.released_at}"
    return f"signed/{statement.registered_model}/{statement.version}/{re.sub('[:.]', '', last)}"
