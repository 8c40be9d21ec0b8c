"""The record of a server: what was asked, and what was answered."""

import contextlib
import json
import os
import re
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path

FILE_NAME = re.compile(r"requests-(\d{4}-\d\d-\d\d)-.+\.jsonl")


class Record:
    """Requests and answers, one line of JSON each, in files of one day.

    A line is with the operating system before the answer is sent, so a killed server loses none.
    On a power failure the last lines can be lost.
    """

    def __init__(self, folder: str, keep_days: int, size_limit: int):
        """Keep lines in ``folder``, which is created if needed. Only this user can read it.

        Args:
            folder: several servers may share it.
            keep_days: files of earlier days are removed.
            size_limit: of all files, in bytes.
        """
        self.folder = Path(folder)
        self.keep_days = keep_days
        self.size_limit = size_limit
        self.path = None
        self.day = None
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.remove_old()

    def add(self, entry: dict) -> None:
        """Add a line.

        Raises:
            OSError: it cannot be written. Then no part of it is left.
        """
        now = datetime.now(UTC)
        line = json.dumps({"time": now.isoformat(timespec="milliseconds"), **entry}).encode()
        if self.day != now.date() or self._is_full():
            name = f"requests-{now:%Y-%m-%d-%H%M%S-%f}-{secrets.token_hex(4)}.jsonl"
            self.path = self.folder / name
            self.day = now.date()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line + b"\n") <= len(line):
                    raise OSError("the disk is full")
            except OSError:
                file.truncate(end)
                raise

    def _is_full(self) -> bool:
        """Return whether the file has a tenth of the size limit, so that another one is needed."""
        return self.path.exists() and self.path.stat().st_size > self.size_limit / 10

    def remove_old(self) -> None:
        """Remove the files of earlier days, and the oldest ones beyond the size limit."""
        first_day = datetime.now(UTC).date() - timedelta(days=self.keep_days)
        size = 0
        for path in sorted(self.folder.glob("requests-*.jsonl"), reverse=True):
            found = FILE_NAME.fullmatch(path.name)
            if not found:
                continue
            # Another server may remove it first. Windows does not remove a file that is open.
            with contextlib.suppress(OSError):
                size += path.stat().st_size
                if found[1] < first_day.isoformat() or size > self.size_limit:
                    path.unlink()
