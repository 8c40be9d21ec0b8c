"""The key that signs: made once, for its owner only; and which keys are taken."""

import re
import shlex
import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import click
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from mlflow_lifecycle.exceptions import KeyRefusedError
from mlflow_lifecycle.signing.keys import fingerprint_of, load_private, new_key, own_key, own_public_key


@pytest.fixture(autouse=True)
def keys(tmp_path, monkeypatch):
    """Name a folder of the test for the keys."""
    monkeypatch.setenv("LIFECYCLE_KEYS", str(tmp_path / "keys"))


def private_pem(key, encryption=None) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def public_pem(key) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


GOOD = ec.generate_private_key(ec.SECP256R1())
OF_ANOTHER_KIND = {
    "another curve": ec.generate_private_key(ec.SECP384R1()),
    "RSA": rsa.generate_private_key(65537, 2048),
}
NO_PRIVATE_KEYS = {"no key": b"", "with a password": private_pem(GOOD, BestAvailableEncryption(b"hunter2"))}
NO_PRIVATE_KEYS |= {kind: private_pem(key) for kind, key in OF_ANOTHER_KIND.items()}
NO_PUBLIC_KEYS = {"no key": b""} | {kind: public_pem(key) for kind, key in OF_ANOTHER_KIND.items()}


@pytest.mark.parametrize("content", NO_PRIVATE_KEYS.values(), ids=NO_PRIVATE_KEYS)
def test_key_that_cannot_sign_is_refused(content, tmp_path):
    (tmp_path / "own.pem").write_bytes(content)
    with pytest.raises(KeyRefusedError) as caught:
        load_private(tmp_path / "own.pem")
    assert str(caught.value).startswith(f"Cannot sign with {tmp_path / 'own.pem'}: ")
    assert "It must be a PEM file with a private EC key on the curve P-256, without a password" in str(caught.value)


@pytest.mark.parametrize("content", NO_PUBLIC_KEYS.values(), ids=NO_PUBLIC_KEYS)
def test_key_that_cannot_verify_is_refused(content, tmp_path):
    (tmp_path / "key.pub").write_bytes(content)
    with pytest.raises(KeyRefusedError, match=r"Cannot verify with .*: .* It must be a PEM file with a public EC key"):
        fingerprint_of(tmp_path / "key.pub")


def test_key_made_as_the_refusal_says_is_taken(tmp_path, lacking):
    # given the command in the message
    if not shutil.which("openssl"):
        lacking("OpenSSL's command", "apt-get install openssl")
    with pytest.raises(KeyRefusedError) as caught:
        load_private(tmp_path / "signing_key.pem")
    # when it is run, then the key is taken
    subprocess.run(shlex.split(re.search("openssl .*", str(caught.value))[0]), cwd=tmp_path, check=True)
    (tmp_path / "signing_key.pem").chmod(0o600)
    assert load_private(tmp_path / "signing_key.pem").curve.name == "secp256r1"


def test_key_that_others_can_read_is_refused(tmp_path):
    key = own_key()
    key.chmod(0o640)
    with pytest.raises(KeyRefusedError, match=f"it is readable by other users. Run: chmod 600 '{key}'"):
        own_key()


def test_key_is_made_once_for_its_owner_only(tmp_path):
    private = own_key()
    assert private == tmp_path / "keys/signing_key.pem"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(private.parent.stat().st_mode) == 0o700
    assert sorted(path.name for path in private.parent.iterdir()) == ["signing_key.pem", "signing_key.pub"]
    before = private.read_bytes(), own_public_key().read_bytes()
    assert own_key() == private
    assert (private.read_bytes(), own_public_key().read_bytes()) == before


def test_key_is_in_the_configuration_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.delenv("LIFECYCLE_KEYS")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home/.config"))
    assert own_key() == Path(click.get_app_dir("lifecycle")) / "keys/signing_key.pem"
    assert (tmp_path / "home").is_dir()


def test_key_in_a_folder_that_other_users_can_write_is_refused(tmp_path):
    """Attack 33."""
    own_key().parent.chmod(0o777)
    for function in (own_key, own_public_key):
        with pytest.raises(KeyRefusedError, match=r"Other users can replace the keys in .*chmod go-w"):
            function()


def test_starts_at_the_same_moment_make_one_key(tmp_path):
    # given eight at once
    several = 8
    barrier = Barrier(several)

    def fingerprint(_) -> tuple[bytes, str]:
        barrier.wait()
        return own_key().read_bytes(), fingerprint_of(own_public_key())

    with ThreadPoolExecutor(several) as pool:
        found = set(pool.map(fingerprint, range(several)))
    # then there is one, and nothing else
    assert len(found) == 1
    assert {path.name for path in (tmp_path / "keys").iterdir()} == {"signing_key.pem", "signing_key.pub"}


def test_lost_private_half_is_not_replaced_without_being_asked(tmp_path):
    # given a key whose private half is gone
    own_key().unlink()
    before = own_public_key().read_bytes()
    # then signing says what to do, and the public half stays
    with pytest.raises(KeyRefusedError, match=r"only its public half is left.*make a new key: lifecycle new-key"):
        own_key()
    assert own_public_key().read_bytes() == before


@pytest.mark.parametrize("lost", ["", ".pem", ".pub"])
def test_new_key_keeps_what_is_left_of_the_one_before(tmp_path, lost):
    # given a key, of which a half may be lost
    key = own_key()
    private, public = key.read_bytes(), own_public_key().read_bytes()
    if lost:
        key.with_suffix(lost).unlink()
    # when
    new, before = new_key()
    # then
    assert before.read_bytes() == public
    assert before.name == f"signing_key-{fingerprint_of(before)[:16]}.pub"
    assert before.with_suffix(".pem").exists() == (lost != ".pem")
    assert new.read_bytes() != private
    assert fingerprint_of(own_public_key()) != fingerprint_of(before)


def test_first_key_has_none_before_it(tmp_path):
    assert new_key() == (tmp_path / "keys/signing_key.pem", None)


def test_missing_public_key_is_refused(tmp_path):
    with pytest.raises(KeyRefusedError, match=r"There is no public key .*--public-key"):
        own_public_key()
