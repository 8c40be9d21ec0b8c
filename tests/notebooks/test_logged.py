"""What one execution of the quickstart prints, and what it leaves in the store."""

import re
import shutil
import subprocess
import sys

import mlflow
import nbformat
import pytest
from execution import (
    MODEL,
    ROOT,
    copy_project,
    environment,
    execute,
    executed,
    finished,
    git,
    text_outputs,
)
from nbval.plugin import get_sanitize_patterns

NOTEBOOKS = [ROOT / name for name in git(ROOT, "ls-files", "*.ipynb", ":!benchmarks").splitlines()]
CONFIGURATIONS = {
    "lbfgs": {"solver": "lbfgs", "max_iter": "1000", "random_state": "8888", "C": "1.0"},
    "newton-cg, C=0.01": {
        "solver": "newton-cg",
        "max_iter": "1000",
        "random_state": "1000",
        "warm_start": "True",
        "C": "0.01",
    },
}


@pytest.fixture(scope="module")
def folder(compared, tmp_path_factory):
    """Give a folder in which the quickstart has been executed once. No test here writes to its store.

    That is where nbval has executed it and compared its outputs, or, if only this file is tested, another one.
    """
    if compared:
        shutil.copy(ROOT / "project.ipynb", compared / "executed.ipynb")
        return compared
    folder = tmp_path_factory.mktemp("quickstart")
    process = execute(copy_project(folder), folder)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture
def client(folder):
    return mlflow.MlflowClient(f"sqlite:///{folder.as_posix()}/mlflow.db")


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


def test_every_sanitize_rule_is_read_and_matches():
    # given the rules as nbval reads them
    text = (ROOT / "tests/sanitize.cfg").read_text(encoding="utf-8")
    rules = get_sanitize_patterns(text)
    # then none is lost to the file's form
    assert len(rules) == len(re.findall("^ *regex", text, flags=re.MULTILINE)) == 1
    # and what each leaves stands in a stored output, where no text is left that it would change
    outputs = "\n".join(output for name in NOTEBOOKS for output in text_outputs(nbformat.read(name, as_version=4)))
    for pattern, replacement in rules:
        assert replacement in outputs, pattern
        assert re.sub(pattern, replacement, outputs) == outputs


def test_table_shows_actual_beside_predicted_values(folder):
    cell = next(cell for cell in executed(folder).cells if "predict data" in cell.source)
    columns = re.findall("<th>([a-z ()]+)</th>", cell.outputs[0].data["text/html"])
    assert columns[-2:] == ["actual data", "predict data"]
    assert len(columns) == 6


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
    assert set(first) == set(second) == {"accuracy", "f1_macro", "neg_log_loss"}
    assert all(first[name] != second[name] for name in first)


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
        "newton-cg, C=0.01": 2,
    }
    for name, version in versions.items():
        assert version.run_id == runs[name].info.run_id
        model = client.get_logged_model(version.source.removeprefix("models:/"))
        assert model.source_run_id == version.run_id
        measured = model.metrics
        assert {metric.key: metric.value for metric in measured} == runs[name].data.metrics
        assert {metric.dataset_name for metric in measured} == {"iris_test"}


@pytest.mark.parametrize(
    ("filter_string", "found"),
    [
        ("tags.dataset = 'iris'", {"lbfgs", "newton-cg, C=0.01"}),
        ("tags.configuration = 'lbfgs'", {"lbfgs"}),
        ("tags.mlflow.note.content LIKE 'newton-cg%Pipeline on iris'", {"newton-cg, C=0.01"}),
        ("tags.dataset = 'wine'", set()),
    ],
)
def test_runs_are_found_by_their_tags(client, filter_string, found):
    experiment = client.get_experiment_by_name(MODEL)
    runs = client.search_runs([experiment.experiment_id], filter_string)
    assert {run.info.run_name for run in runs} == found


@pytest.mark.extended  # it takes long
def test_three_lines_load_the_champion_in_another_folder(folder, tmp_path):
    # given the lines that the text shows, with the path of this store in place of the reader's
    text = "\n".join(cell.source for cell in executed(folder).cells if cell.cell_type == "markdown")
    (lines,) = re.findall("```python\n(.*?)```", text, flags=re.DOTALL)
    assert len([line for line in lines.splitlines() if line]) == 3
    program = lines.replace("/home/you/quickstart", folder.as_posix())
    assert program != lines
    # when a program in another folder runs them
    row = "import pandas; row = pandas.read_json('row.json', orient='split')"
    (tmp_path / "row.json").write_bytes(next((folder / "mlruns").rglob("input_example.json")).read_bytes())
    command = [sys.executable, "-c", f"{program}\n{row}\nprint(champion.predict(row))"]
    process = finished(command, tmp_path, environment(tmp_path), limit=120)
    # then
    assert process.returncode == 0, process.stderr
    assert process.stdout == "['setosa' 'versicolor' 'versicolor']\n"


def test_only_c_changes_the_scores(folder):
    # given the second configuration with the C of the first
    namespace = {"target_name": "species"}
    for cell in executed(folder).cells:
        if {"data", "model"} & set(cell.metadata.get("tags", [])):
            exec(cell.source, namespace)
    data, configurations = namespace["data"], namespace["configurations"]
    first, second = configurations.values()
    features, target = data.drop(columns="species"), data["species"]
    # when both are trained
    probabilities = [
        namespace["make_model"](**parameters).fit(features, target).predict_proba(features)
        for parameters in (first, second | {"C": first["C"]})
    ]
    # then they agree as closely as solvers do
    assert abs(probabilities[0] - probabilities[1]).max() < 1e-3


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
        assert model.flavors["sklearn"]["skops_trusted_types"] == []
        assert model.signature.inputs.input_names()[0] == "sepal length (cm)"
        assert model.signature.outputs.input_names() == ["species"]
        assert model.load_input_example(files).shape == (3, 4)


@pytest.mark.extended  # it takes long
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


@pytest.mark.extended  # it takes long
def test_mlflow_alone_would_list_pytest(model_files):
    # given a logged model, when MLflow infers what it needs
    inferred = mlflow.models.infer_pip_requirements(str(model_files[0]), flavor="sklearn")
    # then the list has a package that no prediction needs, as the text says, and ours has not
    assert any(line.startswith("pytest==") for line in inferred)
    assert "pytest" not in (model_files[0] / "requirements.txt").read_text()
