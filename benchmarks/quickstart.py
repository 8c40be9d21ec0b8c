"""Compare the quickstart with named peers. Each figure is a ratio, measured in one run.

Usage: python benchmarks/quickstart.py [--rounds 5] [--bytecode cold|warm|both]

The peers:

- official: the steps of MLflow's own tracking quickstart (https://mlflow.org/docs/latest/ml/tracking/quickstart) as a
  notebook, `official_quickstart.ipynb`: one model, registered and loaded again, whose requirements MLflow infers.
- plain script: the MLflow calls of project.ipynb and nothing else, as a Python program: `plain_script.py`.

Both notebooks are executed the same way, by `tools/run.py` as in `make run`: a new kernel, the same shutdown, a page at
the end. Each candidate runs as a whole process in an empty folder with an empty store. A round runs each candidate
once, one after the other, so that all are slowed down alike by other work on the machine. The ratio is formed within a
round, and the figure is the median over the rounds. The first round is not counted.

Python compiles each module that has no compiled file yet, which takes long. `cold` never keeps compiled files, as in
a container that sets PYTHONDONTWRITEBYTECODE; `warm` keeps them, as from the second run on a laptop. Environment
variables set this for all candidates alike, so compiled files in .venv are not used. After the first round, the
environment that the quickstart builds comes from uv's cache, as on a laptop from the second run on.

At the end, a bar per section of the quickstart shows what takes the time when the environment is built.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OFFICIAL = ROOT / "benchmarks" / "official_quickstart.ipynb"
PLAIN = ROOT / "benchmarks" / "plain_script.py"
PROJECT = ROOT / "project.ipynb"
RUN = [str(ROOT / "tools" / "run.py"), "--shutdown", "immediate"]
CANDIDATES = {
    "official": (OFFICIAL, [*RUN, OFFICIAL.name], "off"),
    "project": (PROJECT, [*RUN, PROJECT.name], "off"),
    "project, environment rebuilt": (PROJECT, [*RUN, PROJECT.name], "on"),
    "plain script": (PLAIN, [PLAIN.name], "off"),
}
RATIOS = [
    ("project", "official", 0.70),
    ("project, environment rebuilt", "official", 0.98),
    ("project", "plain script", 1.15),
]


def run(candidate: str, bytecode: dict[str, str]) -> tuple[float, str]:
    """Run ``candidate`` in a new folder, and return its wall-clock seconds and its output.

    Raises:
        RuntimeError: the run failed; the message has its output.
    """
    source, arguments, rebuild = CANDIDATES[candidate]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PYTHON"))}
    variables = inherited | bytecode | {"REBUILD_ENVIRONMENT": rebuild}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(source, folder)
        shutil.copy(ROOT / "model_requirements.txt", folder)
        start = time.perf_counter()
        process = subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True
        )
        elapsed = time.perf_counter() - start
    if process.returncode != 0:
        raise RuntimeError(f"{candidate}:\n{process.stdout}\n{process.stderr}")
    return elapsed, process.stdout


def measure(rounds: int, bytecode: dict[str, str]) -> None:
    """Run all candidates in ``rounds`` rounds and one that is not counted, and print the seconds and the ratios."""
    taken = [{name: run(name, bytecode)[0] for name in CANDIDATES} for _ in range(rounds + 1)][1:]
    for name in CANDIDATES:
        values = [one[name] for one in taken]
        print(f"  {name:30} {statistics.median(values):6.2f} s  ({min(values):.2f} to {max(values):.2f})")
    for name, peer, bound in RATIOS:
        values = [one[name] / one[peer] for one in taken]
        print(
            f"  {name} / {peer}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}), "
            f"bound {bound:.2f}"
        )


def show_sections(rounds: int, bytecode: dict[str, str]) -> None:
    """Print the median seconds of each section over ``rounds`` runs, as `make run` measures them, as bars."""
    taken = {}
    for _ in range(rounds):
        elapsed, printed = run("project, environment rebuilt", bytecode)
        found = {title: float(value) for title, value in re.findall(r"(?m)^  (\S.*?) +([\d.]+) s$", printed)}
        found["(the kernel, and the page)"] = elapsed - sum(found.values())
        for title, value in found.items():
            taken.setdefault(title, []).append(value)
    for title, values in taken.items():
        print(f"  {title:30} {statistics.median(values):5.1f} s  {'#' * round(4 * statistics.median(values))}")


def main() -> None:
    """Measure with the bytecode states that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytecode", choices=["cold", "warm", "both"], default="both")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cold, tempfile.TemporaryDirectory() as warm:
        states = {
            "cold": {"PYTHONPYCACHEPREFIX": cold, "PYTHONDONTWRITEBYTECODE": "1"},
            "warm": {"PYTHONPYCACHEPREFIX": warm},
        }
        for name, bytecode in states.items():
            if options.bytecode in (name, "both"):
                print(f"{name} bytecode, {options.rounds} rounds")
                measure(options.rounds, bytecode)
                show_sections(options.rounds, bytecode)


if __name__ == "__main__":
    main()
