"""batch and spark: what is scored on Spark, what is refused, and that nothing is left behind."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
from click.testing import CliRunner
from execution import ROOT, environment, snapshot
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import ColSpec, Schema, TensorSpec
from sklearn.datasets import load_iris
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from versions import register, store_in

from mlflow_lifecycle import batch as scoring
from mlflow_lifecycle import spark as sparks
from mlflow_lifecycle.cli import main
from mlflow_lifecycle.exceptions import NotVerifiedError
from mlflow_lifecycle.pins import read_pins
from mlflow_lifecycle.signing.keys import own_key

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
def signature(uri):
    return mlflow.models.get_model_info(uri).signature


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


@pytest.fixture(scope="module")
def session(spark, tmp_path_factory):
    """Give a session on two cores, and see at its end that it has left no process, and no file elsewhere."""
    scratch, elsewhere = tmp_path_factory.mktemp("a scratch"), tmp_path_factory.mktemp("elsewhere")
    with contextlib.chdir(elsewhere), sparks.spark_session("local[2]", scratch) as session:
        yield session
        (java,) = java_children()
    assert java_children() == []
    assert not psutil.pid_exists(java.pid)
    assert snapshot(elsewhere) == {}


def java_children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "java" in child.name()]


# The rows


def test_rows_that_fit_are_counted_and_have_a_digest(session, signature, folder, flowers):
    rows = scoring.check_rows(session, folder / "data", signature)
    assert rows.count == len(flowers)
    assert re.fullmatch("[0-9a-f]{16}", rows.digest)
    assert rows.frame.columns == ["id", *COLUMNS]


def test_digest_depends_on_content_alone(session, signature, folder, flowers, tmp_path):
    # given the same rows in another order, in one file, with a column more; and a set with one value changed
    flowers.sample(frac=1, random_state=0).assign(note="x").to_parquet(tmp_path / "same.parquet", index=False)
    changed = flowers.copy()
    changed.loc[7, "petal width (cm)"] += 0.01
    changed.to_parquet(tmp_path / "changed.parquet", index=False)
    # when
    digests = [
        scoring.check_rows(session, path, signature).digest
        for path in (folder / "data", tmp_path / "same.parquet", tmp_path / "changed.parquet")
    ]
    # then
    assert digests[0] == digests[1] != digests[2]


BAD_SETS = {
    "no column": (lambda rows: rows.drop(columns=COLUMNS[3]), "petal width (cm) is missing, not double or float"),
    "no key": (lambda rows: rows.drop(columns="id"), "id is missing, not bigint or int"),
    "text": (lambda rows: rows.assign(**{COLUMNS[1]: "wide"}), "sepal width (cm) is string, not double or float"),
    "integers": (lambda rows: rows.assign(**{COLUMNS[1]: 1}), "sepal width (cm) is bigint, not double or float"),
    "key of text": (lambda rows: rows.assign(id=["a", "b", "c"]), "id is string, not bigint or int"),
    "null": (lambda rows: rows.assign(**{COLUMNS[1]: [None, 1.0, 1.0]}), "missing or not finite: sepal width (cm) (1)"),
    "NaN key": (lambda rows: rows.assign(id=pd.array([0, None, 2], dtype="Int64")), "missing or not finite: id (1)"),
    "infinite": (lambda rows: rows.assign(**{COLUMNS[1]: [1.0, np.inf, -np.inf]}), "not finite: sepal width (cm) (2)"),
    "key twice": (lambda rows: rows.assign(id=[0, 1, 1]), "3 rows have 2 different values of the key id"),
    "empty": (lambda rows: rows.head(0), "there are no rows"),
}


@pytest.mark.parametrize(("change", "reason"), BAD_SETS.values(), ids=BAD_SETS)
def test_data_set_that_cannot_be_scored_is_refused(session, signature, tmp_path, change, reason):
    # given three good rows, in which one thing is wrong
    rows = pd.DataFrame({"id": range(3), **dict.fromkeys(COLUMNS, 1.0)})
    change(rows).to_parquet(tmp_path / "bad.parquet", index=False)
    # when, then
    with pytest.raises(scoring.InvalidInputError) as error:
        scoring.check_rows(session, tmp_path / "bad.parquet", signature)
    assert str(error.value).startswith(f"Cannot score {tmp_path / 'bad.parquet'}: ")
    assert reason in str(error.value)


def test_nan_in_a_file_is_refused(session, signature, tmp_path):
    # given NaN that is no null, which pandas cannot write
    names = ", ".join(f"double('NaN') AS `{name}`" for name in COLUMNS)
    session.sql(f"SELECT 1 AS id, {names}").write.parquet(str(tmp_path / "nan"))
    # when, then
    with pytest.raises(scoring.InvalidInputError, match=re.escape("sepal length (cm) (1)")):
        scoring.check_rows(session, tmp_path / "nan", signature)


def test_model_that_learned_from_gaps_gets_them_but_nothing_infinite(session, tmp_path):
    # given a model that knows gaps, rows with one, and the same with an infinite value beside it
    signature = ModelSignature(Schema([ColSpec("double", name, required=False) for name in COLUMNS]))
    rows = pd.DataFrame({"id": range(3), **dict.fromkeys(COLUMNS, 1.0)}).assign(**{COLUMNS[1]: [None, 1.0, 1.0]})
    rows.to_parquet(tmp_path / "gap.parquet", index=False)
    rows.assign(**{COLUMNS[2]: [np.inf, 1.0, 1.0]}).to_parquet(tmp_path / "both.parquet", index=False)
    # when, then
    assert scoring.check_rows(session, tmp_path / "gap.parquet", signature).count == 3
    with pytest.raises(scoring.InvalidInputError, match=re.escape(": petal length (cm) (1)")):
        scoring.check_rows(session, tmp_path / "both.parquet", signature)


def test_gap_in_a_text_is_refused_although_the_model_learned_from_some(session, tmp_path):
    # given a model that learned from a text with gaps, which were NaN there, and are None for Spark
    signature = ModelSignature(Schema([ColSpec("string", "group", required=False)]))
    pd.DataFrame({"id": range(3), "group": ["a", None, "b"]}).to_parquet(tmp_path / "gap.parquet", index=False)
    # when, then
    with pytest.raises(scoring.InvalidInputError, match=re.escape(": group (1)")):
        scoring.check_rows(session, tmp_path / "gap.parquet", signature)


def test_columns_of_every_type_come_from_the_signature(session, tmp_path):
    # given a model that takes a text, an integer, which is the key, a truth value, a time, and a number that had gaps
    types = {"a `name`": "string", "number": "long", "open": "boolean", "time": "datetime"}
    columns = [ColSpec("double", "gaps", required=False)] + [ColSpec(kind, name) for name, kind in types.items()]
    rows = pd.DataFrame({"a `name`": ["x", "y"], "number": [1, 2], "open": [True, False], "gaps": [0.5, 1.5]})
    rows = rows.assign(time=pd.Timestamp("2024-01-01").as_unit("us"))
    rows.to_parquet(tmp_path / "good.parquet", index=False)
    rows.assign(**{"a `name`": ["x", None]}).to_parquet(tmp_path / "bad.parquet", index=False)
    signature = ModelSignature(Schema(columns))
    # when, then
    checked = scoring.check_rows(session, tmp_path / "good.parquet", signature, "number")
    assert checked.frame.columns == ["number", "gaps", "a `name`", "open", "time"]
    with pytest.raises(scoring.InvalidInputError, match=re.escape("a `name` (1)")):
        scoring.check_rows(session, tmp_path / "bad.parquet", signature, "number")
    # and the number with gaps may not lack as a whole
    rows.drop(columns="gaps").to_parquet(tmp_path / "less.parquet", index=False)
    with pytest.raises(scoring.InvalidInputError, match="gaps is missing"):
        scoring.check_rows(session, tmp_path / "less.parquet", signature, "number")


@pytest.mark.parametrize("inputs", [None, Schema([TensorSpec(np.dtype("float64"), (-1, 4))])], ids=["none", "tensor"])
def test_model_without_named_columns_is_refused(inputs):
    with pytest.raises(scoring.InvalidInputError, match="no signature with named columns"):
        scoring.input_types(ModelSignature(inputs, Schema([ColSpec("double")])) if inputs else None)


@pytest.mark.parametrize("content", [None, b"no Parquet"], ids=["nothing", "another file"])
def test_files_that_spark_cannot_read_are_refused_in_a_line(session, signature, tmp_path, content):
    if content:
        (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(sparks.SparkFailedError) as error:
        scoring.check_rows(session, tmp_path / "rows.parquet", signature)
    assert str(error.value).startswith(f"Cannot score {tmp_path / 'rows.parquet'}: ")
    assert "\n" not in str(error.value)


# The predictions


def expected(uri, flowers) -> pd.Series:
    here = mlflow.pyfunc.load_model(uri).predict(flowers[COLUMNS])
    return pd.Series(here, index=flowers["id"], name="prediction")


@pytest.fixture(scope="module")
def scoring_here(session, uri, signature, folder, flowers):
    """Give the rows, sorted by key, and the model as a function of columns, in the environment of the tests."""
    frame = scoring.check_rows(session, folder / "data", signature).frame.orderBy("id").cache()
    return frame, mlflow.pyfunc.spark_udf(session, uri, env_manager="local")


@pytest.mark.parametrize(("partitions", "rows"), [(7, 1000), (9, 4)])
def test_partitions_change_no_prediction(scoring_here, uri, flowers, partitions, rows):
    # given the rows dealt out in so many partitions, of which some may be empty
    frame, predict = scoring_here
    frame = frame.limit(rows).repartition(partitions)
    assert frame.rdd.getNumPartitions() == partitions
    # when they are scored
    columns = [scoring.quoted(name) for name in COLUMNS]
    found = frame.select("id", predict(*columns).alias("prediction")).toPandas().set_index("id")["prediction"]
    # then they are those of this process, by key
    pd.testing.assert_series_equal(found.sort_index(), expected(uri, flowers.head(rows)))


def test_model_that_learned_from_gaps_gets_each_column_in_its_place(session, tmp_path):
    # given a model whose first column had gaps, and rows for it
    iris = load_iris(as_frame=True)
    rows = iris.data.assign(**{COLUMNS[0]: iris.data[COLUMNS[0]].where(iris.data.index % 3 > 0)})
    species = pd.Series(iris.target_names[iris.target])
    model = make_pipeline(SimpleImputer(), LogisticRegression(max_iter=1000)).fit(rows, species)
    signature = infer_signature(rows, species)
    mlflow.sklearn.save_model(model, tmp_path / "model", signature=signature, skops_trusted_types=["numpy.dtype"])
    rows.assign(id=range(150)).to_parquet(tmp_path / "rows.parquet", index=False)
    # when they are scored as `score` does it
    checked = scoring.check_rows(session, tmp_path / "rows.parquet", signature)
    predict = mlflow.pyfunc.spark_udf(session, str(tmp_path / "model"), env_manager="local")
    columns = [scoring.quoted(name) for name in scoring.input_types(signature)]
    found = checked.frame.orderBy("id").select(predict(*columns).alias("prediction")).toPandas()["prediction"]
    # then the predictions are those of this process
    assert found.tolist() == model.predict(rows).tolist()


@pytest.fixture(scope="module")
def small_model(folder, uri):
    """Give the address of a model with other pins than the first, so with an environment of its own."""
    iris = load_iris(as_frame=True)
    mlflow.sklearn.save_model(
        LogisticRegression(max_iter=1000).fit(iris.data, iris.target),
        folder / "small",
        signature=infer_signature(iris.data, iris.target),
        pip_requirements=read_pins(ROOT / "model_requirements.txt")[:-1],
    )
    return str(folder / "small")


CHANGES = {
    "another hash": (r"(?m)^(wheel==\S+ \\\n)(?:.*sha256:.*\n)+", r"\1    --hash=sha256:" + "0" * 64 + "\n"),
    "no hash": (r"(?m)^wheel==\S+ \\\n(?:.*sha256:.*\n)+", ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_archive_that_is_not_in_the_lock_is_refused_by_name(small_model, tmp_path, capfd, monkeypatch, change):
    # given a lock in which one thing is wrong, and a setting that would have uv overlook it
    text, count = re.subn(*CHANGES[change], LOCK.read_text())
    assert count == 1
    (tmp_path / "a lock.txt").write_text(text)
    monkeypatch.setenv("UV_NO_VERIFY_HASHES", "1")
    variables = dict(os.environ)
    # when MLflow builds an environment by it
    refused = pytest.raises(sparks.EnvironmentNotBuiltError, match=r"was not built\. .*wheel==")
    with refused as error, sparks.verified_archives(tmp_path / "a lock.txt"):
        mlflow.models.predict(small_model, load_iris(as_frame=True).data.head(3), env_manager="uv")
    # then the refusal is all that is said, and all is as it was
    assert "\n" not in str(error.value)
    assert "wheel" not in "".join(capfd.readouterr())
    assert dict(os.environ) == variables


@pytest.mark.parametrize("place", ["settings file", "variable"])
def test_settings_of_the_user_do_not_change_what_mlflow_builds(tmp_path, monkeypatch, place):
    # given a setting that sends packages elsewhere, in the working directory or the environment
    monkeypatch.chdir(tmp_path)
    if place == "settings file":
        (tmp_path / "uv.toml").write_text("[pip]\ntarget = 'elsewhere'\n")
    else:
        monkeypatch.setenv("UV_CONFIG_FILE", str(tmp_path / "elsewhere.toml"))
        (tmp_path / "elsewhere.toml").write_text("[pip]\ntarget = 'elsewhere'\n")
    pin = next(line.split()[0] for line in LOCK.read_text().splitlines() if line.startswith("six=="))
    # when uv installs as MLflow starts it
    with sparks.verified_archives(LOCK):
        subprocess.run(["uv", "venv", "environment", f"--python={sys.executable}"], check=True)
        subprocess.run(["uv", "pip", "install", "--python", "environment", pin], check=True)
    # then the package is in the environment
    assert list(tmp_path.rglob("environment/**/six.py"))


def test_missing_lock_and_a_space_in_tmpdir_are_refused(tmp_path, monkeypatch):
    with pytest.raises(sparks.EnvironmentNotBuiltError, match="git checkout"), sparks.verified_archives("nowhere.txt"):
        pass
    (tmp_path / "a space").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a space"))
    with pytest.raises(sparks.EnvironmentNotBuiltError, match="Set TMPDIR"), sparks.verified_archives(LOCK):
        pass


@pytest.mark.parametrize(
    ("values", "summary"),
    [
        ("'setosa', 'setosa', 'a (b)'", {"setosa": 2, "a _b_": 1}),
        ("1, 1, 0", {"1": 2, "0": 1}),
        ("true, true, true", {"true": 3}),
        ("double(1), double(2), double(6)", {"mean": 3, "min": 1, "max": 6}),
    ],
    ids=["texts", "integers", "truth values", "numbers"],
)
def test_summary_counts_classes_and_describes_numbers(session, values, summary):
    assert scoring.summary(session.sql(f"SELECT explode(array({values})) AS prediction")) == summary


# The session


def test_session_listens_on_loopback_only_where_no_cluster_has_to_reach_it(tmp_path):
    local, cluster = (sparks.spark_settings(master, tmp_path) for master in ("local[2]", "spark://cluster:7077"))
    assert (local["spark.driver.host"], local["spark.driver.bindAddress"]) == ("127.0.0.1", "127.0.0.1")
    assert local["spark.local.dir"].startswith(str(tmp_path))
    assert not {"spark.driver.host", "spark.driver.bindAddress", "spark.local.dir"} & set(cluster)
    assert (local["spark.master"], cluster["spark.master"]) == ("local[2]", "spark://cluster:7077")


def test_spark_listens_on_loopback_only(session):
    (java,) = java_children()
    listening = {at.laddr.ip for at in java.net_connections("tcp") if at.status == psutil.CONN_LISTEN}
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_missing_pyspark_and_java_are_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(sparks, "find_spec", lambda name: None)
    with pytest.raises(sparks.SparkFailedError, match="make scale"), sparks.spark_session("local", tmp_path):
        pass
    monkeypatch.setattr(sparks, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(sparks.SparkFailedError, match="Java 17 or later"), sparks.spark_session("local", tmp_path):
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # PySpark leaves a pipe open
def test_java_that_does_not_start_is_named(spark, tmp_path, monkeypatch):
    # given a Java that is too old for what Spark asks of it
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").write_text("#!/bin/sh\necho 'Unrecognized option: --add-modules' >&2\nexit 1\n")
    (tmp_path / "bin" / "java").chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    # when, then
    session = sparks.spark_session("local", tmp_path)
    with (
        pytest.raises(sparks.SparkFailedError, match="did not start Spark: Unrecognized option"),
        session,
    ):
        pass


# The command


TWICE = """
    import sys
    from click.testing import CliRunner
    from mlflow_lifecycle.cli import main

    for result in sys.argv[-2:]:
        answer = CliRunner().invoke(main, [*sys.argv[1:-2], "--result", result])
        print(answer.exit_code, answer.output.strip())
"""


@pytest.fixture(scope="module")
def commanded(spark, folder, uri, flowers):
    """Give what ``lifecycle score`` prints, run twice in a process, and the temporary files that it leaves."""
    arguments = ["score", uri, "--rows", str(folder / "data"), "--master", "local[2]", "--json"]
    results = [str(folder / "result"), str(folder / "again")]
    variables = environment(folder.parent, MLFLOW_TRACKING_URI=mlflow.get_tracking_uri())
    command = [sys.executable, "-c", textwrap.dedent(TWICE), *arguments, *results]
    process = subprocess.run(command, cwd=folder, env=variables, capture_output=True, encoding="utf-8", timeout=300)
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout.splitlines(), snapshot(Path(variables["TMPDIR"]))


def test_models_own_environment_gives_the_predictions_of_this_process_by_key(commanded, uri, flowers, folder):
    written = pd.read_parquet(folder / "result").set_index("id")["prediction"].sort_index()
    pd.testing.assert_series_equal(written, expected(uri, flowers))
    assert (folder / "result" / "_SUCCESS").exists()


def test_command_logs_rows_model_and_predictions(commanded, session, uri, signature, folder, flowers):
    # given what the command printed
    assert commanded[0][0][:2] == "0 ", commanded[0]
    said = json.loads(commanded[0][0].removeprefix("0 "))
    assert said["rows"] == 1000
    # then the run has it, in the experiment of the default name
    run = mlflow.get_run(said["run_id"])
    assert mlflow.get_experiment(run.info.experiment_id).name == "scoring"
    assert run.info.status == "FINISHED"
    assert run.data.params["model_uri"] == uri
    assert run.data.params["rows"] == "1000"
    counts = expected(uri, flowers).value_counts()
    assert run.data.metrics == {f"predicted_{name}": count for name, count in counts.items()}
    assert said["predictions"] == counts.to_dict()
    # and its inputs are the rows, by their digest, and the model
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == said["digest"]
    assert said["digest"] == scoring.check_rows(session, folder / "data", signature).digest
    assert [model.model_id for model in run.inputs.model_inputs] == [mlflow.models.get_model_info(uri).model_id]


def test_second_session_of_a_process_is_refused(commanded, folder):
    assert commanded[0][-1].startswith("1 Error: Spark has ended in this process and cannot start again.")
    assert not (folder / "again").exists()


def test_command_leaves_no_temporary_file(commanded):
    assert commanded[1] == {}


def test_result_that_exists_is_refused_in_a_line(folder, uri, monkeypatch):
    monkeypatch.chdir(folder)
    before = len(mlflow.search_runs())
    variables = {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    answer = CliRunner().invoke(main, ["score", uri, "--rows", "data", "--result", "mlruns"], env=variables)
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert answer.stderr == ("Error: There is a result in mlruns already. Name another folder, or remove this one.\n")
    assert len(mlflow.search_runs()) == before


def test_version_that_another_key_signed_is_refused_before_spark_starts(folder, uri, tmp_path, monkeypatch):
    # given somebody else's key
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    public = own_key().with_suffix(".pub")
    # when
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.get_tracking_uri())
    places = ["--rows", "data", "--result", str(tmp_path / "scored"), "--public-key", str(public)]
    answer = CliRunner().invoke(main, ["score", uri, *places])
    # then
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert re.fullmatch(r"Error: Not loaded: models:/iris/1. The key \w+ has not signed it.*\n", answer.stderr)
    assert not (tmp_path / "scored").exists()


def test_alias_that_was_moved_to_a_candidate_is_not_scored(uri, folder, tmp_path):
    # given an alias on a version that was never released
    mlflow.MlflowClient().set_registered_model_alias("iris", "champion", "1")
    # then
    public_key = own_key().with_suffix(".pub")
    with pytest.raises(NotVerifiedError, match="There is no release as champion"):
        scoring.score("models:/iris@champion", "data", str(tmp_path / "scored"), public_key=public_key)


def test_spark_overwrites_no_result(session, tmp_path):
    # given a result, when Spark is told to write it once more
    frame = session.sql("SELECT 1 AS id")
    frame.write.mode("error").parquet(str(tmp_path / "result"))
    before = snapshot(tmp_path)
    with pytest.raises(sparks.SparkFailedError, match="PATH_ALREADY_EXISTS"), sparks.in_a_line("Scoring failed:"):
        frame.write.mode("error").parquet(str(tmp_path / "result"))
    # then
    assert snapshot(tmp_path) == before
