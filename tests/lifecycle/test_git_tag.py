"""The tag of the commit that a version was made from: refused where it would not be true, and taken up again."""

import shutil
from pathlib import Path

import mlflow
import pytest
from execution import git, snapshot
from versions import iris_rows, register, store_in

from mlflow_lifecycle.exceptions import TagRefusedError
from mlflow_lifecycle.experiments import source_tags
from mlflow_lifecycle.releases.release import check_tag, make_tag
from mlflow_lifecycle.signing.statement import candidate_statement


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Give a folder with a store, a repository, and its remote; a version was made from the only commit."""
    folder = tmp_path_factory.mktemp("original")
    git(folder, "init", "--quiet", "--bare", "remote.git")
    git(folder, "init", "--quiet", "project")
    project = folder / "project"
    git(project, "remote", "add", "origin", "../remote.git")
    git(project, "config", "user.name", "A")
    git(project, "config", "user.email", "a@example.org")
    (project / "file").touch()
    git(project, "add", ".")
    git(project, "commit", "--quiet", "--message=First")
    with pytest.MonkeyPatch.context() as monkeypatch, store_in(folder, monkeypatch):
        version = register(folder, rows=iris_rows())
        commit = source_tags("file", project)["mlflow.source.git.commit"]
        mlflow.MlflowClient().set_tag(version.run_id, "mlflow.source.git.commit", commit)
    return folder


@pytest.fixture
def project(original, tmp_path, monkeypatch):
    """Give a copy of the repository, with its remote; the store is the active one."""
    for name in ("project", "remote.git"):
        shutil.copytree(original / name, tmp_path / name)
    with store_in(original, monkeypatch):
        yield tmp_path / "project"


def run_id(model: str = "iris") -> str:
    return mlflow.MlflowClient().get_model_version(model, 1).run_id


def statement_of(model: str = "iris"):
    return candidate_statement(model, "1", mlflow.get_run(run_id(model)), "classification", "")


def tag(project: Path, remote: str = "", model: str = "iris") -> str:
    name = check_tag(project, statement_of(model), remote)
    make_tag(project, name, f"{model}, version 1\n\nrun: {run_id(model)}", remote)
    return name


def version_of(model: str) -> None:
    """Register a version of ``model``, without files, made from the commit of the version of iris, in another run."""
    client = mlflow.MlflowClient()
    commit = client.get_run(run_id()).data.tags["mlflow.source.git.commit"]
    run = client.create_run("0", tags={"mlflow.source.git.commit": commit}).info.run_id
    client.create_registered_model(model)
    client.create_model_version(model, f"runs:/{run}/model", run)


def dirty(folder: Path) -> str:
    (folder / "notes.txt").write_text("mine")
    return ""


def tagged(folder: Path) -> str:
    git(folder, "tag", "iris-v1")
    return ""


def another_commit(folder: Path) -> str:
    git(folder, "commit", "--quiet", "--allow-empty", "--message=More")
    return ""


def no_repository(folder: Path) -> str:
    shutil.move(folder / ".git", folder.parent / "no longer a repository")
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
    no_repository: "git rev-parse failed, and no tag was made: fatal: not a git repository",
    no_remote: "git ls-remote failed, and no tag was made: fatal: 'nowhere' does not appear",
    tagged_remote: "The remote 'origin' has a tag iris-v1 already.",
}


@pytest.mark.parametrize(("prepare", "reason"), REFUSALS.items(), ids=[prepare.__name__ for prepare in REFUSALS])
def test_tag_that_would_not_be_true_is_refused_and_nothing_changed(prepare, reason, project):
    remote = prepare(project)
    before = snapshot(project.parent)
    with pytest.raises(TagRefusedError) as caught:
        check_tag(project, statement_of(), remote)
    assert reason in str(caught.value)
    assert snapshot(project.parent) == before


def test_tag_is_annotated_with_what_it_says_and_stays_here(project):
    assert tag(project) == "iris-v1"
    assert git(project, "cat-file", "-t", "iris-v1") == "tag"
    assert git(project, "rev-parse", "iris-v1^{commit}") == git(project, "rev-parse", "HEAD")
    assert f"run: {run_id()}" in git(project, "tag", "--list", "--format=%(contents)", "iris-v1")
    assert git(project.parent / "remote.git", "tag") == ""


def test_tag_is_pushed_if_asked(project):
    tag(project, "origin")
    assert git(project.parent / "remote.git", "tag") == "iris-v1"


def test_tag_of_a_release_that_was_cut_off_is_taken_up_again(project):
    # given that the tag was made, and then the release was killed
    tag(project, "origin")
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
    "wine": "wine-v1",
    "two words": "two_words-v1",
    "größe": "größe-v1",
    "-f": "_f-v1",
    ".hidden": "_hidden-v1",
    "a..b": "a_b-v1",
    "what?*[^~\\@{1}": "what_1_-v1",
    "kept.lock": "kept.lock-v1",
}


def test_each_model_has_tags_of_its_own_whatever_its_name(project):
    # given a version of this number of each of several models
    tag(project)
    for model, expected in NAMES.items():
        version_of(model)
        assert tag(project, "origin", model) == expected
    # then all tags are there
    found = git(project, "-c", "core.quotePath=off", "tag").splitlines()
    assert sorted(found) == sorted([*NAMES.values(), "iris-v1"])
