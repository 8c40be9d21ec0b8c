"""Promotion from one store to another: between two files, and between two real tracking servers."""

import time
from dataclasses import replace

import mlflow
import pytest
from execution import free_port, tracking_server
from releases import ROWS_TEST, ROWS_TRAIN, SENTENCES, SETTINGS, released
from sklearn.linear_model import LogisticRegression
from versions import register

import mlflow_lifecycle.signing.adopt
from mlflow_lifecycle.exceptions import GateClosedError, InvalidInputError, StoreUnusableError
from mlflow_lifecycle.releases.promote import promote
from mlflow_lifecycle.releases.release import Release
from mlflow_lifecycle.signing.keys import own_key, own_public_key
from mlflow_lifecycle.signing.statement import register_candidate
from mlflow_lifecycle.signing.verify import release_tag, verified

TOO_HIGH = replace(SETTINGS, thresholds={"accuracy_score": 0.999})


def promoted(to: str, uri: str = "models:/iris@production", settings=SETTINGS) -> Release:
    return promote(uri, to, ROWS_TEST, "species", settings, key=own_key(), **SENTENCES)


def test_promotion_within_a_run_or_to_a_server_that_is_down_is_refused_at_once(folder):
    began = time.monotonic()
    with pytest.raises(StoreUnusableError, match="Start the server"):
        promoted(f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - began < 60  # MLflow itself tries for four minutes
    with mlflow.start_run(), pytest.raises(InvalidInputError, match="A run is active here"):
        promoted("sqlite:///other.db")


@pytest.mark.extended  # it takes long
def test_promotion_that_fails_deletes_no_version_that_somebody_else_registered_meanwhile(folder, tmp_path, monkeypatch):
    # given another store, in which somebody registers a version during the promotion
    to = f"sqlite:///{tmp_path.as_posix()}/other.db"
    there = mlflow.MlflowClient(to)

    def meanwhile(*arguments, **options):
        version = register_candidate(*arguments, **options)
        theirs = there.create_model_version("iris", tmp_path.as_uri())
        there.set_registered_model_alias("iris", "theirs", theirs.version)
        return version

    monkeypatch.setattr(mlflow_lifecycle.signing.adopt, "register_candidate", meanwhile)
    # when the gate refuses the promoted one
    with pytest.raises(GateClosedError, match="thresholds failed"):
        promoted(to, settings=TOO_HIGH)
    # then that one is gone, and the other one is there
    assert str(there.get_model_version_by_alias("iris", "theirs").version) == "2"
    assert [str(version.version) for version in there.search_model_versions("name = 'iris'")] == ["2"]


@pytest.mark.extended  # it takes long
def test_promotion_that_fails_after_the_alias_has_moved_leaves_production_usable(folder, tmp_path, monkeypatch):
    # given another store, which fails when the version is said to be released
    to = f"sqlite:///{tmp_path.as_posix()}/other.db"
    original = mlflow.MlflowClient.set_model_version_tag

    def failing(self, name, version, key, value):
        if key == release_tag("production"):
            raise OSError("the store is gone")
        original(self, name, version, key, value)

    # when
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_model_version_tag", failing)
        with pytest.raises(OSError, match="the store is gone"):
            promoted(to)
    # then
    public = own_public_key()
    mlflow.set_tracking_uri(to)
    with verified("models:/iris@production", public, purpose="release") as copy:
        assert copy.statement.version == "1"


@pytest.mark.extended  # two servers
def test_version_is_released_on_the_other_server_with_tags_that_lead_back(tmp_path, no_pictures, monkeypatch):
    # given two servers, the first with a good and a cautious version
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    monkeypatch.setenv("LIFECYCLE_KEYS", str(tmp_path / "keys"))
    with tracking_server(tmp_path / "one") as one, tracking_server(tmp_path / "two") as two:
        mlflow.set_tracking_uri(one)
        mlflow.set_experiment("versions")
        register(tmp_path, LogisticRegression(max_iter=1000), ROWS_TRAIN)
        register(tmp_path, LogisticRegression(C=0.01, max_iter=1000), ROWS_TRAIN)
        released("models:/iris/1")
        here = mlflow.MlflowClient().get_model_version("iris", 1)
        # when a version that the gate refuses is promoted, then nothing is left there
        with pytest.raises(GateClosedError, match="thresholds failed"):
            promoted(two, settings=TOO_HIGH)
        there = mlflow.MlflowClient(two)
        assert there.search_registered_models() == []
        assert there.search_logged_models([item.experiment_id for item in there.search_experiments()]) == []
        # when a good one is
        made = promoted(two)
        # then it is in production there, and says where it is from
        assert (made.version, made.before, made.alias) == ("1", "", "production")
        version = there.get_model_version_by_alias("iris", "production")
        assert version.tags["promoted_from"] == one
        assert version.tags["promoted_version"] == "iris/1"
        assert version.tags["promoted_run"] == here.run_id
        assert there.get_run(version.run_id).data.params == mlflow.get_run(here.run_id).data.params
        # and this process still works with the first server
        assert mlflow.get_tracking_uri() == one
        # and when a worse one is promoted, the gate there stops it and leaves the first as it is
        with pytest.raises(GateClosedError, match="baseline failed"):
            promoted(two, "models:/iris/2")
        assert len(there.search_model_versions("name = 'iris'")) == 1
        # and that one verifies there, under its own number
        mlflow.set_tracking_uri(two)
        with verified("models:/iris@production", own_public_key(), purpose="release") as copy:
            assert copy.statement.run_id == version.run_id
    mlflow.set_tracking_uri(None)
