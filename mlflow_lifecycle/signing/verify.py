"""Hand out a model version only after it is verified.

MLflow loads whatever the store holds (mlflow#18889), and loading a model can run code. Here the
files, the statement that was signed with them and what they may do are checked first, on a copy
that nobody else can change.
"""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
import model_signing
from mlflow.entities.model_registry import ModelVersion
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlflow_lifecycle.exceptions import InvalidInputError, NotVerifiedError
from mlflow_lifecycle.experiments import printable
from mlflow_lifecycle.policy import check_contents
from mlflow_lifecycle.signing.keys import fingerprint_of
from mlflow_lifecycle.signing.statement import Statement, check_name, every_file, evidence_place

SIZE_LIMIT = 2_000_000_000
OBJECT_STORES = ("s3", "gs", "abfss", "wasbs")  # MLflow sends them no password of a tracking server


@dataclass(frozen=True)
class Verified:
    """A verified copy of a version on this machine. Everything in it was signed."""

    uri: str
    statement: Statement
    folder: Path  # the model, as MLflow saved it
    packages: Path  # the pins that it recorded, with hashes
    training_rows: Path | None  # Parquet: the rows that it learned from; None if none were signed
    key_fingerprint: str  # the SHA-256 of the public key
    model_id: str = ""  # of MLflow's logged model


@contextlib.contextmanager
def verified(
    uri: str,
    public_key: Path,
    *,
    purpose: str | None = None,
    alias: str = "",
    trusted_types: Collection[str] = (),
    size_limit: int = SIZE_LIMIT,
) -> Iterator[Verified]:
    """Download a version, verify it, and give the verified copy to the block.

    The model is not loaded, and no code of it runs. The copy is removed at the end of the block.

    Args:
        uri: ``models:/name/3`` or ``models:/name@champion``.
        public_key: the public half of the key that signed it.
        purpose: "release" accepts only a release, as the very alias if ``uri`` has one, and none
            that is older than the newest release for that alias. "candidate" accepts a candidate,
            too. The default is "release" if ``uri`` has an alias, because anyone with write access
            to the store can move an alias, and otherwise "candidate".
        alias: for a ``uri`` with a number: the alias as which it must have been released.
        trusted_types: additional types that skops may load.
        size_limit: the maximum size of the files in bytes. A larger version is not downloaded.

    Raises:
        NotVerifiedError: the version is not what was signed, or may not be loaded.
        KeyRefusedError: the public key is invalid.
        InvalidInputError: ``uri`` names no version.
        mlflow.MlflowException: there is no such version, or the store does not answer.
    """
    public_key = Path(public_key)
    fingerprint = fingerprint_of(public_key)
    version, by_alias = find_version(uri)
    if purpose is None:
        purpose = "release" if by_alias else "candidate"
    with tempfile.TemporaryDirectory(prefix="verified-") as scratch:
        root = Path(scratch).resolve() / "version"
        try:
            statement = _download_signed(
                root, version, by_alias or alias, purpose, public_key, size_limit
            )
            if by_alias and statement.purpose == "release":
                _refuse_older(version.name, by_alias, statement, public_key)
            check_contents(root / "model", root / "packages.txt", trusted_types)
        except Exception as error:  # whatever a file that somebody has changed leads to
            raise NotVerifiedError(printable(f"Not loaded: {uri}. {_reason(error)}.")) from None
        yield Verified(
            uri=uri,
            statement=statement,
            folder=root / "model",
            packages=root / "packages.txt",
            training_rows=root / "training_rows.parquet" if statement.training_rows else None,
            key_fingerprint=fingerprint,
            model_id=mlflow.models.Model.load(str(root / "model/MLmodel")).model_id,
        )


def verify_release(name: str, number: str, alias: str, public_key: Path) -> Statement:
    """Return what was signed when a version was released as an alias. Nothing of it is loaded.

    Args:
        name: the registered model.
        number: of the version.
        alias: the alias as which it must have been released, and no other version after it.
        public_key: the public half of the key that signed it.

    Raises:
        NotVerifiedError: the version was not released as the alias, or is not what was signed.
    """
    uri = f"models:/{name}/{number}"
    with tempfile.TemporaryDirectory(prefix="verified-") as scratch:
        root = Path(scratch).resolve() / "version"
        try:
            version, _ = find_version(uri)
            statement = _download_signed(root, version, alias, "release", public_key)
            _refuse_older(name, alias, statement, public_key)
        except Exception as error:  # whatever a file that somebody has changed leads to
            raise NotVerifiedError(printable(f"Not released: {uri}. {_reason(error)}.")) from None
    return statement


def find_version(uri: str) -> tuple[ModelVersion, str]:
    """Return the version that an address leads to, and the alias in it, empty if there is none.

    Raises:
        InvalidInputError: the address is invalid.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([\w-]+))", uri)
    if match is None:
        raise InvalidInputError(
            f"{uri!r} is not the address of a version. Write models:/name/3 or models:/name@alias"
        )
    name, number, alias = match.groups()
    check_name(name)
    client = mlflow.MlflowClient()
    if alias:
        return client.get_model_version_by_alias(name, alias), alias
    return client.get_model_version(name, number), ""


def open_model(version: ModelVersion) -> ArtifactRepository:
    """Return the files of a version's model, from the active store only.

    Raises:
        InvalidInputError: they are somewhere else.
    """
    logged = re.fullmatch(r"models:/(m-[\w-]+)", version.source)
    if logged:
        model = mlflow.get_logged_model(logged[1])
        return _open_location(model.artifact_location, model.experiment_id)
    run = mlflow.get_run(version.run_id)
    return _open_location(version.source, run.info.experiment_id)


def download_model(model: ArtifactRepository, folder: Path) -> None:
    """Download the files of a model into a new folder."""
    folder.mkdir(parents=True)
    model.download_artifacts("", str(folder))
    # MLflow writes this file when it downloads a version by name.
    (folder / "registered_model_meta").unlink(missing_ok=True)


def released_now(name: str, alias: str, public_key: Path) -> str:
    """Return the time of a new release: now, or just after the newest if a clock went backwards."""
    now = _time_text(datetime.now(UTC))
    newest = _find_newer(name, alias, now, public_key)
    if newest is None:
        return now
    return _time_text(datetime.fromisoformat(newest.released_at) + timedelta(microseconds=1))


def release_tag(alias: str) -> str:
    """Return the tag of a version that says when it was last released as an alias."""
    return f"released.{alias}"


def _download_signed(
    root: Path,
    version: ModelVersion,
    alias: str,
    purpose: str,
    public_key: Path,
    size_limit: int = SIZE_LIMIT,
) -> Statement:
    """Download a version and its evidence into ``root``, and return its statement.

    Raises:
        InvalidInputError: the key has not signed this version.
    """
    run = mlflow.get_run(version.run_id)
    evidence = _open_location(run.info.artifact_uri, run.info.experiment_id)
    place = _newest_evidence(evidence, version, alias, purpose)
    model = open_model(version)
    size = _listed_size(model, "") + _listed_size(evidence, place)
    if size > size_limit:
        raise InvalidInputError(
            f"Its files have {size:,} bytes, more than size_limit={size_limit:,}"
        )
    download_model(model, root / "model")
    signature = _download_evidence(evidence, place, root, fingerprint_of(public_key)[:16])
    verifier = model_signing.verifying.Config().set_hashing_config(every_file())
    try:
        verifier.use_elliptic_key_verifier(public_key=public_key).verify(root, signature)
    except Exception as error:  # model_signing raises those of its parts, too
        raise InvalidInputError(
            f"{_reason(error)}. It is not what was signed. Register the model again"
        ) from None
    statement = Statement(**json.loads((root / "statement.json").read_text(encoding="utf-8")))
    expected = replace(
        statement,
        registered_model=version.name,
        version=str(version.version),
        run_id=version.run_id,
    )
    if statement != expected or evidence_place(statement) != place:
        raise InvalidInputError(
            f"The signature is for the {statement.purpose} of version {statement.version} of "
            f"{statement.registered_model}. Register the model again"
        )
    return statement


def _open_location(location: str, experiment_id: str) -> ArtifactRepository:
    """Return the files at a location of an experiment in the active store.

    Anyone with write access to the store can change a location, and MLflow sends
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to the host in it.

    Raises:
        InvalidInputError: the location is outside the experiment or the active store.
    """
    experiment = mlflow.get_experiment(experiment_id).artifact_location.rstrip("/")
    is_inside = location.startswith(f"{experiment}/") and ".." not in unquote(location).split("/")
    if not is_inside or not _is_in_active_store(location):
        raise InvalidInputError(
            f"Its files are outside the active store: {location}. Register the model again"
        )
    return get_artifact_repository(location)


def _is_in_active_store(location: str) -> bool:
    """Return whether MLflow reads a location from this machine, the server or an object store."""
    parts = urlsplit(location)
    tracking = urlsplit(mlflow.get_tracking_uri())
    server = tracking.netloc.rpartition("@")[2]  # without user and password
    if parts.scheme in ("", "file"):
        is_share = re.match(r"[/\\]{2}", unquote(parts.path))  # Windows logs in to its host
        return not parts.netloc and not is_share
    if parts.scheme == "mlflow-artifacts":
        return parts.netloc in ("", server)
    if parts.scheme in ("http", "https"):
        return (parts.scheme, parts.netloc) == (tracking.scheme, server)
    return parts.scheme in OBJECT_STORES


def _listed_size(files: ArtifactRepository, folder: str) -> int:
    """Return the size of the files in a folder in bytes, as the store lists them."""
    size = 0
    for item in files.list_artifacts(folder):
        size += _listed_size(files, item.path) if item.is_dir else item.file_size or 0
    return size


def _newest_evidence(
    evidence: ArtifactRepository, version: ModelVersion, alias: str, purpose: str
) -> str:
    """Return the folder of the evidence to verify: the newest release, or else the candidate."""
    above = f"signed/{version.name}/{version.version}"
    folders = [item.path for item in evidence.list_artifacts(above)]
    latest = re.sub("[:.]", "", _latest_time())
    newest = ""
    in_future = False
    for folder in folders:
        released_as, _, moment = folder.rpartition("/")[2].partition("@")
        if not moment or alias not in ("", released_as):
            continue
        if moment > latest:
            in_future = True
        elif moment > newest.rpartition("@")[2]:
            newest = folder
    if newest:
        return newest
    if f"{above}/candidate" in folders and purpose != "release":
        return f"{above}/candidate"
    if in_future and purpose == "release":
        raise InvalidInputError("Its release is dated in the future. Check the clock here")
    address = f"models:/{version.name}/{version.version}"
    if purpose == "release":
        what = f"no release as {alias}" if alias else "no release"
        option = f" --alias {alias}" if alias else ""
        raise InvalidInputError(
            f"There is {what} of this version. Release it: lifecycle release {address}{option}"
        )
    raise InvalidInputError(
        f"There is no signature of this version. Sign it: lifecycle sign {address}"
    )


def _download_evidence(evidence: ArtifactRepository, place: str, root: Path, key: str) -> Path:
    """Download the evidence into ``root``, and return the signature that the key has made."""
    folder = Path(evidence.download_artifacts(place, str(root.parent)))
    signed_by = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".sig":
            signed_by.append(path.stem)
        else:
            path.rename(root / path.name)
    if key not in signed_by:
        others = ", ".join(signed_by) or "none"
        raise InvalidInputError(
            f"The key {key} has not signed it (signed by: {others}). Use the matching public key"
        )
    return folder / f"{key}.sig"


def _find_newer(name: str, alias: str, after: str, public_key: Path) -> Statement | None:
    """Return the newest release as an alias that the key has signed after a time, or None.

    The tag of a version says only where to look, because anyone with write access to the store can
    set it.
    """
    newest = None
    latest = _latest_time()
    for version in mlflow.search_model_versions(filter_string=f"name = '{name}'"):
        if not after < version.tags.get(release_tag(alias), "") <= latest:
            continue
        with tempfile.TemporaryDirectory(prefix="verified-") as scratch:
            root = Path(scratch).resolve() / "version"
            try:
                statement = _download_signed(root, version, alias, "release", public_key)
            except (ValueError, OSError, mlflow.MlflowException):
                continue  # the tag is not true, or its release is gone
        if statement.released_at > after:
            after = statement.released_at
            newest = statement
    return newest


def _refuse_older(name: str, alias: str, statement: Statement, public_key: Path) -> None:
    """Refuse a release that is older than another one, in the store or seen on this machine."""
    remedy = f"To go back: lifecycle rollback {name}"
    newer = _find_newer(name, alias, statement.released_at, public_key)
    if newer:
        raise InvalidInputError(
            f"Version {newer.version} was released as {alias} after it. {remedy}"
        )
    # A folder with an empty file for each release. Nothing in it is ever changed, so programs that
    # use it at the same moment need no lock.
    key = f"{printable(mlflow.get_tracking_uri())} {name}@{alias}"
    folder = public_key.with_name("seen_releases") / hashlib.sha256(key.encode()).hexdigest()
    seen = statement.released_at.replace(":", "")
    for path in folder.glob("*"):
        if path.name > seen:
            raise InvalidInputError(f"A newer release of {alias} was seen here before. {remedy}")
    with contextlib.suppress(OSError):  # in a read-only folder nothing is remembered
        folder.mkdir(parents=True, exist_ok=True)
        (folder / seen).touch()


def _time_text(time: datetime) -> str:
    """Return a time in UTC as in a statement."""
    return f"{time.replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


def _latest_time() -> str:
    """Return the latest time that a release can have: now, and a day for clocks that differ."""
    return _time_text(datetime.now(UTC) + timedelta(days=1))


def _reason(error: Exception) -> str:
    """Return the message of an error in one line, without hashes, quotes and brackets."""
    text = re.sub(r"(?s): Expected .*|[\[\]\"'\\]", "", str(error)) or type(error).__name__
    return " ".join(text.split()).rstrip(".")
