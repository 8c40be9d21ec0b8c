"""The environment built from a model's recorded pins: what is refused, what it holds, and what it predicts.

All is real: uv, the package index, the models. Refusals use six, the smallest package in the lock.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from asking import inferred
from execution import ROOT, snapshot
from packaging.requirements import Requirement
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from versions import LOCK, save

from mlflow_lifecycle import environments
from mlflow_lifecycle.environments import build_environment, own_environment, predict_in, python_note
from mlflow_lifecycle.exceptions import EnvironmentNotBuiltError, PredictionFailedError
from mlflow_lifecycle.pins import read_pins

pytestmark = pytest.mark.extended  # it takes long

SIX = re.search(r"^six==.+\\\n(?: +--hash=.+\n)+", LOCK.read_text(encoding="utf-8"), re.MULTILINE)[0]
PIN = SIX.split()[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Give the folder of a model as it is downloaded, and rows whose numbers need all their digits, with one gap."""
    folder = tmp_path_factory.mktemp("model") / "model"
    rows = pd.DataFrame(np.random.default_rng(0).normal(size=(500, 2)), columns=["first", "second"])
    rows.loc[3, "second"] = np.nan
    estimator = make_pipeline(SimpleImputer(), LinearRegression())
    save(folder, estimator, rows.assign(third=rows["first"] / 3), "third", skops_trusted_types=["numpy.dtype"])
    return folder, rows


@pytest.fixture(scope="module")
def python(model, tmp_path_factory):
    """Give the Python of the model's own environment, in a folder whose name has a space and a letter beyond ASCII."""
    return build_environment(
        model[0] / "requirements.txt", tmp_path_factory.mktemp("own") / "Umgebung für mich", lock=LOCK
    )


@pytest.fixture
def small(tmp_path):
    """Give a folder with a recorded list of one package and its lock."""
    (tmp_path / "requirements.txt").write_text(f"{PIN}\n")
    (tmp_path / "lock.txt").write_text(SIX)
    return tmp_path


def build_small(folder: Path, **options) -> Path:
    """Build the small list's environment in ``folder / "environment"``."""
    return build_environment(folder / "requirements.txt", folder / "environment", lock=folder / "lock.txt", **options)


def installed_six(python: Path) -> str:
    """Return the source of six in the environment of ``python``."""
    command = [python, "-c", "import six, pathlib; print(pathlib.Path(six.__file__).read_text())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def damaged(small):
    """Give a package cache, filled by a build, in which an installed file was then edited."""
    cache = small / "cache"
    build_small(small, cache=cache)
    shutil.rmtree(small / "environment")
    (file,) = cache.rglob("six.py")
    file.write_text(file.read_text() + "# edited\n")
    return cache


def test_environment_holds_the_recorded_packages_and_no_others(model, python):
    # when the packages in the environment are listed
    command = [sys.executable, "-m", "uv", "pip", "list", "--format", "json", "--python", python]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # then they are those that apply here
    pins = [Requirement(line) for line in read_pins(model[0] / "requirements.txt")]
    recorded = {f"{pin.name}{pin.specifier}" for pin in pins if pin.marker is None or pin.marker.evaluate()}
    assert {f"{package['name']}=={package['version']}" for package in listed} == recorded


def test_predictions_equal_those_in_this_process_or_end_with_the_reason(model, python):
    # given a model, and rows with a gap and with numbers that MLflow reads from CSV with an error
    folder, rows = model
    # when both environments predict
    predictions = predict_in(python, folder, rows)
    # then no number differs
    assert list(predictions.predicted) == mlflow.pyfunc.load_model(str(folder)).predict(rows).tolist()
    # and when a column is missing
    with pytest.raises(PredictionFailedError, match=r"gave no predictions.*second"):
        predict_in(python, folder, rows[["first"]])


def test_number_of_every_type_is_predicted(tmp_path):
    # given a model that learned from columns of these types
    rows = pd.DataFrame({"kind": ["x", "y"] * 10})
    for dtype in ("float32", "float64", "int32", "int64", "bool"):
        rows[dtype] = np.arange(20).astype(dtype)
    estimator, features = LogisticRegression(), rows.drop(columns="kind")
    options = {"signature": inferred(features, rows["kind"]), "input_example": None}
    folder = save(tmp_path / "model", estimator, rows, "kind", **options)
    # then it predicts the same in another process
    predictions = predict_in(Path(sys.executable), folder, features)
    assert predictions.probabilities.tolist() == estimator.predict_proba(features).tolist()


def test_gap_in_text_is_the_one_that_the_model_learned(tmp_path):
    # given a model that learned from a text with gaps, as read_csv reads them
    rows = pd.DataFrame({"group": np.array(["a", "b", np.nan] * 20, dtype=object), "number": [0.5, np.nan, 1.5] * 20})
    rows["kind"] = ["x", "y", "x"] * 20
    encode = make_column_transformer((OneHotEncoder(), ["group"]), (SimpleImputer(), ["number"]))
    estimator = make_pipeline(encode, LogisticRegression())
    folder = save(tmp_path / "model", estimator, rows, "kind", skops_trusted_types=["numpy.dtype"])
    # then it predicts the same in another process
    predictions = predict_in(Path(sys.executable), folder, rows.drop(columns="kind"))
    assert list(predictions.predicted) == rows["kind"].tolist()
    assert predictions.probabilities.tolist() == estimator.predict_proba(rows).tolist()


def test_changed_hash_is_refused_by_the_name_of_the_package(small, monkeypatch):
    # given a lock with other hashes, and a variable that turns uv's verification off
    monkeypatch.setenv("UV_NO_VERIFY_HASHES", "1")
    (small / "lock.txt").write_text(re.sub(r"sha256:....", "sha256:0000", SIX))
    # when the environment is built, then the error names the package, and nothing is left behind
    before = snapshot(small)
    with pytest.raises(EnvironmentNotBuiltError, match=r"Do not use it.*\n(?s:.*)six==1"):
        build_small(small)
    assert snapshot(small) == before
    assert not (small / "environment").exists()


def foreign_six(folder: Path) -> str:
    """Make a wheel that claims to be six, and return a requirement with its address and its own hash."""
    path = folder / f"{PIN.replace('==', '-')}-py3-none-any.whl"
    about = f"{PIN.replace('==', '-')}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("six.py", "foreign = True\n")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: six\nVersion: {PIN.split('==')[1]}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "six.py,,\n")
    return f"six @ {path.as_uri()}#sha256={sha256(path.read_bytes()).hexdigest()}"


def test_settings_file_of_uv_and_program_in_the_working_directory_do_not_change_what_is_built(small, monkeypatch):
    """Attack 25."""
    # given settings files of the user, in the working directory and above it, that send packages elsewhere, and name a
    # foreign archive with its own hash; and a program with the name of the module that starts uv
    work = small / "above" / "work"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(small / "settings"))
    elsewhere = json.dumps(str(small / "elsewhere"))
    foreign = json.dumps(foreign_six(small))
    for folder in (work, work.parent, small / "settings/uv"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "uv.toml").write_text(f"constraint-dependencies = [{foreign}]\n[pip]\ntarget = {elsewhere}\n")
    (work / "uv.py").write_text("open('ran', 'w')\n")
    # when the environment is built, then it holds the archive in the lock, and the program did not run
    assert "def with_metaclass" in installed_six(build_small(small))
    assert not (work / "ran").exists()


def test_package_missing_in_the_lock_is_refused_by_name(small):
    (small / "requirements.txt").write_text(f"{PIN}\npackaging==26.0\n")
    with pytest.raises(EnvironmentNotBuiltError, match=r"no hash for this version(?s:.*)packaging==26.0"):
        build_small(small)


def test_list_that_leaves_out_a_needed_package_is_refused_by_name(small):
    # given a recorded list without six, which python-dateutil needs
    (small / "requirements.txt").write_text(f"python-dateutil=={version('python-dateutil')}\n")
    # when it is built with the full lock, then six is not added silently
    with pytest.raises(EnvironmentNotBuiltError, match=r"incomplete(?s:.*)six"):
        build_environment(small / "requirements.txt", small / "environment", lock=LOCK)


def test_folder_that_is_there_is_left_alone(small):
    (small / "environment").mkdir()
    (small / "environment" / "mine.txt").touch()
    with pytest.raises(FileExistsError):
        build_small(small)
    assert (small / "environment" / "mine.txt").exists()


def test_offline_with_an_empty_cache_is_said(small):
    with pytest.raises(EnvironmentNotBuiltError, match=r"Build once online with the same cache(?s:.*)six"):
        build_small(small, cache=small / "cache", offline=True)


def test_environment_shares_no_file_with_its_cache_and_can_be_built_from_it_offline(small):
    # given a cache that a build has filled
    python = build_small(small, cache=small / "cache")
    files = [path for path in python.parent.parent.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {path.stat().st_nlink for path in files} == {1}
    shutil.rmtree(small / "environment")
    # when it is built offline, then the package is there
    assert "def with_metaclass" in installed_six(build_small(small, cache=small / "cache", offline=True))


def test_silent_index_is_said_without_its_password(small, monkeypatch):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://me:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(EnvironmentNotBuiltError, match="index does not answer") as error:
        build_small(small)
    assert "secret" not in str(error.value)


def test_edit_in_the_users_cache_does_not_reach_the_environment(small, damaged, monkeypatch):
    # given a user's cache in which a package was edited
    monkeypatch.setenv("UV_CACHE_DIR", str(damaged))
    # when an environment is built with no cache named, then it holds the package as it was published
    assert "# edited" not in installed_six(build_small(small))


def test_edited_or_lost_file_in_a_named_cache_is_refused(small, damaged):
    with pytest.raises(EnvironmentNotBuiltError, match=r"six\.py in the cache is damaged"):
        build_small(small, cache=damaged, offline=True)
    assert not (small / "environment").exists()
    # and when the file is gone
    for path in damaged.rglob("six.py"):
        path.unlink()
    with pytest.raises(EnvironmentNotBuiltError, match=r"six\.py in the cache is damaged"):
        build_small(small, cache=damaged, offline=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal for one process")
def test_environment_that_another_process_has_kept_meanwhile_is_used(model, tmp_path, monkeypatch):
    # given a process that builds the same environment, and is faster
    def build(requirements: Path, folder: Path, **options) -> None:
        for place in (folder, folder.with_suffix("")):
            place.mkdir()
            (place / "built").touch()

    monkeypatch.setattr(environments, "build_environment", build)
    (tmp_path / "packages.txt").write_text("")
    # when, then
    with own_environment(model[0], tmp_path / "packages.txt", tmp_path / "cache") as python:
        (kept,) = (tmp_path / "cache/environments").iterdir()
        assert python.is_relative_to(kept)


def test_interruption_leaves_nothing_behind(model, small):
    # given a build in another process, under way
    before = snapshot(small)
    code = "import sys; from mlflow_lifecycle import environments\n"
    code += "environments.build_environment(*sys.argv[1:3], lock=sys.argv[3])"
    command = [sys.executable, "-c", code, model[0] / "requirements.txt", small / "environment", LOCK]
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not list(small.glob("packages-*/cache/archive-v0/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    # when it is interrupted as by Ctrl-C
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=30)
    # then it ends, and neither environment nor cache is there
    assert b"KeyboardInterrupt" in error
    assert snapshot(small) == before
    assert sorted(path.name for path in small.iterdir()) == ["lock.txt", "requirements.txt"]


@pytest.mark.parametrize(("recorded", "said"), [("3.8.1", "under Python 3.8.1."), (sys.version.split()[0], "None")])
def test_other_version_of_python_is_said(tmp_path, recorded, said):
    mlflow.models.Model(flavors={"python_function": {"python_version": recorded}}).save(tmp_path / "MLmodel")
    assert said in str(python_note(tmp_path))
