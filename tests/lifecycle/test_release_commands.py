"""The commands about releases: what they print, and what they refuse in a line."""

import json
import sqlite3
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner
from execution import snapshot
from releases import ROWS_TEST
from sklearn.ensemble import RandomForestClassifier
from versions import register

from mlflow_lifecycle.cli import main
from mlflow_lifecycle.signing.keys import own_key

GATE = ["--data", "rows.csv", "--target", "species", "--threshold", "accuracy_score=0.5", "--no-environment"]
TREE = "sklearn.tree._tree.Tree"
CARD = ["--intended-use", "To learn with.", "--limits", "Three species only."]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Give the function that runs the command in a folder with the test rows, and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    ROWS_TEST.to_csv("rows.csv", index=False)

    def command(*arguments: str, status: int = 0) -> str:
        answer = CliRunner().invoke(main, arguments)
        assert answer.exit_code == status, answer.output
        return answer.stdout if status == 0 else answer.output

    return command


def test_verify_says_what_was_signed_and_takes_another_public_key(twice, run):
    text = run("verify", "models:/iris@production")
    assert text.startswith("Version 2 of iris is as it was signed, as a release for production, 20")
    assert json.loads(run("verify", "models:/iris/3", "--json"))["purpose"] == "candidate"
    assert "Cannot verify with none.pub" in run("verify", "models:/iris/2", "--public-key", "none.pub", status=1)


@pytest.mark.extended  # it takes long
def test_gate_tells_each_check_and_changes_nothing_in_the_store(folder, run):
    before = contents(folder)
    text = run("gate", "models:/iris/2", *GATE)
    assert "\nbaseline: passed (log probability +0.4866 " in text
    assert text.endswith("fresh environment: not checked (skipped on request)\n")
    assert contents(folder) == before
    assert {path.name for path in Path.cwd().iterdir()} == {"rows.csv"}


def contents(folder: Path) -> tuple[dict, list[str]]:
    """Return the files beside the store, and what its database holds."""
    database = sqlite3.connect(folder / "mlflow.db")
    try:
        return snapshot(folder / "mlruns"), list(database.iterdump())
    finally:
        database.close()


@pytest.mark.extended  # it takes long
def test_gate_takes_each_rule_for_the_baseline(folder, run):
    assert "at most 0.0001)" in run("gate", "models:/iris/3", *GATE, "--threshold", "log_loss=0.0001", status=1)
    assert "baseline: passed" in run("gate", "models:/iris/3", *GATE, "--same-predictions")
    assert "baseline: passed" in run("gate", "models:/iris/3", *GATE, "--margin", "0.1")
    assert "a gain of more than 0.6 is not shown" in run(
        "gate", "models:/iris/2", *GATE, "--minimum-gain", "0.6", status=1
    )


@pytest.mark.extended  # it takes long
def test_release_and_rollback_print_a_line_and_are_listed(folder, run):
    assert "release of iris: version 2 is production, 1 was (" in run("release", "models:/iris/2", *GATE, *CARD)
    made = json.loads(run("rollback", "iris", "--json"))
    assert (made["kind"], made["version"]) == ("rollback", "1")
    lines = run("history", "iris").splitlines()
    assert [line.split()[2] for line in lines] == ["rollback", "release", "release"]
    assert json.loads(run("history", "iris", "--json"))[0] == made


def test_tag_to_push_is_made_although_only_push_is_stated(folder, run):
    text = run("release", "models:/iris/2", *GATE, *CARD, "--push", "origin", status=1)
    assert "no tag was made" in text


def test_release_that_was_refused_is_listed_as_failed(twice, run):
    run("release", "models:/iris/3", *GATE, *CARD, status=1)
    assert run("history", "iris").startswith("failed: release of iris, version 3 as production\n")


def test_model_that_was_never_released_is_said(folder, run):
    assert run("history", "nobody") == "nobody was never released.\n"


@pytest.mark.parametrize("threshold", ["0.9", "accuracy_score=high"])
def test_invalid_threshold_is_refused(folder, run, threshold):
    text = run("gate", "models:/iris/2", *GATE, "--threshold", threshold, status=1)
    assert (
        f"{threshold!r} is not a valid threshold. Write the name of a metric and a number: accuracy_score=0.9" in text
    )


def test_new_key_signs_anew_and_says_what_still_verifies(twice, run):
    # given that the private half is lost
    own_key().unlink()
    # when
    text = run("new-key", "--sign-anew", "iris")
    assert "The new key: " in text
    assert "Signed anew: iris, version 2" in text
    # then what it has signed verifies, and the rest with the public half of the old one
    old = text.partition("--public-key ")[2].splitlines()[0]
    run("verify", "models:/iris@production")
    run("verify", "models:/iris/1", "--public-key", old)
    assert "has not signed it" in run("verify", "models:/iris/1", status=1)


def test_key_is_not_replaced_where_a_version_cannot_be_signed_anew(folder, run):
    # given a second model, which holds what somebody has to have reviewed
    register(folder, RandomForestClassifier(n_estimators=2), name="forest", skops_trusted_types=[TREE])
    mlflow.MlflowClient().set_registered_model_alias("forest", "champion", 1)
    keys = snapshot(folder / "keys")
    # when a name is wrong, or a type is not named, then all keys are as they were
    assert "irsi" in run("new-key", "--sign-anew", "iris", "--sign-anew", "irsi", status=1)
    assert TREE in run("new-key", "--sign-anew", "iris", "--sign-anew", "forest", status=1)
    assert snapshot(folder / "keys").items() >= keys.items()
    assert len(list((folder / "keys").glob("signing_key*"))) == 2
    # and the corrected command signs both
    text = run("new-key", "--sign-anew", "iris", "--sign-anew", "forest", "--trusted-type", TREE)
    assert text.endswith("Signed anew: iris, version 1\nSigned anew: forest, version 1\n")


def test_first_key_signs_nothing_anew(folder, run):
    for path in (folder / "keys").glob("signing_key*"):
        path.unlink()
    assert "There is no key yet" in run("new-key", "--sign-anew", "iris", status=1)
    assert list((folder / "keys").glob("signing_key*")) == []
