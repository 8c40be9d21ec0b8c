"""A Spark session that leaves nothing behind, and a model's environment whose archives are verified.

PySpark starts a Java process that lives as long as Python, listens on every interface, and writes on the screen.
MLflow's ``spark_udf(env_manager="uv")`` builds the environment of a model without hashes (mlflow#4886, mlflow#12478).
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from mlflow_lifecycle.environments import find_overrides
from mlflow_lifecycle.exceptions import EnvironmentNotBuiltError, SparkFailedError
from mlflow_lifecycle.experiments import printable

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@contextlib.contextmanager
def spark_session(master: str, scratch: Path) -> Iterator["SparkSession"]:
    """Start Spark, quietly, and give its session to the block; at its end Java has ended. A process can do this once.

    A local Spark listens on the loopback interface only, and keeps its files in ``scratch``.

    Args:
        master: Spark's address: ``local[*]`` is all cores of this machine.
        scratch: a folder, which the caller removes. What Spark and its workers print is in ``spark.log`` there.

    Raises:
        SparkFailedError: PySpark or Java is missing, or Spark does not start, such as with a master out of reach.
    """
    if find_spec("pyspark") is None:
        raise SparkFailedError("PySpark is missing. Install it: make scale")
    if not shutil.which("java") and not os.environ.get("JAVA_HOME"):
        raise SparkFailedError(
            "Java 17 or later is missing. On Debian: apt-get install openjdk-17-jre-headless"
        )
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkRuntimeError
    from pyspark.java_gateway import launch_gateway
    from pyspark.sql import SparkSession

    log = Path(scratch) / "spark.log"
    python = {"PYSPARK_PYTHON": os.environ.get("PYSPARK_PYTHON", sys.executable)}
    with log.open("a") as output, contextlib.ExitStack() as stack:
        try:
            with patch.dict(os.environ, python):
                configuration = SparkConf().setAll(
                    list(spark_settings(master, Path(scratch)).items())
                )
                gateway = launch_gateway(configuration, {"stdout": output, "stderr": output})
                stack.callback(end_java, gateway)
                with in_a_line("Spark did not start:"):
                    session = SparkSession(SparkContext(conf=configuration, gateway=gateway))
        except ConnectionRefusedError:
            raise SparkFailedError(
                "Spark has ended in this process and cannot start again. Use a new one."
            ) from None
        except PySparkRuntimeError:
            said = re.findall(
                r"(?im)^(?!\s).*(?:error|exception|unrecognized).*$",
                log.read_text(errors="replace"),
            )
            raise SparkFailedError(
                f"Java, 17 or later, did not start Spark: {' '.join(said[:1])}"
            ) from None
        stack.callback(session.stop)
        yield session


def spark_settings(master: str, scratch: Path) -> dict[str, str]:
    """Return the settings of a quiet session; where the master is a cluster, all others are the cluster's own."""
    settings = {"spark.master": master, "spark.app.name": "lifecycle", "spark.log.level": "ERROR"}
    settings |= {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
    if master.startswith("local"):
        temporary = shlex.quote(f"-Djava.io.tmpdir={scratch}")
        settings |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
        settings |= {
            "spark.local.dir": f"{scratch}/spark",
            "spark.sql.warehouse.dir": f"{scratch}/warehouse",
        }
        settings |= {"spark.driver.extraJavaOptions": f"{temporary} -XX:-UsePerfData"}
        settings |= {
            "spark.sql.artifact.isolation.enabled": "false"
        }  # its folder would be in the working directory
    return settings


def end_java(gateway) -> None:
    """End the Java process behind a session that has stopped, and wait until it is gone."""
    gateway.shutdown()
    if gateway.proc:
        gateway.proc.stdin.close()  # the sign for it to end
        try:
            gateway.proc.wait(timeout=30)
        except subprocess.TimeoutExpired:
            gateway.proc.kill()
            gateway.proc.wait()


@contextlib.contextmanager
def in_a_line(refusal: str) -> Iterator[None]:
    """Say after ``refusal``, in a line, what Spark says in a page of Java.

    Raises:
        SparkFailedError: Spark failed in the block.
    """
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = [
            line
            for line in lines
            if re.match(r"(: )?[\w.]*(Error|Exception): |\[[A-Z_.]+\] ", line)
        ]
        raise SparkFailedError(
            f"{refusal} {printable((told or lines)[-1].removeprefix(': '))}"
        ) from None


@contextlib.contextmanager
def verified_archives(lock: str | Path) -> Iterator[None]:
    """Let MLflow build a model's environment by uv in this block, every archive downloaded and verified by ``lock``.

    uv takes hashes from its constraints, and is told so by environment variables. It reads no settings file, and no
    other variable except those of the network. What it prints is kept from the screen. An environment that this
    process has built before, MLflow takes again as it is. On a cluster the machines build it, and need the same
    variables there.

    Args:
        lock: the project's list, with the hashes of every archive, those of pip, setuptools and wheel included.

    Raises:
        EnvironmentNotBuiltError: an archive is not the one in the lock, or a package is not in it; in uv's own words.
    """
    from mlflow.utils.process import ShellCommandException

    if not Path(lock).is_file():
        raise EnvironmentNotBuiltError(
            f"There is no {lock} with the hashes. Put it there: git checkout {lock}"
        )
    if " " in tempfile.gettempdir():
        raise EnvironmentNotBuiltError(
            f"Set TMPDIR to a folder without a space, not {tempfile.gettempdir()}"
        )
    programs = [
        sysconfig.get_path("scripts"),
        str(Path(sys.executable).resolve().parent),
        os.environ["PATH"],
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile("w+", encoding="utf-8") as log,
    ):
        shutil.copy(lock, f"{folder}/lock.txt")  # uv takes a space in a path for the end of it
        variables = {
            "PATH": os.pathsep.join(programs),
            "UV_CACHE_DIR": f"{folder}/cache",
            "UV_NO_BUILD": "true",
        }
        variables |= {
            "UV_REQUIRE_HASHES": "true",
            "UV_CONSTRAINT": f"{folder}/lock.txt",
            "UV_NO_CONFIG": "true",
        }
        try:
            with patch.dict(os.environ), printing_to(log):
                for name in find_overrides(list(os.environ)):
                    del os.environ[name]
                os.environ.update(variables)
                yield
        except ShellCommandException:
            log.seek(0)
            text = " ".join(log.read().split())  # uv breaks lines as wide as the terminal
            said = re.search(r"(?:error: |\u00d7 )(.+?)(?= Expected:| hint:| \d{4}/\d\d/|$)", text)
            cause = said[1].replace(" ╰─▶", ":") if said else "uv gave no reason"
            what = f"The model's environment was not built. {printable(cause)}."
            raise EnvironmentNotBuiltError(
                f"{what} Give the lock that the model was logged with."
            ) from None


@contextlib.contextmanager
def printing_to(log) -> Iterator[None]:
    """Send what this process and its children print to the file ``log``."""
    sys.stdout.flush(), sys.stderr.flush()
    screen = os.dup(1), os.dup(2)
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(screen[0], 1), os.dup2(screen[1], 2)
        os.close(screen[0]), os.close(screen[1])
