"""Make .env beside this file: the settings of .env.example, with new secrets, readable by you alone.

Usage: python3 make_env.py

A .env that is there stays as it is. Needs Python and nothing else.
"""

import os
import secrets
import sys
from pathlib import Path

from start import SECRETS, STORE_SECRET, reason_against

HERE = Path(__file__).parent


def made() -> str:
    """Return a new secret of 256 bits, one that the server starts with."""
    while reason_against(secret := secrets.token_urlsafe(32)):
        pass
    return secret


def main() -> None:
    """Write the file, or end with the reason why not."""
    lines = (HERE / ".env.example").read_text(encoding="utf-8").splitlines()
    names = {*SECRETS, STORE_SECRET}
    filled = [line + made() if line.removesuffix("=") in names else line for line in lines]
    try:
        file = os.open(HERE / ".env", os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o600)
    except FileExistsError:
        sys.exit(f"{HERE / '.env'} is there already, and stays as it is. To make new secrets, move it away.")
    with os.fdopen(file, "w", encoding="utf-8") as env:
        env.write("\n".join(filled) + "\n")
    print(f"Made {HERE / '.env'}, which only you can read. Keep a copy where you keep passwords.")


if __name__ == "__main__":
    main()
