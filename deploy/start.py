"""Refuse to start with a secret that somebody chose; else become the command that is given.

Usage: python start.py COMMAND [ARGUMENT ...]

The secrets are files in the folder that SECRETS_FOLDER names. The command finds them in its environment, which
nothing shows from outside the container.
"""

import itertools
import os
import sys
from pathlib import Path

SECRETS = {  # the file's name, and the variable in which PostgreSQL's driver or MLflow looks for it
    "POSTGRES_PASSWORD": "PGPASSWORD",
    "MLFLOW_ADMIN_PASSWORD": "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_SECRET_KEY": "MLFLOW_FLASK_SERVER_SECRET_KEY",
}
STORE_SECRET = "AWS_SECRET_ACCESS_KEY"  # of the S3 store, where there is one; its provider chooses it
REMEDY = "Make all three: python3 make_env.py"
SHORTEST = 32  # make_env.py makes 43; `openssl rand -hex 16` gives 32
VARIETY = 10  # different characters
REPEATED = 6  # so many characters in a row do not come twice in what is made
MIXED = 1 / 4  # how often, in what is made, a capital, a digit or another character is followed by one of another kind
# What people and keyboards put together. None of these comes by chance in a good secret, or it does so once.
KNOWN = ("pass", "change", "secret", "admin", "mlflow", "postgres", "qwert", "asdf", "zxcv", "abcd", "1234", "6789")


def reason_against(secret: str) -> str | None:
    """Return by what ``secret`` does not look made, or None. The answer does not contain it."""
    if not secret:
        return "is missing"
    if len(secret) < SHORTEST:
        return f"has fewer than {SHORTEST} characters"
    if sum(secret.lower().count(word) for word in KNOWN) > 1:
        return "has words that everybody tries"
    pieces = [secret.lower()[start : start + REPEATED] for start in range(len(secret) - REPEATED + 1)]
    if len(set(secret)) < VARIETY or len(set(pieces)) < len(pieces):
        return "repeats itself"
    kinds = [character.isupper() + 2 * character.isdigit() for character in secret]
    if sum(kind != after for kind, after in itertools.pairwise(kinds)) < MIXED * len(kinds):
        return "reads like words or a number"
    return None


def read(path: Path) -> str:
    """Return the secret in a file, empty if it is missing."""
    return path.read_text().strip() if path.exists() else ""


def main(command: list[str]) -> None:
    """Check the secrets, then become ``command``."""
    folder = Path(os.environ.get("SECRETS_FOLDER", "/run/secrets"))
    secrets = {name: read(folder / name) for name in SECRETS}
    reasons = {name: reason_against(secret) for name, secret in secrets.items()}
    refused = [f"{name} {reason}" for name, reason in reasons.items() if reason]
    if not refused and len(set(secrets.values())) < len(secrets):
        refused = [f"two of {', '.join(SECRETS)} are the same"]
    if refused:
        sys.exit(f"Not started: {'; '.join(refused)}. {REMEDY}")
    os.environ.update({SECRETS[name]: secret for name, secret in secrets.items()})
    if store_secret := read(folder / STORE_SECRET):
        os.environ[STORE_SECRET] = store_secret
    if not command:
        sys.exit(__doc__)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
