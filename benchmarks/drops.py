"""Fill tables of drops in the documentation from the data files of studies.

    python benchmarks/drops.py                 # every page in docs
    python benchmarks/drops.py keep RUN NAME   # first keep a study's report as docs/results/NAME

A page asks for a table by two comments, and this program writes what stands between them:

    <!-- drops: digits-study | 2, 4 | kmeans; penalty-snapped; penalty-snapped, strength 3 -->
    <!-- end of drops -->

that is: the folder in docs/results, the numbers of values, and the rows, each a method with the
settings that are not the study's default. A cell is the mean drop over the seeds, in points, and
its standard deviation. One such figure in the text stands between these, which may be in a table:

    <!-- drop: digits-study; 2; penalty-snapped --><!-- end -->
"""

import functools
import json
import re
import shutil
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
KEPT = ("report.md", "results.json", "rows.csv", "*.svg")
MARK = re.compile(
    r"(<!-- drops: ([^|>]+)\|([^|>]+)\|([^>]+) -->\n).*?(<!-- end of drops -->)", re.S
)
ONE = re.compile(r"(<!-- drop: ([^;>]+);([^;>]+);([^>]+) -->).*?(<!-- end -->)")


def drops(results: dict[str, Any], label: str, k: int) -> list[float]:
    """Return the drops of one row of a table at K values, one per seed.

    Args:
        results: what is in results.json.
        label: a method, and settings such as "strength 3", commas between.
        k: the number of values.

    Raises:
        KeyError: if a setting is no axis of the study.
    """
    method, *settings = (part.strip() for part in label.split(","))
    wanted = dict(results["defaults"])
    for setting in settings:
        name, _, value = setting.rpartition(" ")
        wanted[name] = type(wanted[name])(value)
    return [
        row["drop"]
        for row in results["rows"]
        if row["method"] == method
        and row["k"] == k
        and all(row[axis] == value for axis, value in wanted.items())
    ]


def cell(found: Iterable[float]) -> str:
    """Return mean and standard deviation as text; a dash for what was not measured."""
    found = list(found)
    if not found:
        return "–"
    mean = f"{statistics.mean(found):.2f}"
    return mean + (f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else "")


def table(results: dict[str, Any], ks: Iterable[int], labels: Iterable[str]) -> str:
    """Return the Markdown of a table, a row per label and a column per K."""
    ks = list(ks)
    lines = ["| drop, points | " + " | ".join(f"K = {k}" for k in ks) + " |"]
    lines.append("|---|" + "---:|" * len(ks))
    for label in labels:
        method, comma, rest = label.strip().partition(",")
        cells = [cell(drops(results, label, k)) for k in ks]
        lines.append(f"| {' | '.join([f'`{method}`{comma}{rest}', *cells])} |")
    return "\n".join(lines) + "\n"


def filled(page: str) -> str:
    """Return a page's text with its drops, in tables and one by one, made anew."""

    def fill(match: re.Match) -> str:
        made = table(kept(match[2]), map(int, match[3].split(",")), match[4].split(";"))
        return f"{match[1]}\n{made}\n{match[5]}"

    def fill_one(match: re.Match) -> str:
        return match[1] + cell(drops(kept(match[2]), match[4], int(match[3]))) + match[5]

    return ONE.sub(fill_one, MARK.sub(fill, page))


@functools.cache
def kept(name: str) -> dict[str, Any]:
    """Return the data file of a study that is kept in docs/results."""
    return json.loads((RESULTS / name.strip() / "results.json").read_text())


def keep(run: Path, name: str) -> None:
    """Copy the report of a study's folder to docs/results/NAME."""
    target = RESULTS / name
    target.mkdir(parents=True, exist_ok=True)
    for pattern in KEPT:
        for path in (run / "report").glob(pattern):
            shutil.copy(path, target / path.name)


def main(arguments: list[str]) -> None:
    """Keep a study if one is named, then fill every page."""
    if arguments:
        keep(Path(arguments[1]), arguments[2])
    for path in sorted((ROOT / "docs").rglob("*.md")):
        text = path.read_text()
        if (new := filled(text)) != text:
            path.write_text(new)


if __name__ == "__main__":
    main(sys.argv[1:])
