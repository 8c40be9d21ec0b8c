"""Guide 04, the signature: what anybody with the public key can verify, and which keys are taken."""

import re
import shlex
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import mlflow
import nbformat
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from execution import ROOT, copy_project, papermill, refusal, tracking_server

pytestmark = pytest.mark.extended  # it takes long

GUIDE = "guides/04_release_and_report.ipynb"
MODEL = "iris_classification_best_model"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Give a folder in which the guide has released a version on a tracking server, and what was downloaded from there.

    That is ``model``, the files of the version in production, and ``model.sig``, its signature.
    """
    folder = tmp_path_factory.mktemp("signing")
    notebook = copy_project(folder / "project", GUIDE)
    with tracking_server(folder) as address:
        variables = {"MLFLOW_TRACKING_URI": address}
        process = papermill(notebook, folder / "project", {"allow_unchecked": True}, **variables)
        assert process.returncode == 0, process.stderr
        mlflow.set_tracking_uri(address)
        version = mlflow.MlflowClient().get_model_version_by_alias(MODEL, "production")
        (folder / "model").mkdir()
        mlflow.artifacts.download_artifacts(version.source, dst_path=str(folder / "model"))
        downloaded = mlflow.MlflowClient().download_artifacts(version.run_id, version.tags["signature"], str(folder))
        mlflow.set_tracking_uri(None)
    Path(downloaded).rename(folder / "model.sig")
    (folder / "model/registered_model_meta").unlink()  # MLflow puts it into each download
    return folder


def verify(release: Path, model: Path) -> subprocess.CompletedProcess:
    """Verify a folder with model_signing's own command line, all files."""
    command = [sys.executable, "-m", "model_signing", "verify", "key", "--no-ignore-git-paths"]
    command += ["--signature", release / "model.sig", "--public_key", release / "project/keys/signing_key.pub", model]
    return subprocess.run(command, capture_output=True, text=True)


def test_signed_release_verifies_on_the_command_line(release):
    process = verify(release, release / "model")
    assert process.returncode == 0, process.stderr


def test_release_with_a_file_more_or_changed_does_not_verify(release, tmp_path):
    model = Path(shutil.copytree(release / "model", tmp_path / "model"))
    (model / ".gitignore").write_text("*")
    assert "Extra files found in model 'model': .gitignore" in verify(release, model).stderr
    (model / ".gitignore").unlink()
    content = (model / "requirements.txt").read_text()
    (model / "requirements.txt").write_text(content.replace("skops", "skopt"))
    process = verify(release, model)
    assert process.returncode != 0
    assert "Hash mismatch for 'requirements.txt'" in process.stderr.replace("\\", "")


def test_private_key_is_for_its_owner_only(release):
    key = release / "project/keys/signing_key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700


def test_private_key_is_in_no_file_of_the_store(release):
    # given the key as it stands in its file, line by line, and the secret number in it
    pem = (release / "project/keys/signing_key.pem").read_bytes()
    number = load_pem_private_key(pem, None).private_numbers().private_value
    secrets = [*pem.splitlines()[1:-1], number.to_bytes(32, "big"), b"%x" % number, b"%d" % number]
    # then nothing that server, guide or papermill wrote has any of it
    files = [path for path in release.rglob("*") if path.is_file() and path.name != "signing_key.pem"]
    assert {"server.db", "server.log", "executed.ipynb", "model.sig"} <= {path.name for path in files}
    assert [path for path in files for secret in secrets if secret in path.read_bytes()] == []


def test_releases_at_the_same_moment_use_one_key(tmp_path):
    # given the guide's cells up to the one that makes the key, run for eight stores that are one folder
    cells = [cell.source for cell in nbformat.read(ROOT / GUIDE, as_version=4).cells if cell.cell_type == "code"]
    imports, parameters = cells[:2]
    (checks,) = [source for source in cells if source.startswith("def loaded_key(")]
    (makes,) = [source for source in cells if source.startswith("def keep(")]
    several = 8
    barrier = Barrier(several)

    def fingerprint(_) -> tuple[str, bytes]:
        names = {"store": tmp_path}
        for source in (imports, parameters, checks):
            exec(source, names)
        code = compile(makes, "key", "exec")
        barrier.wait()
        exec(code, names)
        names["scratch"].cleanup()
        return names["fingerprint"], names["public_key"].read_bytes()

    # when all make it at once
    with ThreadPoolExecutor(several) as pool:
        found = set(pool.map(fingerprint, range(several)))
    # then there is one, and nothing else
    assert len(found) == 1
    assert {path.name for path in (tmp_path / "keys").iterdir()} == {"signing_key.pem", "signing_key.pub"}


def pem_of(key, encryption=None) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def wrong_key(kind: str, path: Path) -> None:
    """Write to ``path`` what is not a key that signs a release."""
    good = ec.generate_private_key(ec.SECP256R1())
    contents = {
        "empty": lambda: b"",
        "no key": lambda: b"-----BEGIN PRIVATE KEY-----\nbm8ga2V5\n-----END PRIVATE KEY-----\n",
        "cut off": lambda: pem_of(good)[:100],
        "binary": lambda: good.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        "public half": lambda: good.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "with a password": lambda: pem_of(good, BestAvailableEncryption(b"hunter2")),
        "another curve": lambda: pem_of(ec.generate_private_key(ec.SECP384R1())),
        "RSA": lambda: pem_of(rsa.generate_private_key(65537, 2048)),
        "Ed25519": lambda: pem_of(ed25519.Ed25519PrivateKey.generate()),
    }
    if kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(contents[kind]())


KINDS = ["missing", "a folder", "empty", "no key", "cut off", "binary", "public half", "with a password"]
KINDS += ["another curve", "RSA", "Ed25519"]


@pytest.mark.parametrize("kind", KINDS)
def test_key_that_cannot_sign_is_refused_before_the_store_is_opened(kind, tmp_path):
    wrong_key(kind, tmp_path / "own.pem")
    error = refusal(GUIDE, signing_key=str(tmp_path / "own.pem"))
    assert error.startswith(f"Cannot sign with {tmp_path / 'own.pem'}: ")
    assert "A PEM file with a private EC key on the curve P-256, without a password, is wanted" in error


def test_key_made_as_the_refusal_says_is_taken(tmp_path, lacking):
    # given the command in the message
    if not shutil.which("openssl"):
        lacking("OpenSSL's command", "apt-get install openssl")
    command = re.search(r"openssl .*", refusal(GUIDE, signing_key=str(tmp_path / "signing_key.pem")))[0]
    # when it is run, then the key is taken
    subprocess.run(shlex.split(command), cwd=tmp_path, check=True, capture_output=True)
    with pytest.raises(AssertionError, match="took"):
        refusal(GUIDE, signing_key=str(tmp_path / "signing_key.pem"))
