"""The record of a server: what was asked, and what was answered."""

import contextlib
import json
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path


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
        self.day = None
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.remove_old()

    def add(self, entry: dict) -> None:
        """Add a line.

        Raises:
            OSError: it cannot be written. Then no part of it is left.
        """
        now = datetime.now(UTC)
        if self.day != now.date():
            self.day = now.date()
            name = f"requests-{now:%Y-%m-%d-%H%M%S-%f}-{secrets.token_hex(4)}.jsonl"
            self.path = self.folder / name
        time = now.isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, **entry}) + "\n"
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(line.encode()) < len(line):
                file.truncate(end)
                raise OSError("the disk is full")
        if end > self.size_limit / 10:
            self.day = None  # the next line begins another file

    def remove_old(self) -> None:
        """Remove the files of earlier days, and the oldest ones beyond the size limit."""
        first_day = datetime.now(UTC).date() - timedelta(days=self.keep_days)
        first_name = f"requests-{first_day}"
        size = 0
        for path in sorted(self.folder.glob("requests-*.jsonl"), reverse=True):
            # Another server may remove it first. Windows does not remove a file that is open.
            with contextlib.suppress(OSError):
                size += path.stat().st_size
                if path.name < first_name or size > self.size_limit:
                    path.unlink()
