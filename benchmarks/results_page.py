"""Keep a run's results under docs/results: a data file, and the page made from it.

    python benchmarks/results_page.py RUN NAME "Title" ["A note." ["Name of the data"]]
    python benchmarks/results_page.py        # make every page anew from its data file

The page holds nothing that is not in the data file; a test makes it anew and compares. The tables
in README.md between "results: NAME" and "end of results" are made the same way.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from fewbits.report import comparison, markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
KEPT = ("command", "config", "environment", "data", "model", "float_bytes", "rows")


def page(results: dict[str, Any]) -> str:
    """Return the Markdown page of a data file's content."""
    data, model, machine = results["data"], results["model"], results["environment"]
    config = results["config"]
    lines = [
        f"# {results['title']}",
        "",
        f"{data['name']}: {data['train']:,} training and {data['test']:,} held-out images."
        f" `{model['name']}` with {model['parameters']:,} parameters, width {config['width']:g}."
        f" Seeds {', '.join(map(str, config['seeds']))}; mean ± standard deviation over seeds."
        f" {config['epochs']} epochs of float training, then {config['finetune_epochs']} more for"
        " every method and for the float network they are compared with; batch"
        f" {config['batch_size']}, peak learning rate {config['lr']:g}, then"
        f" {config['lr'] * config['finetune_lr']:g}.",
        "",
        f"Machine: {machine['device']}, {machine['processors']} processors,"
        f" {machine['threads']} threads used; torch {machine['torch']}, Python"
        f" {machine['python']}, fewbits {machine['fewbits']}.",
        "",
        *([results["note"], ""] if results["note"] else []),
        "```sh",
        results["command"],
        "```",
        "",
        markdown(results["rows"]),
        "The best accuracy at each K is in bold. Accuracy in percent, drop and gap in points,"
        " bytes of the whole model with packed indices. Batch-norm statistics are re-estimated in"
        " every row; what accuracy was before is in its own column.",
        "",
        f"Made from [{results['name']}.json]({results['name']}.json) by"
        " `python benchmarks/results_page.py`.",
    ]
    return "\n".join(lines) + "\n"


def table(results: dict[str, Any]) -> str:
    """Return the short table of README.md: a row per K and method, the float network first."""
    rows = results["rows"]
    reference = {row["seed"]: row["float_accuracy"] for row in rows}
    float_bytes = results["float_bytes"]
    mean = sum(reference.values()) / len(reference)
    lines = [
        "| weights | made by | accuracy, % | drop, points | bytes | ratio |",
        "|---|---|---:|---:|---:|---:|",
        f"| float32 | training | {mean:.2f} | | {float_bytes:,} | 1× |",
    ]
    entries = sorted(comparison(rows), key=lambda e: (-e["k"], e["accuracy"]))
    for e in entries:
        bits = e["bits_fixed"]
        cells = [f"{bits:g} bit{'s' if bits > 1 else ''}", f"`{e['method']}`"]
        for key in ("accuracy", "drop"):
            deviation = e[f"{key}_sd"]
            cells.append(f"{e[key]:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else ""))
        cells += [f"{e['bytes']:,.0f}", f"{e['ratio']:.1f}×"]
        if e["best"]:
            cells[1:3] = [f"**{cell}**" for cell in cells[1:3]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def filled(readme: str) -> str:
    """Return the text of README.md with its tables made anew."""

    def fill(match: re.Match) -> str:
        results = json.loads((RESULTS / f"{match[2]}.json").read_text())
        return f"{match[1]}{table(results)}{match[3]}"

    pattern = r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)"
    return re.sub(pattern, fill, readme, flags=re.DOTALL)


def keep(run: Path, name: str, title: str, note: str = "", data: str = "") -> None:
    """Write the data file of a finished run.

    Args:
        run: its folder.
        name: of the data file and the page.
        title: of the page.
        note: how it was measured, for the page.
        data: what to call data from a folder, whose path says nothing to others.
    """
    details = json.loads((run / "details.json").read_text())
    if data:
        details["command"] = details["command"].replace(details["config"]["data"], "FOLDER")
        details["config"]["data"] = "FOLDER"
        details["data"]["name"] = data
    kept = {"name": name, "title": title, "note": note} | {key: details[key] for key in KEPT}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def main(arguments: list[str]) -> None:
    """Keep a run if one is named; then make every page anew."""
    if arguments:
        keep(Path(arguments[0]), *arguments[1:])
    for path in sorted(RESULTS.glob("*.json")):
        path.with_suffix(".md").write_text(page(json.loads(path.read_text())))
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
