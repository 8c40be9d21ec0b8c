"""Score a Parquet data set on Spark, and refuse one whose predictions would be worth nothing.

MLflow's ``spark_udf`` makes a model a function of columns. It does not look at the rows first: a wrong type ends the
work in the middle, and a gap, or a key that is there twice, may go unnoticed. It logs neither rows nor model.
"""

import contextlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_lifecycle.exceptions import InvalidInputError
from mlflow_lifecycle.signing.verify import verified
from mlflow_lifecycle.spark import in_a_line, spark_session, verified_archives

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from pyspark.sql import DataFrame, SparkSession

INTEGERS, FLOATS = {"tinyint", "smallint", "int", "bigint"}, {"double", "float"}
TYPES = {  # a type in a signature: what the column may be in the files
    "double": FLOATS,
    "float": {"float"},
    "long": INTEGERS,
    "integer": INTEGERS - {"bigint"},
    "string": {"string"},
    "boolean": {"boolean"},
    "datetime": {"timestamp", "timestamp_ntz", "date"},
}


@dataclass(frozen=True)
class CheckedRows:
    """Rows that a model can score: the key and the model's columns, how many rows, and a digest of them."""

    frame: "DataFrame"
    count: int
    digest: str


@dataclass(frozen=True)
class Scored:
    """What was scored: the run that records it, how many rows, their digest, and a summary of the predictions."""

    run_id: str
    rows: int
    digest: str
    predictions: dict[str, float]


def check_result(result: str) -> None:
    """Refuse a folder for the result that is there already; Spark would refuse it only after all the work.

    Raises:
        FileExistsError: it is there.
    """
    if Path(result).exists():
        raise FileExistsError(
            f"There is a result in {result} already. Name another folder, or remove this one."
        )


def input_types(signature: "ModelSignature | None") -> dict[str, set[str]]:
    """Return the names of the columns that a model takes, and the types that each may have in the files.

    Those that had gaps when the model learned, which a signature calls optional, are among them: Spark hands columns
    over by their places, so without one of them the next one's values would pass for it.

    Raises:
        InvalidInputError: the signature names no columns.
    """
    inputs = signature.inputs if signature else None
    if inputs is None or inputs.is_tensor_spec() or not inputs.has_input_names():
        raise InvalidInputError(
            "The model has no signature with named columns. Log it with one: infer_signature(...)"
        )
    return {column.name: TYPES.get(getattr(column.type, "name", ""), set()) for column in inputs}


def quoted(name: str) -> str:
    """Return the name of a column as Spark reads it, whatever characters it has."""
    return "`" + name.replace("`", "``") + "`"


def check_rows(
    spark: "SparkSession", path: str | Path, signature: "ModelSignature", key: str = "id"
) -> CheckedRows:
    """Return the rows of the Parquet data set at ``path`` that a model with this signature can score.

    The columns and their types are read from the files' schema, all else in one pass over the rows. Values may be
    missing where they were when the model learned, which a signature calls optional. Not so in text: Spark's gap there
    is None, which scikit-learn takes for another value than NaN. The digest adds up a hash of each row, so it depends
    neither on their order nor on files and partitions.

    Args:
        spark: a running session.
        path: a Parquet file or a folder of them, wherever Spark can read.
        signature: the model's.
        key: the column of integers that tells the rows apart.

    Raises:
        InvalidInputError: a column is missing or of another type; there are no rows; a value is missing or infinite; or
            two rows have the same key.
        SparkFailedError: Spark cannot read the files.
    """
    from pyspark.sql import functions as F  # noqa: N812

    needed, refusal = input_types(signature), f"Cannot score {path}:"
    wanted = {key: needed.pop(key, INTEGERS) & INTEGERS} | needed
    with in_a_line(refusal):
        rows = spark.read.parquet(str(path))
    types = dict(rows.dtypes)
    if wrong := [name for name in wanted if types.get(name) not in wanted[name]]:
        listed = (
            f"{name} is {types.get(name, 'missing')}, not {' or '.join(sorted(wanted[name]))}"
            for name in wrong
        )
        raise InvalidInputError(f"{refusal} {'; '.join(listed)}")

    optional = {
        item.name for item in signature.inputs if not item.required and types[item.name] != "string"
    } - {key}

    def unsound(name: str):
        gaps = name in optional
        if types[name] in FLOATS:
            finite = (
                F.abs(quoted(name)) != float("inf") if gaps else F.abs(quoted(name)) < float("inf")
            )
            return ~F.coalesce(finite, F.lit(gaps))
        return F.lit(False) if gaps else F.col(quoted(name)).isNull()

    columns = [quoted(name) for name in wanted]
    digest = F.sum(F.xxhash64(*columns).cast("decimal(38, 0)"))
    counts = [F.count_if(unsound(name)) for name in wanted]
    with in_a_line(refusal):
        count, keys, digest, *counts = rows.agg(
            F.count("*"), F.count_distinct(quoted(key)), digest, *counts
        ).first()
    if count == 0:
        raise InvalidInputError(f"{refusal} there are no rows")
    if bad := [f"{name} ({number})" for name, number in zip(wanted, counts, strict=True) if number]:
        raise InvalidInputError(
            f"{refusal} rows in which a value is missing or not finite: {', '.join(bad)}"
        )
    if keys < count:
        raise InvalidInputError(
            f"{refusal} {count} rows have {keys} different values of the key {key}"
        )
    return CheckedRows(rows.select(*columns), count, f"{int(digest) % 2**64:016x}")


def summary(predictions: "DataFrame") -> dict[str, float]:
    """Return how often each class stands in the column ``prediction``, or the mean, minimum and maximum of numbers."""
    from pyspark.sql import functions as F  # noqa: N812

    if predictions.dtypes[-1][1] in FLOATS:
        figures = [getattr(F, name)("prediction").alias(name) for name in ("mean", "min", "max")]
        return predictions.agg(*figures).first().asDict()
    counts = predictions.groupBy(F.col("prediction").cast("string").alias("name")).count()
    found = counts.orderBy(F.desc("count"), "name").limit(100).collect()  # more would be no classes
    return {re.sub(r"[^\w .-]", "_", row["name"]): row["count"] for row in found}


def score(
    uri: str,
    path: str,
    result: str,
    *,
    key: str = "id",
    master: str = "local[*]",
    public_key: Path,
    trusted_types: list[str] | tuple[str, ...] = (),
    own_environment: bool = True,
) -> Scored:
    """Score the Parquet data set at ``path``, write keys and predictions to ``result``, and log a run that says so.

    The run is in the active experiment, with rows and model as its inputs. It fails if Spark does.

    Args:
        uri: the version's address, such as ``models:/name@champion``. It is verified before it is loaded.
        path: as for ``check_rows``.
        result: a folder that is not there yet.
        key: as for ``check_rows``.
        master: Spark's address.
        public_key: the public half of the key that signed the version.
        trusted_types: see ``mlflow_lifecycle.signing.verify.verified``.
        own_environment: whether to score in the environment that the version recorded, or in this one.

    Raises:
        NotVerifiedError: the version is not what was signed.
        FileExistsError, InvalidInputError, EnvironmentNotBuiltError: before anything is written.
        SparkFailedError: Spark failed.
    """
    import mlflow
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.data.spark_dataset_source import SparkDatasetSource
    from mlflow.entities import LoggedModelInput

    check_result(result)
    with contextlib.ExitStack() as stack:
        version = stack.enter_context(verified(uri, public_key, trusted_types=trusted_types))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        spark = stack.enter_context(spark_session(master, scratch))
        model = mlflow.models.Model.load(str(version.folder))
        rows = check_rows(spark, path, model.signature, key)
        environment = "uv" if own_environment else "local"
        with verified_archives(version.packages) if own_environment else contextlib.nullcontext():
            predict = mlflow.pyfunc.spark_udf(spark, str(version.folder), env_manager=environment)
        dataset = MetaDataset(
            SparkDatasetSource(path=str(path)), name=Path(path).name, digest=rows.digest
        )
        with mlflow.start_run(
            run_name="scoring", tags={"mlflow.source.name": "lifecycle score"}
        ) as run:
            mlflow.log_params(
                {"model_uri": uri, "rows": rows.count, "environment": environment, "result": result}
            )
            mlflow.log_input(dataset, "scoring", model=LoggedModelInput(version.model_id))
            frame = rows.frame.coalesce(
                spark.sparkContext.defaultParallelism
            )  # a server of MLflow's for each
            columns = [quoted(name) for name in input_types(model.signature)]
            with in_a_line("Scoring failed:"):
                frame.select(quoted(key), predict(*columns).alias("prediction")).write.mode(
                    "error"
                ).parquet(result)
                found = summary(spark.read.parquet(result))
            mlflow.log_metrics({f"predicted_{name}": number for name, number in found.items()})
    return Scored(run.info.run_id, rows.count, rows.digest, found)
