"""Score a Parquet dataset with a verified version, in the environment that it recorded.

MLflow scores a file in memory, or columns by ``spark_udf``. Neither looks at the rows first: a
wrong type ends the work in the middle, and missing values or a key that is there twice may go
unnoticed. MLflow builds the environment for Spark without verifying hashes (mlflow#4886,
mlflow#12478).
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import mlflow
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.spark_dataset_source import SparkDatasetSource
from mlflow.entities import LoggedModelInput

from mlflow_lifecycle import batch_worker
from mlflow_lifecycle.environments import build_environment
from mlflow_lifecycle.exceptions import InvalidInputError, SparkFailedError
from mlflow_lifecycle.experiments import printable
from mlflow_lifecycle.signing.verify import Verified, verified

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclass(frozen=True)
class Scored:
    """How many rows were scored, a digest of them, and the run that records it."""

    run_id: str
    rows: int
    digest: str


def check_output(output: str) -> None:
    """Refuse a folder for the predictions that exists already.

    Raises:
        InvalidInputError: it exists.
    """
    if Path(output).exists():
        raise InvalidInputError(f"{output} exists already. Choose another folder, or remove it.")


def score(
    uri: str,
    data: str,
    output: str,
    *,
    public_key: Path,
    key: str = "id",
    engine: str = "local",
    master: str = "local[*]",
    trusted_types: tuple[str, ...] = (),
    own_environment: bool = True,
) -> Scored:
    """Score the Parquet dataset ``data``, and log a run in the active experiment.

    Columns and types are checked before the rows, and values as the rows are scored. If a row
    cannot be scored, there is no output.

    Args:
        uri: the version, such as ``models:/name@production``. It is verified before it is loaded.
        data: a Parquet file or a folder of them.
        output: the folder for the keys and predictions. It must not exist.
        public_key: the public half of the key that signed the version.
        key: the column of integers that identifies a row.
        engine: "local" is one process on this machine. "spark" is for data on a cluster.
        master: the address of Spark.
        trusted_types: see `mlflow_lifecycle.signing.verify.verified`.
        own_environment: False scores in this environment, in place of the recorded one.

    Raises:
        NotVerifiedError: the version is not what was signed.
        EnvironmentNotBuiltError: its environment cannot be built.
        InvalidInputError: the output exists, or rows cannot be scored.
        SparkFailedError: Spark does not start, or its job failed.
    """
    check_output(output)
    with (
        verified(uri, public_key, trusted_types=trusted_types) as version,
        tempfile.TemporaryDirectory(prefix="scoring-") as folder,
    ):
        scratch = Path(folder)
        python = build_with_pyarrow(version, scratch) if own_environment else Path(sys.executable)
        with mlflow.start_run(run_name="scoring", tags={"mlflow.source.name": "lifecycle score"}):
            mlflow.log_params({"model_uri": uri, "engine": engine, "output": output})
            model = str(version.folder)
            if engine == "spark":
                if own_environment:  # otherwise each worker would compile the packages
                    packages = python.parents[1]
                    subprocess.run([python, "-I", "-m", "compileall", "-q", packages], check=False)
                with spark_session(master, scratch, python) as spark:
                    rows, digest = score_on_spark(spark, data, output, model, key)
            else:
                rows, digest = score_here(python, data, output, model, key)
            mlflow.log_metric("rows", rows)
            dataset = MetaDataset(SparkDatasetSource(path=data), Path(data).name, digest)
            mlflow.log_input(dataset, "scoring", model=LoggedModelInput(version.model_id))
            return Scored(mlflow.active_run().info.run_id, rows, digest)


def build_with_pyarrow(version: Verified, scratch: Path) -> Path:
    """Build the environment of a version, with pyarrow, and return its Python.

    Raises:
        EnvironmentNotBuiltError: see `mlflow_lifecycle.environments.build_environment`.
    """
    requirements = (version.folder / "requirements.txt").read_text(encoding="utf-8")
    lock = version.packages.read_text(encoding="utf-8")
    if not re.search("(?m)^pyarrow==", requirements):
        pyarrow = Path(__file__).with_name("pyarrow.txt").read_text(encoding="utf-8")
        requirements += f"\n{pyarrow.split()[0]}\n"
        lock += f"\n{pyarrow}"
    (scratch / "requirements.txt").write_text(requirements, encoding="utf-8")
    (scratch / "lock.txt").write_text(lock, encoding="utf-8")
    return build_environment(
        scratch / "requirements.txt", scratch / "environment", lock=scratch / "lock.txt"
    )


def score_here(python: Path, data: str, output: str, model: str, key: str) -> tuple[int, str]:
    """Score a dataset in a process of ``python``, and return the rows and a digest of the files.

    Raises:
        InvalidInputError: rows cannot be scored.
    """
    place = Path(output).resolve()
    variables = {name: value for name, value in os.environ.items() if name[:6] != "PYTHON"}
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{place.name}.", dir=place.parent) as folder:
        part = Path(folder) / "part"
        command = [python, "-I", batch_worker.__file__, data, part, model, key]
        child = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8")
        if child.returncode:
            *_, reason = child.stderr.strip().splitlines() or ["no reason was given"]
            raise InvalidInputError(f"Cannot score {data}: {printable(reason)}")
        part.rename(place)
    digest = hashlib.sha256()
    files = sorted(Path(data).rglob("*.parquet")) or [Path(data)]
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return json.loads(child.stdout.splitlines()[-1]), digest.hexdigest()[:16]


def score_on_spark(
    spark: "SparkSession", data: str, output: str, model: str, key: str
) -> tuple[int, str]:
    """Score a dataset on Spark, and return the rows and a digest that ignores their order.

    Raises:
        InvalidInputError: rows cannot be scored.
        SparkFailedError: Spark failed.
    """
    from pyspark import cloudpickle
    from pyspark.sql import functions as F  # noqa: N812
    from pyspark.sql.pandas.types import from_arrow_type, to_arrow_schema
    from pyspark.sql.types import StructType

    refusal = f"Cannot score {data}:"
    signature = mlflow.models.Model.load(model).signature
    with in_a_line(refusal):
        frame = spark.read.parquet(data)
        try:
            names = batch_worker.check_columns(to_arrow_schema(frame.schema), signature, key)
        except ValueError as error:
            raise InvalidInputError(f"{refusal} {error}") from None
        columns = []
        for name in dict.fromkeys([key, *names]):
            columns.append(F.col("`" + name.replace("`", "``") + "`"))
        frame = frame.select(*columns)
        total = F.sum(F.xxhash64(*columns).cast("decimal(38, 0)"))
        rows, keys, digest = frame.agg(F.count("*"), F.count_distinct(columns[0]), total).first()
    if rows == 0:
        raise InvalidInputError(f"{refusal} there are no rows")
    if keys < rows:
        raise InvalidInputError(f"{refusal} two rows have the same {key}, or it is missing")
    cloudpickle.register_pickle_by_value(batch_worker)  # the workers do not have this package
    predictions = StructType().add(key, frame.schema[key].dataType)
    predictions.add("prediction", from_arrow_type(batch_worker.prediction_type(signature)))

    def score_part(batches):
        return batch_worker.score_batches(batches, model, key)

    with in_a_line(refusal):
        frame.mapInArrow(score_part, predictions).write.mode("error").parquet(output)
    return rows, f"{int(digest) % 2**64:016x}"


@contextlib.contextmanager
def spark_session(
    master: str, scratch: Path, python: Path | None = None
) -> Iterator["SparkSession"]:
    """Start Spark and give its session to the block. At its end Java has ended.

    A process can do this once. A local Spark listens on the loopback interface only.

    Args:
        master: the address of Spark. ``local[*]`` is all cores of this machine.
        scratch: a folder for temporary files. What Spark prints is in ``spark.log`` there.
        python: the Python of the workers. The default is this one.

    Raises:
        SparkFailedError: Java is missing or does not start Spark.
    """
    if not shutil.which("java") and not os.environ.get("JAVA_HOME"):
        remedy = "On Debian: apt-get install openjdk-17-jre-headless"
        raise SparkFailedError(f"Java 17 or later is missing. {remedy}")
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkRuntimeError
    from pyspark.java_gateway import launch_gateway
    from pyspark.sql import SparkSession

    log = Path(scratch) / "spark.log"
    settings = SparkConf().setAll(list(spark_settings(master, Path(scratch)).items()))
    with log.open("a") as output, contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, PYSPARK_PYTHON=str(python or sys.executable)))
        try:
            gateway = launch_gateway(settings, {"stdout": output, "stderr": output})
            stack.callback(end_java, gateway)
            with in_a_line("Spark did not start:"):
                session = SparkSession(SparkContext(conf=settings, gateway=gateway))
        except ConnectionRefusedError:
            remedy = "It has ended in this process. Use a new one."
            raise SparkFailedError(f"Spark cannot start again. {remedy}") from None
        except PySparkRuntimeError:
            printed = log.read_text(errors="replace")
            lines = re.findall(r"(?im)^(?!\s).*(?:error|exception|unrecognized).*$", printed)
            reason = " ".join(lines[:1])
            raise SparkFailedError(
                f"Java did not start Spark. It must be 17 or later. {reason}"
            ) from None
        stack.callback(session.stop)
        yield session


def spark_settings(master: str, scratch: Path) -> dict[str, str]:
    """Return the settings of a quiet session. On a cluster, all others are the cluster's own."""
    settings = {
        "spark.master": master,
        "spark.app.name": "lifecycle",
        "spark.log.level": "ERROR",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
    }
    if not master.startswith("local"):
        return settings
    temporary = shlex.quote(f"-Djava.io.tmpdir={scratch}")
    return settings | {
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.extraJavaOptions": f"{temporary} -XX:-UsePerfData",
        "spark.local.dir": f"{scratch}/spark",
        "spark.sql.warehouse.dir": f"{scratch}/warehouse",
        "spark.sql.artifact.isolation.enabled": "false",  # or it writes to the working directory
    }


def end_java(gateway) -> None:
    """End the Java process of a session that has stopped."""
    gateway.shutdown()
    if gateway.proc:
        gateway.proc.stdin.close()  # asks it to end
        try:
            gateway.proc.wait(timeout=30)
        except subprocess.TimeoutExpired:
            gateway.proc.kill()
            gateway.proc.wait()


@contextlib.contextmanager
def in_a_line(refusal: str) -> Iterator[None]:
    """Say in a line what Spark says in a page of Java.

    Raises:
        InvalidInputError: a worker refused a value.
        SparkFailedError: Spark failed in another way.
    """
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        text = str(error)
        refused = re.search(r"ValueError: (.* not finite)", text)
        if refused:
            raise InvalidInputError(f"{refusal} {refused[1]}") from None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        named = r"(: )?[\w.]*(Error|Exception): |\[[A-Z_.]+\] "
        named_lines = [line for line in lines if re.match(named, line)] or lines
        reason = printable(named_lines[-1].removeprefix(": "))
        raise SparkFailedError(f"{refusal} {reason}") from None
