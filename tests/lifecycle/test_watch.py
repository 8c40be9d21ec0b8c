"""The command `lifecycle watch`, as cron calls it: what it prints, what it leaves, and its exit status."""

import json

import mlflow
import pandas as pd
import pytest
from click.testing import CliRunner
from versions import NAME, iris_rows

from mlflow_lifecycle.cli import main

ROWS = iris_rows()
FEATURES, TARGET = ROWS.columns[:-1].tolist(), "species"


@pytest.fixture
def watched(store, tmp_path, monkeypatch):
    """Give a function that watches rows, with further options, and returns exit status and output."""
    monkeypatch.chdir(store)

    def run(rows: pd.DataFrame, *options: str, uri: str = f"models:/{NAME}/1"):
        path = tmp_path / "Monday.csv"
        rows.to_csv(path, index=False)
        result = CliRunner().invoke(main, ["watch", uri, "--data", str(path), *options])
        return result.exit_code, result.output

    return run


def test_usual_rows_end_with_0_and_are_a_run(watched, usual):
    status, printed = watched(usual, "--experiment", "usual rows")
    assert status == 0, printed
    assert printed.startswith("quiet: 75 rows\nrecorded in run ")
    (run,) = mlflow.search_runs(experiment_names=["usual rows"], output_format="list")
    assert printed.split()[-1] == run.info.run_id
    assert (run.info.run_name, run.data.tags["verdict"]) == ("Monday", "quiet")


def test_accepted_change_ends_with_0_and_is_recorded(watched, usual):
    options = ["--accept-change", "another garden", "--experiment", "accepted"]
    status, printed = watched(usual.assign(**1.3 * usual[FEATURES]), *options)
    assert (status, printed.splitlines()[0]) == (0, "accepted change: 75 rows")
    (run,) = mlflow.search_runs(experiment_names=["accepted"], output_format="list")
    assert run.data.tags["accepted_change"] == "another garden"


def test_judgement_as_json(watched, usual):
    status, printed = watched(usual[FEATURES], "--json")
    assert status == 0
    said = json.loads(printed)
    assert (said["verdict"], said["performance"]) == ("quiet", None)
    assert {column["column"] for column in said["differences"]} == {*FEATURES, "prediction of species"}


def test_labels_under_another_name_count(watched, usual):
    renamed = usual.rename(columns={TARGET: "what it was"})
    assert json.loads(watched(renamed, "--json")[1])["performance"] is None
    assert json.loads(watched(renamed, "--json", "--target", "what it was")[1])["performance"]["rows"] == 75


def test_labels_that_are_not_there_or_there_twice_are_refused(watched, usual):
    status, printed = watched(usual, "--target", "nowhere")
    assert (status, "There is no column 'nowhere'" in printed) == (1, True)
    doubled = usual.assign(label=usual[TARGET])
    status, printed = watched(doubled, "--target", "label")
    assert status == 1
    assert "There is a column 'label', and also 'species', the target of the model" in printed
    # and the model's own name can be chosen
    assert watched(doubled, "--target", TARGET)[0] == 0


def test_alarm_ends_with_2_and_limits_can_be_stated(watched, usual):
    shifted = usual.assign(**{FEATURES[1]: usual[FEATURES[1]] * 0.6 + 1.6})
    status, printed = watched(shifted)
    assert status == 2
    assert printed.startswith("drift: 75 rows\nsepal width (cm): ")
    assert watched(shifted, "--shift", "2", "--share", "1", "--loss", "1")[0] == 0


def test_missing_option_ends_with_1_and_is_no_alarm():
    assert CliRunner().invoke(main, ["watch", f"models:/{NAME}/1"]).exit_code == 1


def test_version_that_was_changed_in_the_store_is_not_loaded(watched, usual, store):
    """Attack 12."""
    # given the training rows of the version, in the store, changed in one number
    (path,) = store.glob("mlruns/**/training_rows.parquet")
    content = path.read_bytes()
    pd.read_parquet(path).assign(**{FEATURES[0]: 1.0}).to_parquet(path)
    try:
        status, printed = watched(usual)
    finally:
        path.write_bytes(content)
    # then
    assert status == 1
    assert "It is not what was signed" in printed


def test_alias_that_was_moved_without_a_release_is_not_watched(watched, usual):
    mlflow.MlflowClient().set_registered_model_alias(NAME, "champion", "1")
    status, printed = watched(usual, uri=f"models:/{NAME}@champion")
    assert status == 1
    assert "no release as champion" in printed
