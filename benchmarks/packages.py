"""Measure what it takes to renew, compare and audit a version, beside the calls of MLflow and of uv.

Usage: python benchmarks/packages.py [--rounds 3]

The version is a LogisticRegression on Iris with the pins of this project. The new packages have pandas 3.

- renew: the old and the new environment are built, every package downloaded and verified. Both predict the training
  rows, and the same model is registered with the new packages. The peer predicts the rows by two calls of
  `mlflow.models.predict(env_manager="uv")`, compares the answers, and logs and registers the model with the new list.
  Its environments are new ones, too, from packages in uv's cache as they are.
- compare: two versions, each in its own environment, predict the rows. The peer is the two calls of `predict` again.
- compare, kept: the same, with the environments of an earlier comparison in `--cache`.
- audit: a version is verified, and its packages are looked up in a copy of OSV's database. The peer is `uv audit` for
  the same list and the same copy, without the verification. The copy has one advisory, so its size is not measured.

A round runs both, in turn; a ratio is formed within a round, and its median over the rounds is the figure, with the
range. The network is in the first two figures of this project.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import sysconfig
import tempfile
import warnings
import zipfile
from pathlib import Path

os.environ |= {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_LOGGING_LEVEL": "ERROR"}

import mlflow
import pandas as pd
import pytest
from gate import ROOT, measure

sys.path.append(str(ROOT / "tests/helpers"))

from versions import NAME, iris_rows, register, store_in

from mlflow_lifecycle.audit import audit_model, audit_pins, read_version_pins, serve_database
from mlflow_lifecycle.difference import compare_versions
from mlflow_lifecycle.pins import read_pins
from mlflow_lifecycle.renew import renew_version, replace_packages
from mlflow_lifecycle.signing.keys import own_key, own_public_key
from mlflow_lifecycle.signing.verify import verified

NEW = ROOT / "guides/07_pins/pandas_3.txt"
FIRST = f"models:/{NAME}/1"
SECOND = f"models:/{NAME}/2"
ADVISORY = {
    "id": "PYSEC-0000-1",
    "modified": "2026-01-01T00:00:00Z",
    "affected": [{"package": {"name": "somepackage", "ecosystem": "PyPI"}, "versions": ["1.0"]}],
}


def predict_by_mlflow(folder: Path, place: Path) -> pd.DataFrame:
    """Return what a model predicts in an environment that MLflow builds for it."""
    environments = place / "environments"
    shutil.rmtree(environments, ignore_errors=True)
    os.environ["MLFLOW_ENV_ROOT"] = str(environments)
    answer = place / "answer.json"
    rows = iris_rows().drop(columns="species")
    mlflow.models.predict(str(folder), rows, env_manager="uv", output_path=str(answer))
    return pd.DataFrame(json.loads(answer.read_text(encoding="utf-8")))


def compare_by_mlflow(first: Path, second: Path, place: Path) -> None:
    """Predict the rows with both models, and compare the answers."""
    assert predict_by_mlflow(first, place).equals(predict_by_mlflow(second, place))


def renew_by_mlflow(first: Path, second: Path, place: Path) -> None:
    """Compare the answers, and register the model with the new packages."""
    compare_by_mlflow(first, second, place)
    model = mlflow.sklearn.load_model(str(first))
    saved = mlflow.models.Model.load(str(first))
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            model,
            name="model",
            signature=saved.signature,
            pip_requirements=str(NEW),
            registered_model_name="peer",
        )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ["PATH"] = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"  # for MLflow to find uv
    with (
        tempfile.TemporaryDirectory() as name,
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(name),
        store_in(Path(name), patch) as client,
    ):
        place = Path(name)
        lock = place / "lock.txt"
        lock.write_text((ROOT / "requirements.txt").read_text() + (NEW.parent / "lock.txt").read_text())
        register(place)
        renew_version(FIRST, NEW, lock, key=own_key())
        client.set_registered_model_alias(NAME, "production", 1)
        with verified(FIRST, own_public_key()) as copy:
            first = Path(shutil.copytree(copy.folder, place / "first"))
        second = replace_packages(first, read_pins(NEW), place / "second")
        rows = iris_rows()
        cache = place / "cache"
        database = place / "all.zip"
        with zipfile.ZipFile(database, "w") as archive:
            archive.writestr(f"{ADVISORY['id']}.json", json.dumps(ADVISORY))
        pins = read_version_pins(first)

        def compare(cache: Path | None = None) -> None:
            compare_versions(FIRST, SECOND, own_public_key(), rows=rows, target="species", cache=cache)

        def audit() -> None:
            (found,) = audit_model(NAME, own_public_key(), service=service)
            assert found.packages == len(pins)
            assert not found.failure

        print(f"{'':24}{'ours (s)':>14}{'peer (s)':>14}   ours / peer")
        measure(
            "renew",
            lambda: renew_version(FIRST, NEW, lock, key=own_key()),
            lambda: renew_by_mlflow(first, second, place),
            rounds,
        )
        measure("compare", compare, lambda: compare_by_mlflow(first, second, place), rounds)
        measure("compare, kept", lambda: compare(cache), lambda: compare_by_mlflow(first, second, place), rounds)
        with serve_database(database) as service:
            measure("audit", audit, lambda: audit_pins(pins, service), rounds)


if __name__ == "__main__":
    main()
