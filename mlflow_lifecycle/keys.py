"""The key that signs model versions, made once for its owner alone, and how one goes on after it was lost.

MLflow knows no keys and no signatures (mlflow#18889). The private half signs, and stays with whoever releases. The
public half verifies, and goes to everybody who loads models.
"""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from mlflow_lifecycle.store import store_folder

CURVE = "secp256r1"  # P-256
WANTED = (
    "A PEM file with a private EC key on the curve P-256, without a password, is wanted: "
    "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out signing_key.pem"
)


class KeyRefusedError(ValueError):
    """A key cannot be used; the message says why, and what to do."""


def own_key(folder: Path) -> Path:
    """Return the private key in ``keys`` beside the store of ``folder``; make both halves where neither is there.

    Raises:
        KeyRefusedError: only the public half is left, or the key cannot be used.
    """
    private = store_folder(folder) / "keys" / "signing_key.pem"
    public = private.with_suffix(".pub")
    made = public.exists()  # asked first, because whoever makes the key right now writes its public half last
    if not private.exists():
        if made:
            lost = f"Cannot sign: {private} is lost, and only its public half is left. Put it back from a backup."
            raise KeyRefusedError(f"{lost} If there is none, make a new one: lifecycle new-key")
        key = ec.generate_private_key(ec.SECP256R1())
        _keep(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    _keep(public, _public_bytes(load_private(private)))
    public_half(private, private.parent)
    return private


def load_private(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the private key in the file ``path``.

    Raises:
        KeyRefusedError: there is none, it is of another kind, or others than its owner can read it.
    """
    path = Path(path)
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
        if getattr(key, "curve", None) is None or key.curve.name != CURVE:
            raise ValueError("this is another kind of key")
    except Exception as error:
        raise KeyRefusedError(f"Cannot sign with {path}: {error}. {WANTED}") from None
    if os.name != "nt" and path.stat().st_mode & 0o077:
        raise KeyRefusedError(f"Cannot sign with {path}: others can read it. Close it: chmod 600 {path}")
    return key


def own_public_key(folder: Path) -> Path:
    """Return the public key in ``keys`` beside the store of ``folder``.

    Raises:
        KeyRefusedError: there is none.
    """
    path = store_folder(folder) / "keys" / "signing_key.pub"
    if not path.is_file():
        raise KeyRefusedError(f"There is no public key {path}. Give the one of whoever signed: --public-key FILE")
    return path


def fingerprint_of(public_key: Path) -> str:
    """Return the SHA-256 of a public key, in hexadecimal.

    Raises:
        KeyRefusedError: the file is not a public EC key in PEM.
    """
    try:
        key = load_pem_public_key(Path(public_key).read_bytes())
        if getattr(key, "curve", None) is None or key.curve.name != CURVE:
            raise ValueError("this is another kind of key")
    except Exception as error:
        wanted = "A PEM file with a public EC key on the curve P-256 is wanted."
        raise KeyRefusedError(f"Cannot verify with {public_key}: {error}. {wanted}") from None
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def public_half(private: Path, scratch: Path) -> Path:
    """Return the file of the public key that belongs to ``private``: beside it, or else written to ``scratch``.

    Raises:
        KeyRefusedError: the private key cannot be used, or the file beside it is of another key.
    """
    content, beside = _public_bytes(load_private(private)), Path(private).with_suffix(".pub")
    if beside.exists() and beside != Path(private):
        if beside.read_bytes() != content:
            raise KeyRefusedError(f"{beside} is not the other half of {private}. Give the key that belongs to it.")
        return beside
    path = Path(scratch) / "public_half.pub"
    path.write_bytes(content)
    return path


def new_key(folder: Path) -> tuple[Path, Path | None]:
    """Make a new key beside the store of ``folder``; return it, and the public half of the one before it.

    The halves before it stay, with the first 16 digits of their fingerprint in their names: what they signed can still
    be verified with that public half.

    Raises:
        KeyRefusedError: a half that is needed is no key.
    """
    keys, before = store_folder(folder) / "keys", None
    if present := present_public_key(folder):
        name = f"signing_key-{fingerprint_of(present)[:16]}"
        if (keys / "signing_key.pem").exists():
            (keys / "signing_key.pem").rename(keys / f"{name}.pem")
        before = present.rename(keys / f"{name}.pub")
    return own_key(folder), before


def present_public_key(folder: Path) -> Path | None:
    """Return the public half of the key beside the store, made if it is missing; None if neither half is there.

    Raises:
        KeyRefusedError: it is missing, and the private half is no key.
    """
    public = store_folder(folder) / "keys" / "signing_key.pub"
    if not public.exists() and public.with_suffix(".pem").exists():
        own_key(folder)
    return public if public.exists() else None


def _public_bytes(private: ec.EllipticCurvePrivateKey) -> bytes:
    return private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _keep(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, for this user alone; one that is there stays as it is."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent) as draft:
        draft.write(content)
        draft.flush()
        with contextlib.suppress(FileExistsError):  # another process may have been faster
            os.link(draft.name, path)
