"""Check a model version at the gate, release it if it passes, and report both in the summary of the job.

action.yml runs this program in the environment that install.sh has made, and sets the variables that it reads. The step
that uses the action sets two more: SIGNING_KEY, the private key in PEM, and MLFLOW_TRACKING_URI. The commands of
lifecycle do the work. A version that is refused changes nothing in the store.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from mlflow_lifecycle.datasets import in_markdown
from mlflow_lifecycle.exceptions import LifecycleError
from mlflow_lifecycle.signing.keys import own_key, own_public_key
from mlflow_lifecycle.signing.verify import verified

LIFECYCLE = Path(sys.executable).with_name("lifecycle")


class RefusedError(Exception):
    """A command of lifecycle has failed, with the reason that it printed."""


def main() -> None:
    """Release the version, or end with the reason of the refusal."""
    for name in ("SIGNING_KEY", "MLFLOW_TRACKING_URI"):
        if not os.environ.get(name):
            sys.exit(f"{name} is missing. Set it in the step that uses this action.")
    version = os.environ["VERSION"]
    report(f"## {version} as {os.environ['ALIAS']}\n")
    with tempfile.TemporaryDirectory() as folder:
        try:
            keep_key(Path(folder))
            if os.environ["TRAINING_DATA"]:
                sign(version)
            check(version)
            release(version)
        except (RefusedError, LifecycleError) as error:
            report(f"**Not released**: {in_markdown(error)}")
            sys.exit(f"Error: {error}")


def keep_key(folder: Path) -> None:
    """Write the private key, and its public half, to where the commands of lifecycle look for them."""
    private = folder / "signing_key.pem"
    private.touch(mode=0o600)
    private.write_text(os.environ.pop("SIGNING_KEY") + "\n", encoding="utf-8")
    os.environ["LIFECYCLE_KEYS"] = str(folder)
    own_key()


def sign(version: str) -> None:
    """Sign a version with its training data, unless that was done before."""
    before = run("verify", version, *type_options(), "--json")
    if before.returncode == 0 and json.loads(before.stdout)["training_rows"]:
        return
    files = ["--training-data", os.environ["TRAINING_DATA"], "--lock", os.environ["REQUIREMENTS"]]
    require(run("sign", version, *files, *type_options()))


def check(version: str) -> None:
    """Report each check of the gate, and the metrics.

    Raises:
        RefusedError: a check failed.
    """
    process = run("gate", version, *gate_options(), "--json")
    if process.stdout:
        verdict = json.loads(process.stdout)
        checks = [(item["name"], item["result"], item["detail"]) for item in verdict["checks"]]
        metrics = [(name, f"{value:.4f}") for name, value in sorted(verdict["metrics"].items())]
        report(table(("check", "result", "detail"), checks))
        report(table(("metric", "value"), metrics))
    require(process)


def release(version: str) -> None:
    """Release the version, and report its model card as it was signed.

    Raises:
        RefusedError: the version is not released.
    """
    card = ["--intended-use", os.environ["INTENDED_USE"], "--limits", os.environ["LIMITS"]]
    made = json.loads(require(run("release", version, *gate_options(), *card, "--json")))
    uri = f"models:/{made['registered_model']}@{made['alias']}"
    with verified(uri, own_public_key(), trusted_types=lines("TRUSTED_TYPES")) as copy:
        text = (copy.folder.parent / "model_card.md").read_text(encoding="utf-8")
    report(f"**Released**: version {made['version']} is {made['alias']}\n")
    report(f"<details><summary>The model card</summary>\n\n{text}\n</details>")
    print(f"Released: version {made['version']} of {made['registered_model']} is {made['alias']}")


def gate_options() -> list[str]:
    """Return the options that the commands gate and release share."""
    options = ["--data", os.environ["DATA"], "--target", os.environ["TARGET"], "--alias", os.environ["ALIAS"]]
    for threshold in lines("THRESHOLDS"):
        options += ["--threshold", threshold]
    return options + os.environ["GATE_OPTIONS"].split() + type_options()


def type_options() -> list[str]:
    """Return the options that name additional types."""
    options = []
    for name in lines("TRUSTED_TYPES"):
        options += ["--trusted-type", name]
    return options


def lines(name: str) -> list[str]:
    """Return the lines of an environment variable that are not empty."""
    return [line.strip() for line in os.environ[name].splitlines() if line.strip()]


def run(command: str, version: str, *options: str) -> subprocess.CompletedProcess:
    """Run a command of lifecycle on a version."""
    line = [LIFECYCLE, command, *options, "--", version]
    return subprocess.run(line, capture_output=True, encoding="utf-8")


def require(process: subprocess.CompletedProcess) -> str:
    """Return what a command has printed.

    Raises:
        RefusedError: it has failed.
    """
    if process.returncode:
        reasons = re.findall(r"(?m)^Error: (.*)", process.stderr)
        raise RefusedError(reasons[-1] if reasons else process.stderr)
    return process.stdout


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header)]
    for row in rows:
        lines.append([in_markdown(value) for value in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def report(text: str) -> None:
    """Add a text to the summary of the job."""
    with Path(os.environ["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as summary:
        summary.write(f"{text}\n")


if __name__ == "__main__":
    main()
