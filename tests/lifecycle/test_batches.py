"""batches: rows from the record of a served version, and what a batch leaves in the store."""

import dataclasses
import json

import mlflow
import pandas as pd
import pytest
from matplotlib.figure import Figure
from versions import NAME, iris_rows

from mlflow_lifecycle.monitoring.batches import log_batch, plot_differences, read_batch
from mlflow_lifecycle.monitoring.drift import compare
from mlflow_lifecycle.monitoring.judge import Verdict, judge

ROWS = iris_rows()
FEATURES = ROWS.columns[:-1].tolist()


# The record


def entry(number: int, rows: pd.DataFrame, **other) -> dict:
    """Return what the server records of one request."""
    answer = {"name": NAME, "version": "1", "predictions": ["setosa"] * len(rows)}
    return (
        {"time": f"2026-01-31T12:00:{number:02}.000+00:00", "id": f"id{number}"}
        | answer
        | {"inputs": rows[FEATURES].to_dict("list")}
        | other
    )


def write(folder, *entries, name="requests-2026-01-31-aa.jsonl") -> None:
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_recorded_rows_come_back_with_their_answers(tmp_path, version):
    write(tmp_path, entry(1, ROWS[:2]), entry(2, ROWS[100:101], predictions=["virginica"]))
    rows = read_batch(tmp_path, version)
    pd.testing.assert_frame_equal(
        rows[FEATURES].reset_index(drop=True), ROWS.loc[[0, 1, 100], FEATURES].reset_index(drop=True)
    )
    assert rows["prediction"].tolist() == ["setosa", "setosa", "virginica"]
    assert rows.index.tolist() == ["id1", "id1", "id2"]


def test_requests_of_another_client_are_not_in_a_batch(tmp_path, version):
    """Attack 23."""
    # given two clients that ask the same server in turn
    mine = [entry(number, ROWS[number : number + 1]) for number in (1, 3, 5)]
    write(tmp_path, mine[0], entry(2, ROWS[50:90]), mine[1], entry(4, ROWS[90:91]), mine[2])
    # when the batch is read by the ids of its answers, in the order in which its labels will come
    rows = read_batch(tmp_path, version, ["id5", "id1", "id3"])
    # then
    assert rows[FEATURES].to_numpy().tolist() == ROWS.loc[[5, 1, 3], FEATURES].to_numpy().tolist()


def test_record_of_several_servers_and_days_is_read_by_time(tmp_path, version):
    write(tmp_path, entry(2, ROWS[2:3]))
    write(tmp_path, entry(1, ROWS[1:2]), entry(3, ROWS[3:4]), name="requests-2026-01-30-bb.jsonl")
    assert read_batch(tmp_path, version).index.tolist() == ["id1", "id2", "id3"]


def test_answer_that_is_not_recorded_is_said(tmp_path, version):
    write(tmp_path, entry(1, ROWS[:1]))
    with pytest.raises(KeyError, match="id7"):
        read_batch(tmp_path, version, ["id1", "id7"])
    assert read_batch(tmp_path / "nowhere", version).empty


def test_answers_of_another_version_do_not_count(tmp_path, version):
    write(tmp_path, entry(1, ROWS[:1]), entry(2, ROWS[1:2], version="2"), entry(3, ROWS[2:3], name="other"))
    assert read_batch(tmp_path, version).index.tolist() == ["id1"]


# What a batch leaves in the store


def test_batch_and_model_are_inputs_of_the_run(version, known, usual):
    run_id = log_batch(version, known, usual, judge(known, usual), "Monday").info.run_id
    run = mlflow.get_run(run_id)
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.tags[0].value) == ("Monday", "monitoring")
    assert [used.model_id for used in run.inputs.model_inputs] == [version.model_id]
    assert run.data.tags["verdict"] == "quiet"


def test_accuracy_belongs_to_the_model_and_to_that_batch(version, known, usual):
    # given two batches
    batches = {"first": usual, "second": usual.head(50)}
    runs = {name: log_batch(version, known, rows, judge(known, rows), name) for name, rows in batches.items()}
    # when the model's metrics are read
    metrics = mlflow.get_logged_model(version.model_id).metrics
    # then there is one for each batch
    for name, rows in batches.items():
        (metric,) = [found for found in metrics if found.run_id == runs[name].info.run_id]
        assert (metric.key, metric.dataset_name) == ("accuracy", name)
        assert metric.dataset_digest == mlflow.get_run(runs[name].info.run_id).inputs.dataset_inputs[0].dataset.digest
        assert metric.value == (known.estimator.predict(rows[FEATURES]) == rows["species"]).mean()


def test_rows_answers_and_judgement_are_kept(version, known, usual):
    judgement = judge(known, usual)
    run_id = log_batch(version, known, usual, judgement).info.run_id
    kept = mlflow.load_table("batch.json", [run_id])
    assert kept["prediction"].tolist() == known.estimator.predict(usual[FEATURES]).tolist()
    said = mlflow.artifacts.load_dict(f"runs:/{run_id}/judgement.json")
    assert said["verdict"] == judgement.verdict == Verdict.QUIET
    assert said["metric"] == "accuracy"
    assert said["performance"] == dataclasses.asdict(judgement.performance)
    names = {item.path for item in mlflow.MlflowClient().list_artifacts(run_id)}
    assert names == {"batch.json", "judgement.json"}


def test_accepted_change_is_recorded_with_its_reason(version, known, usual):
    longer = usual.assign(**1.3 * usual[FEATURES])
    run = log_batch(version, known, longer, judge(known, longer, accepted="another garden"))
    tags = mlflow.get_run(run.info.run_id).data.tags
    assert (tags["verdict"], tags["accepted_change"]) == ("accepted change", "another garden")


def test_broken_batch_is_kept_without_answers(version, known, usual):
    broken = usual.drop(columns=FEATURES[0])
    run_id = log_batch(version, known, broken, judge(known, broken)).info.run_id
    assert mlflow.get_run(run_id).data.tags["verdict"] == "broken input"
    assert "prediction" not in mlflow.load_table("batch.json", [run_id])


def test_picture_shows_names_of_columns_as_they_are(known, usual):
    # given columns with names that matplotlib would read as formulas
    names = ["price in $, cost in $", "a_$_b_$"]
    rows = pd.DataFrame([[1.0, 2.0], [2.0, 3.0]], columns=names)
    figure = Figure()
    axes = figure.subplots()
    # when
    plot_differences(dataclasses.replace(judge(known, usual), differences=compare(rows, rows)), axes)
    figure.canvas.draw()
    # then
    assert [label.get_text() for label in axes.get_yticklabels()][1::2] == names[::-1]
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())
