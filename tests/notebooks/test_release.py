"""Guide 04, the release: what the gate lets pass, what the card says, and when git is given a tag."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import mlflow
import nbformat
import pytest
import skops.io
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from execution import ROOT, commit_all, copy_project, executed, git, papermill, snapshot, text_outputs
from kernels import execute_in, running_kernel
from mlflow.entities import Dataset, DatasetInput
from sklearn.datasets import load_iris
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

pytestmark = pytest.mark.extended  # it takes long

GUIDE = "guides/04_release_and_report.ipynb"
MODEL = "iris_classification_best_model"
GOLDEN = ROOT / "tests" / "golden"
MASKS = {
    r"[0-9a-f]{64}": "FINGERPRINT",
    r"[0-9a-f]{40}": "COMMIT",
    r"[0-9a-f]{32}": "RUN-ID",
    r"\d{4}-\d\d-\d\dT[\d:+]+": "DATE",
    r'([ |"]*[\w.-]+==[^\s"|]+["|, ]*\n)+': "PACKAGES\n",
    r"(python\W+)\d[\d.]+\w*": r"\1VERSION",
    r" +": " ",  # how wide a table is depends on what was masked
    r"--+": "--",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Give a git repository in which the guide has been executed once by papermill, in an empty store.

    The environment is not rebuilt, and the guide is told to take that risk.
    """
    project = tmp_path_factory.mktemp("release") / "project"
    copy_project(project, GUIDE)
    shutil.copy(ROOT / ".gitignore", project)
    commit_all(project)
    process = papermill(project / GUIDE, project, {"allow_unchecked": True})
    assert process.returncode == 0, process.stderr
    return project


@pytest.fixture(scope="module")
def client(project):
    return mlflow.MlflowClient(f"sqlite:///{project.as_posix()}/mlflow.db")


@pytest.fixture(scope="module")
def kernel(project):
    with running_kernel(project.parent) as kernel:
        yield kernel


@pytest.fixture
def execute(kernel, project):
    """Give a function that executes the guide's release in the store of ``project``; it returns error and output."""

    def run(folder: Path = project, rebuild: str = "off", **parameters) -> tuple[str, str]:
        notebook = nbformat.read(ROOT / GUIDE, as_version=4)
        last = max(i for i, cell in enumerate(notebook.cells[:-1]) if "release" in cell.metadata.get("tags", []))
        notebook.cells = notebook.cells[: last + 1]
        variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{project.as_posix()}/mlflow.db", "REBUILD_ENVIRONMENT": rebuild}
        error = execute_in(kernel, notebook, folder, variables, parameters)
        return error, "\n".join(text_outputs(notebook))

    return run


def files_of(client: mlflow.MlflowClient, number: int) -> Path:
    """Return the folder with the files of a version that the guide made."""
    source = client.get_model_version(MODEL, str(number)).source
    return Path(url2pathname(urlparse(client.get_logged_model(source.removeprefix("models:/")).artifact_location).path))


@pytest.fixture
def register(client, request):
    """Give a function that registers folders of model files, each with a run, under a name of this test's own."""
    name = re.sub(r"\W+", "_", request.node.name)

    def make(*versions: tuple[Path, str], production: bool = True) -> str:
        client.create_registered_model(name)
        for files, run_id in versions:
            client.create_model_version(name, files.as_uri(), run_id)
        if production:
            client.set_registered_model_alias(name, "production", "1")
        return name

    return make


@pytest.fixture
def cautious(client):
    return files_of(client, 1), client.get_model_version(MODEL, "1").run_id


@pytest.fixture
def better(client):
    return files_of(client, 2), client.get_model_version(MODEL, "2").run_id


@pytest.fixture
def clone(project, tmp_path):
    """Give a clone of the project, whose remote is a bare repository."""
    git(tmp_path, "clone", "--quiet", "--bare", str(project), "remote.git")
    git(tmp_path, "clone", "--quiet", "remote.git", "clone")
    git(tmp_path / "clone", "config", "user.name", "A")
    git(tmp_path / "clone", "config", "user.email", "a@example.org")
    return tmp_path / "clone"


def state(client: mlflow.MlflowClient, project: Path, *repositories: Path) -> list:
    """Return all that a release could change: aliases, tags, runs, files of the store, and references in git.

    Not the file in which MLflow, each time that it loads a registered version from disk, leaves name and number.
    """
    models = {model.name: (model.aliases, model.tags) for model in client.search_registered_models()}
    versions = sorted((version.name, version.version, version.tags) for version in client.search_model_versions())
    experiment = client.get_experiment_by_name("iris_classification").experiment_id
    runs = sorted(str(run.to_dictionary()) for run in client.search_runs([experiment]))
    files = snapshot(project / "mlruns") | snapshot(project / "releases")
    files = {path: content for path, content in files.items() if not path.endswith("registered_model_meta")}
    references = [git(repository, "for-each-ref") for repository in repositories if (repository / ".git").exists()]
    return [models, str(versions), runs, files, references]


def production(client: mlflow.MlflowClient, name: str = MODEL) -> str:
    return str(client.get_registered_model(name).aliases.get("production"))


def test_better_candidate_takes_production(project, client):
    # given an empty store, when the guide was executed, then the second version has replaced the first
    assert production(client) == "2"
    runs = [client.get_run(client.get_model_version(MODEL, number).run_id) for number in "12"]
    assert [run.info.run_name for run in runs] == ["final_cautious", "final_best"]
    assert runs[0].data.metrics["test_accuracy"] < runs[1].data.metrics["test_accuracy"]
    # and the way back is shown
    text = "\n".join(text_outputs(executed(project)))
    assert f'Back: client.set_registered_model_alias("{MODEL}", "production", "1")' in text


def test_stored_gate_has_passed_every_check():
    # given the committed outputs, which come from an execution that rebuilt the environment
    committed = nbformat.read(ROOT / GUIDE, as_version=4)
    table = next(text for text in text_outputs(committed) if "fresh environment" in text)
    # then each check is there with its result
    results = re.findall(r"^(\w[\w ]+?) {2,}(\w+) ", table, flags=re.MULTILINE)
    checks = ["signature", "input example", "exact pins", "same test set", "not worse", "fresh environment"]
    assert results == [(check, "passed") for check in checks]


def test_production_takes_raw_rows_and_predicts_what_was_measured(client, better):
    # given the split of the guide
    iris = load_iris(as_frame=True)
    species = iris.target_names[iris.target]
    _, features, _, target = train_test_split(iris.data, species, test_size=0.2, stratify=species, random_state=42)
    # when the files of the released version are loaded, then they are as good on the test rows as their run says
    accuracy = client.get_run(better[1]).data.metrics["test_accuracy"]
    assert (mlflow.pyfunc.load_model(str(better[0])).predict(features) == target).mean() == accuracy


def edited(better: tuple[Path, str], folder: Path, field: str) -> tuple[Path, str]:
    """Return a copy of a version's files in which one field of MLmodel is empty, and its run."""
    files = Path(shutil.copytree(better[0], folder / "files"))
    model = mlflow.models.Model.load(files)
    setattr(model, field, None)
    model.save(files / "MLmodel")
    return files, better[1]


def loosened(better: tuple[Path, str], folder: Path, line: str) -> tuple[Path, str]:
    """Return a copy of a version's files with one more line in its requirements, and its run."""
    files = Path(shutil.copytree(better[0], folder / "files"))
    with (files / "requirements.txt").open("a") as requirements:
        requirements.write(f"\n{line}\n")
    return files, better[1]


def with_other_test_rows(client: mlflow.MlflowClient, files: Path) -> tuple[Path, str]:
    """Return a version's files with a new run that recorded another digest for ``iris_test``."""
    run = client.create_run(client.get_experiment_by_name("iris_classification").experiment_id)
    client.log_inputs(run.info.run_id, [DatasetInput(Dataset("iris_test", "0badcafe", "code", "{}"))])
    client.set_terminated(run.info.run_id)
    return files, run.info.run_id


def less_sure(better: tuple[Path, str], folder: Path) -> tuple[Path, str]:
    """Return a copy of a version's files that answers the same, with probabilities nearer to each other."""
    files = Path(shutil.copytree(better[0], folder / "files"))
    pipeline = mlflow.sklearn.load_model(str(files))
    pipeline[-1].coef_ /= 2
    pipeline[-1].intercept_ /= 2
    skops.io.dump(pipeline, files / "model.skops")
    return files, better[1]


DEFECTS = ["signature", "input example", "exact pins", "same test set", "not worse", "log loss"]


@pytest.mark.parametrize("check", DEFECTS)
def test_version_with_one_defect_is_not_promoted(check, client, project, cautious, better, tmp_path, register, execute):
    # given a version that lacks one thing, while another one holds production
    holder, candidate = cautious, better
    if check == "signature":
        candidate = edited(better, tmp_path, "signature")
    elif check == "input example":
        candidate = edited(better, tmp_path, "saved_input_example_info")
    elif check == "exact pins":
        candidate = loosened(better, tmp_path, "narwhals>=2")
    elif check == "same test set":
        candidate = with_other_test_rows(client, better[0])
    elif check == "log loss":
        holder, candidate, check = better, less_sure(better, tmp_path), "not worse"
    else:
        holder, candidate = better, cautious
    name = register(holder, candidate)
    before = state(client, project)
    # when it is to be released
    error, output = execute(model_name=name, allow_unchecked=True)
    # then the error names just this check, the table shows it, and nothing has changed
    assert error.startswith(f"RuntimeError: Version 2 is not promoted: {check} failed (")
    assert error.count("failed (") == 1
    assert re.search(rf"^{check} +failed", output, flags=re.MULTILINE)
    assert state(client, project) == before
    assert production(client, name) == "1"


def test_version_whose_environment_cannot_be_built_is_not_promoted(
    client, project, cautious, better, tmp_path, register, execute
):
    # given exact pins, one of which no package index has
    name = register(cautious, loosened(better, tmp_path, "mlflow-quickstart-there-is-none==0"))
    before = state(client, project)
    # when
    error, output = execute(model_name=name, rebuild="on", allow_unchecked=True)
    # then
    assert error.startswith("RuntimeError: Version 2 is not promoted: fresh environment failed (")
    assert "there-is-none" in output
    assert state(client, project) == before


ODDITY = """
import sys

def odd(features):
    return features if "ipykernel" in sys.modules else -features
"""


def test_version_that_answers_differently_elsewhere_is_not_promoted(
    client, project, better, tmp_path, register, execute, monkeypatch
):
    # given a model that is good in a notebook, and loads without error but answers otherwise where there is none
    (tmp_path / "oddity.py").write_text(ODDITY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    from oddity import odd

    good = mlflow.sklearn.load_model(str(better[0]))
    files = tmp_path / "files"
    signature = mlflow.models.Model.load(better[0]).signature
    example = load_iris(as_frame=True).data.head(3)
    options = {"signature": signature, "input_example": example, "code_paths": [str(tmp_path / "oddity.py")]}
    options |= {"pip_requirements": str(ROOT / "model_requirements.txt"), "skops_trusted_types": ["oddity.odd"]}
    mlflow.sklearn.save_model(make_pipeline(FunctionTransformer(odd), *good), files, **options)
    name = register((files, better[1]), production=False)
    before = state(client, project)
    # when
    error, output = execute(model_name=name, rebuild="on")
    # then all other checks pass, and this one does not
    assert error.startswith("RuntimeError: Version 1 is not promoted: fresh environment failed (not the same 30 ")
    assert len(re.findall(r"^\w[\w ]+ +passed ", output, flags=re.MULTILINE)) == 5
    assert state(client, project) == before


def test_version_that_cannot_be_scored_is_not_promoted(client, project, cautious, better, tmp_path, register, execute):
    # given a version whose model file is lost
    files = Path(shutil.copytree(better[0], tmp_path / "files"))
    (files / "model.skops").unlink()
    name = register(cautious, (files, better[1]))
    before = state(client, project)
    # when
    error, _ = execute(model_name=name, allow_unchecked=True)
    # then
    assert error.startswith("RuntimeError: Version 2 is not promoted: not worse failed (cannot be scored: ")
    assert state(client, project) == before


def test_unchecked_environment_stops_the_promotion(client, project, cautious, better, register, execute):
    name = register(cautious, better)
    before = state(client, project)
    error, _ = execute(model_name=name)
    assert "Version 2 is not promoted: fresh environment not checked" in error
    assert state(client, project) == before


def test_first_version_needs_no_holder_to_beat(client, better, register, execute):
    # given a registered model without production
    name = register(better, production=False)
    # when
    error, output = execute(model_name=name, allow_unchecked=True)
    # then
    assert error == ""
    assert "no holder yet" in output
    assert production(client, name) == "1"


def test_older_version_can_be_released_by_its_number(client, better, cautious, register, execute):
    # given a good version, and after it a bad one that is the newest
    name = register(cautious, better, cautious)
    # when the good one is asked for
    error, _ = execute(model_name=name, candidate_version=2, allow_unchecked=True)
    # then
    assert error == ""
    assert production(client, name) == "2"


def test_version_that_is_not_registered_is_refused(execute):
    assert execute(candidate_version=99)[0] == f"ValueError: {MODEL} has no version 99; it has: 2, 1"


def test_release_of_the_holder_changes_nothing(client, project, execute):
    before = state(client, project)
    error, output = execute(allow_unchecked=True)
    assert error == ""
    assert "it holds production already" in output
    assert state(client, project) == before


def masked(text: str) -> str:
    for pattern, replacement in MASKS.items():
        text = re.sub(pattern, replacement, text)
    return text


@pytest.mark.parametrize("name", ["model_card_v2.json", "model_card_v2.md"])
def test_card_is_the_golden_one(name, project):
    # when the card is made; RENEW_GOLDEN=on writes what it is now
    card = masked((project / "releases" / MODEL / "v2" / name).read_text(encoding="utf-8"))
    if os.environ.get("RENEW_GOLDEN") == "on":
        (GOLDEN / name).write_text(card, encoding="utf-8")
    # then
    assert card == (GOLDEN / name).read_text(encoding="utf-8")


def test_card_has_the_facts_of_version_and_run(project, client):
    facts = json.loads((project / "releases" / MODEL / "v2" / "model_card_v2.json").read_text(encoding="utf-8"))
    version = client.get_model_version(MODEL, "2")
    run = client.get_run(version.run_id)
    assert facts["run_id"] == version.run_id
    assert facts["parameters"] == run.data.params
    assert facts["metrics"] == {name: round(value, 4) for name, value in run.data.metrics.items()}
    assert facts["git_commit"] == git(project, "rev-parse", "HEAD")
    pins = (project / "model_requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition(";")[0].strip() for line in pins if re.match("[a-z]", line)]
    assert facts["environment"]["packages"] == pins


def test_card_is_logged_with_the_version(project, client, tmp_path):
    version = client.get_model_version(MODEL, "2")
    place = f"releases/{MODEL}/v2"
    logged = Path(client.download_artifacts(version.run_id, place, str(tmp_path)))
    assert {path.name for path in logged.iterdir()} == {"model_card_v2.json", "model_card_v2.md"}
    assert snapshot(logged) == snapshot(project / place)
    assert version.tags["model_card"] == f"{place}/model_card_v2.md"


def test_released_card_is_never_replaced(client, project, better, cautious, register, execute):
    # given a released version
    name = register(cautious, better)
    assert execute(model_name=name, allow_unchecked=True)[0] == ""
    before = state(client, project)
    # when it is released again, with other limits
    error, _ = execute(model_name=name, allow_unchecked=True, limits="None.")
    # then
    assert "Version 2 was released with another model_card_v2.json; a card is not replaced" in error
    assert state(client, project) == before


def test_signature_is_logged_with_the_version_and_the_key_stays_out_of_git(project, client):
    version = client.get_model_version(MODEL, "2")
    assert version.tags["signature"] == f"signatures/{MODEL}/v2/model.sig"
    assert [file.path for file in client.list_artifacts(version.run_id, f"signatures/{MODEL}/v2")] == [
        version.tags["signature"]
    ]
    assert {path.name for path in (project / "keys").iterdir()} == {"signing_key.pem", "signing_key.pub"}
    assert git(project, "status", "--porcelain") == "?? executed.ipynb"


def test_signature_of_a_changed_version_is_refused_and_stays(client, project, better, tmp_path, register, execute):
    # given a released version, of whose files one is changed afterwards
    files = Path(shutil.copytree(better[0], tmp_path / "files"))
    name = register((files, better[1]), production=False)
    assert execute(model_name=name, allow_unchecked=True)[0] == ""
    with (files / "MLmodel").open("a") as file:
        file.write("\n")
    before = state(client, project)
    # when it is released again
    error, _ = execute(model_name=name, allow_unchecked=True)
    # then the error names the file and the remedy, and the signature is the old one
    assert error.startswith("RuntimeError: Version 1 has a signature that does not hold: Signature mismatch")
    assert "Hash mismatch for 'MLmodel'" in error.replace("\\", "")
    assert "register the model anew" in error
    assert state(client, project) == before


def test_signature_made_with_another_key_is_refused_and_stays(client, project, better, tmp_path, register, execute):
    # given a version that was released with a key of the user's
    private_key = ec.generate_private_key(ec.SECP256R1())
    pem = private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "own.pem").write_bytes(pem)
    name = register(better, production=False)
    assert execute(model_name=name, allow_unchecked=True, signing_key=str(tmp_path / "own.pem"))[0] == ""
    assert {path.name for path in tmp_path.iterdir()} == {"own.pem"}
    before = state(client, project)
    # when it is released again with the key of this computer
    error, _ = execute(model_name=name, allow_unchecked=True)
    # then
    assert "Version 1 has a signature that does not hold: Key mismatch" in error
    assert "Give the key that signed it (signing_key)" in error
    assert state(client, project) == before
    # and the user's key still fits
    assert execute(model_name=name, allow_unchecked=True, signing_key=str(tmp_path / "own.pem"))[0] == ""
    assert state(client, project) == before


def dirty(folder: Path) -> dict:
    (folder / "notes.txt").write_text("mine")
    return {}


def tagged(folder: Path) -> dict:
    git(folder, "tag", "model-v2")
    return {}


def another_commit(folder: Path) -> dict:
    git(folder, "commit", "--quiet", "--allow-empty", "--message=More")
    return {}


def no_repository(folder: Path) -> dict:
    shutil.move(folder / ".git", folder.parent / "no longer a repository")
    return {}


def no_remote(folder: Path) -> dict:
    return {"push": True, "remote": "nowhere"}


def tagged_remote(folder: Path) -> dict:
    git(folder.parent / "remote.git", "tag", "model-v2")
    return {"push": True}


REFUSALS = {
    dirty: "the tree is dirty, commit or stash first: ?? notes.txt",
    tagged: "this tag exists already",
    another_commit: "and the commit here is",
    no_repository: "is in no git repository with a commit",
    no_remote: "there is no remote 'nowhere' to reach",
    tagged_remote: "the remote 'origin' has it already",
}


@pytest.mark.parametrize(("prepare", "reason"), REFUSALS.items(), ids=[prepare.__name__ for prepare in REFUSALS])
def test_tag_is_refused_and_nothing_changed(
    prepare, reason, client, project, clone, better, cautious, register, execute
):
    # given a version that could be promoted, and a repository that is not fit for the tag
    name = register(cautious, better)
    parameters = prepare(clone)
    before = state(client, project, clone), snapshot(clone.parent)
    # when a tag is asked for
    error, _ = execute(clone, model_name=name, release_tag=True, allow_unchecked=True, **parameters)
    # then
    assert error.startswith("RuntimeError: Refused to make the tag model-v2: ")
    assert reason in error
    assert (state(client, project, clone), snapshot(clone.parent)) == before


def test_tag_of_what_is_not_registered_is_refused(client, project, clone, execute):
    before = state(client, project, clone)
    error, _ = execute(clone, model_name="nobody", release_tag=True)
    assert "There is no version of nobody to tag yet" in error
    assert state(client, project, clone) == before


def test_push_without_tag_is_refused(execute):
    assert "set release_tag = True as well" in execute(push=True)[0]


def test_release_leaves_git_alone_unless_asked(client, project, clone, better, cautious, register, execute):
    name = register(cautious, better)
    error, output = execute(clone, model_name=name, allow_unchecked=True)
    assert error == ""
    assert "The tag model-v2 would say (release_tag is off)" in output
    assert git(clone, "tag") == ""
    assert git(clone, "status", "--porcelain") == ""


def test_tag_is_annotated_with_metrics_and_run(client, clone, execute):
    # given a clean clone at the commit of the run, when the tag is asked for and no push
    error, _ = execute(clone, candidate_version=2, release_tag=True, allow_unchecked=True)
    assert error == ""
    # then the tag is annotated, at this commit, and says what was released
    assert git(clone, "cat-file", "-t", "model-v2") == "tag"
    assert git(clone, "rev-parse", "model-v2^{commit}") == git(clone, "rev-parse", "HEAD")
    message = git(clone, "tag", "--list", "--format=%(contents)", "model-v2")
    run = client.get_run(client.get_model_version(MODEL, "2").run_id)
    assert message.startswith(f"{MODEL}, version 2\n")
    assert f"run: {run.info.run_id}" in message
    assert all(f"{metric} {value:.4f}" in message for metric, value in run.data.metrics.items())
    # and the remote knows nothing of it
    assert git(clone.parent / "remote.git", "tag") == ""


def test_rejected_push_leaves_no_tag_and_can_be_repeated(client, project, clone, better, cautious, register, execute):
    # given a remote that rejects what is pushed
    name, remote = register(cautious, better), clone.parent / "remote.git"
    hook = remote / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho 'not on a Friday'\nexit 1\n")
    hook.chmod(0o755)
    before = state(client, project, clone)
    wanted = {"model_name": name, "release_tag": True, "push": True, "allow_unchecked": True}
    # when
    error, _ = execute(clone, **wanted)
    # then the error says so, no tag is left and nothing is promoted
    assert "The tag model-v2 could not be made and pushed; nothing was changed" in error
    assert "not on a Friday" in error
    assert state(client, project, clone) == before
    # and when the remote accepts, the second attempt works
    hook.unlink()
    assert execute(clone, **wanted)[0] == ""
    assert git(remote, "tag") == git(clone, "tag") == "model-v2"
    assert production(client, name) == "2"
