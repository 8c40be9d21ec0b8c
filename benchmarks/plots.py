"""Draw the ratios of benchmarks/RESULTS.md, and where the time of the quickstart goes: benchmarks/results.png.

Usage: python benchmarks/plots.py
"""

import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/RESULTS.md"
PICTURE = ROOT / "benchmarks/results.png"
QUICKSTART = r"benchmarks/quickstart\.py.*?\n{} bytecode.*?\n +project{} / official: "
SERVING = r"benchmarks/serving\.py.*?\n +{} +{}  kept +lifecycle  +\S+ +\S+ +\S+ +"
# What is drawn: what stands before the ratio in the results, and the most that it should be, if that was decided.
ROWS = {
    "quickstart, compiled": (QUICKSTART.format("warm", ""), 0.70),
    "quickstart with its environment, compiled": (QUICKSTART.format("warm", ", environment rebuilt"), 0.98),
    "quickstart, not compiled": (QUICKSTART.format("cold", ""), 0.70),
    "quickstart with its environment, not compiled": (QUICKSTART.format("cold", ", environment rebuilt"), 0.98),
    "set-up, nothing cached": (r"benchmarks/installation\.py.*?\ncold +[\d.]+ +[\d.]+ +", 0.15),
    "set-up, all cached": (r"benchmarks/installation\.py.*?\nwarm +[\d.]+ +[\d.]+ +", None),
    "a model's environment, MB": (r"benchmarks/environment\.py.*?\ninstalled size \(MB\) +\d+ +\d+ +", 0.55),
    "its first prediction": (r"benchmarks/environment\.py.*?\nfirst prediction \(s\) +[\d.]+ +[\d.]+ +", None),
    "a run logged, SQLite": (r"benchmarks/store\.py.*?\nSQLite\n +a run, ours / one by one: ", 0.40),
    "a run logged, PostgreSQL": (r"benchmarks/store\.py.*?\nPostgreSQL\n +a run, ours / one by one: ", 0.40),
    "search tracked, 30 trials": (r"benchmarks/search\.py.*?\ntracked / untracked, 30 trials: ", 1.6),
    "search tracked, 300 trials": (r"benchmarks/search\.py.*?\ntracked / untracked, 300 trials: ", 1.6),
    "search tracked, 1,000 trials": (r"benchmarks/search\.py.*?\ntracked / untracked, 1000 trials: ", 1.6),
    "verification of 1 GB": (r"benchmarks/verification\.py.*?\n +1000 +[\d.]+ +[\d.]+ +", 1.5),
    "a version renewed": (r"benchmarks/packages\.py.*?\nrenew +[\d.]+ +[\d.]+ +", None),
    "two versions compared": (r"benchmarks/packages\.py.*?\ncompare +[\d.]+ +[\d.]+ +", None),
    "the gate's scores": (r"benchmarks/gate\.py.*?\nscored +[\d.]+ +[\d.]+ +", None),
    "an answer, one client": (SERVING.format(1, 1), 0.65),
    "an answer, eight clients": (SERVING.format(1, 8), 0.80),
    "1,000 rows, one client": (SERVING.format(1000, 1), 0.65),
    "1,000 rows, eight clients": (SERVING.format(1000, 8), 0.80),
}


class Ratio(NamedTuple):
    """Ours divided by the peer's: the median over the rounds, and the range, where there was more than one."""

    median: float
    low: float
    high: float


def ratio(page: str, name: str) -> Ratio | None:
    """Return the ratio that the results have for a row of ``ROWS``, or None where it was not measured."""
    found = re.search(ROWS[name][0] + r"([\d.]+)(?: \(([\d.]+) to ([\d.]+)\))?", page, re.DOTALL)
    if found is None:
        return None
    median, low, high = (float(text or found[1]) for text in found.groups())
    return Ratio(median, low, high)


def sections(page: str) -> dict[str, float]:
    """Return the seconds of each section of the quickstart, with bytecode compiled before."""
    (part,) = re.findall(r"benchmarks/quickstart\.py.*?\nwarm bytecode(.*?)\n```", page, re.DOTALL) or [""]
    return {title: float(value) for title, value in re.findall(r"(?m)^  (\S.*?) +([\d.]+) s +#*$", part)}


def draw(page: str, picture: Path) -> None:
    """Draw the ratios, each with its range and the most that it should be, and below them the seconds by section."""
    ratios = {name: one for name in ROWS if (one := ratio(page, name))}
    figure, (above, below) = plt.subplots(2, figsize=(9, 12), height_ratios=(21, 9), layout="constrained")
    for row, (name, one) in enumerate(ratios.items()):
        above.plot([one.low, one.high], [row, row], color="C0", linewidth=2)
        above.plot(one.median, row, "o", color="C0", label=None if row else "measured: median and range of the rounds")
        if ROWS[name][1]:
            above.plot(
                ROWS[name][1], row, "|", color="C1", markersize=16, label=None if row else "the most that it should be"
            )
    above.axvline(1, color="grey", linewidth=1)
    above.set(xscale="log", title="This project / its peer: less is better", yticks=range(len(ratios)))
    above.set_yticklabels([f"{name}   {one.median:.2f}" for name, one in ratios.items()])
    above.set_xticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    above.minorticks_off()
    above.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    taken = sections(page)
    below.barh(list(taken), list(taken.values()))
    below.set(title="Where the time of the quickstart with its environment goes", xlabel="seconds")
    below.invert_yaxis()
    figure.savefig(picture, dpi=100, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(RESULTS.read_text(encoding="utf-8"), PICTURE)
