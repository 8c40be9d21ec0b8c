"""Exit with 0 if a version was released as an alias, and signed with one of the team's keys; otherwise print why not.

Usage: python verify_release.py NAME VERSION ALIAS

PUBLIC_KEYS names the folder with the public keys (*.pub). The version is read from the server MLFLOW_TRACKING_URI.
"""

import os
import sys
from pathlib import Path

from mlflow_lifecycle.exceptions import LifecycleError
from mlflow_lifecycle.signing.verify import verify_release


def main(name: str, version: str, alias: str) -> str | None:
    """Return why the version may not take the alias, or None."""
    keys = sorted(Path(os.environ["PUBLIC_KEYS"]).glob("*.pub"))
    reason = "The server has no public key to verify it with. Ask an admin to add yours to the folder public_keys."
    for key in keys:
        try:
            verify_release(name, version, alias, key)
        except LifecycleError as error:
            reason = str(error)
        else:
            return None
    return reason


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
