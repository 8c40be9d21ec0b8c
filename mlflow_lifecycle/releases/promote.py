"""Promote a version to another tracking server.

It is verified here and passes the gate there, and its tags lead back. MLflow's
``client.copy_model_version`` stays within one registry (mlflow#10336).
"""

import contextlib
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import mlflow
import pandas as pd

from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.experiments import check_store, create_experiment, printable
from mlflow_lifecycle.releases.card import check_sentences
from mlflow_lifecycle.releases.gate import GateSettings
from mlflow_lifecycle.releases.release import Release, release
from mlflow_lifecycle.signing.adopt import register_again
from mlflow_lifecycle.signing.keys import public_half
from mlflow_lifecycle.signing.verify import Verified, verified

EXPERIMENT = "promoted"


def promote(
    uri: str,
    to: str,
    rows: pd.DataFrame,
    target: str,
    settings: GateSettings,
    *,
    key: Path,
    intended_use: str,
    limits: str,
    alias: str = "production",
    trusted_types: Collection[str] = (),
) -> Release:
    """Release a version of the active store on the server ``to``, under the same name.

    The version is verified here and registered there, with the parameters and metrics of its run.
    There it passes the gate against the baseline on that server. If anything fails before the alias
    moves there, the version that was registered there is deleted again.

    Args:
        uri: the version here: ``models:/name/3`` or ``models:/name@production``.
        to: the address of the other server.
        rows: the test rows, target included.
        target: the column with the true values.
        settings: what the version must reach there.
        key: the private key, which signed the version here and signs it there.
        intended_use: for the card: what the model is for.
        limits: for the card: what the model is not for.
        alias: the alias to move there.
        trusted_types: see ``mlflow_lifecycle.signing.verify.verified``.

    Raises:
        NotVerifiedError: the version is not what was signed.
        GateClosedError: it did not pass the gate there.
        KeyRefusedError: the key cannot be used.
        StoreUnusableError: the other server does not answer, or cannot be used.
        InvalidInputError: a run is active, or a sentence or the test rows cannot be used.
    """
    check_sentences(intended_use=intended_use, limits=limits)
    if mlflow.active_run():
        raise InvalidInputError("A run is active here. End it before: mlflow.end_run()")
    check_store(to)
    here = mlflow.get_tracking_uri()
    with tempfile.TemporaryDirectory() as scratch:
        public = public_half(key, Path(scratch))
        with verified(uri, public, purpose="candidate", trusted_types=trusted_types) as copy:
            run = mlflow.get_run(copy.statement.run_id)
            own_tags = {}
            for tag, value in run.data.tags.items():
                if not tag.startswith("mlflow."):
                    own_tags[tag] = value
            tags = {
                "promoted_from": printable(here),
                "promoted_version": f"{copy.statement.registered_model}/{copy.statement.version}",
                "promoted_run": copy.statement.run_id,
            }
            mlflow.set_tracking_uri(to)
            try:
                with _registered(copy, own_tags, tags, key, Path(scratch)) as there:
                    return release(
                        there,
                        rows,
                        target,
                        settings,
                        key=key,
                        intended_use=intended_use,
                        limits=limits,
                        alias=alias,
                        trusted_types=trusted_types,
                    )
            finally:
                mlflow.set_tracking_uri(here)


@contextlib.contextmanager
def _registered(
    copy: Verified,
    run_tags: dict[str, str],
    tags: dict[str, str],
    key: Path,
    scratch: Path,
) -> Iterator[str]:
    """Register the version in the active store and give its address to the block.

    If the block fails, the version is deleted again.
    """
    client = mlflow.MlflowClient()
    name = copy.statement.registered_model
    is_new = not client.search_registered_models(f"name = '{name}'")
    description = "Versions from another server."
    experiment = create_experiment(mlflow.get_tracking_uri(), EXPERIMENT, description)
    folder = Path(shutil.copytree(copy.folder, scratch / "model"))
    run_id = None
    try:
        with mlflow.start_run(
            experiment_id=experiment.experiment_id, run_name=f"promoted {name}", tags=run_tags
        ) as there:
            run_id = there.info.run_id
            version = register_again(copy, folder, key=key, lock=copy.packages, tags=tags)
        yield f"models:/{name}/{version.version}"
    except BaseException:
        if run_id:
            _delete(client, name, run_id, is_new)
        raise


def _delete(client: mlflow.MlflowClient, name: str, run_id: str, is_new: bool) -> None:
    """Delete what was made of a version that could not be released, unless it has an alias now."""
    with contextlib.suppress(mlflow.MlflowException):
        for version in client.search_model_versions(f"name = '{name}'"):
            if version.run_id == run_id:
                if client.get_model_version(name, version.version).aliases:
                    return
                client.delete_model_version(name, version.version)
        # Another user may have registered a version meanwhile.
        if is_new and not client.search_model_versions(f"name = '{name}'"):
            client.delete_registered_model(name)
    for output in client.get_run(run_id).outputs.model_outputs:
        client.delete_logged_model(output.model_id)
    client.delete_run(run_id)
