"""The command as a whole: how it prints errors and values from the store, and what its help says."""

import sqlite3
import warnings
from pathlib import Path

import click
import mlflow
import pytest
from click.testing import CliRunner

import mlflow_lifecycle
from mlflow_lifecycle.cli import Commands, main
from mlflow_lifecycle.cli.options import print_lines
from mlflow_lifecycle.exceptions import InvalidInputError

SECRET = "cannot reach\nhttp://user:hunter2@host:5000\n"


def failing(error: Exception) -> click.Group:
    """Return a group with a command that raises an error."""

    @click.group(cls=Commands)
    @click.option("--debug", is_flag=True)
    def group(debug: bool) -> None:
        pass

    @group.command()
    def fail() -> None:
        raise error

    return group


EXPECTED = [
    InvalidInputError(SECRET),
    OSError(SECRET),
    sqlite3.OperationalError(SECRET),
    mlflow.MlflowException(SECRET),
]


@pytest.mark.parametrize("error", EXPECTED, ids=lambda error: type(error).__name__)
def test_expected_error_ends_a_command_in_one_line_without_its_secret(error):
    answer = CliRunner().invoke(failing(error), ["fail"])
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert answer.stderr == "Error: cannot reach http://host:5000\n"


def test_warning_for_who_logs_a_model_is_not_printed():
    group = failing(ValueError())

    @group.command()
    def warn() -> None:
        warnings.warn("Hint: Inferred schema contains integer column(s).", stacklevel=1)  # an error in pytest

    assert CliRunner().invoke(group, ["warn"]).exception is None


def test_debug_shows_the_traceback_of_an_expected_error():
    assert CliRunner().invoke(failing(EXPECTED[0]), ["--debug", "fail"]).exception is EXPECTED[0]


@pytest.mark.parametrize("error", [ValueError("ours"), ModuleNotFoundError("x", name="x")])
def test_error_that_is_ours_keeps_its_traceback(error):
    assert CliRunner().invoke(failing(error), ["fail"]).exception is error


def test_missing_extra_is_named_with_the_command_that_installs_it():
    answer = CliRunner().invoke(failing(ModuleNotFoundError("no", name="optuna.samplers")), ["fail"])
    assert answer.exit_code == 1
    assert answer.stderr.endswith("Run: pip install 'mlflow-quickstart-lifecycle[search]'\n")


def test_value_from_the_store_forges_no_line_and_no_colour(capsys):
    """Attack 36."""
    print_lines(["released by a\n2026-01-01 release of iris\x1b[2K\u202e \x9b31m"])
    assert capsys.readouterr().out == "released by a 2026-01-01 release of iris [2K 31m\n"


def test_commands_say_in_a_line_what_they_do_and_give_an_example():
    lines = CliRunner().invoke(main, ["--help"]).stdout.splitlines()
    for name, command in main.commands.items():
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert line.endswith(command.short_help)
        assert f"Example: lifecycle {name}" in CliRunner().invoke(main, [name, "--help"]).stdout


def test_target_of_a_comparison_needs_rows():
    answer = CliRunner().invoke(main, ["compare", "models:/iris/1", "models:/iris/2", "--target", "species"])
    assert (answer.exit_code, answer.stderr) == (1, "Error: --target needs rows: --data FILE\n")


READING = {
    "history": ["history", "iris"],
    "verify": ["verify", "models:/iris/1"],
    "search-worker": ["search-worker", "0", "--objective", "objective.py:score"],
}


@pytest.mark.parametrize("arguments", READING.values(), ids=READING)
def test_command_that_reads_a_store_makes_none(arguments, tmp_path, monkeypatch):
    # given a folder with nothing but an objective
    monkeypatch.chdir(tmp_path)
    Path("objective.py").write_text("def score(trial): return 1.0")
    variables = {"MLFLOW_TRACKING_URI": None, "SEARCH_STORAGE": "postgresql://me@127.0.0.1:1/x"}
    # when
    answer = CliRunner().invoke(main, arguments, env=variables)
    # then
    assert (answer.exit_code, answer.stdout) == (1, "")
    (line,) = answer.stderr.splitlines()
    assert f"There is no store at sqlite:///{tmp_path.as_posix()}/mlflow.db." in line
    assert line.endswith("Log a model in this folder, or set MLFLOW_TRACKING_URI.")
    assert [path.name for path in tmp_path.iterdir()] == ["objective.py"]


def test_public_names_are_imported_from_the_package():
    for name in mlflow_lifecycle.__all__:
        public = getattr(mlflow_lifecycle, name)
        assert isinstance(public, tuple) or (callable(public) and public.__doc__), name


def test_unknown_name_is_no_part_of_the_package():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mlflow_lifecycle.nothing  # noqa: B018
