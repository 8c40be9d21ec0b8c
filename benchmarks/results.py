"""Run the benchmarks, one after the other, and write what they print to benchmarks/RESULTS.md, with a picture of it.

Usage: python benchmarks/results.py [--only quickstart search serving ...] [--quick]

Each part has its command, so that anybody can repeat it alone. A part that is not run keeps what stands in the file,
with the commit and the date at which it was measured. Some parts take long, and are only measured where they are asked
for: `make reliability`, `make reproduce`. `--quick` takes few rounds, to see that all of it works.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from plots import PICTURE, ROWS, draw, ratio

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/RESULTS.md"
FOUND = 3  # the exit status where something of ours was lost, or differs
ASKED_FOR = ("reliability", "damage", "reproduce", "upgrades")
PROGRAMS = {"damage": "reliability"}  # where a part is not called as its program
KILLS = ["kill-quickstart", "kill-search", "kill-release"]
PARTS = {  # title, arguments, and those of a quick run
    "quickstart": (
        "The quickstart beside MLflow's own, and beside the bare calls",
        ["--rounds", "3"],
        ["--rounds", "1"],
    ),
    "installation": ("Setting up from a clone, beside pip", ["--rounds", "2"], ["--rounds", "1"]),
    "environment": ("What a model needs, beside full MLflow", [], []),
    "store": ("Logging a run, and finding the best one", [], ["--runs", "50"]),
    "search": (
        "A tracked search beside an untracked one, and beside MLflow's own storage",
        ["--trials", "30", "300", "1000"],
        ["--rounds", "1"],
    ),
    "verification": ("Verifying a signature, beside the bare SHA-256", [], ["--rounds", "1", "--megabytes", "1"]),
    "gate": ("The gate, beside MLflow's own calls", [], ["--rounds", "1"]),
    "packages": (
        "Renewing, comparing and auditing, beside the calls of MLflow and of uv",
        ["--rounds", "3"],
        ["--rounds", "1"],
    ),
    "serving": (
        "Serving beside `mlflow models serve`",
        ["--start", "--rounds", "3"],
        ["--rounds", "1", "--seconds", "0.5"],
    ),
    "scale": (
        "Spark beside one process, and two workers beside one",
        ["--rows", "10000", "100000", "1000000"],
        ["--rounds", "1", "--rows", "10000"],
    ),
    "reliability": ("Killed: what survived", ["--only", *KILLS], ["--moments", "1"]),
    "damage": (
        "Crowded, damaged and interrupted: what survived",
        ["--only", "kill-tables", "crowd", "server", "bytes", "database", "set-up", "faults"],
        ["--moments", "1", "--changes", "2"],
    ),
    "reproduce": ("The same in other folders, homes, zones, languages, and with other Pythons", [], ["project.ipynb"]),
    "upgrades": ("What newer releases than those pinned would change", [], ["--package", "numpy"]),
    "server": ("The team's server beside `mlflow server` on SQLite", [], ["--clients", "8", "--seconds", "5"]),
}
HEAD = """# Results

Each part compares this project with a named peer, in one run on one machine. Ratios say more than times, which another
machine changes. `make bench` measures the speed, `make reliability` and `make reproduce` measure the rest. Each writes
its parts of this file. Nobody edits it.

![The ratios below as points, with their ranges, and the seconds of each section of the quickstart as bars](results.png)
"""


def machine() -> str:
    """Return what the figures depend on: processor, memory, system, versions, and the disk of the temporary files."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("mlflow", "scikit-learn", "pandas", "uv")]
    cores = f"{os.cpu_count()} cores, {memory:.0f} GB"
    disk = subprocess.run(["stat", "-f", "-c", "%T", tempfile.gettempdir()], capture_output=True, text=True).stdout
    return (
        f"{platform.system()}, {cores}, temporary files on {disk.strip() or 'a disk'}\n"
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def commit() -> str:
    """Return the commit that is measured, marked as dirty if files differ from it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def measured(name: str, arguments: list[str], version: str) -> str:
    """Run one benchmark on a commit, and return its part of the page.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    program = PROGRAMS.get(name, name)
    folder = "tools" if (ROOT / f"tools/{program}.py").exists() else "benchmarks"
    command = [f"{folder}/{program}.py", *arguments]
    print("...", *command, flush=True)
    before = os.getloadavg()[0]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, FOUND):  # what was lost stands in the page, too
        done.check_returncode()
    today = datetime.datetime.now(datetime.UTC).date()
    facts = f"{today}, commit {version}, load of the machine before: {before:.1f}\n{machine()}"
    text = done.stdout.strip("\n")
    return f"## {PARTS[name][0]}\n\n```\n.venv/bin/python {' '.join(command)}\n```\n\n{facts}\n\n```\n{text}\n```\n"


def parts_of(page: str) -> dict[str, str]:
    """Return the parts that a page has, by their names."""
    found = {part.partition("\n")[0][3:]: part.rstrip() + "\n" for part in re.findall(r"(?ms)^## .*?(?=^## |\Z)", page)}
    return {name: found[title] for name, (title, *_) in PARTS.items() if title in found}


def table_of_bounds(page: str) -> str:
    """Return a table of the ratios in a page that have a bound, with those that miss it."""
    lines = ["| seconds or megabytes, this project / its peer | ratio | bound | |", "|---|---|---|---|"]
    for name, (_, bound) in ROWS.items():
        found = ratio(page, name)
        if found and bound:
            verdict = "met" if found.median <= bound else "**missed**"
            lines.append(f"| {name} | {found.median:.2f} | {bound:.2f} | {verdict} |")
    return "\n".join(lines) + "\n"


def write(parts: dict[str, str]) -> None:
    """Write the page and its picture from its parts."""
    measurements = [parts[name] for name in PARTS if name in parts]
    page = "\n".join([HEAD, table_of_bounds("\n".join(measurements)), *measurements])
    RESULTS.write_text(page, encoding="utf-8")
    draw(page, PICTURE)


def main() -> None:
    """Measure, and write the page after each part."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=[part for part in PARTS if part not in ASKED_FOR])
    parser.add_argument("--quick", action="store_true")
    settings = parser.parse_args()
    parts = parts_of(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    version = commit()  # before this page changes
    for name in settings.only:
        if name == "scale" and (shutil.which("java") is None or importlib.util.find_spec("pyspark") is None):
            print("Left out: benchmarks/scale.py. It needs Java 17 or later and: make scale")
            continue
        _, arguments, quick = PARTS[name]
        parts[name] = measured(name, arguments + quick if settings.quick else arguments, version)
        write(parts)


if __name__ == "__main__":
    main()
