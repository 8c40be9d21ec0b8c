"""The user's own key, and the keys of others.

MLflow knows no keys and no signatures (mlflow#18889). The private half signs, and stays with its
owner. The public half verifies, and goes to everyone who loads models. Both are in the user's
configuration folder, so that write access to the store or the project does not include them.
"""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import click
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from mlflow_lifecycle.exceptions import KeyRefusedError

CURVE = "secp256r1"  # P-256
MAKE_KEY = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out signing_key.pem"


def key_folder() -> Path:
    """Return the folder of the user's own key, which may not exist yet.

    It is the one that ``LIFECYCLE_KEYS`` names, or ``keys`` in the user's configuration folder.

    Raises:
        KeyRefusedError: other users can write to it.
    """
    default = Path(click.get_app_dir("lifecycle")) / "keys"
    folder = Path(os.environ.get("LIFECYCLE_KEYS") or default)
    if os.name != "nt" and folder.exists() and folder.stat().st_mode & 0o022:
        raise KeyRefusedError(
            f"Other users can replace the keys in {folder}. Run: chmod go-w '{folder}'"
        )
    return folder


def own_key() -> Path:
    """Return the user's private key; make both halves if neither exists.

    Raises:
        KeyRefusedError: only the public half is left, or the key cannot be used.
    """
    private = key_folder() / "signing_key.pem"
    public = private.with_suffix(".pub")
    has_public = public.exists()  # checked first, because another process writes it last
    if not private.exists():
        if has_public:
            raise KeyRefusedError(
                f"{private} is missing, and only its public half is left. "
                "Restore it from a backup, or make a new key: lifecycle new-key"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write_once(private, content)
    _write_once(public, _public_bytes(load_private(private)))
    public_half(private, private.parent)
    return private


def own_public_key() -> Path:
    """Return the user's public key.

    Raises:
        KeyRefusedError: there is none.
    """
    path = key_folder() / "signing_key.pub"
    if not path.is_file():
        raise KeyRefusedError(
            f"There is no public key {path}. If nobody has signed yet, run: lifecycle sign "
            "models:/NAME/1. Otherwise use that of the person who signed: --public-key FILE"
        )
    return path


def load_private(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the private key in the file ``path``.

    Raises:
        KeyRefusedError: there is none, it is of another kind, or other users can read it.
    """
    path = Path(path)
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != CURVE:
            raise ValueError("this is another kind of key")
    except (OSError, ValueError, TypeError) as error:  # TypeError: it has a password
        raise KeyRefusedError(
            f"Cannot sign with {path}: {error}. It must be a PEM file with a private EC key on the "
            f"curve P-256, without a password: {MAKE_KEY}"
        ) from None
    if os.name != "nt" and path.stat().st_mode & 0o077:
        raise KeyRefusedError(
            f"Cannot sign with {path}: it is readable by other users. Run: chmod 600 '{path}'"
        )
    return key


def fingerprint_of(public_key: Path) -> str:
    """Return the SHA-256 of a public key, in hexadecimal.

    Raises:
        KeyRefusedError: the file is not a public EC key in PEM.
    """
    try:
        key = load_pem_public_key(Path(public_key).read_bytes())
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != CURVE:
            raise ValueError("this is another kind of key")
    except (OSError, ValueError) as error:
        raise KeyRefusedError(
            f"Cannot verify with {public_key}: {error}. It must be a PEM file with a public EC key "
            "on the curve P-256."
        ) from None
    content = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(content).hexdigest()


def public_half(private: Path, scratch: Path) -> Path:
    """Return the file of the public key of ``private``: beside it, or else written to ``scratch``.

    Raises:
        KeyRefusedError: the private key cannot be used, or the file beside it is of another key.
    """
    content = _public_bytes(load_private(private))
    beside = Path(private).with_suffix(".pub")
    if beside.exists() and beside != Path(private):
        if beside.read_bytes() != content:
            raise KeyRefusedError(
                f"{beside} is not the public half of {private}. Replace it, or remove it."
            )
        return beside
    path = Path(scratch) / "public_half.pub"
    path.write_bytes(content)
    return path


def new_key() -> tuple[Path, Path | None]:
    """Make a new key; return it, and the public half of the one before it.

    The old halves stay, with the first 16 digits of their fingerprint in their names. Versions that
    the old key signed still verify with its public half.

    Raises:
        KeyRefusedError: a half that is needed is invalid.
    """
    folder = key_folder()
    present = present_public_key()
    before = None
    if present:
        name = f"signing_key-{fingerprint_of(present)[:16]}"
        if (folder / "signing_key.pem").exists():
            (folder / "signing_key.pem").rename(folder / f"{name}.pem")
        before = present.rename(folder / f"{name}.pub")
    return own_key(), before


def present_public_key() -> Path | None:
    """Return the user's public key, made if it is missing; None if there is no key yet.

    Raises:
        KeyRefusedError: it is missing, and the private half is invalid.
    """
    public = key_folder() / "signing_key.pub"
    if not public.exists() and public.with_suffix(".pem").exists():
        own_key()
    return public if public.exists() else None


def _public_bytes(private: ec.EllipticCurvePrivateKey) -> bytes:
    return private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _write_once(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, for this user alone; an existing one is kept."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent) as draft:
        draft.write(content)
        draft.flush()
        with contextlib.suppress(FileExistsError):  # another process may have been faster
            os.link(draft.name, path)
