"""__main__: what commands share: errors in one line without a secret; reading a store makes none."""

import sqlite3
from pathlib import Path

import click
import mlflow
import pytest
from click.testing import CliRunner

from mlflow_lifecycle.__main__ import in_one_line, main
from mlflow_lifecycle.store import StoreUnusableError

SECRET = "cannot reach\nhttp://user:hunter2@host:5000\n"


@pytest.mark.parametrize(
    "error",
    [
        ValueError(SECRET),
        RuntimeError(SECRET),
        OSError(SECRET),
        sqlite3.OperationalError(SECRET),
        mlflow.MlflowException(SECRET),
        StoreUnusableError(SECRET, ""),
    ],
    ids=lambda error: type(error).__name__,
)
def test_expected_error_ends_a_command_in_one_line_without_its_secret(error):
    # given a command that fails in this way
    @click.command()
    def command():
        with in_one_line():
            raise error

    # when
    answer = CliRunner().invoke(command)
    # then
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert answer.stderr == "Error: cannot reach http://host:5000\n"


def test_mistake_in_a_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), in_one_line():
        1 / 0  # noqa: B018


READING = {
    "report": ["report", "an experiment"],
    "score": ["score", "models:/a/1", "--rows", "rows", "--result", "result"],
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
    assert f"There is no store at sqlite:///{tmp_path.as_posix()}/mlflow.db yet." in line
    assert line.endswith("Make one first: make run")
    assert [path.name for path in tmp_path.iterdir()] == ["objective.py"]
