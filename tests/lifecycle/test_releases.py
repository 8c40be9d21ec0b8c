"""Releases: the alias moves only through the gate, and whatever fails or is killed leaves it where it was."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from execution import ROOT, environment
from releases import SETTINGS, released
from versions import files_of, store_in

import mlflow_lifecycle.releases.release
from mlflow_lifecycle.exceptions import GateClosedError, KeyRefusedError, NotVerifiedError
from mlflow_lifecycle.releases.card import make_card
from mlflow_lifecycle.releases.gate import gate
from mlflow_lifecycle.releases.release import history, rollback
from mlflow_lifecycle.signing.keys import own_key, own_public_key
from mlflow_lifecycle.signing.verify import release_tag, verified


def production() -> str:
    """Return the version that is handed out as the one in production."""
    with verified("models:/iris@production", own_public_key(), purpose="release") as copy:
        return copy.statement.version


def test_better_version_takes_the_alias_and_its_run_says_so(folder):
    made = released()
    assert production() == "2"
    assert (made.version, made.before, made.kind, made.status) == ("2", "1", "release", "FINISHED")
    assert made == history("iris")[0]
    run = mlflow.get_run(made.run_id)
    assert mlflow.MlflowClient().get_experiment(run.info.experiment_id).name == "releases"
    table = mlflow.artifacts.load_dict(f"runs:/{made.run_id}/gate.json")
    names = ["signature", "input example", "exact pins", "test rows", "thresholds", "baseline", "fresh environment"]
    assert [row[0] for row in table["data"]] == names
    assert made.by == run.data.tags["mlflow.user"]


@pytest.mark.extended  # it takes long
def test_version_that_is_not_better_leaves_everything_as_it_was(twice):
    with pytest.raises(GateClosedError, match="The version is not released: baseline failed"):
        released("models:/iris/3")
    assert production() == "2"
    assert history("iris")[0].status == "FAILED"


def put_loader(place: Path, marker: Path) -> None:
    """Put a loader into a model, as somebody does who can write to the store. It writes a file when it is run."""
    (place / "evil_loader.py").write_text(f"open({str(marker)!r}, 'w')")
    text = (place / "MLmodel").read_text()
    (place / "MLmodel").write_text(text.replace("loader_module: mlflow.sklearn", "loader_module: evil_loader"))


def test_version_that_was_changed_is_not_even_loaded(folder, tmp_path):
    put_loader(files_of(2), tmp_path / "ran")
    with pytest.raises(NotVerifiedError):
        released()
    assert not (tmp_path / "ran").exists()


@pytest.mark.extended  # it takes long
def test_baseline_that_was_changed_is_not_loaded_and_the_remedy_works(folder, tmp_path):
    put_loader(files_of(1), tmp_path / "ran")
    # when another one is to be released
    with pytest.raises(NotVerifiedError, match="It has the alias production, and the gate compares with it") as caught:
        released()
    # then the line in the message is the way on
    exec(re.search(r"client\..*", str(caught.value))[0], {"client": mlflow.MlflowClient()})
    assert released().before == ""
    assert not (tmp_path / "ran").exists()


REFUSED = {
    "a missing key": ({"key": Path("none.pem")}, KeyRefusedError, "Cannot sign with none.pem"),
    "no intended use": ({"intended_use": " "}, ValueError, "needs a sentence on the intended use"),
    "no limits": ({"limits": " "}, ValueError, "needs a sentence on the limits"),
    "no target": ({"target": "variety"}, ValueError, "The training data has no column 'variety'"),
}


@pytest.mark.parametrize(("options", "error", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_released_is_refused_before_anything_is_written(folder, options, error, reason):
    before = history("iris")
    with pytest.raises(error, match=reason):
        released(**options)
    assert history("iris") == before


def test_record_that_was_left_open_after_the_alias_is_finished(folder):
    # given a release whose process ended before it could close its record
    (made,) = history("iris")
    mlflow.MlflowClient().update_run(made.run_id, status="RUNNING")
    # when the same release is asked for, then it is the same one, and its record is closed
    assert released("models:/iris/1") == made
    assert history("iris") == [made]


def test_version_in_production_whose_record_was_deleted_is_not_released_again(folder):
    mlflow.MlflowClient().delete_run(history("iris")[0].run_id)
    with pytest.raises(ValueError, match="is production already, and the record of its release is gone"):
        released("models:/iris/1")
    assert production() == "1"


# Meanwhile


@pytest.mark.extended  # it takes long
def test_release_does_not_take_the_alias_from_one_that_it_was_not_compared_with(folder, monkeypatch):
    # given a release during which, after it was signed, another one is finished
    original = mlflow_lifecycle.releases.release.sign

    def interrupted(*arguments, **options):
        original(*arguments, **options)
        monkeypatch.setattr(mlflow_lifecycle.releases.release, "sign", original)
        released("models:/iris/3", settings=replace(SETTINGS, same_predictions=True))

    monkeypatch.setattr(mlflow_lifecycle.releases.release, "sign", interrupted)
    # when it goes on, then it is refused, and the other one stays usable
    with pytest.raises(GateClosedError, match="Meanwhile production moved from version 1 of iris to version 3"):
        released()
    assert production() == "3"
    # and the same call again is compared with that one
    assert released().before == "3"
    assert production() == "2"


def test_release_tells_of_itself_although_another_one_has_begun_since(folder, monkeypatch):
    # given a release after whose gate the record of another one begins
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("releases").experiment_id

    def checked(*arguments, **options):
        tags = {"registered_model": "iris", "alias": "production", "version": "3", "before": "1", "kind": "release"}
        client.create_run(experiment, int(time.time() * 1000) + 1000, tags)
        return gate(*arguments, **options)

    monkeypatch.setattr(mlflow_lifecycle.releases.release, "gate", checked)
    # when, then
    made = released()
    assert (made.version, made.status) == ("2", "FINISHED")


# Cut off


@pytest.mark.extended
@pytest.mark.parametrize("step", ["log_artifacts", "set_registered_model_alias"])
def test_kill_leaves_production_usable_and_the_same_call_finishes(folder, step):
    # given a release in a process of its own, which is killed after one step
    program = f"""
import os, sys
import mlflow
sys.path.insert(0, {str(ROOT / "tests/helpers")!r})
from releases import released
original = mlflow.MlflowClient.{step}
def killing(self, *arguments, **options):
    original(self, *arguments, **options)
    os.kill(os.getpid(), 9)
mlflow.MlflowClient.{step} = killing
released()
"""
    variables = environment(folder, MLFLOW_TRACKING_URI=mlflow.get_tracking_uri())
    child = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert child.returncode == -9, child.stderr
    # then production can be used, and the same call again finishes
    alias = mlflow.MlflowClient().get_model_version_by_alias("iris", "production").version
    assert str(alias) == production()
    assert released().status == "FINISHED"
    assert production() == "2"
    assert "RUNNING" not in {item.status for item in history("iris")}


# Back


def test_rollback_goes_to_the_version_before_although_the_present_one_is_broken_and_is_recorded(twice):
    # given a version in production whose files are gone
    shutil.rmtree(files_of(2))
    # when, then
    back = rollback("iris", key=own_key())
    assert production() == "1"
    assert (back.kind, back.version, back.before) == ("rollback", "1", "2")
    kinds = [(item.kind, item.status) for item in history("iris", "production")]
    assert kinds == [("rollback", "FINISHED"), ("release", "FINISHED"), ("release", "FINISHED")]


def test_second_rollback_does_not_go_forward_again(twice):
    rollback("iris", key=own_key())
    with pytest.raises(ValueError, match="There is no earlier release of iris to roll back to"):
        rollback("iris", key=own_key())
    assert production() == "1"


def test_rollback_ignores_a_tag_that_was_not_signed(twice):
    """Attack 30."""
    mlflow.MlflowClient().set_model_version_tag("iris", 3, release_tag("production"), "9999-12-31T23:59:59.999999Z")
    assert rollback("iris", key=own_key()).version == "1"


def test_rollback_goes_back_from_a_release_that_was_cut_off_after_the_alias(folder, monkeypatch):
    # given a release whose last step fails
    def failing(*arguments, **options):
        raise OSError("the store is gone")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_model_version_tag", failing)
        with pytest.raises(OSError, match="the store is gone"):
            released()
    assert production() == "2"
    # when
    rollback("iris", key=own_key())
    # then
    assert production() == "1"


def test_there_is_no_way_back_from_the_first_release_or_to_a_version_that_was_never_released(folder):
    with pytest.raises(ValueError, match="There is no earlier release of iris to roll back to"):
        rollback("iris", key=own_key())
    with pytest.raises(NotVerifiedError, match="no release"):
        rollback("iris", key=own_key(), to="3")
    assert production() == "1"


def test_store_or_model_without_releases_has_an_empty_history(folder, tmp_path, monkeypatch):
    assert history("nobody's") == []
    with store_in(tmp_path, monkeypatch):
        assert history("iris") == []


# The card


MASKS = {
    r"\d{4}-\d\d-\d\d[T ][\d:.]+(Z| UTC)": "DATE",
    r"\b[0-9a-f]{32}\b": "RUN-ID",
    r'("signed_with": "|signed_with\s+\|\s+)[0-9a-f]{64}': r"\1FINGERPRINT",
    r'("python": "|python\s+\|\s+)3\.\d+\.\d+': r"\1VERSION",
    r"(?s)(## Packages\n).*": r"\1",
    r'(?s)("packages": \[).*?\]': r"\1]",
    r"[ ]{2,}": " ",
    r"-{2,}": "-",
}


def masked(text: str) -> str:
    for pattern, replacement in MASKS.items():
        text = re.sub(pattern, replacement, text)
    return text


@pytest.mark.parametrize("suffix", ["json", "md"])
def test_card_is_the_golden_one(twice, suffix):
    with verified("models:/iris/2", own_public_key()) as copy:
        text = masked((copy.folder.parent / f"model_card.{suffix}").read_text())
    golden = ROOT / f"tests/golden/model_card.{suffix}"
    if os.environ.get("RENEW_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_names_and_values_in_the_store_cannot_change_the_form_of_the_card():
    facts = json.loads((ROOT / "tests/golden/model_card.json").read_text(encoding="utf-8"))
    text = masked(make_card(facts | {"parameters": {"a|b": "<script>\nx & y"}}).render())
    assert r"| a\|b | &lt;script> x &amp; y |" in text


def test_card_says_what_was_signed_whatever_the_run_says_later(folder):
    """Attack 34."""
    # given a run that somebody has changed after its version was signed
    client = mlflow.MlflowClient()
    run_id = client.get_model_version("iris", 2).run_id
    client.set_tag(run_id, "mlflow.source.git.commit", "forged")
    client.log_metric(run_id, "cv_score", 1.0)
    client.log_param(run_id, "C", 7)
    # when the version is released, then its card does not know of it
    released()
    with verified("models:/iris@production", own_public_key()) as copy:
        facts = json.loads((copy.folder.parent / "model_card.json").read_text())
    assert (facts["git_commit"], facts["metrics"], facts["parameters"]) == ("not recorded", {}, {})
