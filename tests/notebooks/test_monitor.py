"""Guide 05, monitoring: the alarm, what is recorded, and when a challenger takes over.

The headless command is executed once. The guide's later cells are then run in this process, on the store that it left.
"""

import contextlib
import os
from unittest.mock import patch

import mlflow
import nbformat
import pandas as pd
import psutil
import pytest
from execution import ROOT, copy_project, executed, papermill, refusal, run_cells, text_outputs
from mlflow.artifacts import load_text
from sklearn.datasets import load_iris
from sklearn.model_selection import train_test_split

pytestmark = pytest.mark.extended  # it takes long

GUIDE = "guides/05_serve_and_monitor.ipynb"
MODEL = "iris_served"


def newer_rows() -> pd.DataFrame:
    """Return all flowers of Iris, measured 30% too long."""
    iris = load_iris(as_frame=True)
    return (1.3 * iris.data).round(2).assign(species=iris.target_names[iris.target])


def easy_rows() -> pd.DataFrame:
    """Return 20 setosa and the 30 virginica with the longest petals, of the newer rows: any model tells them apart."""
    rows = newer_rows()
    setosa, virginica = rows[rows["species"] == "setosa"], rows[rows["species"] == "virginica"]
    return pd.concat([setosa.head(20), virginica.nlargest(30, "petal length (cm)")], ignore_index=True)


def misleading_rows() -> pd.DataFrame:
    """Return the easy rows, but where the guide's challenger learns, each setosa looks like a virginica."""
    rows = easy_rows()
    learned, _ = train_test_split(rows, test_size=0.5, stratify=rows["species"], random_state=42)
    features, means = rows.columns[:-1], rows.groupby("species").mean()
    exchanged = learned.index[learned["species"] == "setosa"]
    rows.loc[exchanged, features] += means.loc["virginica"] - means.loc["setosa"]
    return rows


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Give a project's folder in which the headless command has been executed, on newer rows from a file."""
    project = tmp_path_factory.mktemp("monitor")
    newer_rows().to_csv(project / "newer rows.csv", index=False)
    parameters = {"allow_unchecked": True, "newer": project / "newer rows.csv", "calls": 8}
    process = papermill(copy_project(project, GUIDE), project, parameters)
    assert process.returncode == 0, process.stderr
    return project


@pytest.fixture
def folder(project):
    return project


@pytest.fixture
def runs(client):
    """Give the runs of the headless command, by name."""
    found = client.search_runs([client.get_experiment_by_name("iris_monitoring").experiment_id])
    return {run.info.run_name: run for run in sorted(found, key=lambda run: -run.info.start_time)}


@pytest.fixture(scope="module")
def printed(project):
    return "\n".join(text_outputs(executed(project)))


@pytest.fixture
def guide(project, monkeypatch):
    """Give a function that runs the guide up to its challenger, on the store of the headless command.

    It takes the newer rows, whether the challenger is to be served in its own environment, and other parameters; it
    returns what the cells define.
    """
    monkeypatch.chdir(project)
    with contextlib.ExitStack() as ends, patch.dict(os.environ):
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{project.as_posix()}/mlflow.db"

        def run(rows=None, served=False, **parameters):
            os.environ["REBUILD_ENVIRONMENT"] = "on" if served else "off"
            names = {"__name__": "__main__"}
            starts = ["import ", "newer = ", "os.environ", "iris = ", "def loaded_key", "open_experiment("]
            starts += ["def keep", "loader = ", "def registered"]
            run_cells(GUIDE, starts, names, **{"resamples": 1, "allow_unchecked": True} | parameters)
            ends.callback(names["scratch"].cleanup)
            run_cells(GUIDE, ["def downloaded", "def drift"], names)
            for cell in nbformat.read(ROOT / GUIDE, as_version=4).cells if served else []:
                if cell.source.startswith("keeper = "):  # without what only a notebook has
                    exec(cell.source.replace("_ = get_ipython()", "# "), names)
                if cell.source.startswith("def serve("):  # the function alone
                    exec(cell.source.partition("\nport = ")[0], names)
            if rows is not None:
                names |= {"rows_newer": rows, "tests": {"newer": names["drift"](names["reference"], rows)}}
                run_cells(GUIDE, ["challenger, checks", "if challenger:"], names)
            return names

        yield run
    mlflow.set_tracking_uri(None)


def aliases(client) -> dict[str, str]:
    return {name: str(number) for name, number in client.get_registered_model(MODEL).aliases.items()}


def test_headless_command_takes_rows_from_a_file(project, runs, printed):
    assert list(runs) == ["challenger", "monitoring newer", "monitoring usual", "champion"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert "accuracy on 75 newer rows: challenger " in printed


def test_unchanged_rows_raise_no_alarm_and_shifted_ones_do(runs):
    usual, newer = runs["monitoring usual"], runs["monitoring newer"]
    assert (usual.data.tags["alarm"], usual.data.metrics["drifted_features"]) == ("false", 0)
    assert (newer.data.tags["alarm"], newer.data.metrics["drifted_features"]) == ("true", 4)
    assert newer.data.metrics["accuracy"] < usual.data.metrics["accuracy"]


def test_model_that_answered_is_an_input_of_the_monitoring_runs(client, runs):
    (made,) = client.get_run(runs["champion"].info.run_id).outputs.model_outputs
    for name in ("usual", "newer"):
        (used,) = client.get_run(runs[f"monitoring {name}"].info.run_id).inputs.model_inputs
        assert used.model_id == made.model_id


def test_false_alarms_are_no_more_frequent_than_the_level(printed):
    assert "30% too long: 200 alarms in 200 resamples" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("unchanged: ")]
    assert int(line.split()[1]) <= 0.05 * 200


def test_requests_answers_and_tests_are_logged_with_each_batch(client, runs):
    for name, count in {"usual": 75, "newer": 150}.items():
        run = runs[f"monitoring {name}"]
        rows = pd.read_json(client.download_artifacts(run.info.run_id, "requests.json"), orient="split")
        assert rows.shape == (count, 5)
        assert rows["prediction"].isin(["setosa", "versicolor", "virginica"]).all()
        assert {item.path for item in client.list_artifacts(run.info.run_id)} == {
            "drift.csv",
            "drift.png",
            "requests.json",
        }


def test_every_version_is_signed_where_its_tag_says(client):
    for number in "12":
        version = client.get_model_version(MODEL, number)
        assert version.tags["signature"] == f"signatures/{MODEL}/v{number}/model.sig"
        assert "dsseEnvelope" in load_text(f"runs:/{version.run_id}/{version.tags['signature']}")


def test_private_key_is_nowhere_in_the_store(project):
    (secret,) = project.glob("keys/*.pem")
    body = secret.read_bytes().splitlines()[1]
    kept = [path for path in project.rglob("*") if path.is_file() and body in path.read_bytes()]
    assert kept == [secret]


def test_every_version_carries_its_pins(client):
    pins = (ROOT / "model_requirements.txt").read_text(encoding="utf-8")
    for number in "12":
        version = client.get_model_version(MODEL, number)
        location = client.get_logged_model(version.source.removeprefix("models:/")).artifact_location
        packages = [line for line in load_text(f"{location}/requirements.txt").splitlines() if "==" in line]
        assert [line.partition(";")[0].strip() for line in packages] == [
            line.partition(";")[0].strip() for line in pins.splitlines() if line and line[0] not in "# "
        ]


def test_better_challenger_takes_over_and_the_old_champion_is_one_alias_away(client, printed):
    # given what the command printed
    assert "Version 2 is better, and the champion now." in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("Back: ")]
    assert aliases(client)["champion"] == "2"
    # when its line is executed
    exec(line.removeprefix("Back: "), {"client": client})
    # then the old model is back
    assert aliases(client)["champion"] == "1"
    client.set_registered_model_alias(MODEL, "champion", "2")


def test_challenger_that_is_no_better_waits(client, guide, capsys):
    # given rows on which the champion makes no error
    names = guide(easy_rows())
    # then
    printed = capsys.readouterr().out
    assert "accuracy on 25 newer rows: challenger 1.0000, champion 1.0000" in printed
    assert f"Version {names['challenger']} is no better, so version 2 stays champion." in printed
    assert aliases(client) == {"champion": "2", "challenger": names["challenger"]}


def test_challenger_that_is_worse_gets_no_alias(client, guide):
    before = aliases(client)
    with pytest.raises(RuntimeError, match=r"gets no alias; it failed: not worse. The champion stays"):
        guide(misleading_rows())
    assert aliases(client) == before


def test_challenger_whose_environment_cannot_be_built_gets_no_alias(project, client, guide, capsys):
    # given pins that no index can serve; the champion has others, which it was logged with
    before, pins = aliases(client), project / "model_requirements.txt"
    text = pins.read_text(encoding="utf-8")
    pins.write_text(f"{text}there-is-no-such-package==1\n", encoding="utf-8")
    try:
        # when a challenger is trained that is as good as the champion
        with pytest.raises(RuntimeError, match=r"gets no alias; it failed: fresh environment. The champion stays"):
            guide(easy_rows(), served=True)
    finally:
        pins.write_text(text, encoding="utf-8")
    # then the reason is printed
    assert "there-is-no-such-package" in capsys.readouterr().out
    assert aliases(client) == before


def test_without_drift_nothing_is_trained(client, guide, capsys):
    before = len(client.search_model_versions(f"name = '{MODEL}'"))
    guide(guide()["reference"])
    assert "No drift, so nothing was trained. The champion stays version 2." in capsys.readouterr().out
    assert len(client.search_model_versions(f"name = '{MODEL}'")) == before


def test_training_rows_that_were_changed_are_no_reference(project, client, guide):
    # given the rows logged with the champion's run, one number of them changed
    run = client.get_run(client.get_model_version(MODEL, "2").run_id)
    (path,) = project.glob(f"mlruns/**/{run.info.run_id}/artifacts/training_rows.csv")
    text = path.read_text()
    path.write_text(text.replace("1", "2", 1))
    # then
    try:
        with pytest.raises(ValueError, match=r"training_rows.csv has the digest \w+, and version 2 learned from \w+"):
            guide()
    finally:
        path.write_text(text)


def test_champion_that_was_changed_in_the_store_is_not_loaded(project, client, guide):
    version = client.get_model_version(MODEL, "2")
    (path,) = project.glob(f"mlruns/**/{version.source.removeprefix('models:/')}/artifacts/requirements.txt")
    text = path.read_text(encoding="utf-8")
    path.write_text(text + "\n", encoding="utf-8")
    try:
        with pytest.raises(ValueError, match=r"Not loaded\. model\.sig: Signature mismatch: Hash mismatch for requ"):
            guide()
    finally:
        path.write_text(text, encoding="utf-8")


def test_champion_without_signature_is_not_loaded(client, guide):
    tag = client.get_model_version(MODEL, "2").tags["signature"]
    client.delete_model_version_tag(MODEL, "2", "signature")
    try:
        with pytest.raises(ValueError, match=rf"Not loaded\. Version 2 of {MODEL} has no signature"):
            guide()
    finally:
        client.set_model_version_tag(MODEL, "2", "signature", tag)


def test_note_that_mlflow_adds_to_a_download_opens_no_gap(project, client, guide):
    # given a file under the name of MLflow's note, in the store
    version = client.get_model_version(MODEL, "2")
    (files,) = project.glob(f"mlruns/**/{version.source.removeprefix('models:/')}/artifacts")
    (files / "registered_model_meta").write_text("something else")
    # when the champion is verified, then the file is not in what is loaded and served
    folder = guide()["folder"]
    assert not (folder / "registered_model_meta").exists()


def test_headless_command_leaves_no_process_and_no_file(project):
    left = []
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("TMPDIR", "").startswith(str(project)):
            left.append(process)
    assert left == []
    assert [path for path in (project / "tmp").iterdir() if path.is_dir()] == []


ROWS = load_iris(as_frame=True).data.assign(species=["a"] * 75 + ["b"] * 75)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (ROWS.drop(columns=["species"]), "row 0, species: Field required"),
        (ROWS.assign(**{"petal width (cm)": "wide"}), "row 0, petal width (cm): Input should be a valid number"),
        (ROWS.assign(**{"petal width (cm)": float("inf")}), "row 0, petal width (cm): Input should be a finite number"),
        (ROWS.assign(species=None), "row 0, species: Input should be a valid string"),
        (ROWS.assign(species="a"), "two species or more"),
        (ROWS.assign(**{"petal width (cm)": -999}), "greater than or equal to 0"),
        (ROWS.head(0), "at least 1 item"),
    ],
)
def test_newer_rows_that_nobody_could_learn_from_are_refused(tmp_path, rows, reason):
    rows.to_csv(tmp_path / "rows.csv", index=False)
    error = refusal(GUIDE, newer=str(tmp_path / "rows.csv"))
    assert error.startswith(f"Cannot use {tmp_path / 'rows.csv'}: ")
    assert reason in error


def test_missing_file_is_refused(tmp_path):
    assert "Cannot use" in refusal(GUIDE, newer=str(tmp_path / "none.csv"))
