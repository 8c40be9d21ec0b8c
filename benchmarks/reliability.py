"""Kill, crowd and damage what this project runs, and count what survives.

Usage: python benchmarks/reliability.py [--moments 30] [--changes 100] [--only kill-quickstart kill-release ...]

- kill-quickstart, kill-search, kill-release: the quickstart, guide 03 and a release are killed by SIGKILL, with their
  children, at seeded moments. After each, the store opens, everything that was registered before loads and predicts the
  same, no run that is called finished is empty, and a new execution finishes. Each begins in the same store, with what
  one execution has registered.
- set-up: `make run` in a fresh clone is killed at ten seeded moments. The same command afterwards finishes.
- faults: the quickstart by `tools/run.py` on a full disk, in a read-only folder, on a database that is locked for a
  minute, without HOME, in a C locale, under umask 077, with CRLF pins, and with the disk full while the tables are
  made. It survives if it finishes, or ends with a line that says why; and finishes once the fault is gone, with all
  that was registered before.
- kill-tables: a process that makes a store is killed at seeded moments. It survives if the store opens afterwards;
  beside it, a store that MLflow makes.
- crowd: six processes open a store that is not there yet, at the same moment; beside it, six that do so as MLflow does.
- server: eight executions of the quickstart at the same moment on the team's server, as deploy/compose.yaml starts it,
  in an experiment that exists; and eight in a new one, which `mlflow.set_experiment` does not make active for all of
  them. Those that finish survive, if each of their versions answers and nothing else was registered. It needs:
  make postgresql
- bytes: one random byte of a signed version's files is changed in the store. It survives if the version is refused;
  beside it, what `mlflow.pyfunc.load_model` does: it refuses as well, or predicts the same, or differs without a word.
- database: one random byte of the SQLite file is changed. It survives if that is noticed, or the version in production
  predicts the same; beside it, the same for `mlflow.pyfunc.load_model`.

Each line of the table: what was tried, how often, what survived. Exit status 3 if anything of ours was lost.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ |= {"MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}

import mlflow
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests/helpers"))

from releases import make_store  # noqa: E402
from versions import iris_rows, put_back  # noqa: E402

from mlflow_lifecycle.exceptions import NotVerifiedError  # noqa: E402
from mlflow_lifecycle.signing.keys import own_public_key  # noqa: E402
from mlflow_lifecycle.signing.verify import verified  # noqa: E402

LOST = 3  # exit status
RELEASE = "from releases import released; released()"
OPEN = {
    "ours": "import sys; from mlflow_lifecycle.experiments import make_sqlite_store as make; make(sys.argv[1])",
    "mlflow": "import sys, mlflow; mlflow.MlflowClient(f'sqlite:///{sys.argv[1]}').search_experiments()",
}
ANSWERS = """
import json, mlflow
from versions import iris_rows
rows, client = iris_rows().drop(columns="species"), mlflow.MlflowClient()
found = {}
for version in client.search_model_versions():
    uri = f"models:/{version.name}/{version.version}"
    try:
        found[uri] = mlflow.pyfunc.load_model(uri).predict(rows).tolist()
    except Exception as error:
        found[uri] = repr(error)
experiments = [experiment.experiment_id for experiment in client.search_experiments()]
runs = client.search_runs(experiments, "attributes.status = 'FINISHED'", max_results=5000)
found["empty runs"] = [run.info.run_id for run in runs if not run.data.metrics and not run.data.params]
print(json.dumps(found))
"""


def make_release(folder: Path) -> None:
    """Make a store of three versions in ``folder``, of which the first is released."""
    copies = make_store(folder)
    put_back(folder, copies[0])
    for copy in copies:
        shutil.rmtree(copy)


def use(folder: Path) -> None:
    """Make the store in ``folder`` and the keys beside it those of this process."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    os.environ["LIFECYCLE_KEYS"] = str(folder / "keys")
    mlflow.set_tracking_uri(None)


def program(name: str, folder: Path) -> list[str]:
    """Return the command of a program that is to be killed; it works on the store in ``folder``."""
    if name == "release":
        return [sys.executable, "-c", RELEASE]
    notebook = {"quickstart": "project.ipynb", "search": "guides/03_search_and_evaluate.ipynb"}[name]
    for file in (notebook, "model_requirements.txt", "requirements.txt"):
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    options = ["--execute", "--to", "notebook", "--output", str(folder / "out.ipynb")]
    return [sys.executable, "-m", "nbconvert", *options, str(folder / notebook)]


def variables_for(folder: Path, **others: str) -> dict[str, str]:
    """Return the environment variables of a program that works on the store in ``folder``, or on another one."""
    variables = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "REBUILD_ENVIRONMENT": "off"}
    variables |= {"LIFECYCLE_KEYS": str(folder / "keys")}
    return variables | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])} | others


def started(command: list[str], folder: Path, **others: str) -> subprocess.Popen:
    """Start a program on the store in ``folder``, or on another one."""
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=folder, env=variables_for(folder, **others), **silent)


def answers(folder: Path, **others: str) -> dict[str, list]:
    """Return what each registered version in the store of ``folder`` predicts, in a process that opens it anew."""
    variables = variables_for(folder, **others)
    done = subprocess.run([sys.executable, "-c", ANSWERS], env=variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def kill(name: str, moments: int, scratch: Path) -> Counter:
    """Kill a program at random moments, each time in the same store, and count what became of it."""
    chance, outcomes, folder = random.Random(0), Counter(), scratch / name
    if name == "release":
        make_release(folder)
    else:
        folder.mkdir()
        finish(name, folder)
    shutil.copytree(folder, scratch / "before")
    before, begin = answers(folder), time.monotonic()
    finish(name, folder)
    duration = time.monotonic() - begin
    for number in range(1, moments + 1):
        shutil.rmtree(folder)
        shutil.copytree(scratch / "before", folder)
        process, moment = started(program(name, folder), folder), chance.uniform(0, duration)
        time.sleep(moment)
        kill_all(process)
        after = answers(folder)
        kept = all(after.get(uri) == said for uri, said in before.items())
        finished = started(program(name, folder), folder).wait() == 0
        outcome = "survived" if kept and finished else "lost"
        print(
            f"  {name} {number}, killed after {moment:.1f} of {duration:.1f} s: {outcome}", file=sys.stderr, flush=True
        )
        outcomes[outcome] += 1
    shutil.rmtree(scratch / "before")
    return outcomes


def finish(name: str, folder: Path) -> None:
    """Run a program to its end.

    Raises:
        RuntimeError: it fails.
    """
    if started(program(name, folder), folder).wait():
        raise RuntimeError(f"The {name} does not run at all. Run it by hand to see why.")


def kill_all(process: subprocess.Popen) -> None:
    """Kill a process and all below it, such as a kernel, which is in a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait()


def interrupt_set_up(moments: int, scratch: Path) -> Counter:
    """Kill `make run` in a fresh clone at random moments of its first half minute, and run it again to its end."""
    chance, outcomes = random.Random(0), Counter()
    for number in range(moments):
        clone = scratch / f"clone-{number}"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "VIRTUAL"))}
        how = {"cwd": clone, "env": variables, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(["make", "run"], **how)
        time.sleep(chance.uniform(0, 30))
        kill_all(process)
        finished = subprocess.run(["make", "run"], check=False, **how).returncode == 0
        outcomes["survived" if finished and (clone / "build/project.html").is_file() else "lost"] += 1
        shutil.rmtree(clone)
    return outcomes


FAULTS = {  # what is done in the shell, in a small tmpfs of its own, and whether the quickstart has run there before
    "a full disk": ("fill; quickstart; status=$?; rm filler; return $status", True),
    "a full disk, no store yet": ("fill; quickstart; status=$?; rm filler; return $status", False),
    "a read-only folder": ("mount -o remount,ro .; quickstart; status=$?; mount -o remount,rw .; return $status", True),
    "a database locked for a minute": ("locked; quickstart; status=$?; wait; return $status", True),
    "no HOME": ("unset HOME; quickstart", True),
    "a C locale": ("LC_ALL=C LANG=C PYTHONUTF8=0 quickstart", True),
    "umask 077": ("umask 077; quickstart", True),
    "CRLF pins": ("sed -i 's/$/\\r/' model_requirements.txt; quickstart", True),
}
LOCK = """
import sqlite3, time
sqlite3.connect("mlflow.db").execute("BEGIN EXCLUSIVE")
time.sleep(60)
"""
ONE_FAULT = """
mount -t tmpfs -o size=40m tmpfs "$PWD" && cd "$PWD" && cp "$ROOT/project.ipynb" "$ROOT/model_requirements.txt" .
quickstart() { "$PYTHON" "$ROOT/tools/run.py" project.ipynb; }
fill() { dd if=/dev/zero of=filler bs=64k 2>/dev/null; }
locked() { "$PYTHON" -c "$LOCK" & sleep 3; }
fault() { %s; }
echo "{}" >"$OUT/before.json"
if %s; then quickstart && "$PYTHON" -c "$ANSWERS" >"$OUT/before.json"; fi
(fault) >"$OUT/log.txt" 2>&1
echo "ended with $?" >>"$OUT/log.txt"
quickstart && "$PYTHON" -c "$ANSWERS" >"$OUT/after.json"
"""


def meet_faults(scratch: Path) -> dict[str, Counter]:
    """Run the quickstart with each fault, then without, and count what became of it; one line per fault."""
    table = {}
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    variables |= {"PYTHON": sys.executable, "ROOT": str(ROOT), "ANSWERS": ANSWERS, "LOCK": LOCK, "OUT": str(scratch)}
    variables |= {"REBUILD_ENVIRONMENT": "off", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])}
    for title, (fault, earlier) in FAULTS.items():
        place = scratch / f"fault {len(table)}"
        place.mkdir()
        command = ["unshare", "--mount", "--", "bash", "-c", ONE_FAULT % (fault, str(earlier).lower())]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        later = subprocess.run(command, cwd=place, env=variables, check=False, **silent).returncode == 0
        said = (scratch / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        finished = said[-1] == "ended with 0"
        reasons = [line.strip() for line in said if re.search(r"failed in section|\[Errno", line)]
        reason = reasons[-1].replace(f"{place}/", "")[:200] if reasons else ""
        print(f"  {title}: {'it finished' if finished else reason}", flush=True)
        kept = later and last_json(scratch / "before.json").items() <= last_json(scratch / "after.json").items()
        table[title] = Counter(["survived" if kept and (finished or reason) else "lost"])
    return table


def last_json(path: Path) -> dict:
    """Return what the last line of a file says, as JSON."""
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])


def crowd(way: str, times: int, scratch: Path) -> Counter:
    """Let six processes open a store that is not there yet, and count what became of them and of the store."""
    outcomes = Counter()
    for number in range(times):
        folder = scratch / f"crowd-{way}-{number}"
        folder.mkdir()
        command = [sys.executable, "-c", OPEN[way], str(folder / "mlflow.db")]
        results = [process.wait() for process in [started(command, folder) for _ in range(6)]]
        later = started([sys.executable, "-c", OPEN["mlflow"], str(folder / "mlflow.db")], folder).wait()
        outcomes["survived" if not any(results) and not later else "lost"] += 1
    return outcomes


def kill_making(way: str, moments: int, scratch: Path) -> Counter:
    """Kill a process that makes a store, at random moments, and count how often the store opens afterwards."""
    chance, outcomes, duration = random.Random(0), Counter(), 0.0
    for number in range(moments + 1):
        folder = scratch / f"tables-{way}-{number}"
        folder.mkdir()
        command = [sys.executable, "-c", OPEN[way], str(folder / "mlflow.db")]
        begin, process = time.monotonic(), started(command, folder)
        if number:
            time.sleep(chance.uniform(0, duration))
            kill_all(process)
            ways = (way, "mlflow")
            opened = [started([sys.executable, "-c", OPEN[by], command[-1]], folder).wait() for by in ways]
            outcomes["lost" if any(opened) else "survived"] += 1
        else:  # the first one says how long it takes
            process.wait()
            duration = time.monotonic() - begin
    return outcomes


def crowd_on_server(executions: int, scratch: Path) -> dict[str, Counter]:
    """Execute the quickstart many times at once on the team's server, and count those that lost nothing.

    First in a new experiment, and then in the same one.
    """
    from deployment import deployed

    outcomes, versions = {}, 0
    (scratch / "server").mkdir()
    with deployed(scratch / "server") as team:
        for experiment in ("new", "known"):
            folders = [scratch / f"{experiment}-{number}" for number in range(executions)]
            for folder in folders:
                folder.mkdir()
            processes = [started(program("quickstart", folder), folder, **team.as_user("ana")) for folder in folders]
            finished = sum(process.wait() == 0 for process in processes)
            versions += 2 * finished
            found = answers(scratch, **team.as_user("ana"))
            whole = found.pop("empty runs") == [] and all(isinstance(said, list) for said in found.values())
            if not whole or len(found) != versions:
                finished = 0
            outcomes[experiment] = Counter(survived=finished, lost=executions - finished)
    return outcomes


def change_bytes(changes: int, scratch: Path) -> tuple[Counter, Counter]:
    """Change a random byte of a signed version's files, and count what loading it says, verified and plainly."""
    folder = scratch / "bytes"
    make_release(folder)
    use(folder)
    chance = random.Random(0)
    version = mlflow.MlflowClient().get_model_version("iris", 1)
    place = mlflow.get_logged_model(version.source.rpartition("/")[2]).artifact_location.removeprefix("file://")
    files = sorted(path for path in Path(place).iterdir() if path.name != "registered_model_meta")
    rows, ours, plain = iris_rows().drop(columns="species"), Counter(), Counter()
    expected = mlflow.pyfunc.load_model("models:/iris/1").predict(rows).tolist()
    for _ in range(changes):
        path = chance.choices(files, [file.stat().st_size for file in files])[0]
        content = bytearray(path.read_bytes())
        original = bytes(content)
        content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
        path.write_bytes(content)
        try:
            with verified("models:/iris@production", own_public_key(), purpose="release"):
                ours["lost"] += 1
        except NotVerifiedError:
            ours["survived"] += 1
        try:
            same = mlflow.pyfunc.load_model("models:/iris/1").predict(rows).tolist() == expected
            plain["survived" if same else "lost"] += 1
        except Exception:
            plain["survived"] += 1
        path.write_bytes(original)
    return ours, plain


def predictions(folder: Path, *, verify: bool) -> list | None:
    """Return what the version in production predicts, or nothing where the change was noticed."""
    use(folder)
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
        uri = "models:/iris@production"
        if verify:
            uri = str(stack.enter_context(verified(uri, own_public_key(), purpose="release")).folder)
        return mlflow.pyfunc.load_model(uri).predict(iris_rows().drop(columns="species")).tolist()
    return None


def change_database(changes: int, scratch: Path) -> dict[bool, Counter]:
    """Change a random byte of the database, and count what loading a version says, verified and plainly.

    Each time in a process that opens the database for the first time.
    """
    folder = scratch / "database"
    make_release(folder)
    chance = random.Random(0)
    database, outcomes = folder / "mlflow.db", {True: Counter(), False: Counter()}
    original = database.read_bytes()
    context = get_context("forkserver")
    context.set_forkserver_preload(["mlflow.sklearn", "mlflow.store.tracking.sqlalchemy_store", "skops.io", "releases"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as executor:
        expected = executor.submit(predictions, folder, verify=True).result()
        if expected is None:
            raise RuntimeError("The version cannot even be verified in a database that nobody has changed.")
        for _ in range(changes):
            content = bytearray(original)
            content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
            for verify, counter in outcomes.items():
                database.write_bytes(content)
                said = executor.submit(predictions, folder, verify=verify).result()
                counter["survived" if said in (None, expected) else "lost"] += 1
    database.write_bytes(original)
    return outcomes


def main() -> None:
    """Try everything, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--changes", type=int, default=100)
    parts = ["kill-quickstart", "kill-search", "kill-release", "kill-tables", "crowd", "server", "bytes", "database"]
    parts += ["set-up", "faults"]
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    settings = parser.parse_args()
    table: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        for name in ("quickstart", "search", "release"):
            if f"kill-{name}" in settings.only:
                table[f"{name}, killed"] = kill(name, settings.moments, scratch)
        if "kill-tables" in settings.only:
            table["a store in the making, killed"] = kill_making("ours", settings.moments, scratch)
            table["a store that MLflow makes, killed (peer)"] = kill_making("mlflow", settings.moments, scratch)
        if "crowd" in settings.only:
            table["six at once, no store yet"] = crowd("ours", 5, scratch)
            table["the same as MLflow does it (peer)"] = crowd("mlflow", 5, scratch)
        if "server" in settings.only:
            outcomes = crowd_on_server(8, scratch)
            table["eight at once, on the team's server"] = outcomes["known"]
            table["the same in a new experiment"] = outcomes["new"]
        if "bytes" in settings.only:
            ours, plain = change_bytes(settings.changes, scratch)
            table |= {"a byte changed, verified": ours, "a byte changed, loaded plainly (peer)": plain}
        if "database" in settings.only:
            outcomes = change_database(settings.changes, scratch)
            table["a byte of the database, verified"] = outcomes[True]
            table["a byte of the database, plainly (peer)"] = outcomes[False]
        if "set-up" in settings.only:
            table["`make run` of a fresh clone, killed"] = interrupt_set_up(min(settings.moments, 10), scratch)
        if "faults" in settings.only:
            table |= meet_faults(scratch)
    print(f"{'tried':42}{'times':>6}{'survived':>10}{'lost':>6}")
    for title, outcomes in table.items():
        print(f"{title:42}{outcomes.total():6}{outcomes['survived']:10}{outcomes['lost']:6}")
    lost = any(outcomes["lost"] for title, outcomes in table.items() if "(peer)" not in title)
    sys.exit(LOST if lost else 0)


if __name__ == "__main__":
    main()
