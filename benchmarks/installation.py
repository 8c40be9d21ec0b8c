"""Measure what it takes to install the lock from a clone, beside `pip install -r` of the same lock.

Usage: python benchmarks/installation.py [--rounds 3]

- ours: as the Makefile does it: a venv without pip, uv by the pip of Python with its hash verified, and `uv pip sync`
  with copies of the files.
- pip: a venv, and `pip install --require-hashes -r requirements.txt`. By the pip of the lock, put there before the time
  counts: pip 23, as Python 3.11 brings it, takes a package that is asked for with an extra for unpinned, as soon as it
  has a newer release.

Cold: both have an empty package cache of their own. Warm: both have what the cold installation left. A round runs each
once, in turn; a ratio is formed within a round, and its median over the rounds is the figure, with the range.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.txt"


def seconds(way: str, folder: Path, cache: Path) -> float:
    """Return how long it takes to make an environment in ``folder`` with the packages of the lock.

    Args:
        way: "ours" or "pip".
        folder: where the environment goes; not there yet.
        cache: the package cache, of pip and of uv.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("UV_CACHE", "PIP_CACHE"))}
    variables |= {"UV_CACHE_DIR": str(cache / "uv"), "PIP_CACHE_DIR": str(cache / "pip")}
    python = folder / "bin/python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes", "-r"]
    tool = folder.parent / f"{folder.name}-tool.txt"  # what installs the rest, as the lock has it
    name = "uv" if way == "ours" else "pip"
    tool.write_text(re.search(rf"(?ms)^{name}==.*?(?=^    # via)", LOCK.read_text(encoding="utf-8"))[0])
    sync = [folder / "bin/uv", "pip", "sync", "--no-config", "--quiet", "--link-mode", "copy", "--require-hashes"]
    venv, first, rest = [sys.executable, "-m", "venv", folder], [*pip, tool], [*pip, LOCK]
    if way == "ours":
        without = [sys.executable, "-m", "pip", "--python", python, *pip[3:]]
        venv, first, rest = [*venv, "--without-pip"], [*without, tool], [*sync, "--python", python, LOCK]
    taken = {}
    for step, command in {"venv": venv, "tool": first, "rest": rest}.items():
        begin = time.perf_counter()
        subprocess.run(command, env=variables, check=True, stdout=subprocess.DEVNULL)
        taken[step] = time.perf_counter() - begin
    return sum(taken.values()) - (taken["tool"] if way == "pip" else 0)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    taken = {(way, state): [] for state in ("cold", "warm") for way in ("ours", "pip")}
    with tempfile.TemporaryDirectory() as scratch:  # removed at the end: some disks are slow after many are deleted
        for number in range(parser.parse_args().rounds):
            for way, state in taken:
                folder = Path(scratch) / f"{way}-{state}-{number}"
                taken[way, state].append(seconds(way, folder, Path(scratch) / f"cache-{way}-{number}"))
    print("cache   ours (s)   pip (s)   ours / pip")
    for state in ("cold", "warm"):
        ours, pip = taken["ours", state], taken["pip", state]
        ratios = [one / other for one, other in zip(ours, pip, strict=True)]
        figures = f"{statistics.median(ours):8.1f}  {statistics.median(pip):8.1f}   {statistics.median(ratios):.2f}"
        print(f"{state:6}{figures} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
