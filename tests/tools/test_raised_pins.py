"""What newer releases break: the pins that are lifted, and what is said of a notebook that no longer gives the same."""

import re
import sys
from pathlib import Path

import nbformat
import pytest
import upgrades
from execution import ROOT
from nbformat.v4 import new_code_cell, new_notebook, new_output

pytestmark = pytest.mark.extended  # it takes long


def test_pins_are_the_direct_ones_that_a_notebook_needs():
    stated = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pins = upgrades.pins()
    assert {"mlflow", "pandas", "scikit-learn", "optuna", "uv"} <= set(pins)
    assert "mlflow-skinny" not in pins  # it goes with mlflow
    assert "ruff" not in pins  # no notebook imports it
    assert [name for name, version in pins.items() if not re.search(rf'"{name}=={re.escape(version)}"', stated)] == []


@pytest.mark.parametrize(
    ("printed", "source", "said"),
    [
        ("1", "print(1)", "nothing"),
        ("1", "print('2 packages')", "cell 1, output 1, text"),
        ("1", "1 / 0", "fails: ZeroDivisionError: division by zero"),
        ("1 packages", "print('2 packages')", "nothing"),  # a list of pins
    ],
)
def test_what_differs_from_the_committed_notebook_is_named(monkeypatch, tmp_path, printed, source, said):
    # given a committed notebook that printed something
    committed, folder = tmp_path / "committed", tmp_path / "a folder"
    for place in (committed, folder):
        place.mkdir()
        outputs = [new_output("stream", name="stdout", text=f"{printed}\n")]
        nbformat.write(new_notebook(cells=[new_code_cell(source, outputs=outputs)]), place / "a.ipynb")
    monkeypatch.setattr(upgrades, "ROOT", committed)
    # when it is executed again, then what it gives otherwise is said
    assert upgrades.broken("a.ipynb", Path(sys.executable), folder) == said


def test_raised_pin_is_written_with_those_that_follow_it(monkeypatch, tmp_path):
    # given pins, one of them with a marker
    text = """model = ["mlflow-skinny==1.0", "other==1.0"]\nmlflow = ["mlflow==1.0; sys_platform != 'darwin'"]\n"""
    (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr(upgrades, "ROOT", tmp_path)
    # when
    upgrades.write("mlflow", "2.0")
    # then
    written = text.replace("skinny==1.0", "skinny==2.0").replace("mlflow==1.0", "mlflow==2.0")
    assert (tmp_path / "pyproject.toml").read_text() == written
