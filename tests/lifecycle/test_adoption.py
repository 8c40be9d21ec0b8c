"""Versions that plain MLflow has logged: what is signed, and what is refused before anything is written."""

from dataclasses import asdict

import mlflow
import pandas as pd
import pytest
from click.testing import CliRunner
from execution import ROOT, snapshot
from mlflow.models import infer_signature
from sklearn.linear_model import LogisticRegression
from versions import LOCK, iris_rows, register, restored, store_in

from mlflow_lifecycle.cli import main
from mlflow_lifecycle.datasets import fingerprint
from mlflow_lifecycle.exceptions import NotVerifiedError, ServingFailedError, UnreviewedContentError
from mlflow_lifecycle.monitoring.judge import load_reference
from mlflow_lifecycle.serving import training_limits
from mlflow_lifecycle.signing.adopt import sign_version
from mlflow_lifecycle.signing.keys import own_key, own_public_key
from mlflow_lifecycle.signing.verify import verified

PINS = str(ROOT / "model_requirements.txt")
PLAIN, PICKLED = "models:/plain/1", "models:/plain/2"


def log_plainly(**options) -> None:
    """Log a model, and register it, as the quickstart does."""
    features, target = iris_rows().drop(columns="species"), iris_rows()["species"]
    model = LogisticRegression(max_iter=1000).fit(features, target)
    with mlflow.start_run(tags={"mlflow.source.git.commit": "c0ffee"}):
        mlflow.log_params({"C": 1.0})
        settings = {"signature": infer_signature(features, target), "pip_requirements": PINS}
        settings |= {"input_example": features[:3], "registered_model_name": "plain"}
        logged = mlflow.sklearn.log_model(model, name="model", **settings | options)
        mlflow.log_metrics({"accuracy": 0.97}, model_id=logged.model_id)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Give the folder of a store with two versions: one to sign, and a pickle."""
    folder = tmp_path_factory.mktemp("made") / "project"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch, store_in(folder, monkeypatch):
        log_plainly()
        log_plainly(serialization_format="pickle")
        own_key()
    return folder


@pytest.fixture
def folder(made, monkeypatch):
    """Give the folder with the store, which is the active one. After the test it is as it was."""
    with restored(made), store_in(made, monkeypatch):
        yield made


@pytest.fixture
def sign(folder):
    """Give the function that signs a version with the key beside the store."""
    return lambda uri=PLAIN, **options: sign_version(uri, key=own_key(), lock=LOCK, **options)


def test_version_is_signed_with_its_training_data_without_being_loaded_and_then_verifies(folder, sign, monkeypatch):
    monkeypatch.setattr("skops.io.load", lambda *_, **__: pytest.fail("the model is loaded"))
    statement = sign(training_data=iris_rows())
    with verified(PLAIN, own_public_key()) as copy:
        assert copy.statement == statement
        assert pd.read_parquet(copy.training_rows).equals(iris_rows())
    assert (statement.purpose, statement.task, statement.commit) == ("candidate", "classification", "c0ffee")
    assert (statement.parameters, statement.metrics) == ({"C": "1.0"}, {"accuracy": 0.97})
    assert statement.training_rows == fingerprint(iris_rows())


def test_later_change_in_the_store_is_refused(folder, sign):
    sign()
    for path in folder.glob("mlruns/**/model.skops"):
        path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(NotVerifiedError, match=r"Hash mismatch for model/model\.skops"):
        sign()


REFUSED = {
    "pickle": (PICKLED, {}, UnreviewedContentError, "serialization_format is 'pickle', and must be 'skops'"),
    "missing column": (
        PLAIN,
        {"training_data": iris_rows().iloc[:, 1:]},
        ValueError,
        "These columns are missing: sepal length",
    ),
    "two targets": (PLAIN, {"training_data": iris_rows().assign(id=1)}, ValueError, "the target, got species, id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_version_leaves_nothing_behind(folder, sign, case):
    uri, options, error, reason = REFUSED[case]
    before = snapshot(folder / "mlruns")
    with pytest.raises(error) as caught:
        sign(uri, **options)
    assert reason in str(caught.value)
    assert snapshot(folder / "mlruns") == before


def test_second_time_changes_nothing_or_adds_the_training_data(folder, sign):
    first = sign()
    before = snapshot(folder / "mlruns")
    mlflow.MlflowClient().set_registered_model_alias("plain", "champion", 1)
    assert sign() == sign("models:/plain@champion") == first
    assert snapshot(folder / "mlruns") == before
    # when the training data is given later, then it is added once
    assert sign(training_data=iris_rows()).training_rows == fingerprint(iris_rows())
    with verified(PLAIN, own_public_key()) as copy:
        assert len(pd.read_parquet(copy.training_rows)) == 150
    with pytest.raises(ValueError, match="is signed with its training data already"):
        sign(training_data=iris_rows())


def test_what_needs_training_data_names_the_command_that_adds_it(folder, sign):
    sign()
    command = f"[Nn]o training data was signed.* Add it: lifecycle sign {PLAIN} --training-data FILE"
    with verified(PLAIN, own_public_key()) as copy:
        assert (copy.training_rows, copy.statement.training_rows) == (None, "")
        with pytest.raises(ServingFailedError, match=command):
            training_limits(copy)
        with pytest.raises(ValueError, match=command):
            load_reference(copy)


def test_files_outside_of_the_store_are_not_downloaded(folder, sign):
    # given a version whose files are said to be on another host
    client = mlflow.MlflowClient()
    run_id = client.get_model_version("plain", "1").run_id
    version = client.create_model_version("plain", "mlflow-artifacts://evil.example/0/model", run_id)
    with pytest.raises(ValueError, match="Its files are outside the active store: mlflow-artifacts://evil"):
        sign(f"models:/plain/{version.version}")


def test_statement_from_before_the_later_fields_still_verifies(folder, monkeypatch):
    # given a version that was signed before the statement had what its run held
    later = ("task", "commit", "parameters", "metrics")

    def before(statement):
        return {name: value for name, value in asdict(statement).items() if name not in later}

    monkeypatch.setattr("mlflow_lifecycle.signing.statement.asdict", before)
    register(folder, name="old")
    # then it verifies, with nothing in their place
    with verified("models:/old/1", own_public_key()) as copy:
        assert "task" not in (copy.folder.parent / "statement.json").read_text()
        assert [getattr(copy.statement, name) for name in later] == ["", "", {}, {}]


def test_command_signs_and_says_the_next_one(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    iris_rows().to_parquet("rows.parquet")

    def run(*arguments: str) -> str:
        return CliRunner().invoke(main, arguments).output

    assert f"There is no signature of this version. Sign it: lifecycle sign {PLAIN}" in run("verify", PLAIN)
    text = run("sign", PLAIN, "--lock", str(LOCK))
    assert "Version 1 of plain is signed in its present state, as a candidate.\n" in text
    assert f"No training data was signed. Add it: lifecycle sign {PLAIN} --training-data FILE\n" in text
    assert text.endswith(f"Next: lifecycle verify {PLAIN}\n")
    assert "No training data was signed." in run("verify", PLAIN)
    assert "No training data" not in run("sign", PLAIN, "--lock", str(LOCK), "--training-data", "rows.parquet")
    assert "No training data" not in run("verify", PLAIN)


def test_name_of_a_registered_model_may_have_a_dot(folder):
    register(folder, name="team.iris")
    with verified("models:/team.iris/1", own_public_key()) as copy:
        assert copy.statement.registered_model == "team.iris"
