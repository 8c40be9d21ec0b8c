"""Measure the environment that a model records, beside one with full mlflow.

Usage: python benchmarks/environment.py [--rounds 5]

One environment has the packages of `model_requirements.txt`, with mlflow-skinny; the other has full mlflow,
scikit-learn, pandas, numpy and skops, with what they need, in the versions of the lock. Compared are the number of
packages, the installed size, and the seconds in which a new process loads a linear model and predicts one row.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlflow
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

ROOT = Path(__file__).resolve().parents[1]
UV = [sys.executable, "-m", "uv", "--no-config"]
PREDICT = (
    "import sys, mlflow, pandas; print(mlflow.pyfunc.load_model(sys.argv[1]).predict(pandas.read_json(sys.argv[2])))"
)


def build(folder: Path, arguments: list[str]) -> Path:
    """Make an environment in ``folder`` with the packages in ``arguments``, and return its Python."""
    subprocess.run([*UV, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    python = folder / "bin/python"
    install = ["pip", "install", "--quiet", "--python", str(python)]
    subprocess.run([*UV, *install, "-c", str(ROOT / "requirements.txt"), *arguments], check=True)
    return python


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        iris = load_iris(as_frame=True)
        model = LogisticRegression(max_iter=1000).fit(iris.data, iris.target)
        mlflow.sklearn.save_model(model, scratch / "model", pip_requirements=str(ROOT / "model_requirements.txt"))
        iris.data.head(1).to_json(scratch / "row.json")
        contents = {"ours": ["-r", str(ROOT / "model_requirements.txt")]}
        contents["full"] = ["mlflow", "scikit-learn", "pandas", "numpy", "skops"]
        pythons = {name: build(scratch / name, wanted) for name, wanted in contents.items()}
        packages, size, taken = {}, {}, {name: [] for name in pythons}
        for name, python in pythons.items():
            listed = [*UV, "pip", "list", "--quiet", "--format", "json", "--python", str(python)]
            packages[name] = len(json.loads(subprocess.run(listed, check=True, capture_output=True).stdout))
            size[name] = sum(path.stat().st_size for path in (scratch / name).rglob("*") if path.is_file()) / 1e6
        for _ in range(rounds + 1):
            for name, python in pythons.items():
                begin = time.perf_counter()
                command = [python, "-c", PREDICT, scratch / "model", scratch / "row.json"]
                subprocess.run(command, check=True, capture_output=True)
                taken[name].append(time.perf_counter() - begin)
    ratios = [one / other for one, other in zip(taken["ours"][1:], taken["full"][1:], strict=True)]  # not the first
    print("                            ours    full   ours / full")
    print(
        f"packages                {packages['ours']:8} {packages['full']:7}   {packages['ours'] / packages['full']:.2f}"
    )
    print(f"installed size (MB)     {size['ours']:8.0f} {size['full']:7.0f}   {size['ours'] / size['full']:.2f}")
    medians = [statistics.median(taken[name][1:]) for name in ("ours", "full")]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"first prediction (s)    {medians[0]:8.2f} {medians[1]:7.2f}   {spread}")


if __name__ == "__main__":
    main()
