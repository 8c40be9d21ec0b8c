"""Signed versions: what was changed, or put in another's place, is not handed out, whoever can write to the store."""

import json
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from execution import snapshot
from releases import ROWS_TRAIN
from serving import serving
from versions import LOCK, files_of, iris_rows, register, save

from mlflow_lifecycle.datasets import fingerprint
from mlflow_lifecycle.exceptions import NotVerifiedError
from mlflow_lifecycle.signing.keys import own_key, own_public_key
from mlflow_lifecycle.signing.statement import Statement, check_name, register_candidate, sign
from mlflow_lifecycle.signing.verify import _is_in_active_store as is_in_active_store
from mlflow_lifecycle.signing.verify import _refuse_older as refuse_older
from mlflow_lifecycle.signing.verify import release_tag, released_now, verified, verify_release

INVISIBLE = "a\u200bb"


def release(number: str, moment: str) -> None:
    """Sign a version as released in production at a moment, and move the alias, as a release does."""
    with verified(f"models:/iris/{number}", own_public_key()) as copy:
        statement = replace(copy.statement, purpose="release", alias="production", released_at=moment)
        sign(copy.folder.parent, statement, own_key())
    client = mlflow.MlflowClient()
    client.set_registered_model_alias("iris", "production", number)
    client.set_model_version_tag("iris", number, release_tag("production"), moment)


@pytest.fixture
def folder(twice):
    """Give the folder with the store: versions 1 and 2 of iris were released in turn, and version 3 was not."""
    return twice


def accepted(uri: str = "models:/iris/2", **options) -> Statement:
    with verified(uri, own_public_key(), **options) as copy:
        return copy.statement


def refused(uri: str = "models:/iris/2", **options) -> str:
    with pytest.raises(NotVerifiedError) as caught:
        accepted(uri, **options)
    message = str(caught.value)
    assert message.startswith(f"Not loaded: {uri}. ")
    assert "\n" not in message
    return message


def evidence_of(number: int) -> list[Path]:
    """Return the folders in the store with what was signed of the version."""
    run = mlflow.get_run(mlflow.MlflowClient().get_model_version("iris", number).run_id)
    return sorted(Path(run.info.artifact_uri.removeprefix("file://"), "signed/iris", str(number)).iterdir())


def test_version_is_handed_out_as_it_was_saved(folder):
    with verified("models:/iris@production", own_public_key(), purpose="release") as copy:
        assert snapshot(copy.folder) == snapshot(files_of(2))
        assert pd.read_parquet(copy.training_rows).equals(ROWS_TRAIN.reset_index(drop=True))
        assert copy.statement.training_rows == fingerprint(ROWS_TRAIN)
        assert copy.packages.read_text().count("--hash=sha256:") > copy.packages.read_text().count("==")
        assert copy.model_id == mlflow.MlflowClient().get_model_version("iris", 2).source.rpartition("/")[2]
    assert not copy.folder.exists()


def test_logged_model_is_as_log_model_makes_it(folder):
    version = mlflow.MlflowClient().get_model_version("iris", 1)
    run = mlflow.get_run(version.run_id)
    (logged,) = run.outputs.model_outputs
    assert version.source == f"models:/{logged.model_id}"
    assert mlflow.get_logged_model(logged.model_id).status == "READY"
    info = mlflow.models.get_model_info("models:/iris/1")
    assert (info.model_id, info.run_id) == (logged.model_id, version.run_id)


@pytest.mark.parametrize("uri", ["models:/iris", "models:/iris/latest", "runs:/iris/1"])
def test_address_that_names_no_version_is_refused(folder, uri):
    with pytest.raises(
        ValueError, match=r"is not the address of a version. Write models:/name/3 or models:/name@alias"
    ):
        accepted(uri)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_in_any_file_is_refused(folder):
    for path in [*files_of(2).iterdir(), *evidence_of(2)[-1].iterdir()]:
        flip_a_bit(path)
        assert "It is not what was signed. Register the model again" in refused()
        flip_a_bit(path)
    assert accepted().version == "2"


def test_an_added_or_a_removed_file_is_refused(folder):
    for path in (files_of(2) / "evil_loader.py", evidence_of(2)[-1] / ".gitignore"):
        path.write_text("more")
        assert "Extra files found" in refused()
        path.unlink()
    (files_of(2) / "input_example.json").unlink()
    assert "input_example.json" in refused()


@pytest.mark.parametrize("place", ["model", "evidence"])
def test_files_over_the_size_limit_are_not_downloaded(folder, place):
    """Attack 39."""
    # given a large sparse file in a subfolder
    root = files_of(2) if place == "model" else evidence_of(2)[-1]
    (root / "more").mkdir()
    with (root / "more/large").open("wb") as file:
        file.truncate(3_000_000_000)
    # then
    assert "more than size_limit=2,000,000,000" in refused()


def test_size_limit_can_be_set(folder):
    assert "more than size_limit=10" in refused(size_limit=10)


def test_crafted_model_that_was_signed_is_refused(folder):
    # given a version that was signed by a careless colleague, and needs a type that nobody has reviewed
    from sklearn.ensemble import RandomForestClassifier

    types = ["sklearn.tree._tree.Tree"]
    register(folder, RandomForestClassifier(n_estimators=2), skops_trusted_types=types)
    assert "nobody has reviewed" in refused("models:/iris/4")
    assert accepted("models:/iris/4", trusted_types=types).version == "4"


def test_version_in_production_with_another_loader_is_refused_before_it_is_loaded(folder, tmp_path):
    # given code in the model, and a loader that runs it
    (files_of(2) / "code").mkdir()
    (files_of(2) / "code/evil_loader.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    path = files_of(2) / "MLmodel"
    text = path.read_text().replace("loader_module: mlflow.sklearn", "loader_module: evil_loader\n    code: code")
    path.write_text(text)
    # then
    refused("models:/iris@production")
    assert not (tmp_path / "ran").exists()


def test_what_the_store_makes_of_a_model_is_not_signed(folder, monkeypatch):
    # given somebody who changes the model in the store at the moment when it arrives there, before it is signed
    def watched(model_id, status, finalize=mlflow.finalize_logged_model):
        (Path(mlflow.get_logged_model(model_id).artifact_location.removeprefix("file://")) / "MLmodel").write_text(
            "evil"
        )
        return finalize(model_id, status)

    monkeypatch.setattr(mlflow, "finalize_logged_model", watched)
    # when it is registered, then the signature is that of the model as it was saved here
    register(folder)
    assert "Hash mismatch for model/MLmodel" in refused("models:/iris/4")


NO_PARQUET = r"Parquet cannot hold the training rows: .+ column colour .+\. Give each column values of one type"
REFUSED = {
    "loose pin": ({"pip_requirements": ["scikit-learn"]}, {}, "leaves the version open"),
    "name": ({}, {"name": "a#b"}, "must not contain"),
    "text and number": ({}, {"training_rows": iris_rows().assign(colour=["red", 1] * 75)}, NO_PARQUET),
    "complex": ({}, {"training_rows": iris_rows().assign(colour=[1j, 2j] * 75)}, NO_PARQUET),
}


@pytest.mark.parametrize(("options", "arguments", "refusal"), REFUSED.values(), ids=REFUSED)
def test_refused_candidate_leaves_nothing_in_the_store(folder, tmp_path, options, arguments, refusal):
    saved = save(tmp_path / "saved", **options)
    content = (saved / "MLmodel").read_text()
    arguments = {"name": "iris", "key": own_key(), "lock": LOCK, "training_rows": iris_rows()} | arguments
    # when
    with mlflow.start_run(), pytest.raises(ValueError, match=refusal):
        register_candidate(saved, **arguments)
    # then
    assert len(mlflow.search_logged_models(output_format="list")) == 3
    assert [model.name for model in mlflow.MlflowClient().search_registered_models()] == ["iris"]
    assert (saved / "MLmodel").read_text() == content


def test_candidate_without_a_run_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="A candidate belongs to a run"):
        register_candidate(save(tmp_path / "m"), "iris", key=own_key(), lock=LOCK, training_rows=iris_rows())


# On another host


def set_in_store(folder: Path, change: str, *values: str) -> None:
    """Change the store as somebody does who can write to its database."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        database.execute(f"UPDATE {change}", values)


@pytest.mark.parametrize(
    "change",
    [
        "model_versions SET source = ?1",
        "logged_models SET artifact_location = ?1",
        "runs SET artifact_uri = ?1",
        "experiments SET artifact_location = ?1",
    ],
)
def test_location_on_another_host_gets_no_password(folder, monkeypatch, change):
    """Attack 27."""
    # given a location that somebody has changed in the store, and the password of a tracking server
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with serving(b"") as (host, requests):
        address = f"{host}/api/2.0/mlflow-artifacts/artifacts"
        set_in_store(folder, change, address)
        if change.startswith("experiments"):
            set_in_store(folder, "runs SET artifact_uri = ?1", f"{address}/run")
        # then the version is refused, and that host was not asked
        assert "outside the active store" in refused()
    assert requests == []


@pytest.mark.parametrize("source", ["models:/iris/1", "{experiment}/../elsewhere"])
def test_source_that_is_no_place_of_the_active_store_is_refused(folder, source):
    version = mlflow.MlflowClient().get_model_version("iris", 2)
    experiment = mlflow.get_experiment(mlflow.get_run(version.run_id).info.experiment_id).artifact_location
    set_in_store(folder, "model_versions SET source = ?", source.format(experiment=experiment))
    assert "Its files are outside the active store" in refused()


@pytest.mark.parametrize(
    ("location", "accepted"),
    [
        ("mlflow-artifacts:/1/models", True),
        ("mlflow-artifacts://here:5000/1", True),
        ("http://here:5000/api/2.0/mlflow-artifacts/artifacts/1", True),
        ("s3://bucket/1", True),
        ("file:///mlruns/1", True),
        ("mlflow-artifacts://there:5000/1", False),
        ("http://here:5000@there/1", False),
        ("https://here:5000/1", False),
        ("ftp://here:5000/1", False),
        ("file://there/share", False),
        ("file:////there/share", False),
        ("file:///%5C%5Cthere/share", False),
    ],
)
def test_place_of_the_active_store_is_told_from_another(monkeypatch, location, accepted):
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "http://me:secret@here:5000")
    assert is_in_active_store(location) == accepted


# In another's place


def replace_files(target: Path, source: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


def test_other_version_with_its_signature_in_this_ones_place_is_refused(folder):
    replace_files(files_of(2), files_of(1))
    for there, other in zip(evidence_of(2), evidence_of(1), strict=True):
        replace_files(there, other)
    assert "The signature is for the release of version 1 of iris. Register the model again" in refused()


def test_version_that_the_database_gives_another_name_is_refused(folder):
    # given a version that two values in the database make one of another model
    mlflow.MlflowClient().create_registered_model("other")
    root = evidence_of(3)[0].parents[1]
    set_in_store(folder, "model_versions SET name = 'other' WHERE version = 3")
    shutil.copytree(root, root.with_name("other"))
    assert "The signature is for the candidate of version 3 of iris" in refused("models:/other/3")


@pytest.mark.parametrize("name", ["a#b", "a?b", "a@b", 'a"b', "a\\b", INVISIBLE])
def test_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(ValueError, match=r"must not contain # \? @ \\ quotes or invisible"):
        check_name(name)


def test_alias_needs_a_release_unless_the_caller_decides_on_a_candidate(folder):
    """Attack 28."""
    # given an alias on a version that was never released
    mlflow.MlflowClient().set_registered_model_alias("iris", "production", 3)
    # then
    message = refused("models:/iris@production")
    assert "There is no release as production of this version." in message
    assert "Release it: lifecycle release models:/iris/3 --alias production" in message
    assert accepted("models:/iris@production", purpose="candidate").purpose == "candidate"


def test_candidates_signature_in_a_releases_place_is_refused(folder):
    for path in evidence_of(2)[1:]:
        replace_files(path, evidence_of(2)[0])
    assert "The signature is for the candidate" in refused(purpose="release")


def test_older_version_put_back_without_a_release_is_refused(folder):
    mlflow.MlflowClient().set_registered_model_alias("iris", "production", 1)
    message = refused("models:/iris@production", purpose="release")
    assert "Version 2 was released as production after it. To go back: lifecycle rollback iris" in message


def test_name_with_an_invisible_character_is_refused(folder):
    """Attack 40."""
    # given a registered model that somebody has renamed so that a search by its name finds nothing
    mlflow.MlflowClient().rename_registered_model("iris", INVISIBLE)
    # then
    with pytest.raises(ValueError, match="invisible character"):
        accepted(f"models:/{INVISIBLE}/1")


def test_older_version_put_back_is_refused_where_the_newer_release_was_seen(folder):
    # given a machine that has used version 2, and then a store from which its release has vanished
    accepted("models:/iris@production", purpose="release")
    mlflow.MlflowClient().set_registered_model_alias("iris", "production", 1)
    mlflow.MlflowClient().delete_model_version("iris", 2)
    message = refused("models:/iris@production", purpose="release")
    assert "A newer release of production was seen here before" in message


def test_models_that_are_loaded_at_the_same_moment_are_each_remembered(folder):
    # given releases of many models, which are seen at the same moment
    names, public = [f"model{number}" for number in range(40)], own_public_key()
    statement = accepted("models:/iris@production", purpose="release")
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda name: refuse_older(name, "production", statement, public), names))
    # then an older one of each is refused
    older = replace(statement, released_at="2001-01-01T00:00:00.000000Z")
    for name in names:
        with pytest.raises(ValueError, match="A newer release of production was seen here before"):
            refuse_older(name, "production", older, public)


def test_public_key_in_a_read_only_folder_serves(folder, tmp_path, monkeypatch):
    # given a folder in which nothing can be remembered: a file stands where the folder of notes would be made
    public = Path(shutil.copy(own_public_key(), tmp_path / "key.pub"))
    (tmp_path / "seen_releases").touch()
    with verified("models:/iris@production", public, purpose="release") as copy:
        assert copy.statement.version == "2"


def test_clock_that_went_backwards_makes_no_older_release(folder):
    # given a release that was signed when the clock was an hour ahead
    ahead = datetime.now(UTC) + timedelta(hours=1)
    release("1", f"{ahead:%Y-%m-%dT%H}:00:00.000000Z")
    # then the next one is after it
    later = released_now("iris", "production", own_public_key())
    assert later == f"{ahead:%Y-%m-%dT%H}:00:00.000001Z"


@pytest.mark.parametrize("forged", ["9999-12-31T23:59:59.999999Z", "soon"])
def test_tag_that_was_not_signed_stops_no_release(folder, forged):
    """Attack 29."""
    # given a tag that says that the replaced version was released after all others
    mlflow.MlflowClient().set_model_version_tag("iris", 1, release_tag("production"), forged)
    # then the release is handed out, and the next one can be signed
    assert accepted("models:/iris@production").version == "2"
    assert released_now("iris", "production", own_public_key()) < "2999"


def test_evidence_that_is_dated_in_the_future_stops_no_release(folder):
    # given a folder that looks like the newest release
    newest = evidence_of(2)[-1]
    shutil.copytree(newest, newest.with_name("production@9999-12-31T235959999999Z"))
    # then the signed one is handed out
    assert accepted("models:/iris@production").version == "2"


def test_release_that_was_signed_in_the_future_is_refused(folder):
    release("1", "2999-01-01T00:00:00.000000Z")
    for path in evidence_of(1):
        if path.name.startswith("production") and "2999" not in path.name:
            shutil.rmtree(path)
    assert "dated in the future. Check the clock here" in refused("models:/iris@production")


# Keys


def test_signature_that_claims_our_key_is_refused(folder):
    # given somebody's signature, in the place and with the mark of ours
    (ours,) = evidence_of(2)[-1].glob("*.sig")
    material = json.loads(ours.read_text())["verificationMaterial"]
    theirs = folder / "theirs.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    theirs.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    theirs.chmod(0o600)
    with verified("models:/iris/2", own_public_key()) as copy:
        sign(copy.folder.parent, copy.statement, theirs)
    (made,) = set(evidence_of(2)[-1].glob("*.sig")) - {ours}
    ours.write_text(json.dumps(json.loads(made.read_text()) | {"verificationMaterial": material}))
    # then
    assert "It is not what was signed" in refused()


def test_private_key_is_in_no_file_of_the_store(folder):
    # given the key as it stands in its file, line by line, and the secret number in it
    pem = own_key().read_bytes()
    number = load_pem_private_key(pem, None).private_numbers().private_value
    secrets = [*pem.splitlines()[1:-1], number.to_bytes(32, "big"), b"%x" % number, b"%d" % number]
    # then nothing else has any of it
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "signing_key.pem"]
    assert any(path.suffix == ".sig" for path in files)
    assert [path for path in files for secret in secrets if secret in path.read_bytes()] == []


@pytest.mark.extended  # it takes long
def test_signature_verifies_with_model_signings_own_command(folder):
    # given a version as anybody downloads it: the model, and what was signed beside it
    with verified("models:/iris/2", own_public_key()) as copy:
        (signature,) = evidence_of(2)[-1].glob("*.sig")
        command = [sys.executable, "-m", "model_signing", "verify", "key", "--no-ignore-git-paths"]
        command += ["--signature", signature, "--public_key", own_public_key(), copy.folder.parent]
        # then it verifies, and with a file more it does not
        assert subprocess.run(command, capture_output=True).returncode == 0
        (copy.folder / ".gitignore").write_text("*")
        assert "Extra files found" in subprocess.run(command, capture_output=True, text=True).stderr


def test_newest_release_as_an_alias_is_verified_without_its_contents(folder):
    public = own_public_key()
    assert verify_release("iris", "2", "production", public).version == "2"
    refusals = {
        ("iris", "1", "production"): "Version 2 was released as production after it",
        ("iris", "2", "staging"): "There is no release as staging of this version",
        ("iris", "9", "production"): "not found",
    }
    for arguments, reason in refusals.items():
        with pytest.raises(NotVerifiedError, match=reason):
            verify_release(*arguments, public)
    # and if a file was changed
    with (files_of(2) / "MLmodel").open("a") as file:
        file.write(" ")
    with pytest.raises(NotVerifiedError, match="It is not what was signed"):
        verify_release("iris", "2", "production", public)
