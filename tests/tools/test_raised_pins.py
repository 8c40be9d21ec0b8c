"""What newer releases break: the pins that are lifted, and what is said of a notebook that no longer gives the same."""

import re
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from execution import ROOT
from nbformat.v4 import new_code_cell, new_notebook, new_output

pytestmark = pytest.mark.extended  # it takes long


@pytest.fixture
def upgrades(monkeypatch) -> ModuleType:
    """Give the program that lifts the pins."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    import upgrades

    return upgrades


def test_pins_are_the_direct_ones_that_a_notebook_needs(upgrades):
    stated = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pins = upgrades.pins()
    assert {"mlflow", "pandas", "scikit-learn", "optuna"} <= set(pins)
    assert "mlflow-skinny" not in pins  # it goes with mlflow
    assert "ruff" not in pins  # no notebook imports it
    assert [name for name, version in pins.items() if not re.search(rf'"{name}=={re.escape(version)}"', stated)] == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("print(1)", "nothing"),
        ("print(2)", "cell 1, output 1, text"),
        ("print('2 packages')", "cell 1, output 1, text"),
        ("1 / 0", "fails: ZeroDivisionError: division by zero"),
    ],
)
def test_what_differs_from_the_committed_notebook_is_named(upgrades, monkeypatch, tmp_path, source, said):
    # given a committed notebook that printed 1
    committed, folder = tmp_path / "committed", tmp_path / "a folder"
    for place, code in ((committed, "print(1)"), (folder, source)):
        place.mkdir()
        outputs = [new_output("stream", name="stdout", text="1\n")]
        nbformat.write(new_notebook(cells=[new_code_cell(code, outputs=outputs)]), place / "a.ipynb")
    monkeypatch.setattr(upgrades, "ROOT", committed)
    # when another one is executed, then what it gives otherwise is said
    assert upgrades.broken("a.ipynb", Path(sys.executable), folder) == said


def test_list_of_pins_that_a_notebook_shows_does_not_count(upgrades):
    assert upgrades.PINS_SHOWN.search("... and so on: 58 packages in all")
    assert not upgrades.PINS_SHOWN.search("accuracy 0.93")


def test_raised_pin_is_written_with_those_that_follow_it(upgrades, monkeypatch, tmp_path):
    # given pins, one of them with a marker
    text = """model = ["mlflow-skinny==1.0", "other==1.0"]\nmlflow = ["mlflow==1.0; sys_platform != 'darwin'"]\n"""
    (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr(upgrades, "ROOT", tmp_path)
    # when
    upgrades.write("mlflow", "2.0")
    # then
    written = text.replace("skinny==1.0", "skinny==2.0").replace("mlflow==1.0", "mlflow==2.0")
    assert (tmp_path / "pyproject.toml").read_text() == written
