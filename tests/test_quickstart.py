"""The quickstart, executed as its users do, and what it leaves in the store."""

import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import nbformat
import pytest
from execution import ROOT, copy_project, environment, execute, executed, text_outputs, tracking_server
from mlflow.entities import Metric
from nbval.plugin import get_sanitize_patterns

MODEL = "tracking_quick_start"
CONFIGURATIONS = {
    "lbfgs": {"solver": "lbfgs", "max_iter": "1000", "random_state": "8888", "C": "1.0"},
    "newton-cg, regularised": {
        "solver": "newton-cg",
        "max_iter": "1000",
        "random_state": "1000",
        "warm_start": "True",
        "C": "0.01",
    },
}


def sanitized(text: str) -> str:
    for pattern, replacement in get_sanitize_patterns((ROOT / "tests/sanitize.cfg").read_text()):
        text = re.sub(pattern, replacement, text)
    return text


def differing_outputs(folder: Path) -> list[str]:
    """Return the text outputs of the execution in ``folder`` that the committed notebook does not have."""
    committed = text_outputs(nbformat.read(ROOT / "project.ipynb", as_version=4))
    fresh = [sanitized(text) for text in text_outputs(executed(folder))]
    return [text for text in fresh if text not in committed]


NOT_REBUILT = ["NOT CHECKED: rebuild_environment is off, so no environment was rebuilt.\n"]


def git(folder: Path, *arguments: str) -> str:
    """Run git in ``folder`` and return what it prints."""
    command = ["git", "-C", folder, "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit_all(folder: Path) -> None:
    """Make ``folder`` a git repository with one commit of everything in it."""
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=Start")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give a folder in which the quickstart has been executed once. No test here writes to its store.

    The path has a space and a letter beyond ASCII, and nbconvert was started from another folder.
    """
    folder = tmp_path_factory.mktemp("a folder of Zoë")
    notebook = copy_project(folder)
    commit_all(folder)
    process = execute(notebook, folder, working_directory=tmp_path_factory.mktemp("elsewhere"))
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture
def client(folder):
    return mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")


@pytest.fixture
def runs(client):
    """Give the runs of the execution by name."""
    experiment = client.get_experiment_by_name(MODEL)
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.fixture
def versions(client):
    """Give the registered versions by the name of the run that made them."""
    found = [client.get_model_version(MODEL, str(number)) for number in (1, 2)]
    return {client.get_run(version.run_id).info.run_name: version for version in found}


@pytest.fixture
def model_files(folder):
    """Give the folders of the logged models' files."""
    return sorted(path.parent for path in (folder / "mlruns").rglob("MLmodel"))


# --- the stored outputs ---


def test_stored_outputs_are_reproduced_elsewhere(folder):
    # when the notebook has been executed in another folder, with the step off that builds an environment
    # then only that step prints something else
    assert differing_outputs(folder) == NOT_REBUILT


def test_comparison_of_stored_outputs_can_fail(tmp_path):
    # given a copy of the notebook with one stored number changed
    notebook = nbformat.read(copy_project(tmp_path), as_version=4)
    notebook.cells = notebook.cells[: next(i for i, cell in enumerate(notebook.cells) if "MlflowClient" in cell.source)]
    text = nbformat.writes(notebook)
    assert text.count("<td>0.8000</td>") == 1
    (tmp_path / "project.ipynb").write_text(text.replace("<td>0.8000</td>", "<td>0.8001</td>"), encoding="utf-8")
    # when nbval compares it
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider"]
    sanitize = f"--nbval-sanitize-with={ROOT / 'tests/sanitize.cfg'}"
    process = subprocess.run(
        [*command, sanitize, "project.ipynb"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    # then just the changed cell fails
    assert process.returncode == 1, process.stdout
    assert "1 failed" in process.stdout
    assert "0.8001" in process.stdout


def test_every_sanitize_rule_is_read_and_matches(folder):
    # given the rules as nbval reads them
    text = (ROOT / "tests/sanitize.cfg").read_text(encoding="utf-8")
    rules = get_sanitize_patterns(text)
    # then none is lost to the file's form
    assert len(rules) == len(re.findall("^ *regex", text, flags=re.MULTILINE)) == 2
    # and each changes something that the notebook printed
    outputs = "\n".join(text_outputs(executed(folder)))
    for pattern, _ in rules:
        assert re.search(pattern, outputs), pattern


def test_committed_notebook_is_in_its_stable_form():
    notebook = nbformat.read(ROOT / "project.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    before = nbformat.writes(notebook)
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import notebooks
    finally:
        sys.path.remove(str(ROOT / "tools"))
    notebooks.stable(notebook)
    assert nbformat.writes(notebook) == before


# --- what was logged ---


def test_experiment_has_description_and_tags(client):
    tags = client.get_experiment_by_name(MODEL).tags
    assert "LogisticRegression" in tags["mlflow.note.content"]
    assert tags["dataset"] == "iris"


def test_both_runs_finished_under_their_names(runs):
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(CONFIGURATIONS, "FINISHED")


def test_parameters_are_those_of_the_configurations(runs):
    assert {name: run.data.params for name, run in runs.items()} == CONFIGURATIONS


def test_metrics_are_three_and_differ(runs):
    first, second = (run.data.metrics for run in runs.values())
    assert set(first) == set(second) == {"accuracy", "f1_macro", "log_loss"}
    assert all(first[name] != second[name] for name in first)


def test_runs_are_tagged_with_configuration_source_and_commit(folder, runs):
    head = git(folder, "rev-parse", "HEAD")
    for name, run in runs.items():
        assert run.data.tags["configuration"] == name
        assert run.data.tags["mlflow.source.name"] == "project.ipynb"
        assert run.data.tags["mlflow.source.git.commit"].removesuffix("-dirty") == head


def test_both_datasets_are_inputs_of_each_run(runs):
    for run in runs.values():
        inputs = {
            data.dataset.name: {tag.value for tag in data.tags if tag.key == "mlflow.data.context"}
            for data in run.inputs.dataset_inputs
        }
        assert inputs == {"iris_train": {"training"}, "iris_test": {"evaluation"}}


def test_versions_lead_back_to_run_and_data(client, runs, versions):
    assert {name: int(version.version) for name, version in versions.items()} == {
        "lbfgs": 1,
        "newton-cg, regularised": 2,
    }
    for name, version in versions.items():
        assert version.run_id == runs[name].info.run_id
        model = client.get_logged_model(version.source.removeprefix("models:/"))
        assert model.source_run_id == version.run_id
        measured: list[Metric] = model.metrics
        assert {metric.key: metric.value for metric in measured} == runs[name].data.metrics
        assert {metric.dataset_name for metric in measured} == {"iris_test"}


def test_champion_is_the_version_with_the_highest_accuracy(client, runs, versions):
    best = max(runs, key=lambda name: runs[name].data.metrics["accuracy"])
    assert client.get_model_version_by_alias(MODEL, "champion").version == versions[best].version


def test_logged_model_has_signature_example_and_pins_and_nothing_pickled(model_files):
    assert len(model_files) == 2
    for files in model_files:
        assert {path.name for path in files.iterdir()} == {
            "MLmodel",
            "conda.yaml",
            "input_example.json",
            "model.skops",
            "python_env.yaml",
            "registered_model_meta",
            "requirements.txt",
            "serving_input_example.json",
        }
        model = mlflow.models.Model.load(files)
        assert model.flavors["sklearn"]["serialization_format"] == "skops"
        assert model.flavors["sklearn"]["skops_trusted_types"] is None
        assert model.signature.inputs.input_names()[0] == "sepal length (cm)"
        assert model.signature.outputs.input_names() == ["species"]
        assert model.load_input_example(files).shape == (3, 4)


def test_loading_prints_no_warning(folder, model_files):
    # given a logged model, when a new process loads it
    code = "import sys, mlflow; print(type(mlflow.pyfunc.load_model(sys.argv[1])).__name__)"
    process = subprocess.run(
        [sys.executable, "-c", code, model_files[0]],
        env=environment(folder),
        capture_output=True,
        text=True,
    )
    # then MLflow finds no difference between its requirements and this environment
    assert process.stdout == "PyFuncModel\n"
    assert process.stderr == ""


# --- where and how it can be executed ---


def test_second_execution_in_the_same_store_adds_versions(tmp_path):
    # given a store with two versions
    notebook = copy_project(tmp_path)
    assert execute(notebook, tmp_path).returncode == 0
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    before = {version.version: version for version in client.search_model_versions()}
    # when the notebook is executed again
    process = execute(notebook, tmp_path)
    # then it works, there are four versions, and what was there is unchanged
    assert process.returncode == 0, process.stderr
    after = {version.version: version for version in client.search_model_versions(order_by=["version_number"])}
    assert sorted(map(int, after)) == [1, 2, 3, 4]
    for number, version in before.items():
        assert after[number].source == version.source
    assert client.get_model_version_by_alias(MODEL, "champion").version == 3
    experiment = client.get_experiment_by_name(MODEL).experiment_id
    assert len(client.search_runs([experiment])) == 4


def test_tracking_server_gives_the_stored_outputs(tmp_path):
    # given a tracking server
    work = tmp_path / "work"
    notebook = copy_project(work)
    with tracking_server(tmp_path) as address:
        # when the notebook is executed against it
        process = execute(notebook, work, MLFLOW_TRACKING_URI=address)
        # then it prints what is stored, and the server holds the versions
        assert process.returncode == 0, process.stderr
        assert differing_outputs(work) == NOT_REBUILT
        versions = mlflow.MlflowClient(address).search_model_versions(f"name = '{MODEL}'")
        assert {str(version.version) for version in versions} == {"1", "2"}
        assert all(version.source.startswith("models:/") for version in versions)
    # and nothing was written beside the notebook
    assert not (work / "mlflow.db").exists()
    assert not (work / "mlruns").exists()


def kernel_started_in(notebook: Path, folder: Path) -> Path:
    """Return a copy of ``notebook`` whose kernel nbconvert starts in ``folder``."""
    folder.mkdir()
    return Path(shutil.copy(notebook, folder))


def test_kernel_started_in_a_folder_below_uses_the_store_beside_the_notebook(tmp_path):
    notebook = copy_project(tmp_path)
    process = execute(kernel_started_in(notebook, tmp_path / "below"), tmp_path)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "mlflow.db").exists()
    assert (tmp_path / "mlruns").exists()
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["project.ipynb"]


def test_kernel_started_elsewhere_by_jupyter_uses_the_store_beside_the_notebook(tmp_path):
    # given a kernel in a folder that has nothing to do with the notebook, told the notebook's path as Jupyter does
    notebook = copy_project(tmp_path / "project")
    elsewhere = kernel_started_in(notebook, tmp_path / "elsewhere")
    process = execute(elsewhere, tmp_path, JPY_SESSION_NAME=str(notebook))
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "project" / "mlflow.db").exists()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["project.ipynb"]


@pytest.mark.skipif(sys.platform == "win32", reason="making a link takes a right on Windows that users lack")
def test_environment_is_rebuilt_where_the_project_has_a_space_in_its_path(tmp_path):
    # given the Python environment under a path with a space
    project = tmp_path / "my project"
    notebook = copy_project(project)
    (project / "venv").symlink_to(sys.prefix)
    # when the whole notebook is executed with it
    process = execute(notebook, tmp_path, python=project / "venv/bin/python", REBUILD_ENVIRONMENT="on")
    # then it prints what is stored, to the last line
    assert process.returncode == 0, process.stderr
    assert differing_outputs(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are a part of Linux")
def test_no_network_is_needed(tmp_path, lacking):
    # given a process that has no network at all, so that kernel and notebook talk over files
    unshare = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        lacking("the right to make a network namespace", "sysctl kernel.unprivileged_userns_clone=1")
    notebook = copy_project(tmp_path)
    # when the notebook is executed there
    process = execute(notebook, tmp_path, prefix=(*unshare,), transport="ipc")
    # then it works
    assert process.returncode == 0, process.stderr
    assert differing_outputs(tmp_path) == NOT_REBUILT


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def installed() -> str:
    return subprocess.run(
        [sys.executable, "-m", "uv", "pip", "freeze", "--python", sys.executable], capture_output=True, text=True
    ).stdout


def test_packages_git_tree_and_home_stay_as_they_were(tmp_path):
    # given a repository, a home folder with something in it, and all that is installed
    clone, home, caches = tmp_path / "clone", tmp_path / "home", tmp_path / "caches"
    home.mkdir()
    caches.mkdir()
    (home / "notes.txt").write_text("mine")
    notebook = copy_project(clone)
    shutil.copy(ROOT / ".gitignore", clone)
    commit_all(clone)
    packages = installed()
    # when the whole notebook is executed, the step included that builds an environment
    process = execute(
        notebook,
        tmp_path,
        REBUILD_ENVIRONMENT="on",
        HOME=str(home),
        UV_CACHE_DIR=uv_cache(),
        IPYTHONDIR=str(caches / "ipython"),
        MPLCONFIGDIR=str(caches / "matplotlib"),
        JUPYTER_RUNTIME_DIR=str(caches / "jupyter"),
    )
    assert process.returncode == 0, process.stderr
    # then nothing of it has changed, and no temporary file is left
    assert git(clone, "status", "--porcelain") == ""
    assert snapshot(home) == {"notes.txt": b"mine"}
    assert installed() == packages
    assert {path.name for path in (tmp_path / "tmp").iterdir()} == set()


def uv_cache() -> str:
    command = [sys.executable, "-m", "uv", "cache", "dir"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# --- bad input: a clear error, before anything is written ---


def refused(process: subprocess.CompletedProcess, folder: Path, *fragments: str) -> bool:
    """Tell whether the execution stopped with a message that has all ``fragments``, and no run was made."""
    message = process.stderr.strip()
    assert process.returncode != 0
    for fragment in fragments:
        assert fragment in message[-2000:], message
    if (folder / "mlflow.db").exists():
        found = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return [experiment.name for experiment in found] == ["Default"]
    return not (folder / "mlruns").exists()


def test_missing_requirements_are_refused(tmp_path):
    notebook = copy_project(tmp_path)
    (tmp_path / "model_requirements.txt").unlink()
    assert refused(execute(notebook, tmp_path), tmp_path, "No model_requirements.txt", str(tmp_path), "git checkout")


def test_unreadable_requirements_are_refused(tmp_path):
    notebook = copy_project(tmp_path)
    (tmp_path / "model_requirements.txt").write_bytes(b"\xff\xfe\x00")
    assert refused(execute(notebook, tmp_path), tmp_path, "model_requirements.txt", "make lock")


@pytest.mark.parametrize("text", ["", "scikit-learn\n", "scikit-learn>=1.9\n"])
def test_requirements_without_versions_are_refused(tmp_path, text):
    notebook = copy_project(tmp_path)
    (tmp_path / "model_requirements.txt").write_text(text)
    assert refused(execute(notebook, tmp_path), tmp_path, "must pin every package", "make lock")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://user:secret@127.0.0.1:9"])
def test_unreachable_server_is_named_and_its_password_is_not(tmp_path, address):
    # given a port on which nothing listens
    notebook = copy_project(tmp_path)
    # when the notebook is executed; the limit tells seconds from minutes of retries, also on a slow machine
    process = execute(notebook, tmp_path, MLFLOW_TRACKING_URI=address, limit=60)
    # then the error names the server and the remedy
    assert refused(process, tmp_path, "http://127.0.0.1:9", "Start the server")
    assert "secret" not in process.stderr


def test_database_of_a_newer_mlflow_is_refused_and_unchanged(tmp_path):
    # given a store whose schema this MLflow does not know
    notebook = copy_project(tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.search_experiments()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'fedcba987654'")
    database.close()
    before = (tmp_path / "mlflow.db").read_bytes()
    # when, then
    process = execute(notebook, tmp_path)
    assert process.returncode != 0
    assert "Cannot use the MLflow store" in process.stderr
    assert "fedcba987654" in process.stderr
    assert (tmp_path / "mlflow.db").read_bytes() == before


def test_moved_store_is_refused_and_unchanged(tmp_path):
    # given a folder that was moved after an execution
    assert execute(copy_project(tmp_path / "here"), tmp_path).returncode == 0
    there = (tmp_path / "here").rename(tmp_path / "there")
    before = snapshot(there)
    # when the notebook is executed in its new place
    process = execute(there / "project.ipynb", tmp_path)
    # then the error says where the models were, and nothing was written in either place
    assert process.returncode != 0
    assert f"its models are in {(tmp_path / 'here').as_uri()}/mlruns, so it was moved" in process.stderr
    assert snapshot(there) == before
    assert not (tmp_path / "here").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="read-only mounts are made with Linux's unshare")
def test_read_only_folder_is_refused(tmp_path, lacking):
    # given a folder that nobody can write to, not even root
    unshare = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        lacking("the right to make a mount namespace", "sysctl kernel.unprivileged_userns_clone=1")
    project = tmp_path / "project"
    notebook = copy_project(project)
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    # when
    process = execute(notebook, tmp_path, prefix=(*unshare, "sh", "-c", mount, str(project)))
    # then
    assert refused(process, project, "Cannot use the MLflow store", "Read-only file system", "where you may write")


def test_failed_training_leaves_no_run(tmp_path):
    # given a configuration that scikit-learn refuses
    notebook = copy_project(tmp_path)
    text = notebook.read_text(encoding="utf-8")
    changed = text.replace(r"\"solver\": \"lbfgs\"", r"\"solver\": \"no such solver\"")
    assert changed != text
    notebook.write_text(changed, encoding="utf-8")
    # when
    process = execute(notebook, tmp_path)
    # then
    assert process.returncode != 0
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.search_runs([client.get_experiment_by_name(MODEL).experiment_id]) == []


# --- the table of predictions ---


def test_table_shows_actual_beside_predicted_values(folder):
    cell = next(cell for cell in executed(folder).cells if "predict data" in cell.source)
    columns = re.findall("<th>([a-z ()]+)</th>", cell.outputs[0].data["text/html"])
    assert columns[-2:] == ["actual data", "predict data"]
    assert len(columns) == 6
