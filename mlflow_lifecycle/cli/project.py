"""The commands about a project: report, doctor, ui, search-worker."""

import os
import re
from dataclasses import asdict
from pathlib import Path

import click

from mlflow_lifecycle.cli.options import FILE, JSON, print_lines, print_result, use_store
from mlflow_lifecycle.exceptions import InvalidInputError, ServingFailedError


@click.command(short_help="Write a report on the runs of an experiment.")
@click.argument("experiment")
@click.option(
    "--metric",
    default="",
    metavar="NAME",
    help="The metric to compare. Default: the only log loss or error.",
)
@click.option(
    "--by",
    default="mlflow.runName",
    metavar="TAG",
    help="The tag that groups the runs. Default: the run name.",
)
@click.option("--output", type=FILE, metavar="FOLDER", help="Default: reports/EXPERIMENT.")
@JSON
def report(experiment: str, metric: str, by: str, output: Path | None, as_json: bool) -> None:
    """Write the report of EXPERIMENT: which group of runs wins, and which are tied with it.

    Runs with the same name, or the same value of a tag, are one group.

    Example: lifecycle report tracking_quick_start --metric neg_log_loss
    """
    from mlflow_lifecycle.report import make_report, verdict, write_report

    use_store()
    made = make_report(experiment, metric, by)
    folder = output or Path("reports") / re.sub(r"[^\w.-]|^[.]+", "_", experiment)
    write_report(made, folder)
    lines = [verdict(made), f"The report: {folder / 'experiment_report.md'}"]
    groups = made.groups.reset_index().to_dict("records")
    print_result(vars(made) | {"groups": groups}, lines, as_json)


@click.command(short_help="Find problems of the project folder.")
@JSON
@click.option("--fix", is_flag=True, help="Repair the paths in a SQLite store that was moved.")
@click.option("--quiet", is_flag=True, help="Print nothing if no problem is found.")
def doctor(as_json: bool, fix: bool, quiet: bool) -> None:
    """Print the problems of this folder, and how to solve them.

    The exit status is 1 if there is a problem.

    Example: lifecycle doctor --fix
    """
    from mlflow_lifecycle.doctor import find_problems

    if fix:
        fix_store()
        return
    problems = find_problems(Path.cwd())
    lines = []
    for problem in problems:
        lines += [problem.what, problem.remedy]
    if not problems and not quiet:
        lines = ["No problem was found in packages, pins, store and disk."]
    print_result([asdict(problem) for problem in problems], lines, as_json)
    raise SystemExit(bool(problems))


def fix_store() -> None:
    """Show the paths to change in a store that was moved, and change them after confirmation."""
    from mlflow_lifecycle.experiments import tracking_uri
    from mlflow_lifecycle.moved import change_folders, find_moved_folders

    path = Path(tracking_uri(Path.cwd()).removeprefix("sqlite:///"))
    folders = find_moved_folders(path) if path.is_file() else set()
    if not folders:
        print_lines(["There is nothing to repair: there is no store, or its folders exist."])
        return
    print_lines(f"{folder} -> {path.parent}" for folder in folders)
    click.confirm("Change these paths, after a copy of the store?", abort=True)
    copy = change_folders(path)
    print_lines([f"Repaired. A copy of the store as it was: {copy}"])


@click.command(short_help="Start MLflow's interface.")
@click.option(
    "--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="The port."
)
def ui(port: int) -> None:
    """Start MLflow's interface on the store of this folder, and print links to the newest runs.

    If the store is a tracking server, only the links are printed.

    Example: lifecycle ui --port 5002
    """
    import mlflow

    from mlflow_lifecycle.ui import find_links, running_interface

    use_store()
    store = mlflow.get_tracking_uri()
    if store.startswith("http"):
        print_lines(find_links(store.rstrip("/")))
        return
    try:
        print_lines(["The interface starts. Its links follow in some seconds."])
        with running_interface(port) as server:
            links = find_links(f"http://127.0.0.1:{port}")
            print_lines([*links, "Press Ctrl+C to stop the interface."])
            server.wait()
    except KeyboardInterrupt:
        print_lines(["The interface has stopped."])
        return
    raise ServingFailedError("MLflow's server has ended. The reason is above.")


@click.command("search-worker", short_help="Run trials of a search.")
@click.argument("run_id")
@click.option(
    "--objective",
    required=True,
    metavar="FILE.py:FUNCTION",
    help="Takes a trial, returns its value.",
)
def search_worker(run_id: str, objective: str) -> None:
    """Run trials of the search RUN_ID until its queue is empty.

    SEARCH_STORAGE names the PostgreSQL database of the queue.

    Example: lifecycle search-worker 3f2a --objective objective.py:objective
    """
    from mlflow_lifecycle.workers import load_objective, work

    if "SEARCH_STORAGE" not in os.environ:
        raise InvalidInputError(
            "SEARCH_STORAGE must name the PostgreSQL database: postgresql://user@host/database"
        )
    use_store()
    work(
        run_id,
        load_objective(objective),
        os.environ["SEARCH_STORAGE"],
        objective.rpartition(":")[0],
    )


COMMANDS = (report, doctor, ui, search_worker)
