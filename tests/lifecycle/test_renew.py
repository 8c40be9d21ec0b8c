"""renew and compare: the same model with new packages, in real environments."""

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from execution import ROOT
from sklearn.compose import make_column_transformer
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from versions import NAME, iris_rows, register, restored, store_in

from mlflow_lifecycle.cli import main
from mlflow_lifecycle.difference import compare_versions, find_changes, find_other_answers, log_difference, summary
from mlflow_lifecycle.exceptions import InvalidInputError, NotRenewedError
from mlflow_lifecycle.pins import locked, read_pins
from mlflow_lifecycle.policy import check_contents
from mlflow_lifecycle.renew import collect_rows, refuse_changes, renew_version, replace_packages
from mlflow_lifecycle.scoring import Predictions
from mlflow_lifecycle.signing.keys import own_key, own_public_key
from mlflow_lifecycle.signing.verify import verified

PANDAS_3 = ROOT / "guides/07_pins/pandas_3.txt"
TREE = ["sklearn.tree._tree.Tree"]
FEATURES = iris_rows().columns[:-1]


def gaps() -> pd.DataFrame:
    """Return Iris with a text column that is missing in every third row, as pandas 2 reads it from Parquet."""
    rows = iris_rows()
    return rows.assign(place=np.resize(np.array(["north", "south", None], dtype=object), len(rows)))


def model_of_gaps():
    encode = make_column_transformer(
        (StandardScaler(), list(FEATURES)), (OneHotEncoder(handle_unknown="ignore"), ["place"])
    )
    return make_pipeline(encode, LogisticRegression())


@pytest.fixture(scope="module")
def lock(tmp_path_factory):
    """Give a lock file with the hashes of today's packages and of pandas 3."""
    path = tmp_path_factory.mktemp("lock") / "lock.txt"
    path.write_text((ROOT / "requirements.txt").read_text() + (ROOT / "guides/07_pins/lock.txt").read_text())
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Give a folder in which packages and environments are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Give the folder of a store with a version of a model of numbers, and one of a model of a text with gaps."""
    folder = tmp_path_factory.mktemp("renewals") / "project"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch, store_in(folder, patch):
        register(folder)
        register(folder, model_of_gaps(), gaps(), name="gaps")
    return folder


@pytest.fixture
def project(made, monkeypatch):
    """Give that folder, with its store active. After the test it is as it was."""
    with restored(made), store_in(made, monkeypatch) as client:
        monkeypatch.chdir(made)
        yield client


def versions(client: mlflow.MlflowClient) -> list[tuple[str, str]]:
    return sorted((version.name, str(version.version)) for version in client.search_model_versions())


@pytest.mark.extended  # it builds environments
def test_model_that_answers_the_same_becomes_a_new_signed_version(project, lock, cache):
    # when a model of numbers is renewed to pandas 3
    renewal = renew_version(f"models:/{NAME}/1", PANDAS_3, lock, key=own_key(), cache=cache)
    # then there is a candidate with these packages, whose statement and tags lead back
    assert (renewal.uri, renewal.rows) == (f"models:/{NAME}/2", 150)
    with verified(renewal.uri, own_public_key()) as copy, verified(f"models:/{NAME}/1", own_public_key()) as old:
        assert read_pins(copy.folder / "requirements.txt") == read_pins(PANDAS_3)
        assert (copy.folder / "model.skops").read_bytes() == (old.folder / "model.skops").read_bytes()
        assert copy.statement.training_rows == old.statement.training_rows
        assert copy.statement.parameters == old.statement.parameters
    tags = project.get_model_version(NAME, "2").tags
    assert (tags["renewed_from"], tags["equal_predictions"]) == (f"{NAME}/1", "150")
    run = mlflow.get_run(renewal.run_id)
    assert run.info.status == "FINISHED"
    assert mlflow.get_experiment(run.info.experiment_id).name == "renewals"


@pytest.mark.extended  # it builds environments
def test_model_whose_probabilities_change_is_refused_and_nothing_is_registered(project, lock, cache):
    before = versions(project)
    with pytest.raises(
        NotRenewedError, match=r"51 of 151 rows differ.*Nothing was registered.*'place': None"
    ) as refusal:
        renew_version("models:/gaps/1", PANDAS_3, lock, key=own_key(), cache=cache)
    assert str(refusal.value).count(", probabilities [") == 3
    assert versions(project) == before
    (run,) = mlflow.search_runs(experiment_names=["renewals"], output_format="list")
    assert (run.info.status, run.data.tags["renewed_from"]) == ("FAILED", "gaps/1")


@pytest.mark.extended  # it builds environments
def test_model_that_cannot_be_used_with_the_new_packages_is_refused_with_the_cause(project, lock, cache, tmp_path):
    # given a list with an older scikit-learn
    pins = read_pins(ROOT / "model_requirements.txt")
    old = next(pin for pin in pins if pin.startswith("scikit-learn"))
    pins[pins.index(old)] = "scikit-learn==1.8.0"
    (tmp_path / "pins.txt").write_text("\n".join(pins) + "\n")
    # and a model that scikit-learn 1.8 cannot load
    register(tmp_path, GradientBoostingClassifier(n_estimators=2), name="boosted", skops_trusted_types=TREE)
    with pytest.raises(NotRenewedError, match=r"cannot be used with the new packages.*Train it again"):
        renew_version("models:/boosted/1", tmp_path / "pins.txt", lock, key=own_key(), trusted_types=TREE, cache=cache)


def test_packages_that_the_version_has_already_are_refused(project, lock):
    with pytest.raises(InvalidInputError, match=r"has the packages of .* already"):
        renew_version(f"models:/{NAME}/1", ROOT / "model_requirements.txt", lock, key=own_key())


def test_pin_without_a_hash_is_refused_before_anything_is_built(project):
    with pytest.raises(InvalidInputError, match="has no hash for pandas==3"):
        renew_version(f"models:/{NAME}/1", PANDAS_3, ROOT / "requirements.txt", key=own_key())


def test_each_optional_column_is_missing_in_a_row(project):
    with verified("models:/gaps/1", own_public_key()) as copy:
        rows = collect_rows(copy, gaps().head(2))
    assert len(rows) == 150 + 2 + 1
    assert rows.iloc[-1]["place"] is None
    assert rows.iloc[-1][FEATURES[0]] == rows.iloc[0][FEATURES[0]]


def test_version_without_training_rows_needs_rows(project, tmp_path):
    with verified(f"models:/{NAME}/1", own_public_key()) as copy:
        bare = replace(copy, training_rows=None)
        assert len(collect_rows(bare, iris_rows().head(3))) == 3
        with pytest.raises(InvalidInputError, match=r"no training data was signed.*--data FILE"):
            collect_rows(bare, None)


def test_copy_with_other_packages_passes_the_policy(project, lock, tmp_path):
    pins = read_pins(PANDAS_3)
    (tmp_path / "packages.txt").write_text(locked(pins, lock))
    with verified(f"models:/{NAME}/1", own_public_key()) as copy:
        folder = replace_packages(copy.folder, pins, tmp_path / "model")
    check_contents(folder, tmp_path / "packages.txt")


def predictions(*numbers: float) -> Predictions:
    return Predictions("regression", np.array(numbers))


def test_numbers_must_be_equal_bit_by_bit_or_within_the_tolerance():
    before, after = predictions(1.0, 2.0), predictions(1.0, 2.0 + 1e-12)
    rows = pd.DataFrame({"a": [1, 2]})
    with pytest.raises(NotRenewedError, match=r"1 of 2 rows differ .*5e-13.*2.0 -> 2.000000000001 for {'a': 2}"):
        refuse_changes(before, after, rows, 0.0)
    refuse_changes(before, after, rows, 1e-9)
    refuse_changes(before, before, rows, 0.0)


def test_only_facts_that_differ_are_changes():
    first = {("package", "a"): "1", ("package", "b"): "1", ("task", ""): "regression"}
    second = {("package", "a"): "2", ("package", "c"): "1", ("task", ""): "regression"}
    changes = find_changes(first, second)
    assert changes.to_numpy().tolist() == [
        ["package", "a", "1", "2"],
        ["package", "b", "1", ""],
        ["package", "c", "", "1"],
    ]


def test_other_answers_begin_with_the_largest_difference():
    rows = pd.DataFrame({"a": [1, 2, 3]}, index=[0, 1, 1])
    answers = find_other_answers(predictions(1.0, 2.0, 3.0), predictions(1.0, 2.1, 4.0), rows)
    assert answers["a"].tolist() == [3, 2]
    assert list(answers)[:3] == ["first", "second", "difference"]


def test_rows_without_a_label_are_refused_before_anything_is_built(project):
    rows = iris_rows()
    rows.loc[0, "species"] = None
    with pytest.raises(InvalidInputError, match="The column 'species' is missing in 1 of 150 rows"):
        compare_versions(f"models:/{NAME}/1", f"models:/{NAME}/1", own_public_key(), rows=rows, target="species")


def test_facts_are_compared_without_an_environment(project):
    register(Path.cwd(), LogisticRegression(C=2.0, max_iter=500))
    difference = compare_versions(f"models:/{NAME}/1", f"models:/{NAME}/2", own_public_key())
    assert summary(difference) == ["Nothing differs."]
    other = compare_versions(f"models:/{NAME}/1", "models:/gaps/1", own_public_key())
    assert "input column place: (none) -> string" in summary(other)


@pytest.mark.extended  # it builds an environment
def test_versions_are_compared_on_rows_by_the_command_and_kept_as_a_run(project, cache, tmp_path):
    # given a second version that is less sure of itself
    register(Path.cwd(), LogisticRegression(C=0.001, max_iter=500))
    iris_rows().to_csv(tmp_path / "rows.csv", index=False)
    # when both are compared
    command = ["compare", f"models:/{NAME}/1", f"models:/{NAME}/2", "--data", str(tmp_path / "rows.csv")]
    command += ["--target", "species", "--cache", str(cache), "--log", "--json"]
    answer = CliRunner().invoke(main, command)
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    # then the second is worse, and all its answers differ
    assert (found["rows"], found["measure"]) == (150, "log probability")
    assert found["gain"]["high"] < 0
    assert len(found["other_answers"]) == 150
    (run,) = mlflow.search_runs(experiment_names=["comparisons"], output_format="list")
    names = sorted(item.path for item in project.list_artifacts(run.info.run_id))
    assert names == ["changes.json", "difference.md", "other_answers.json"]


def test_text_of_a_run_cannot_become_markup(project):
    difference = compare_versions(f"models:/{NAME}/1", "models:/gaps/1", own_public_key())
    difference.changes.loc[0] = ["tag", "[x](javascript:alert(1))", "", "a"]
    run = log_difference(difference)
    assert "[x](" not in mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/difference.md")
