"""The tag of the commit that a version was made from: refused where it would not be true, and taken up again."""

from pathlib import Path

import pytest
from execution import commit_all, git, snapshot

from mlflow_lifecycle.exceptions import TagRefusedError
from mlflow_lifecycle.releases.release import check_tag, make_tag
from mlflow_lifecycle.signing.statement import Statement


@pytest.fixture
def project(tmp_path):
    """Give a repository with one commit, and with a remote."""
    git(tmp_path, "init", "--quiet", "--bare", "remote.git")
    project = tmp_path / "project"
    project.mkdir()
    (project / "file").touch()
    commit_all(project)
    git(project, "remote", "add", "origin", "../remote.git")
    git(project, "config", "user.name", "A")
    git(project, "config", "user.email", "a@example.org")
    return project


def statement_of(project: Path, model: str = "iris") -> Statement:
    """Return what is signed of a version that was made from the commit, in a run of its own."""
    return Statement(model, "1", f"run of {model}", "candidate", "", commit=git(project, "rev-parse", "HEAD"))


def tag(project: Path, remote: str = "", model: str = "iris") -> str:
    name = check_tag(project, statement_of(project, model), remote)
    make_tag(project, name, f"{model}, version 1\n\nrun: run of {model}", remote)
    return name


def dirty(folder: Path) -> str:
    (folder / "notes.txt").write_text("mine")
    return ""


def tagged(folder: Path) -> str:
    git(folder, "tag", "iris-v1")
    return ""


def another_commit(folder: Path) -> str:
    git(folder, "commit", "--quiet", "--allow-empty", "--message=More")
    return ""


def no_remote(folder: Path) -> str:
    return "nowhere"


def tagged_remote(folder: Path) -> str:
    git(folder, "push", "--quiet", "origin", "HEAD:refs/heads/main")
    git(folder.parent / "remote.git", "tag", "iris-v1", "main")
    return "origin"


REFUSALS = {
    dirty: "The work tree has changes. Commit or stash them: ?? notes.txt",
    tagged: "There is another tag iris-v1. Delete it: git tag --delete iris-v1",
    another_commit: "and the commit here is",
    no_remote: "git ls-remote failed, and no tag was made: fatal: 'nowhere' does not appear",
    tagged_remote: "The remote 'origin' has a tag iris-v1 already.",
}


@pytest.mark.parametrize(("prepare", "reason"), REFUSALS.items(), ids=[prepare.__name__ for prepare in REFUSALS])
def test_tag_that_would_not_be_true_is_refused_and_nothing_changed(prepare, reason, project):
    statement = statement_of(project)
    remote = prepare(project)
    before = snapshot(project.parent)
    with pytest.raises(TagRefusedError) as caught:
        check_tag(project, statement, remote)
    assert reason in str(caught.value)
    assert snapshot(project.parent) == before


def test_tag_is_annotated_with_what_it_says_and_stays_here(project):
    assert tag(project) == "iris-v1"
    assert git(project, "cat-file", "-t", "iris-v1") == "tag"
    assert git(project, "rev-parse", "iris-v1^{commit}") == git(project, "rev-parse", "HEAD")
    assert "run: run of iris" in git(project, "tag", "--list", "--format=%(contents)", "iris-v1")
    assert git(project.parent / "remote.git", "tag") == ""


def test_tag_is_pushed_if_asked_and_that_of_a_release_that_was_cut_off_is_taken_up_again(project):
    # given that the tag was made, and then the release was killed
    tag(project, "origin")
    assert git(project.parent / "remote.git", "tag") == "iris-v1"
    made = git(project, "rev-parse", "iris-v1")
    # when the release is repeated, then it is the same tag
    assert tag(project, "origin") == "iris-v1"
    assert git(project, "rev-parse", "iris-v1") == made


def test_rejected_push_leaves_no_tag_and_can_be_repeated(project):
    # given a remote that rejects what is pushed
    hook = project.parent / "remote.git/hooks/pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho 'not on a Friday'\nexit 1\n")
    hook.chmod(0o755)
    # when
    with pytest.raises(TagRefusedError, match=r"git push failed, and no tag was made: .*not on a Friday"):
        tag(project, "origin")
    # then no tag is left, and when the remote accepts, the second attempt works
    assert git(project, "tag") == ""
    hook.unlink()
    tag(project, "origin")
    assert git(project.parent / "remote.git", "tag") == git(project, "tag") == "iris-v1"


NAMES = {
    "größe": "größe-v1",
    "-f": "_f-v1",
    ".hidden": "_hidden-v1",
    "a..b": "a_b-v1",
    "what?*[^~\\@{1}": "what_1_-v1",
}


def test_each_model_has_tags_of_its_own_whatever_its_name(project):
    # given a tag of a version of this number
    tag(project)
    # then the versions of other models get their own
    for model, expected in NAMES.items():
        assert tag(project, "origin", model) == expected
    found = git(project, "-c", "core.quotePath=off", "tag").splitlines()
    assert sorted(found) == sorted([*NAMES.values(), "iris-v1"])
