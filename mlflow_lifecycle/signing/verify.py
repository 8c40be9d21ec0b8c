"""Hand out a model version only once it is verified.

MLflow loads whatever the store holds (mlflow#18889), and loading a model runs what it brings. Here the files, the
statement that was signed with them, and what they may do are checked first, on a copy that the store cannot change.
"""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
import model_signing
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlflow_lifecycle.exceptions import InvalidInputError, NotVerifiedError
from mlflow_lifecycle.experiments import printable
from mlflow_lifecycle.policy import check_contents
from mlflow_lifecycle.signing.keys import fingerprint_of
from mlflow_lifecycle.signing.statement import Statement, every_file, evidence_place

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
    trusted_types: list[str] | tuple[str, ...] = (),
    size_limit: int = SIZE_LIMIT,
) -> Iterator[Verified]:
    """Download a version, verify it, and give the verified copy to the block; at its end the copy is removed.

    Nothing is loaded, and nothing that the model brings is run.

    Args:
        uri: ``models:/name/3`` or ``models:/name@champion``.
        public_key: the public half of the key that signed it.
        purpose: "release" accepts only what was released, as the very alias if ``uri`` has one, and nothing older than
            the newest release for that alias. "candidate" accepts a candidate, too. The default is "release" if ``uri``
            has an alias, because anyone with write access to the store can move an alias, and else "candidate".
        alias: for a ``uri`` with a number: the alias as which it must have been released.
        trusted_types: what the model may hold beyond what skops knows to be harmless, as reviewed by the project.
        size_limit: the maximum size of the version's files in bytes. A larger version is not downloaded.

    Raises:
        NotVerifiedError: the version is not what was signed, or holds what nobody has reviewed.
        KeyRefusedError: the public key is none.
        ValueError: ``uri`` names no version.
        mlflow.MlflowException: there is no such version, or the store gives no answer.
    """
    digits = fingerprint_of(public_key)
    name, version, by_alias = find_version(uri)
    with tempfile.TemporaryDirectory(prefix="verified-") as scratch:
        root = Path(scratch).resolve() / "version"
        if purpose is None:
            purpose = "release" if by_alias else "candidate"
        try:
            statement = _download_signed(
                root, version, by_alias or alias, purpose, Path(public_key), size_limit
            )
            if by_alias and statement.purpose == "release":
                _refuse_older(name, by_alias, statement, Path(public_key))
            check_contents(root / "model", root / "packages.txt", trusted_types)
        except Exception as error:
            raise NotVerifiedError(printable(f"Not loaded: {uri}. {_cause(error)}.")) from None
        rows = root / "training_rows.parquet" if statement.training_rows else None
        files = (root / "model", root / "packages.txt", rows)
        model_id = mlflow.models.Model.load(str(root / "model/MLmodel")).model_id
        yield Verified(uri, statement, *files, digits, model_id)


def released_now(name: str, alias: str, public_key: Path) -> str:
    """Return the time for a release of ``name``: now, or just after the newest release, if a clock went backwards."""
    now = _time_text(datetime.now(UTC))
    newest = _find_newer(name, alias, now, public_key)
    if newest is None:
        return now
    return _time_text(datetime.fromisoformat(newest.released_at) + timedelta(microseconds=1))


def release_tag(alias: str) -> str:
    """Return the name of the tag of a version that says when it was last released as ``alias``."""
    return f"released.{alias}"


def _cause(error: Exception) -> str:
    """Return what an error says in one line, without hashes, quotes and brackets."""
    text = re.sub(r"(?s): Expected .*|[\[\]\"'\\]", "", str(error)) or type(error).__name__
    return " ".join(text.split()).rstrip(".")


def find_version(uri: str) -> tuple[str, ModelVersion, str]:
    """Return the name in ``uri``, the version that it leads to, and the alias, empty if ``uri`` has a number."""
    found = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([\w-]+))", uri)
    if not found:
        raise InvalidInputError(
            f"{uri!r} names no version. Write models:/name/3 or models:/name@alias"
        )
    name, number, alias = found.groups()
    if not name.isprintable() or re.search(r"""['"\\]""", name):
        raise InvalidInputError(
            f"{name!r} is no name of a model here: it has a quote, a \\ or an invisible character"
        )
    client = mlflow.MlflowClient()
    by_alias = client.get_model_version_by_alias
    return (
        name,
        client.get_model_version(name, number) if number else by_alias(name, alias),
        alias or "",
    )


def _time_text(time: datetime) -> str:
    """Return a time in UTC as statements have it."""
    return f"{time.replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


def _latest_time() -> str:
    """Return the latest time that a release can have: now, and a day more for clocks that differ."""
    return _time_text(datetime.now(UTC) + timedelta(days=1))


def _download_signed(
    root: Path,
    version: ModelVersion,
    alias: str,
    purpose: str,
    public_key: Path,
    size_limit: int = SIZE_LIMIT,
) -> Statement:
    """Download a version and what was signed with it into ``root``, and return its statement.

    Raises:
        ValueError: the key has not signed this version.
    """
    run = mlflow.get_run(version.run_id)
    evidence = _open_location(run.info.artifact_uri, run.info.experiment_id)
    place = _newest_evidence(evidence, version, alias, purpose)
    model = _open_model(version, run)
    size = _listed_size(model, "") + _listed_size(evidence, place)
    if size > size_limit:
        raise InvalidInputError(
            f"Its files have {size:,} bytes, more than size_limit={size_limit:,}"
        )
    signature = _downloaded(root, model, evidence, place, fingerprint_of(public_key))
    verifier = model_signing.verifying.Config().set_hashing_config(every_file())
    try:
        verifier.use_elliptic_key_verifier(public_key=public_key).verify(root, signature)
    except Exception as error:
        raise InvalidInputError(
            f"{_cause(error)}. It is not what was signed. Register the model anew"
        ) from None
    statement = Statement(**json.loads((root / "statement.json").read_text(encoding="utf-8")))
    expected = replace(
        statement,
        registered_model=version.name,
        version=str(version.version),
        run_id=version.run_id,
    )
    if statement != expected or evidence_place(statement) != place:
        said = f"{statement.purpose} of version {statement.version} of {statement.registered_model}"
        raise InvalidInputError(f"What was signed is the {said}. Register the model anew")
    return statement


def _listed_size(files: ArtifactRepository, folder: str) -> int:
    """Return how many bytes the files in a folder have, as the store lists them."""
    size = 0
    for item in files.list_artifacts(folder):
        size += _listed_size(files, item.path) if item.is_dir else item.file_size or 0
    return size


def _open_model(version: ModelVersion, run: Run) -> ArtifactRepository:
    """Return the files of a version, from the active store only."""
    logged = re.fullmatch(r"models:/(m-[\w-]+)", version.source)
    if logged is None:
        return _open_location(version.source, run.info.experiment_id)
    model = mlflow.get_logged_model(logged[1])
    return _open_location(model.artifact_location, model.experiment_id)


def _open_location(location: str, experiment_id: str) -> ArtifactRepository:
    """Return the files at a location of the experiment in the active store.

    Anyone with write access to the store can change a location, and MLflow sends MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD to the host in it.

    Raises:
        ValueError: the location is outside the experiment or the active store.
    """
    experiment = mlflow.get_experiment(experiment_id).artifact_location.rstrip("/")
    is_inside = location.startswith(f"{experiment}/") and ".." not in unquote(location).split("/")
    if not is_inside or not _is_in_active_store(location):
        raise InvalidInputError(
            f"Its files are outside the active store: {location}. Register the model anew"
        )
    return get_artifact_repository(location)


def _is_in_active_store(location: str) -> bool:
    """Return whether MLflow reads a location from this machine, the tracking server or an object store."""
    parts = urlsplit(location)
    tracking = urlsplit(mlflow.get_tracking_uri())
    server = tracking.netloc.rpartition("@")[2]  # without user and password
    if parts.scheme in ("", "file"):
        is_share = re.match(
            r"[/\\]{2}", unquote(parts.path)
        )  # Windows logs in to the host of a share
        return not parts.netloc and not is_share
    if parts.scheme == "mlflow-artifacts":
        return parts.netloc in ("", server)
    if parts.scheme in ("http", "https"):
        return (parts.scheme, parts.netloc) == (tracking.scheme, server)
    return parts.scheme in OBJECT_STORES


def _newest_evidence(
    evidence: ArtifactRepository, version: ModelVersion, alias: str, purpose: str
) -> str:
    """Return the artifact folder with the evidence to verify: the newest release, or else the candidate."""
    above = f"signed/{version.name}/{version.version}"
    found = [item.path for item in evidence.list_artifacts(above)]
    dated = [
        path
        for path in found
        if re.fullmatch(rf"{re.escape(alias) or '[^/@]+'}@[^/]+", path.rpartition("/")[2])
    ]
    latest = re.sub("[:.]", "", _latest_time())
    releases = [path for path in dated if path.rpartition("@")[2] <= latest]
    if releases:
        return max(releases, key=lambda path: path.rpartition("@")[2])
    if f"{above}/candidate" in found and purpose != "release":
        return f"{above}/candidate"
    if dated and purpose == "release":
        raise InvalidInputError(
            "Its release is dated in the future. Check the clock of this machine"
        )
    what = "no signature"
    remedy = "Sign it: lifecycle sign"
    if purpose == "release":
        what = f"no release as {alias}" if alias else "no release"
        remedy = "Release it: lifecycle release"
    raise InvalidInputError(
        f"There is {what} of this version. {remedy} models:/{version.name}/{version.version}"
    )


def _downloaded(
    root: Path, model: ArtifactRepository, evidence: ArtifactRepository, place: str, digits: str
) -> Path:
    """Download the model and its evidence into ``root``, and return the signature that the key has made."""
    (root / "model").mkdir(parents=True)
    model.download_artifacts("", str(root / "model"))
    (root / "model/registered_model_meta").unlink(
        missing_ok=True
    )  # MLflow writes it when it downloads by name
    folder = Path(evidence.download_artifacts(place, str(root.parent)))
    for path in folder.iterdir():
        if path.suffix != ".sig":
            path.rename(root / path.name)
    signature = folder / f"{digits[:16]}.sig"
    if not signature.is_file():
        others = ", ".join(sorted(path.stem for path in folder.glob("*.sig"))) or "none"
        raise InvalidInputError(
            f"The key {digits[:16]} has not signed it (signed by: {others}). Give the key that did"
        )
    return signature


def _find_newer(name: str, alias: str, after: str, public_key: Path) -> Statement | None:
    """Return the newest release as ``alias`` that the key has signed after a time, or None.

    The tag of a version says only where to look, since anyone with write access to the store can set it.
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
    """Refuse a release that is older than another one for its alias, in the store or seen on this machine before."""
    newer = _find_newer(name, alias, statement.released_at, public_key)
    if newer:
        raise InvalidInputError(
            f"Version {newer.version} was released as {alias} after it. To go back: lifecycle rollback {name}"
        )
    folder, seen = _seen_releases(public_key, name, alias), statement.released_at.replace(":", "")
    if max((path.name for path in folder.glob("*")), default="") > seen:
        raise InvalidInputError(
            f"A newer release of {alias} was seen here before. To go back: lifecycle rollback {name}"
        )
    with contextlib.suppress(
        OSError
    ):  # where the folder is read-only, this machine remembers nothing
        folder.mkdir(parents=True, exist_ok=True)
        (folder / seen).touch()


def _seen_releases(public_key: Path, name: str, alias: str) -> Path:
    """Return the folder that has an empty file for each release that was seen: nothing in it is ever changed.

    So programs that use it at the same moment need no lock, and none finds half of what another one writes.
    """
    known_as = f"{printable(mlflow.get_tracking_uri())} {name}@{alias}"
    return public_key.with_name("seen_releases") / hashlib.sha256(known_as.encode()).hexdigest()
