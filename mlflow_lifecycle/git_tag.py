"""Tag the commit that a version was made from, and refuse where the tag would not be true.

MLflow records the commit of a run; it puts no mark into the repository.
"""

import os
import re
import subprocess
from pathlib import Path

import mlflow

from mlflow_lifecycle.store import printable


class TagRefusedError(RuntimeError):
    """The commit cannot be tagged; the message says why. Nothing was changed."""


def check_tag(project: Path, name: str, version: str, remote: str = "") -> str:
    """Return the tag for a version, ``<name>-v<version>``, once it is sure that it can be made.

    A tag of this very version that is there already is fine: a release that was cut off is taken up again.

    Args:
        project: a folder in a git repository.
        name: the registered model.
        version: its number.
        remote: where the tag is to be pushed; empty for nowhere.

    Raises:
        TagRefusedError: the tree is dirty, the commit is not the one that the version's run recorded, another tag of
            that name is there, or the remote cannot be reached.
    """
    head = _git(project, "rev-parse", "HEAD").stdout.strip()
    run = mlflow.get_run(mlflow.MlflowClient().get_model_version(name, version).run_id)
    trained = run.data.tags.get("mlflow.source.git.commit", "no commit")
    changes = _git(project, "status", "--porcelain").stdout.splitlines()
    # What git does not allow in a tag becomes an underscore.
    tag = re.sub(r"[^\w.-]+|[.]{2,}|^[.-]", "_", name) + f"-v{version}"
    tagged = _git(project, "rev-parse", f"{tag}^{{commit}}").stdout.strip()
    ours = tagged == head and run.info.run_id in _git(project, "tag", "--list", "--format=%(contents)", tag).stdout
    there = _git(project, "ls-remote", "--tags", remote, tag) if remote else None
    refusals = {
        f"{project} is in no git repository with a commit": not head,
        f"the tree is dirty, commit or stash first: {', '.join(changes[:3])}": changes,
        "another tag of that name exists": _git(project, "tag", "--list", tag).stdout and not ours,
        f"version {version} was made from {trained}, and the commit here is {head}": trained != head,
        f"there is no remote {remote!r} to reach": there and there.returncode,
        f"the remote {remote!r} has it already": there and there.stdout and not ours,
    }
    if refusal := next((reason for reason, holds in refusals.items() if holds), None):
        raise TagRefusedError(f"Refused to make the tag {tag}: {refusal}. Nothing was changed.")
    return tag


def make_tag(project: Path, tag: str, message: str, remote: str = "") -> None:
    """Make an annotated tag on the present commit, and push it to ``remote`` if one is named; both or nothing.

    Raises:
        TagRefusedError: git or the remote says no; with its own words.
    """
    made = None
    if not _git(project, "tag", "--list", tag).stdout:
        made = _git(project, "tag", "--annotate", f"--message={message}", tag)
    pushed = _git(project, "push", remote, f"refs/tags/{tag}") if remote and not (made and made.returncode) else None
    if pushed and pushed.returncode and made:
        _git(project, "tag", "--delete", tag)
    if failed := next((step for step in (made, pushed) if step and step.returncode), None):
        said = printable(failed.stderr.strip())
        raise TagRefusedError(
            f"The tag {tag} could not be made{' and pushed' * bool(remote)}; nothing was changed: {said}"
        )


def _git(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    command, variables = (
        ["git", "--no-optional-locks", "-C", str(project), *arguments],
        os.environ | {"GIT_TERMINAL_PROMPT": "0"},
    )
    options = {"env": variables, "stdin": subprocess.DEVNULL, "capture_output": True, "encoding": "utf-8"}
    return subprocess.run(command, **options)
