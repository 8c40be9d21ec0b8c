"""Bad input: the quickstart ends with an error that names the cause, and leaves no store behind."""

from pathlib import Path

import pytest
from execution import copy_project, edit_cells
from kernels import execute_in

pytestmark = pytest.mark.extended  # it takes long


def error_of(notebook: Path, kernel) -> str:
    """Execute the notebook, which ends before it opens a store, and return the message that it ends with."""
    error = execute_in(kernel, notebook, notebook.parent)
    assert error
    assert not (notebook.parent / "mlflow.db").exists()
    return error


PINS = {
    "byte order mark": (b"\xef\xbb\xbfnumpy==0.1\n", "can't decode byte 0xef in position 0"),
    "not a requirement": (b"numpy = 0.1\n", "numpy = 0.1"),
    "version left open": (b"numpy>=0.1\npandas==0.1\n", "Pin every version exactly. Run: make lock"),
}


@pytest.mark.parametrize(("content", "message"), PINS.values(), ids=PINS)
def test_pins_that_fix_nothing_are_refused(tmp_path, kernel, content, message):
    # given a list of pins that is damaged or loose
    notebook = copy_project(tmp_path)
    (tmp_path / "model_requirements.txt").write_bytes(content)
    # when, then
    assert message in error_of(notebook, kernel)


def test_training_that_fails_leaves_no_store(tmp_path, kernel):
    # given a configuration that scikit-learn refuses, the second of the two
    notebook = copy_project(tmp_path)
    text = notebook.read_text(encoding="utf-8")
    notebook.write_text(text.replace(r"\"newton-cg\"", r"\"no such solver\""), encoding="utf-8")
    # when, then
    assert "no such solver" in error_of(notebook, kernel)


TARGETS = {
    "missing values": (
        "data.loc[data.index[:3], target_name] = None",
        "'species' has missing values. Remove these rows.",
    ),
    "one class": (
        'data[target_name] = "setosa"',
        "A classifier needs two classes, and five rows of each, got {'setosa': 150}",
    ),
    "few rows of a class": (
        'data.loc[data.index[:4], target_name] = "rare"',
        "'setosa': 46, 'rare': 4}",
    ),
}


@pytest.mark.parametrize(("change", "message"), TARGETS.values(), ids=TARGETS)
def test_target_that_cannot_be_learned_is_refused(tmp_path, kernel, change, message):
    # given a target with missing values, with one class, or with a class that has too few rows
    notebook = copy_project(tmp_path)
    data = """
from sklearn.datasets import load_iris

data = load_iris(as_frame=True).frame
data[target_name] = load_iris().target_names[data.pop("target")]
"""
    edit_cells(notebook, data=data + change)
    # when, then
    assert message in error_of(notebook, kernel).splitlines()[-1]


def test_types_that_are_not_trusted_are_listed_as_a_line_to_paste(tmp_path, kernel):
    # given two kinds of model, each with a type of its own that skops does not know
    notebook = copy_project(tmp_path)
    model = """
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.tree import DecisionTreeClassifier


def make_model(kind):
    return kind(random_state=0)


configurations = {"tree": {"kind": DecisionTreeClassifier}, "boosted": {"kind": HistGradientBoostingClassifier}}
trusted_types = []
"""
    edit_cells(notebook, model=model)
    # when
    error = error_of(notebook, kernel).splitlines()[-1]
    # then pasting the list is all it takes
    line = error.partition("write: ")[2]
    assert "sklearn.tree._tree.Tree" in line
    assert "TreePredictor" in line
    edit_cells(notebook, model=model + line)
    assert execute_in(kernel, notebook, tmp_path) == ""
