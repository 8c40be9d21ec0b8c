"""Do the notebooks give the same on another machine? Execute fresh clones that differ in all that may not matter.

Usage: python tools/reproduce.py [--work FOLDER] [NOTEBOOK ...]

What is committed counts. All clones are compared with the first. Where one differs, each of its settings is tried
alone, so that the table names the cause. The exit status is 3 if anything differs. It takes about 5 GB while it runs.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = ROOT / "tests" / "sanitize.cfg"
# The loopback interface is a part of the machine, not of the network; a new namespace has it switched off.
NO_NETWORK = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@dataclass(frozen=True)
class Situation:
    """Where and how a clone is executed.

    ``python`` is a version, such as 3.12, and ``threads`` how many the linear algebra takes.
    """

    folder: str = "clone"
    home: str = "home"
    time_zone: str = "UTC"
    locale: str = "C.UTF-8"
    hash_seed: int = 0
    threads: int = 1
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"
    network: bool = True

    def varied(self, other: Situation) -> dict[str, Any]:
        """Return the settings in which it differs from ``other``."""
        return {name: value for name, value in asdict(self).items() if value != getattr(other, name)}


FIRST = Situation()
ELSEWHERE = Situation(
    "a path that is long, with spaces and letters such as ä, ø, ł and 中/" + "and one more folder/" * 4 + "clone",
    "another home",
    "Asia/Kathmandu",
    "C",
    4711,
    2,
    network=False,
)

# These download every archive of an environment again, so they are executed with the network everywhere.
WITH_NETWORK = (
    "guides/04_release_and_report.ipynb",
    "guides/05_serve_and_monitor.ipynb",
    "guides/07_keep_pins_current.ipynb",
)


def executable(version: str) -> str | None:
    """Return the path of a Python of that version on this machine, or None."""
    command = [sys.executable, "-m", "uv", "python", "find", "--offline", "--no-project", "--system", version]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def variables(situation: Situation, work: Path) -> dict[str, str]:
    """Return the environment variables of a process in that situation.

    Of this process's own it gets what leads to programs, to the data of guide 02 and to the package index.
    """
    leading = r"PATH|JAVA_HOME|HEART_DISEASE_DATA|\w+_PROXY|(SSL|PIP|UV)_\w*(CERT|INDEX|LINKS)\w*"
    home = work / situation.home
    home.mkdir(exist_ok=True)
    names = {name: value for name, value in os.environ.items() if re.fullmatch(leading, name, re.IGNORECASE)}
    names |= {"HOME": str(home), "TZ": situation.time_zone, "LC_ALL": situation.locale, "LANG": situation.locale}
    names |= {f"{library}_NUM_THREADS": str(situation.threads) for library in ("OMP", "OPENBLAS", "MKL")}
    names |= {"PYTHONHASHSEED": str(situation.hash_seed), "MLFLOW_DISABLE_TELEMETRY": "true"}
    names |= {"UV_CACHE_DIR": str(work / "packages"), "PIP_CACHE_DIR": str(work / "pip")}
    if not situation.network:
        names |= {"UV_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(work / "wheels")}
    return names


def run(command: list, situation: Situation, work: Path, folder: Path, **more: str) -> None:
    """Run ``command`` in that situation.

    Raises:
        RuntimeError: it failed; with the last lines that it printed.
    """
    prefix = [] if situation.network else NO_NETWORK
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    done = subprocess.run([*prefix, *map(str, command)], cwd=folder, env=variables(situation, work) | more, **output)
    if done.returncode:
        lines = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout.decode(errors="replace")).strip().splitlines()
        raise RuntimeError(" ".join(lines[-3:]))


def cloned(situation: Situation, work: Path) -> Path:
    """Return a new clone of what is committed here, with its environment installed as its Makefile does it."""
    clone = work / situation.folder
    python = executable(situation.python)
    clone.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, clone], check=True)
    run(["make", ".venv/installed.txt", f"PYTHON={python}"], situation, work, clone)
    if not (work / "wheels").exists():  # for those that have no network: pip, unlike uv, cannot do without
        wheels = ["download", "--quiet", "--no-deps", "--require-hashes", "--requirement", ".venv/uv.txt"]
        run([clone / ".venv/bin/python", "-m", "pip", *wheels, "--dest", work / "wheels"], situation, work, clone)
    return clone


def executed(clone: Path, notebook: str, situation: Situation, work: Path, results: str = "") -> dict[str, Any]:
    """Execute ``notebook`` in the clone on an empty store, and return what is compared, or why it failed.

    The store and what was executed go below ``build`` in the clone, by default to a folder with the notebook's name.
    """
    python, results = clone / ".venv/bin/python", clone / "build" / (results or Path(notebook).stem)
    results.mkdir(parents=True)
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{results.as_posix()}/mlflow.db"}
    command = [python, "-m", "nbconvert", "--execute", "--to", "notebook", "--output-dir", results, notebook]
    command += ["--KernelManager.transport_encryption=auto", "--ExecutePreprocessor.startup_timeout=600"]
    try:
        run(command, situation, work, clone, **store)
        run([python, Path(__file__).resolve(), "--models", results / "models.json"], situation, work, clone, **store)
    except RuntimeError as error:
        return {"failure": {"execution": str(error)}}
    models = json.loads((results / "models.json").read_text(encoding="utf-8"))
    return outputs(nbformat.read(results / Path(notebook).name, as_version=4)) | models


def outputs(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Return the printed outputs of a notebook, by the rules of tests/sanitize.cfg, and its pictures.

    Cells with measured times, which nbval is told to ignore, are left out.
    """
    from nbval.plugin import coalesce_streams, get_sanitize_patterns

    rules = get_sanitize_patterns(SANITIZE.read_text(encoding="utf-8"))
    printed, pictures = {}, {}
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type != "code" or "nbval-ignore-output" in cell.metadata.get("tags", []):
            continue
        in_order = sorted(coalesce_streams(cell.outputs), key=lambda output: output.get("name", "~"))
        for place, output in enumerate(in_order, 1):  # Jupyter keeps no order between stderr and stdout
            data = {"text": output.text} if "text" in output else output.get("data", {"error": output.get("evalue")})
            for kind, value in data.items():
                name = f"cell {number}, output {place}, {kind}"
                if kind == "image/png":
                    pictures[name] = value
                    continue
                for pattern, replacement in rules:
                    value = re.sub(pattern, replacement, value)
                printed[name] = value
    return {"printed": printed, "pictures": pictures}


def models() -> dict[str, dict[str, str]]:
    """Return what each logged model of the store is: its parameters, predictions and requirements, as SHA-256."""
    import mlflow

    client = mlflow.MlflowClient()
    found = {"parameters": {}, "predictions": {}, "requirements": {}}
    experiments = {experiment.experiment_id: experiment.name for experiment in client.search_experiments()}
    logged = mlflow.search_logged_models(list(experiments), output_format="list", order_by=ORDER)
    for number, model in enumerate(logged, 1):
        run_name = client.get_run(model.source_run_id).info.run_name if model.source_run_id else ""
        name = f"{experiments[model.experiment_id]}, {run_name}, {model.name}, {number}"
        folder = Path(mlflow.artifacts.download_artifacts(model.artifact_location))
        found["requirements"][name] = hashlib.sha256((folder / "requirements.txt").read_bytes()).hexdigest()
        estimator = mlflow.sklearn.load_model(str(folder))
        found["parameters"][name] = digest(estimator)
        if (example := mlflow.pyfunc.load_model(str(folder)).input_example) is None:
            continue
        rows = many_rows(example)
        answers = [estimator.predict(rows)]
        answers += [estimator.predict_proba(rows)] if hasattr(estimator, "predict_proba") else []
        found["predictions"][name] = digest(answers)
    return found


ORDER = [{"field_name": "creation_timestamp", "ascending": True}]


def many_rows(example: Any, count: int = 500) -> Any:
    """Return ``count`` rows like those of the input example: drawn from it, with numbers halved to doubled."""
    import numpy as np

    generator = np.random.default_rng(0)
    rows = example.sample(count, replace=True, random_state=0, ignore_index=True)
    numbers = rows.select_dtypes("floating").columns
    rows[numbers] *= generator.uniform(0.5, 2, rows[numbers].shape)
    return rows


def digest(value: Any) -> str:
    """Return a SHA-256 of a fitted model or of what it predicts: two are equal if every bit of them is."""
    digester = hashlib.sha256()
    for part in parts(value):
        digester.update(part)
    return digester.hexdigest()


def parts(value: Any) -> Iterator[bytes]:
    """Give the content of ``value``, of whatever it is made up."""
    import numpy as np

    yield f"<{type(value).__name__}>".encode()
    if isinstance(value, np.ndarray) and value.dtype.names:  # the nodes of a tree; between the fields are unset bytes
        yield from parts({name: value[name] for name in value.dtype.names})
    elif isinstance(value, np.ndarray | np.generic) and value.dtype.kind != "O":
        yield f"{value.dtype}{value.shape}".encode() + value.tobytes()
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            yield repr(key).encode()
            yield from parts(value[key])
    elif isinstance(value, list | tuple | np.ndarray):
        for item in value:
            yield from parts(item)
    elif value is None or isinstance(value, str | int | float):
        yield repr(value).encode()
    elif callable(value):
        yield getattr(value, "__qualname__", "").encode()
    else:
        yield from parts(value.__getstate__())


def same_pixels(picture: str, other: str) -> bool:
    """Whether two PNG pictures, in base64, have the same pixels; what they say of their making does not count."""
    import numpy as np
    from matplotlib.image import imread

    images = [imread(io.BytesIO(base64.b64decode(text)), format="png") for text in (picture, other)]
    return images[0].shape == images[1].shape and np.array_equal(*images)


COMPARED = ("printed", "pictures", "parameters", "predictions", "requirements")


def differences(result: dict[str, dict], other: dict[str, dict]) -> dict[str, list[str]]:
    """Return, for all that is compared and that both have, the names of what differs or is missing in one."""
    if "failure" in result or "failure" in other:
        return {"failure": [*result.get("failure", {}).values(), *other.get("failure", {}).values()]}
    found = {}
    for kind in (kind for kind in COMPARED if kind in result and kind in other):
        same = same_pixels if kind == "pictures" else str.__eq__
        in_one = result[kind].keys() ^ other[kind].keys()
        both = [name for name in result[kind] if name not in in_one]
        found[kind] = sorted(in_one) + [name for name in both if not same(result[kind][name], other[kind][name])]
    return found


def label(situation: Situation) -> str:
    """Return what differs from the first clone, in a few words."""
    varied = situation.varied(FIRST)
    return ", ".join(f"Python {situation.python}" if name == "python" else name for name in varied)


def report(notebook: str, compared: str, found: dict[str, list[str]], result: dict[str, dict]) -> None:
    """Print a line of the table, and below it what differs."""
    cells = ["fails"] if "failure" in found else []
    for kind in COMPARED[len(cells) :]:
        count = len(result[kind]) if kind in found else 0
        cells.append(f"{len(found[kind])} of {count} differ" if found.get(kind) else f"{count} equal" if count else "-")
    print(f"| {notebook} | {compared} | {' | '.join(cells)} |", flush=True)
    for kind, names in found.items():
        for name in names:
            print(f"    {kind}: {name}", flush=True)


def situations() -> Iterator[Situation]:
    """Give the situations that this machine can make, after the first."""
    if subprocess.run([*NO_NETWORK, "true"], capture_output=True).returncode == 0:
        yield ELSEWHERE
    else:
        print("This machine makes no network namespace, so all have the network.")
        yield replace(ELSEWHERE, network=True)
    for version in ("3.11", "3.12", "3.13", "3.14"):
        if version == FIRST.python:
            continue
        if executable(version):
            yield replace(FIRST, folder=f"clone with Python {version}", python=version)
        else:
            print(f"Left out: Python {version} is not on this machine.")


def committed_notebooks() -> list[str]:
    """Return the notebooks that a clone with the basic set-up can execute."""
    listed = ["git", "-C", ROOT, "ls-files", "*.ipynb", ":!benchmarks", ":!guides/06_scale_out.ipynb"]
    print("Left out: guides/06_scale_out.ipynb, which needs Spark.")
    return subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()


def cause(notebook: str, situation: Situation, first: dict, found: dict, work: Path) -> str:
    """Return which setting alone makes the same difference. Python comes first: it has a folder of its own."""
    again = executed(work / FIRST.folder, notebook, FIRST, work, results=f"{Path(notebook).stem} again")
    if any(differences(first, again).values()):
        return "the cause: chance, since a second execution of the first clone differs, too"
    for name, value in sorted(situation.varied(FIRST).items(), key=lambda setting: setting[0] != "python"):
        alone = replace(FIRST, **{name: value})
        clone = work / (situation if name == "python" else alone).folder
        result = executed(clone, notebook, alone, work, results=f"{Path(notebook).stem} {name}")
        difference = differences(first, result)
        if difference == found or "failure" in difference.keys() & found.keys():
            return f"the cause: {name}"
    return "no setting alone makes this difference"


def main() -> None:
    """Set up the clones, execute the notebooks in each, and print what was compared."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="default: all that are committed")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="a new folder that keeps clones and results")
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.models:
        arguments.models.write_text(json.dumps(models()), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() if arguments.work is None else nullcontext(arguments.work) as folder:
        work = Path(folder).resolve()
        work.mkdir(exist_ok=True)
        sys.exit(0 if compare(arguments.notebooks or committed_notebooks(), work) else 3)


def compare(notebooks: list[str], work: Path) -> bool:
    """Execute the notebooks in each situation, print the table, and return whether all are equal."""
    others = list(situations())
    if with_network := [notebook for notebook in notebooks if notebook in WITH_NETWORK]:
        print(f"With the network everywhere, since they download packages again: {', '.join(with_network)}")
    for situation in (FIRST, *others):
        print(f"Set up: {situation.varied(FIRST) or asdict(FIRST)}", flush=True)
        cloned(situation, work)
    print(f"\n| notebook | the first clone, and | {' | '.join(COMPARED)} |\n|{'---|' * (len(COMPARED) + 2)}")
    equal = True
    for notebook in notebooks:
        first = executed(work / FIRST.folder, notebook, FIRST, work)  # alone: it fills the cache of packages
        found = differences(first, outputs(nbformat.read(work / FIRST.folder / notebook, as_version=4)))
        report(notebook, "what is committed", found, first)
        equal &= not any(found.values())
        if "failure" in first:
            continue
        executions = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for situation in others:
                situation = replace(situation, network=situation.network or notebook in WITH_NETWORK)
                executions[situation] = pool.submit(executed, work / situation.folder, notebook, situation, work)
        for situation, execution in executions.items():
            result = execution.result()
            found = differences(first, result)
            report(notebook, label(situation), found, result)
            if any(found.values()):
                print(f"    {cause(notebook, situation, first, found, work)}", flush=True)
                equal = False
    return equal


if __name__ == "__main__":
    main()
