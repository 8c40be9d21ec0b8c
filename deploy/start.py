"""Refuse to start with a secret that is missing, short or known to everybody; else become the command that is given.

Usage: python start.py COMMAND [ARGUMENT ...]
"""

import os
import sys

SECRETS = {
    "PGPASSWORD": "POSTGRES_PASSWORD",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "MLFLOW_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "MLFLOW_SECRET_KEY",
}
SHORTEST = 12
KNOWN = ("password", "changeme", "change-me", "change_me", "secret", "admin", "mlflow", "postgres", "12345", "qwerty")


def reason_against(secret: str) -> str | None:
    """Return why nobody should rely on ``secret``, or None. The answer does not contain it."""
    if not secret:
        return "is missing"
    if len(secret) < SHORTEST:
        return f"has fewer than {SHORTEST} characters"
    rest = secret.lower()
    for word in KNOWN:
        rest = rest.replace(word, "")
    if len(rest) < SHORTEST / 2:
        return "is a password that everybody tries"
    if len(set(secret)) < SHORTEST / 2:
        return "repeats the same few characters"
    return None


def main(command: list[str]) -> None:
    """Check all secrets, then become ``command``."""
    reasons = {name: reason_against(os.environ.get(variable, "")) for variable, name in SECRETS.items()}
    refused = [f"{name} {reason}" for name, reason in reasons.items() if reason]
    values = [os.environ.get(variable) for variable in SECRETS]
    if not refused and len(set(values)) < len(values):
        refused = [f"two of {', '.join(SECRETS.values())} are the same"]
    if refused:
        sys.exit(f"Not started: {'; '.join(refused)}. Set it in deploy/.env, as .env.example says.")
    if not command:
        sys.exit(__doc__)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
