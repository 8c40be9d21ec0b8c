"""batch: what is scored in a process and on Spark, what is refused, and that nothing is left behind."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from execution import ROOT, environment, snapshot
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import ColSpec, Schema, TensorSpec
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_diabetes, load_iris
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from versions import register, store_in

from mlflow_lifecycle import batch, batch_worker
from mlflow_lifecycle.cli import main
from mlflow_lifecycle.exceptions import InvalidInputError, NotVerifiedError, SparkFailedError
from mlflow_lifecycle.pins import locked
from mlflow_lifecycle.signing.keys import own_key, own_public_key

COLUMNS = ["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]
LOCK = ROOT / "requirements.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scoring") / "a folder of Zoë"


@pytest.fixture(scope="module")
def uri(folder, empty_store):
    """Give the address of a registered model, in a store that is active as long as this module's tests."""
    folder.mkdir()
    shutil.copy(empty_store, folder)
    with pytest.MonkeyPatch.context() as monkeypatch, store_in(folder, monkeypatch):
        iris = load_iris(as_frame=True)
        register(folder, rows=iris.data.assign(species=iris.target_names[iris.target]))
        yield "models:/iris/1"


@pytest.fixture(scope="module")
def flowers(folder, uri):
    """Give the rows of a data set, which is in the folder ``data``, in three files."""
    generator, iris = np.random.default_rng(0), load_iris().data
    drawn = iris[generator.integers(len(iris), size=1000)] + generator.normal(scale=0.3, size=(1000, 4))
    flowers = pd.DataFrame(drawn.round(2), columns=COLUMNS).assign(id=np.arange(1000))
    (folder / "data").mkdir()
    for number, part in enumerate(np.array_split(np.arange(1000), 3)):
        flowers.iloc[part].to_parquet(folder / "data" / f"{number}.parquet", index=False)
    return flowers


def expected(uri, flowers) -> pd.Series:
    here = mlflow.pyfunc.load_model(uri).predict(flowers[COLUMNS])
    return pd.Series(here, index=flowers["id"], name="prediction")


def read(folder) -> pd.Series:
    return pd.read_parquet(folder).set_index("id")["prediction"].sort_index()


def save(folder, model, rows) -> Path:
    """Save a model that was fitted to ``rows``, and return its folder."""
    options = {"signature": infer_signature(rows, model.predict(rows)), "pip_requirements": ["numpy"]}
    mlflow.sklearn.save_model(model, folder, skops_trusted_types=["numpy.dtype"], **options)
    return folder


# The columns


SIGNATURE = ModelSignature(
    Schema([ColSpec("double", "a"), ColSpec("long", "b", required=False), ColSpec("datetime", "`c`")]),
    Schema([ColSpec("string")]),
)
FITTING = {"id": pa.int32(), "a": pa.float32(), "b": pa.int16(), "`c`": pa.timestamp("us", "UTC"), "other": pa.null()}
WRONG_TYPES = {
    "optional column": ({"b": None}, "b is missing"),
    "integers": ({"a": pa.int64()}, "a is int64, and must be float or double"),
    "key of text": ({"id": pa.string()}, "id is string, and must be int8"),
    "two": ({"a": None, "`c`": pa.bool_()}, "a is missing, and must be float or double; `c` is bool"),
}


def test_columns_of_every_type_come_from_the_signature():
    assert batch_worker.check_columns(pa.schema(FITTING), SIGNATURE, "id") == ["a", "b", "`c`"]
    assert batch_worker.check_columns(pa.schema(FITTING), SIGNATURE, "b") == ["a", "b", "`c`"]


@pytest.mark.parametrize(("change", "reason"), WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_wrong_columns_are_refused_before_a_row_is_read(change, reason):
    fields = {name: kind for name, kind in (FITTING | change).items() if kind is not None}
    with pytest.raises(ValueError, match=re.escape(reason)):
        batch_worker.check_columns(pa.schema(fields), SIGNATURE, "id")


def test_key_must_be_integers_although_the_model_takes_it_as_decimals():
    with pytest.raises(ValueError, match="a is float, and must be int8"):
        batch_worker.check_columns(pa.schema(FITTING), SIGNATURE, "a")


@pytest.mark.parametrize("inputs", [None, Schema([TensorSpec(np.dtype("float64"), (-1, 4))])], ids=["none", "tensor"])
def test_model_without_named_columns_is_refused(inputs):
    signature = ModelSignature(inputs, Schema([ColSpec("double")])) if inputs else None
    with pytest.raises(ValueError, match="no signature with named columns"):
        batch_worker.check_columns(pa.schema(FITTING), signature, "id")


# The values


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Give the folder of a model whose first column may have gaps, and a text, which may have some, too."""
    iris = load_iris(as_frame=True)
    rows = iris.data.assign(kind=np.where(iris.data.index % 2, "odd", "even"))
    rows.loc[::3, COLUMNS[0]] = np.nan
    rows.loc[::5, "kind"] = np.nan
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    encode = make_column_transformer((numbers, COLUMNS), (OneHotEncoder(handle_unknown="ignore"), ["kind"]))
    estimator = make_pipeline(encode, LogisticRegression()).fit(rows, iris.target_names[iris.target])
    return save(tmp_path_factory.mktemp("model") / "model", estimator, rows)


def score_here(rows, tmp_path, model) -> pd.Series:
    rows.to_parquet(tmp_path / "rows.parquet", index=False)
    batch_worker.score_files(str(tmp_path / "rows.parquet"), str(tmp_path / "output"), str(model), "id")
    return read(tmp_path / "output")


GOOD = pd.DataFrame({"id": range(3), **dict.fromkeys(COLUMNS, 1.0), "kind": ["odd", "even", "odd"]})
BAD_VALUES = {
    "null": ({COLUMNS[1]: [None, 1.0, 1.0]}, "sepal width (cm) has 1 values that are missing or not finite"),
    "NaN": ({COLUMNS[1]: [np.nan, 1.0, 1.0]}, "sepal width (cm) has 1 values"),
    "infinite where optional": ({COLUMNS[0]: [np.inf, 1.0, None]}, "sepal length (cm) has 1 values"),
    "no key": ({"id": [0, None, 2]}, "id has 1 values"),
    "key twice": ({"id": [0, 1, 1]}, "two rows have the same id"),
}


@pytest.mark.parametrize(("change", "reason"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_value_that_cannot_be_scored_is_refused(model, tmp_path, change, reason):
    pq.write_table(pa.table(GOOD.to_dict("list") | change), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=re.escape(reason)):
        batch_worker.score_files(str(tmp_path / "rows.parquet"), str(tmp_path / "output"), str(model), "id")


def test_empty_data_set_is_refused(model, tmp_path):
    pq.write_table(pa.Table.from_pandas(GOOD).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="there are no rows"):
        batch_worker.score_files(str(tmp_path), str(tmp_path / "output"), str(model), "id")


def test_missing_values_are_those_that_the_model_learned_from(model, tmp_path):
    # given gaps in a number and in a text, and more rows than a batch has
    rows = pd.concat([GOOD] * 7000, ignore_index=True).assign(id=range(21_000))
    rows.loc[::2, COLUMNS[0]] = None
    rows.loc[::3, "kind"] = None
    # when
    found = score_here(rows, tmp_path, model)
    # then they reach the model as NaN, as in pandas
    estimator = mlflow.sklearn.load_model(str(model))
    assert found.tolist() == estimator.predict(rows.fillna({"kind": np.nan})).tolist()


ROWS, MEASURE = load_diabetes(as_frame=True, return_X_y=True)
MODELS = {
    "regression": (LinearRegression(), MEASURE),
    "integer classes": (LogisticRegression(), (MEASURE > 140).astype(int)),
    "truth values": (LogisticRegression(), MEASURE > 140),
}


@pytest.mark.parametrize(("estimator", "target"), MODELS.values(), ids=MODELS)
def test_models_of_every_task_are_scored(estimator, target, tmp_path):
    # given a model, and its columns in another order
    estimator.fit(ROWS, target)
    rows = ROWS[ROWS.columns[::-1]].assign(id=range(len(ROWS)))
    # then
    found = score_here(rows, tmp_path, save(tmp_path / "model", estimator, ROWS))
    assert found.to_numpy() == pytest.approx(estimator.predict(ROWS))
    assert found.dtype == estimator.predict(ROWS).dtype


# One process


@pytest.mark.parametrize("options", [["--this-environment"], pytest.param([], marks=pytest.mark.extended)])
def test_command_scores_a_data_set_by_key_and_records_it(uri, folder, flowers, tmp_path, options):
    command = ["score", uri, "--data", "data", "--output", str(tmp_path / "output"), "--json", *options]
    with contextlib.chdir(folder):
        answer = CliRunner().invoke(main, command)
        again = CliRunner().invoke(main, command)
    # then the predictions are those of this process
    assert answer.exit_code == 0, answer.output
    pd.testing.assert_series_equal(read(tmp_path / "output"), expected(uri, flowers))
    # and the run has the rows, by their digest, and the model
    scored = json.loads(answer.stdout)
    run = mlflow.get_run(scored["run_id"])
    assert (run.info.status, run.data.metrics, scored["rows"]) == ("FINISHED", {"rows": 1000}, 1000)
    assert run.data.params["model_uri"] == uri
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == scored["digest"]
    (used,) = run.inputs.model_inputs
    assert used.model_id == mlflow.models.get_model_info(uri).model_id
    # and it does not overwrite the output
    assert (again.exit_code, again.stderr.count("\n")) == (1, 1)
    assert "exists already" in again.stderr


def test_pyarrow_is_that_of_the_lock():
    lines = Path(batch.__file__).with_name("pyarrow.txt").read_text().split()
    assert locked([lines[0]], LOCK).split() == lines


def test_bad_rows_leave_neither_output_nor_part_and_a_failed_run(uri, folder, flowers, tmp_path):
    # given a value that is missing in the last of the rows, and a folder of somebody else
    (tmp_path / "output.part").mkdir()
    flowers.assign(**{COLUMNS[3]: flowers[COLUMNS[3]].where(flowers["id"] < 999)}).to_parquet(tmp_path / "bad.parquet")
    mlflow.set_experiment("scoring")
    options = {"public_key": own_public_key(), "own_environment": False}
    # when
    with pytest.raises(InvalidInputError) as error:
        batch.score(uri, str(tmp_path / "bad.parquet"), str(tmp_path / "output"), **options)
    # then
    reason = "petal width (cm) has 1 values that are missing or not finite"
    assert str(error.value) == f"Cannot score {tmp_path / 'bad.parquet'}: {reason}"
    assert {path.name for path in tmp_path.iterdir()} == {"bad.parquet", "output.part"}
    assert mlflow.search_runs(max_results=1)["status"].tolist() == ["FAILED"]


def test_file_that_cannot_be_read_is_refused_in_a_line(tmp_path):
    with pytest.raises(InvalidInputError) as error:
        batch.score_here(Path(sys.executable), str(tmp_path / "none"), str(tmp_path / "output"), "model", "id")
    assert str(error.value).startswith(f"Cannot score {tmp_path / 'none'}: ")
    assert "\n" not in str(error.value)


def test_version_that_another_key_signed_is_refused_before_anything_is_logged(uri, folder, tmp_path):
    # given somebody else's key
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIFECYCLE_KEYS", str(tmp_path / "keys"))
        public_key = own_key().with_suffix(".pub")
    runs = len(mlflow.search_runs(search_all_experiments=True))
    # when
    with pytest.raises(NotVerifiedError, match="has not signed it"):
        batch.score(uri, "data", str(tmp_path / "output"), public_key=public_key, engine="spark")
    # then
    assert not (tmp_path / "output").exists()
    assert len(mlflow.search_runs(search_all_experiments=True)) == runs


def test_alias_that_was_moved_to_a_candidate_is_not_scored(uri, tmp_path):
    # given an alias on a version that was never released
    mlflow.MlflowClient().set_registered_model_alias("iris", "champion", "1")
    # then
    with pytest.raises(NotVerifiedError, match="There is no release as champion"):
        batch.score("models:/iris@champion", "data", str(tmp_path / "scored"), public_key=own_public_key())


# Spark


@pytest.fixture(scope="module")
def session(spark, tmp_path_factory):
    """Give a session on two cores, and see at its end that it has left no process, and no file elsewhere."""
    scratch, elsewhere = tmp_path_factory.mktemp("a scratch"), tmp_path_factory.mktemp("elsewhere")
    with contextlib.chdir(elsewhere), batch.spark_session("local[2]", scratch) as session:
        yield session
        (java,) = java_children()
    assert java_children() == []
    assert not psutil.pid_exists(java.pid)
    assert snapshot(elsewhere) == {}


def java_children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "java" in child.name()]


def test_spark_gives_the_predictions_of_one_process(session, model, tmp_path):
    # given missing values in a number and a text, more partitions than rows have, and a name that Spark quotes
    rows = pd.concat([GOOD] * 400, ignore_index=True).assign(id=range(1200))
    rows.loc[::2, COLUMNS[0]] = None
    rows.loc[::3, "kind"] = None
    here = score_here(rows, tmp_path, model)
    data, output = str(tmp_path / "rows.parquet"), str(tmp_path / "spark")
    # when
    count, digest = batch.score_on_spark(session, data, output, str(model), "id")
    # then
    pd.testing.assert_series_equal(read(output), here)
    assert (count, (tmp_path / "spark/_SUCCESS").exists()) == (1200, True)
    # and the digest depends on the content alone
    rows.sample(frac=1, random_state=0).to_parquet(tmp_path / "same.parquet")
    rows.assign(id=rows["id"] + 1).to_parquet(tmp_path / "other.parquet")
    digests = []
    for name in ("same", "other"):
        again = batch.score_on_spark(session, str(tmp_path / f"{name}.parquet"), str(tmp_path / name), str(model), "id")
        digests.append(again[1])
    assert digests[0] == digest != digests[1]


SPARK_REFUSES = {
    "a type": ({COLUMNS[1]: "wide"}, "sepal width (cm) is string, and must be float or double"),
    "a value": ({COLUMNS[1]: [None, 1.0, 1.0]}, "sepal width (cm) has 1 values that are missing or not finite"),
    "a key twice": ({"id": [0, 1, 1]}, "two rows have the same id, or it is missing"),
}


@pytest.mark.parametrize(("change", "reason"), SPARK_REFUSES.values(), ids=SPARK_REFUSES)
def test_spark_refuses_as_one_process_does(session, model, tmp_path, change, reason):
    data = str(tmp_path / "bad.parquet")
    GOOD.assign(**change).to_parquet(data)
    with pytest.raises(InvalidInputError) as error:
        batch.score_on_spark(session, data, str(tmp_path / "output"), str(model), "id")
    assert str(error.value) == f"Cannot score {data}: {reason}"
    assert not (tmp_path / "output/_SUCCESS").exists()


@pytest.mark.parametrize("content", [None, b"no Parquet"], ids=["nothing", "another file"])
def test_files_that_spark_cannot_read_are_refused_in_a_line(session, model, tmp_path, content):
    if content:
        (tmp_path / "rows.parquet").write_bytes(content)
    data = str(tmp_path / "rows.parquet")
    with pytest.raises(SparkFailedError) as error:
        batch.score_on_spark(session, data, str(tmp_path / "output"), str(model), "id")
    assert str(error.value).startswith(f"Cannot score {data}: ")
    assert "\n" not in str(error.value)


def test_spark_works_in_the_recorded_environment_and_leaves_nothing(spark, uri, folder, flowers, tmp_path):
    # given the command, in a process of its own, because Spark starts once in a process
    command = [sys.executable, "-m", "mlflow_lifecycle", "score", uri, "--data", "data", "--engine", "spark"]
    command += ["--output", str(tmp_path / "output"), "--master", "local[2]", "--json"]
    variables = environment(folder.parent, MLFLOW_TRACKING_URI=mlflow.get_tracking_uri())
    variables |= {"LIFECYCLE_KEYS": os.environ["LIFECYCLE_KEYS"]}
    # when
    process = subprocess.run(command, cwd=folder, env=variables, capture_output=True, encoding="utf-8", timeout=300)
    # then
    assert (process.returncode, process.stderr) == (0, "")
    assert json.loads(process.stdout)["rows"] == 1000
    pd.testing.assert_series_equal(read(tmp_path / "output"), expected(uri, flowers))
    assert snapshot(Path(variables["TMPDIR"])) == {}


# The session


def test_session_on_a_cluster_leaves_addresses_and_folders_to_it(tmp_path):
    settings = batch.spark_settings("spark://cluster:7077", tmp_path)
    assert settings["spark.master"] == "spark://cluster:7077"
    assert not {"spark.driver.host", "spark.driver.bindAddress", "spark.local.dir"} & set(settings)


def test_spark_listens_on_loopback_only(session):
    (java,) = java_children()
    listening = {at.laddr.ip for at in java.net_connections("tcp") if at.status == psutil.CONN_LISTEN}
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_missing_java_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(SparkFailedError, match="Java 17 or later"), batch.spark_session("local", tmp_path):
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # PySpark leaves a pipe open
def test_java_that_does_not_start_is_named(spark, tmp_path, monkeypatch):
    # given a Java that is too old for what Spark asks of it
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").write_text("#!/bin/sh\necho 'Unrecognized option: --add-modules' >&2\nexit 1\n")
    (tmp_path / "bin" / "java").chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    # when, then
    session = batch.spark_session("local", tmp_path)
    with (
        pytest.raises(SparkFailedError, match=r"did not start Spark.* Unrecognized option"),
        session,
    ):
        pass
