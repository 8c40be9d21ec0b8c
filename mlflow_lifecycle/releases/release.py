"""Release a version: gate, card, git tag, signature, alias and record.

In MLflow anyone with write access can move an alias to any version, and nothing records where it
pointed before (mlflow#2169). Here an alias moves only through the gate, and each release and
rollback is a run. A failure leaves the alias where it was.
"""

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import pandas as pd
from mlflow.entities import Run

from mlflow_lifecycle.datasets import fingerprint
from mlflow_lifecycle.exceptions import (
    GateClosedError,
    InvalidInputError,
    NotVerifiedError,
    TagRefusedError,
)
from mlflow_lifecycle.experiments import create_experiment, printable
from mlflow_lifecycle.releases.card import card_facts, check_sentences, make_card
from mlflow_lifecycle.releases.gate import GateSettings, Verdict, gate, gate_context
from mlflow_lifecycle.releases.sbom import write_sbom
from mlflow_lifecycle.signing.keys import public_half
from mlflow_lifecycle.signing.statement import Statement, sign
from mlflow_lifecycle.signing.verify import Verified, release_tag, released_now, verified

EXPERIMENT = "releases"


@dataclass(frozen=True)
class Release:
    """A release or a rollback, as its run records it."""

    registered_model: str
    alias: str
    version: str
    before: str  # the version that had the alias before, empty if none did
    kind: str  # "release" or "rollback"
    released_at: str  # in UTC
    by: str
    commit: str  # that the version was made from
    status: str  # of the run: FINISHED, or what became of a release that was not
    run_id: str


def release(
    uri: str,
    rows: pd.DataFrame,
    target: str,
    settings: GateSettings,
    *,
    key: Path,
    intended_use: str,
    limits: str,
    alias: str = "production",
    trusted_types: Collection[str] = (),
    repository: Path | None = None,
    remote: str = "",
) -> Release:
    """Move an alias to a version that passes the gate.

    The same call again finishes a release that was interrupted.

    Args:
        uri: the version: ``models:/name/3`` or ``models:/name@candidate``.
        rows: the test rows, target included.
        target: the column with the true values.
        settings: what the version must reach.
        key: the private key that signed the candidate, and will sign the release.
        intended_use: for the card: what the model is for.
        limits: for the card: what the model is not for.
        alias: the alias to move. The version that has it now is the baseline.
        trusted_types: see ``mlflow_lifecycle.signing.verify.verified``.
        repository: a folder in the git repository whose commit gets a tag; None for no tag.
        remote: where the tag is pushed; empty for nowhere.

    Raises:
        GateClosedError: a check failed, or another release has moved the alias meanwhile.
        NotVerifiedError: the version, or the baseline, is not what was signed.
        KeyRefusedError: the key cannot be used.
        TagRefusedError: the commit cannot be tagged.
        InvalidInputError: a sentence for the card is missing; or as in
            ``mlflow_lifecycle.releases.gate.gate_context``.
    """
    check_sentences(intended_use=intended_use, limits=limits)
    with contextlib.ExitStack() as stack:
        public = public_half(key, Path(stack.enter_context(TemporaryDirectory())))
        candidate = stack.enter_context(
            verified(uri, public, purpose="candidate", trusted_types=trusted_types)
        )
        statement = candidate.statement
        name = statement.registered_model
        tag = check_tag(repository, statement, remote) if repository else ""
        before = find_alias(name, alias)
        baseline = None
        if before:
            baseline = stack.enter_context(verified_baseline(name, alias, public, trusted_types))
        context = gate_context(candidate, baseline, rows, target, settings)
        if before == statement.version:
            return _finish(name, alias, before, baseline.statement.released_at)
        with _record(statement, alias, before, "release") as run:
            verdict = gate(context)
            checks = pd.DataFrame([vars(check) for check in verdict.checks])
            mlflow.log_table(checks, "gate.json")
            tested = f"{len(rows)} rows, SHA-256 {fingerprint(rows)}"
            facts = card_facts(candidate, verdict, tested, intended_use=intended_use, limits=limits)
            verdict.require()
            if tag:
                make_tag(repository, tag, _tag_message(statement, verdict), remote)
            _write_card(candidate, facts)
            _move_alias(candidate, alias, key, public, run, before)
    return _read_release(mlflow.get_run(run.info.run_id))


def try_gate(
    uri: str,
    rows: pd.DataFrame,
    target: str,
    settings: GateSettings,
    *,
    public_key: Path,
    alias: str = "production",
    trusted_types: Collection[str] = (),
) -> Verdict:
    """Return the verdict of the gate on a version, and change nothing in the store.

    Args:
        uri: the version.
        rows: the test rows, target included.
        target: the column with the true values.
        settings: what the version must reach.
        public_key: the public half of the key that signed it.
        alias: the alias that it would take.
        trusted_types: see ``mlflow_lifecycle.signing.verify.verified``.

    Raises:
        NotVerifiedError: the version, or the baseline, is not what was signed.
        InvalidInputError: as in ``mlflow_lifecycle.releases.gate.gate_context``.
    """
    with contextlib.ExitStack() as stack:
        candidate = stack.enter_context(
            verified(uri, public_key, purpose="candidate", trusted_types=trusted_types)
        )
        name = candidate.statement.registered_model
        baseline = None
        if find_alias(name, alias) not in ("", candidate.statement.version):
            baseline = stack.enter_context(
                verified_baseline(name, alias, public_key, trusted_types)
            )
        context = gate_context(candidate, baseline, rows, target, settings)
        with _temporary_run():
            return gate(context)


def rollback(
    name: str,
    *,
    key: Path,
    alias: str = "production",
    to: str = "",
    trusted_types: Collection[str] = (),
) -> Release:
    """Move an alias back to a version that was released before, and sign it as released anew.

    Args:
        name: the registered model.
        key: the private key.
        alias: the alias to move.
        to: the version; by default the one that had the alias before.
        trusted_types: see ``mlflow_lifecycle.signing.verify.verified``.

    Raises:
        InvalidInputError: nothing was released before.
        NotVerifiedError: that version was never released as ``alias``, or is not what was signed.
        GateClosedError: another release has moved the alias meanwhile.
        KeyRefusedError: the key cannot be used.
    """
    present = find_alias(name, alias)
    to = to or _version_before(name, alias, present)
    with TemporaryDirectory() as scratch:
        public = public_half(key, Path(scratch))
        released_before = verified(
            f"models:/{name}/{to}",
            public,
            purpose="release",
            alias=alias,
            trusted_types=trusted_types,
        )
        with released_before as copy, _record(copy.statement, alias, present, "rollback") as run:
            _move_alias(copy, alias, key, public, run, present)
    return _read_release(mlflow.get_run(run.info.run_id))


def history(name: str, alias: str = "") -> list[Release]:
    """Return the releases and rollbacks of a registered model, the newest first.

    Those that were interrupted are included.

    Args:
        name: the registered model.
        alias: only those for this alias; by default all.
    """
    experiment = mlflow.MlflowClient().get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    query = f'tags.registered_model = "{name}"'
    if alias:
        query += f" and tags.alias = '{alias}'"
    runs = mlflow.search_runs(
        [experiment.experiment_id],
        query,
        output_format="list",
        order_by=["start_time DESC"],
    )
    return [_read_release(run) for run in runs]


def find_alias(name: str, alias: str) -> str:
    """Return the version that has the alias, empty if none has."""
    model = mlflow.MlflowClient().get_registered_model(name)
    return str(model.aliases.get(alias, ""))


@contextlib.contextmanager
def verified_baseline(
    name: str, alias: str, public_key: Path, trusted_types: Collection[str]
) -> Iterator[Verified]:
    """Give the verified version that has the alias to the block.

    Raises:
        NotVerifiedError: it is not what was signed. The message says how to retire it.
    """
    with contextlib.ExitStack() as stack:
        try:
            baseline = stack.enter_context(
                verified(
                    f"models:/{name}@{alias}",
                    public_key,
                    purpose="release",
                    trusted_types=trusted_types,
                )
            )
        except NotVerifiedError as error:
            raise NotVerifiedError(
                f"{error} It has the alias {alias}, and the gate compares with it. To retire it, "
                f"delete the alias: client.delete_registered_model_alias({name!r}, {alias!r})"
            ) from None
        yield baseline


def check_tag(repository: Path, statement: Statement, remote: str = "") -> str:
    """Return the git tag of a version, ``<name>-v<version>``, if it can be made.

    A tag that an interrupted release of this version has made is accepted.

    Args:
        repository: a folder in a git repository.
        statement: what the version is.
        remote: where the tag is to be pushed; empty for nowhere.

    Raises:
        TagRefusedError: the work tree has changes, the commit is not the one of the version,
            another tag has that name, or the remote cannot be reached.
    """
    # Characters that git does not allow in a tag become an underscore.
    name = re.sub(r"[^\w.-]+|[.]{2,}|^[.-]", "_", statement.registered_model)
    tag = f"{name}-v{statement.version}"
    head = _git(repository, "rev-parse", "HEAD")
    changes = _git(repository, "status", "--porcelain").splitlines()
    if changes:
        raise TagRefusedError(
            f"The work tree has changes. Commit or stash them: {', '.join(changes[:3])}"
        )
    if head != statement.commit:
        commit = statement.commit or "an unknown commit"
        raise TagRefusedError(
            f"Version {statement.version} was made from {commit}, and the commit here is {head}. "
            "Check that commit out."
        )
    message = _git(repository, "tag", "--list", "--format=%(contents)", tag)
    is_ours = statement.run_id in message
    if message and not is_ours:
        raise TagRefusedError(f"There is another tag {tag}. Delete it: git tag --delete {tag}")
    if remote and _git(repository, "ls-remote", "--tags", remote, tag) and not is_ours:
        raise TagRefusedError(f"The remote {remote!r} has a tag {tag} already.")
    return tag


def make_tag(repository: Path, tag: str, message: str, remote: str = "") -> None:
    """Make an annotated tag on the commit, and push it if a remote is named; both or neither.

    Raises:
        TagRefusedError: git or the remote refuses it.
    """
    exists = _git(repository, "tag", "--list", tag)
    if not exists:
        _git(repository, "tag", "--annotate", f"--message={message}", tag)
    if not remote:
        return
    try:
        _git(repository, "push", remote, f"refs/tags/{tag}")
    except TagRefusedError:
        if not exists:
            _git(repository, "tag", "--delete", tag)
        raise


def _git(repository: Path, *arguments: str) -> str:
    """Return what git prints.

    Raises:
        TagRefusedError: git failed; with what it says.
    """
    command = ["git", "--no-optional-locks", "-C", str(repository), "-c", "core.fsmonitor=false"]
    child = subprocess.run(
        [*command, *arguments],
        env=os.environ | {"GIT_TERMINAL_PROMPT": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
    )
    if child.returncode:
        reason = printable(" ".join(child.stderr.split()))
        raise TagRefusedError(f"git {arguments[0]} failed, and no tag was made: {reason}")
    return child.stdout.strip()


@contextlib.contextmanager
def _temporary_run() -> Iterator[None]:
    """Make a run of a temporary store the active one, because MLflow evaluates only in a run."""
    here = mlflow.get_tracking_uri()
    with TemporaryDirectory(prefix="gate-", ignore_cleanup_errors=True) as scratch:
        mlflow.set_tracking_uri(f"sqlite:///{Path(scratch).as_posix()}/mlflow.db")
        try:
            client = mlflow.MlflowClient()
            location = f"{Path(scratch).as_uri()}/artifacts"
            experiment = client.create_experiment("gate", location)
            with mlflow.start_run(experiment_id=experiment, nested=True):
                yield
        finally:
            mlflow.set_tracking_uri(here)


def _version_before(name: str, alias: str, present: str) -> str:
    """Return the version that had the alias before the present one."""
    for item in history(name, alias):
        is_release = item.kind == "release" and item.version == present and item.released_at
        if is_release and item.before:
            return item.before
    raise InvalidInputError(
        f"There is no earlier release of {name} to roll back to. See: lifecycle history {name}"
    )


def _finish(name: str, alias: str, version: str, released_at: str) -> Release:
    """Finish a release that was interrupted after the alias was moved, and return it."""
    client = mlflow.MlflowClient()
    client.set_model_version_tag(name, version, release_tag(alias), released_at)
    for item in history(name, alias):
        if item.released_at == released_at:
            client.set_terminated(item.run_id, "FINISHED")
            return replace(item, status="FINISHED")
    raise InvalidInputError(
        f"Version {version} of {name} is {alias} already, and the record of its release is gone."
    )


@contextlib.contextmanager
def _record(statement: Statement, alias: str, before: str, kind: str) -> Iterator[Run]:
    """Record a release in a run, which ends as finished if the block succeeds.

    Interrupted runs of the same version end as killed.
    """
    name = statement.registered_model
    version = statement.version
    client = mlflow.MlflowClient()
    for item in history(name, alias):
        if item.status == "RUNNING" and item.version == version:
            client.set_terminated(item.run_id, "KILLED")
    tags = {
        "registered_model": name,
        "alias": alias,
        "version": version,
        "before": before,
        "kind": kind,
        "commit": statement.commit,
    }
    description = "Each run is a release or a rollback of a registered model."
    experiment = create_experiment(mlflow.get_tracking_uri(), EXPERIMENT, description)
    with mlflow.start_run(
        experiment_id=experiment.experiment_id,
        run_name=f"{kind} {name}/{version} as {alias}",
        tags=tags,
        nested=True,
    ) as run:
        yield run


def _move_alias(
    copy: Verified, alias: str, key: Path, public_key: Path, run: Run, before: str
) -> None:
    """Sign the version as released, move the alias, and tag the version, in this order.

    Raises:
        GateClosedError: another release has moved the alias from version ``before`` meanwhile.
    """
    client = mlflow.MlflowClient()
    name = copy.statement.registered_model
    version = copy.statement.version
    _refuse_if_moved(name, alias, before)
    moment = released_now(name, alias, public_key)
    client.set_tag(run.info.run_id, "released_at", moment)
    statement = replace(copy.statement, purpose="release", alias=alias, released_at=moment)
    sign(copy.folder.parent, statement, key)
    _refuse_if_moved(name, alias, before)
    client.set_registered_model_alias(name, alias, version)
    client.set_model_version_tag(name, version, release_tag(alias), moment)


def _refuse_if_moved(name: str, alias: str, before: str) -> None:
    """Refuse to move an alias that does not point to version ``before`` any more."""
    now = find_alias(name, alias)
    if now != before:
        raise GateClosedError(
            f"Meanwhile {alias} moved from version {before or '(none)'} of {name} to version "
            f"{now or '(none)'}, and stays there. Look at it: lifecycle history {name}"
        )


def _write_card(copy: Verified, facts: dict) -> None:
    """Write model card and bill of materials beside the model, so that they are signed with it."""
    folder = copy.folder.parent
    write_sbom(copy, facts, folder / "sbom.cdx.json")
    text = json.dumps(facts, indent=2) + "\n"
    (folder / "model_card.json").write_text(text, encoding="utf-8")
    (folder / "model_card.md").write_text(make_card(facts).render(), encoding="utf-8")


def _tag_message(statement: Statement, verdict: Verdict) -> str:
    """Return the message of the git tag."""
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in verdict.metrics.items())
    title = f"{statement.registered_model}, version {statement.version}"
    return f"{title}\n\nmetrics: {metrics}\nrun: {statement.run_id}"


def _read_release(run: Run) -> Release:
    """Return the release that a run records."""
    tags = run.data.tags
    return Release(
        registered_model=tags.get("registered_model", ""),
        alias=tags.get("alias", ""),
        version=tags.get("version", ""),
        before=tags.get("before", ""),
        kind=tags.get("kind", ""),
        released_at=tags.get("released_at", ""),
        by=tags.get("mlflow.user", ""),
        commit=tags.get("commit", ""),
        status=run.info.status,
        run_id=run.info.run_id,
    )
