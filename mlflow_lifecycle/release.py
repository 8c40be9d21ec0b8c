"""Release a version: gate, card, git tag, signature, alias, record; a failure leaves the alias where it was.

An alias in MLflow is moved by whoever may, to whatever version, and nothing remembers where it pointed before
(mlflow#2169). Here it moves only through the gate; each release and rollback is a run; and what was released carries a
signature that says so.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import pandas as pd
from mlflow.entities import Run

from mlflow_lifecycle.card import card_facts, check_sentences, make_card
from mlflow_lifecycle.gate import GateClosedError, Rule, Verdict, gate, gate_context
from mlflow_lifecycle.git_tag import check_tag, make_tag
from mlflow_lifecycle.keys import KeyRefusedError, new_key, present_public_key, public_half
from mlflow_lifecycle.signing import Statement, sign
from mlflow_lifecycle.store import create_experiment
from mlflow_lifecycle.tables import fingerprint
from mlflow_lifecycle.verification import NotVerifiedError, Verified, release_tag, released_now, verified

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
    *,
    key: Path,
    thresholds: dict[str, float],
    intended_use: str,
    limits: str,
    alias: str = "production",
    trusted_types: list[str] | tuple[str, ...] = (),
    rule: Rule | None = None,
    rebuild: bool = True,
    allow_unchecked: bool = False,
    cache: Path | None = None,
    repository: Path | None = None,
    remote: str = "",
) -> Release:
    """Let a version take ``alias``, if it passes the gate. The same call again finishes a release that was cut off.

    Args:
        uri: the version: ``models:/name/3`` or ``models:/name@candidate``.
        rows: the test rows, target included.
        target: the column with the true values.
        key: the private key that signed the candidate, and will sign the release.
        thresholds: what MLflow's metrics must reach, see ``mlflow_lifecycle.gate.gate_context``.
        intended_use: for the card: what the model is for.
        limits: for the card: what it is not for.
        alias: what the version shall be released as.
        trusted_types: see ``mlflow_lifecycle.verification.verified``.
        rule: what the version must show against the baseline, the version that has the alias; by default, to be
            better.
        rebuild: whether the gate builds the environment.
        allow_unchecked: let a version pass whose environment was not built.
        cache: see ``mlflow_lifecycle.environments.built``.
        repository: a folder in the git repository in which the commit gets a tag; None for no tag.
        remote: where the tag is pushed to; empty for nowhere.

    Raises:
        GateClosedError: a check failed, or another release has moved the alias meanwhile.
        NotVerifiedError: the version, or the one that has the alias, is not what was signed.
        KeyRefusedError: the key cannot be used.
        TagRefusedError: the commit cannot be tagged.
        ValueError: a sentence for the card is missing; or as in ``mlflow_lifecycle.gate.gate_context``.
    """
    check_sentences(intended_use=intended_use, limits=limits)
    with contextlib.ExitStack() as stack:
        public = public_half(key, Path(stack.enter_context(TemporaryDirectory())))
        candidate = stack.enter_context(verified(uri, public, purpose="candidate", trusted_types=trusted_types))
        name, number = candidate.statement.registered_model, candidate.statement.version
        tag = check_tag(repository, name, number, remote) if repository else ""
        before = _version_with(name, alias)
        baseline = _verified_baseline(stack, name, alias, public, trusted_types) if before else None
        context = gate_context(
            candidate,
            baseline,
            rows,
            target,
            thresholds=thresholds,
            rule=rule,
            rebuild=rebuild,
            cache=cache,
        )  # refused here, before anything is written
        if before == number:
            return _finished(name, alias, number, baseline.statement.released_at)
        with _record(name, alias, number, before, "release") as run:
            verdict = gate(context)
            mlflow.log_table(pd.DataFrame([vars(check) for check in verdict.checks]), "gate.json")
            tested = f"{len(rows)} rows, SHA-256 {fingerprint(rows)}"
            facts = card_facts(candidate, verdict, tested, intended_use=intended_use, limits=limits)
            verdict.require(allow_unchecked=allow_unchecked)
            if tag:
                make_tag(repository, tag, _message(candidate, verdict), remote)
            _write_card(candidate.folder.parent, facts)
            _hand_over(candidate, alias, key, public, run, before)
    return _release_of(mlflow.get_run(run.info.run_id))


def try_gate(
    uri: str,
    rows: pd.DataFrame,
    target: str,
    public_key: Path,
    *,
    thresholds: dict[str, float],
    alias: str = "production",
    trusted_types: list[str] | tuple[str, ...] = (),
    **settings,
) -> Verdict:
    """Return the verdict of the gate on a version, and change nothing in the store.

    Args:
        uri: the version.
        rows: the test rows, target included.
        target: the column with the true values.
        public_key: the public half of the key that signed it.
        thresholds: what MLflow's metrics must reach, see ``mlflow_lifecycle.gate.gate_context``.
        alias: the alias that it would take.
        trusted_types: see ``mlflow_lifecycle.verification.verified``.
        settings: the others of ``mlflow_lifecycle.gate.gate_context``.

    Raises:
        NotVerifiedError: the version, or the one that has the alias, is not what was signed.
        ValueError: as in ``mlflow_lifecycle.gate.gate_context``.
    """
    with contextlib.ExitStack() as stack:
        candidate = stack.enter_context(verified(uri, public_key, purpose="candidate", trusted_types=trusted_types))
        name = candidate.statement.registered_model
        baseline = None
        if _version_with(name, alias) not in ("", candidate.statement.version):
            baseline = _verified_baseline(stack, name, alias, public_key, trusted_types)
        context = gate_context(candidate, baseline, rows, target, thresholds=thresholds, **settings)
        with _temporary_run():
            return gate(context)


@contextlib.contextmanager
def _temporary_run() -> Iterator[None]:
    """Let MLflow log to a run of a store of its own, which is removed at the end: it evaluates no model without one."""
    here = mlflow.get_tracking_uri()
    with TemporaryDirectory(prefix="gate-", ignore_cleanup_errors=True) as scratch:
        store = f"sqlite:///{Path(scratch).as_posix()}/mlflow.db"
        mlflow.set_tracking_uri(store)
        try:
            experiment = mlflow.MlflowClient().create_experiment("gate", f"{Path(scratch).as_uri()}/artifacts")
            with mlflow.start_run(experiment_id=experiment, nested=True):
                yield
        finally:
            mlflow.set_tracking_uri(here)


def rollback(name: str, *, key: Path, alias: str = "production", to: str = "", trusted_types=()) -> Release:
    """Move ``alias`` back to a version that was released before, signed as released anew.

    Args:
        name: the registered model.
        key: the private key.
        alias: the alias to move.
        to: the version; by default the one that had the alias before the present one.
        trusted_types: see ``mlflow_lifecycle.verification.verified``.

    Raises:
        ValueError: nothing was released before.
        NotVerifiedError: that version was never released as ``alias``, or is not what was signed.
        GateClosedError: a release has moved the alias meanwhile.
        KeyRefusedError: the key cannot be used.
    """
    present = _version_with(name, alias)
    records = [item for item in history(name, alias) if item.version == present and item.released_at]  # also cut off
    if not (to := to or next((item.before for item in records), "")):
        raise ValueError(
            f"There is nothing to go back to: no release of {name} came before version {present or '(none)'}."
        )
    with TemporaryDirectory() as scratch:
        public = public_half(key, Path(scratch))
        options = {"purpose": "release", "alias": alias, "trusted_types": trusted_types}
        back_to = verified(f"models:/{name}/{to}", public, **options)
        with back_to as copy, _record(name, alias, to, present, "rollback") as run:
            _hand_over(copy, alias, key, public, run, present)
    return _release_of(mlflow.get_run(run.info.run_id))


def history(name: str, alias: str = "") -> list[Release]:
    """Return the releases and rollbacks of a registered model, the newest first, those that were cut off included.

    Args:
        name: the registered model.
        alias: only those for this alias; by default all.
    """
    experiment = mlflow.MlflowClient().get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    wanted = f'tags.registered_model = "{name}"' + (f" and tags.alias = '{alias}'" if alias else "")
    found = mlflow.search_runs([experiment.experiment_id], wanted, output_format="list", order_by=["start_time DESC"])
    return [_release_of(run) for run in found if run.data.tags.get("kind") != "gate"]


def sign_anew(names: Iterable[str], folder: Path, trusted_types=()) -> tuple[Path, Path, list[Statement]]:
    """Make a new key beside the store of ``folder``, and sign with it each version of ``names`` that has an alias.

    All are verified with the present key before anything is changed. Its private half may be lost.

    Returns:
        The new key, the public half of the one before it, and what the versions are.

    Raises:
        NotVerifiedError: a version is not what the present key signed.
        KeyRefusedError: there is no key yet, or it cannot be used.
        mlflow.MlflowException: there is no such model, or the store gives no answer.
    """
    client, present = mlflow.MlflowClient(), present_public_key(folder)
    if present is None:
        raise KeyRefusedError("There is no key yet that could have signed a version. Leave out --sign-anew.")
    with contextlib.ExitStack() as stack:
        aliases = {name: sorted(client.get_registered_model(name).aliases) for name in names}
        uris = [f"models:/{name}@{alias}" for name in aliases for alias in aliases[name]]
        options = {"purpose": "candidate", "trusted_types": trusted_types}
        copies = [stack.enter_context(verified(uri, present, **options)) for uri in uris]
        key, before = new_key(folder)
        for copy in copies:
            sign(copy.folder.parent, copy.statement, key)
    return key, before, [copy.statement for copy in copies]


def _version_with(name: str, alias: str) -> str:
    """Return the version that has the alias, empty if none has."""
    return str(mlflow.MlflowClient().get_registered_model(name).aliases.get(alias, ""))


def _verified_baseline(stack: contextlib.ExitStack, name: str, alias: str, public: Path, trusted_types) -> Verified:
    """Verify the version that has the alias, which the gate will load, and say what to do where it does not verify."""
    baseline = verified(f"models:/{name}@{alias}", public, purpose="release", trusted_types=trusted_types)
    try:
        return stack.enter_context(baseline)
    except NotVerifiedError as error:
        remedy = f"It has the alias {alias}, and the gate compares with it. To retire it, delete the alias:"
        raise NotVerifiedError(f"{error} {remedy} client.delete_registered_model_alias({name!r}, {alias!r})") from None


def _finished(name: str, alias: str, number: str, moment: str) -> Release:
    """Return the release of the version that has the alias, and finish what a kill has left open after the alias."""
    client = mlflow.MlflowClient()
    client.set_model_version_tag(name, number, release_tag(alias), moment)
    found = next((item for item in history(name, alias) if item.released_at == moment), None)
    if found is None:
        raise ValueError(f"Version {number} of {name} is {alias} already, and the record of its release is gone.")
    if found.status != "FINISHED":
        client.set_terminated(found.run_id, "FINISHED")
    return replace(found, status="FINISHED")


@contextlib.contextmanager
def _record(name: str, alias: str, number: str, before: str, kind: str) -> Iterator[Run]:
    """Begin the run that records a release, and end it as finished if the block succeeds; end others that were cut."""
    client = mlflow.MlflowClient()
    for item in history(name, alias):
        if item.status == "RUNNING" and item.version == number:
            client.set_terminated(item.run_id, "KILLED")
    commit = client.get_run(client.get_model_version(name, number).run_id).data.tags.get("mlflow.source.git.commit", "")
    tags = {"registered_model": name, "alias": alias, "version": number, "before": before, "kind": kind}
    tags["commit"] = commit
    description = "Each run is a release or a rollback of a registered model."
    experiment = create_experiment(mlflow.get_tracking_uri(), EXPERIMENT, description)
    run_name = f"{kind} {name}/{number} as {alias}"
    with mlflow.start_run(experiment_id=experiment.experiment_id, run_name=run_name, tags=tags, nested=True) as run:
        yield run


def _hand_over(copy: Verified, alias: str, key: Path, public: Path, run: Run, before: str) -> None:
    """Sign the version as released, move the alias, and say in the version's tag when; in this order.

    Raises:
        GateClosedError: another release has moved the alias from version ``before`` meanwhile.
    """
    client, name, number = mlflow.MlflowClient(), copy.statement.registered_model, copy.statement.version
    _refuse_if_moved(name, alias, before)
    moment = released_now(name, alias, public)
    client.set_tag(run.info.run_id, "released_at", moment)
    sign(copy.folder.parent, replace(copy.statement, purpose="release", alias=alias, released_at=moment), key)
    _refuse_if_moved(name, alias, before)
    client.set_registered_model_alias(name, alias, number)
    client.set_model_version_tag(name, number, release_tag(alias), moment)


def _refuse_if_moved(name: str, alias: str, before: str) -> None:
    """Refuse to move an alias that does not point to version ``before`` any more."""
    if (now := _version_with(name, alias)) != before:
        moved = f"{alias} moved from version {before or '(none)'} of {name} to version {now or '(none)'}"
        raise GateClosedError(f"Meanwhile {moved}, and stays there. Look at the history, and start again.")


def _write_card(root: Path, facts: dict) -> None:
    """Put the model card beside the model, where it is signed with it."""
    (root / "model_card.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (root / "model_card.md").write_text(make_card(facts).render(), encoding="utf-8")


def _message(copy: Verified, verdict: Verdict) -> str:
    """Return the text of the git tag."""
    figures = ", ".join(f"{name} {value:.4f}" for name, value in verdict.metrics.items())
    statement = copy.statement
    return f"{statement.registered_model}, version {statement.version}\n\nmetrics: {figures}\nrun: {statement.run_id}"


def _release_of(run: Run) -> Release:
    """Return what a run of the experiment says."""
    tags, info = run.data.tags, run.info
    names = ("registered_model", "alias", "version", "before", "kind", "released_at")
    values = [tags.get(name, "") for name in names]
    return Release(*values, tags.get("mlflow.user", ""), tags.get("commit", ""), info.status, info.run_id)
