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


def test_recorded_rows_of_a_version_come_back_with_their_answers_by_time(tmp_path, version):
    # given the records of two servers, one of which also has answers of other versions
    own = entry(1, ROWS[:2]), entry(3, ROWS[3:4])
    write(tmp_path, *own, entry(4, ROWS[4:5], version="2"), entry(5, ROWS[5:6], name="other"))
    write(tmp_path, entry(2, ROWS[100:101], predictions=["virginica"]), name="requests-2026-01-30-bb.jsonl")
    # when
    rows = read_batch(tmp_path, version)
    # then
    assert rows.index.tolist() == ["id1", "id1", "id2", "id3"]
    assert rows[FEATURES].to_numpy().tolist() == ROWS.loc[[0, 1, 100, 3], FEATURES].to_numpy().tolist()
    assert rows["prediction"].tolist() == ["setosa", "setosa", "virginica", "setosa"]


def test_requests_of_another_client_are_not_in_a_batch(tmp_path, version):
    """Attack 23."""
    # given two clients that ask the same server in turn
    mine = [entry(number, ROWS[number : number + 1]) for number in (1, 3, 5)]
    write(tmp_path, mine[0], entry(2, ROWS[50:90]), mine[1], entry(4, ROWS[90:91]), mine[2])
    # when the batch is read by the ids of its answers, in the order in which its labels will come
    rows = read_batch(tmp_path, version, ["id5", "id1", "id3"])
    # then
    assert rows[FEATURES].to_numpy().tolist() == ROWS.loc[[5, 1, 3], FEATURES].to_numpy().tolist()


def test_answer_that_is_not_recorded_is_said(tmp_path, version):
    write(tmp_path, entry(1, ROWS[:1]))
    with pytest.raises(KeyError, match="id7"):
        read_batch(tmp_path, version, ["id1", "id7"])
    assert read_batch(tmp_path / "nowhere", version).empty


# What a batch leaves in the store


def test_rows_answers_judgement_and_accuracy_are_kept_with_the_model(version, known, usual):
    judgement = judge(known, usual)
    run = mlflow.get_run(log_batch(version, known, usual, judgement, "Monday").info.run_id)
    run_id, answers = run.info.run_id, known.estimator.predict(usual[FEATURES])
    # then rows and model are inputs of the run
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.tags[0].value) == ("Monday", "monitoring")
    assert [used.model_id for used in run.inputs.model_inputs] == [version.model_id]
    assert run.data.tags["verdict"] == "quiet"
    # and answers and judgement are its files
    assert {item.path for item in mlflow.MlflowClient().list_artifacts(run_id)} == {"batch.json", "judgement.json"}
    assert mlflow.load_table("batch.json", [run_id])["prediction"].tolist() == answers.tolist()
    said = mlflow.artifacts.load_dict(f"runs:/{run_id}/judgement.json")
    assert said["verdict"] == judgement.verdict == Verdict.QUIET
    assert said["metric"] == "accuracy"
    assert said["performance"] == dataclasses.asdict(judgement.performance)
    # and the accuracy belongs to the model and to these rows
    metrics = mlflow.get_logged_model(version.model_id).metrics
    (metric,) = [found for found in metrics if found.run_id == run_id]
    assert (metric.key, metric.value) == ("accuracy", (answers == usual["species"]).mean())
    assert (metric.dataset_name, metric.dataset_digest) == ("Monday", data.dataset.digest)


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


def test_accepted_change_is_recorded_with_its_reason(version, known, usual):
    longer = usual.assign(**1.3 * usual[FEATURES])
    run = log_batch(version, known, longer, judge(known, longer, accepted="another garden"))
    tags = mlflow.get_run(run.info.run_id).data.tags
    assert (tags["verdict"], tags["accepted_change"]) == ("accepted change", "another garden")
