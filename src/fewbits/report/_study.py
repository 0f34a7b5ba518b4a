"""The tables of a study: Markdown, CSV and LaTeX, from its results only."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ._tables import cell, columns_of, comparison, float_entry

# The axes that make another network of it, or another task; the rest are options of a method.
TASK = (
    "data", "model", "width", "epochs", "batch_size", "lr", "weight_decay", "train_images",
    "image_size", "finetune_epochs", "finetune_lr",
)  # fmt: skip

Results = Mapping[str, Any]
Entry = dict[str, Any]


def tasks(results: Results) -> list[dict[str, Any]]:
    """Return the distinct tasks: the values of the axes in `TASK`, in first-seen order."""
    axes = [axis for axis in results["axes"] if axis in TASK]
    found: list[dict[str, Any]] = []
    for row in results["rows"]:
        task = {axis: row[axis] for axis in axes}
        if task not in found:
            found.append(task)
    return found


def label(row: Mapping[str, Any], results: Results) -> str:
    """Name a row by its method and what differs from the default: "penalty, strength 0.1"."""
    options = [o for o in options_of(results) if row[o] != results["defaults"][o]]
    return ", ".join([row["method"], *(f"{o} {_short(row[o])}" for o in options)])


def entries(results: Results, task: Mapping[str, Any]) -> list[Entry]:
    """Sum the rows of one task up over seeds.

    Args:
        results: a study's.
        task: one of `tasks`.

    Returns:
        The float network, then one entry per label and K, with "label", "method", "k", "n" rows,
        its options, and for each measured key the mean and, under key + "_sd", the sample
        standard deviation; "best" marks the highest mean accuracy at its K.
    """
    options = options_of(results)
    rows = [r for r in results["rows"] if all(r[name] == value for name, value in task.items())]
    if not rows:
        return []
    # A label stands where a comparison has the method alone.
    labels = {label(row, results): row for row in reversed(rows)}
    found = comparison([row | {"method": label(row, results)} for row in rows])
    for entry in found:
        first = labels[entry["method"]]
        entry |= {"label": entry["method"]} | {o: first[o] for o in ("method", *options)}
    found.sort(key=lambda entry: (-entry["k"], entry["accuracy"]))
    reference = float_entry(rows)
    return [reference | {"label": "float", "bytes": rows[0]["float_bytes"]}, *found]


def options_of(results: Results) -> list[str]:
    """Return the axes that are options of a method."""
    return [axis for axis in results["axes"] if axis not in TASK]


def heading(results: Results, task: Mapping[str, Any]) -> str:
    """Name a task, such as "vgg16 on cifar10, epochs 30"."""
    settings = {**results["common"], **task}
    rest = [f"{n} {_short(v)}" for n, v in task.items() if n not in ("model", "data")]
    width = settings["width"]
    size = f" (width {width:g})" if width != 1 and "width" not in task else ""
    return ", ".join([f"{settings['model']}{size} on {settings['data']}", *rest])


def table(found: Sequence[Entry]) -> str:
    """Print one task's entries as a Markdown table, the best accuracy per K in bold."""
    columns = columns_of(found)
    lines = [["method", "K", *(c.head for c in columns)], ["---", *["---:"] * (len(columns) + 1)]]
    for entry in found:
        cells = [cell(entry, column) for column in columns]
        if entry["best"]:
            cells[0] = f"**{cells[0]}**"
        lines.append([entry["label"].replace("|", "\\|"), _k(entry), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def text(results: Results) -> str:
    """Print every task's entries as aligned columns for a terminal."""
    blocks = []
    for task in tasks(results):
        found = entries(results, task)
        columns = columns_of(found)
        lines = [["method", "K", *(c.head for c in columns)]]
        for entry in found:
            cells = [cell(entry, column) for column in columns]
            lines.append([entry["label"] + " *" * entry["best"], _k(entry), *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        printed = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        ]
        blocks.append("\n".join([heading(results, task), *printed]))
    return "\n\n".join(blocks) + "\n* highest mean accuracy at its K"


def markdown(results: Results, plots: Mapping[str, str] | None = None) -> str:
    """Return a study's page: how it was made, a table per task, plots, and what failed.

    Args:
        results: a study's.
        plots: alternative text by file name, of plots that lie beside the page.
    """
    seeds = sorted({row["seed"] for row in results["rows"]})
    common = results["common"]
    settings = ", ".join(f"{n} {_short(v)}" for n, v in common.items() if v not in (0, [], {}, ""))
    lines = [
        f"# {results['title']}",
        "",
        f"{len(results['rows'])} of {results['cells']} cells done. Seeds"
        f" {', '.join(map(str, seeds))}; mean ± standard deviation over seeds. Every method had"
        " the same float start, data order and epochs as the float network it is compared with."
        f" Common settings: {settings}.",
        "",
        *[_machine(environment) for environment in results["environments"]],
        *([f"Commit {results['commit']}."] if results["commit"] else []),
        "",
        *([results["note"], ""] if results.get("note") else []),
        "```sh",
        results["command"],
        "```",
        "",
    ]
    for task in tasks(results):
        lines += [f"## {heading(results, task)}", "", table(entries(results, task))]
    lines += [
        "The best accuracy at each K is in bold. Accuracy in percent, drop and gap in points, bytes"
        " of the whole model with packed indices. Batch-norm statistics are re-estimated in every"
        " row.",
        "",
    ]
    for name, about in (plots or {}).items():
        lines += [f"![{about}]({name})", ""]
    if results["failed"]:
        lines += ["## Failed", ""]
        for row in results["failed"]:
            what = label(row, results)
            lines.append(f"- {what}, K = {row['k']}, seed {row['seed']}: {row['error']}")
        lines.append("")
    return "\n".join(lines)


def rows_csv(results: Results) -> str:
    """Return one line per finished cell: its axes, then all it measured."""
    rows = [{k: v for k, v in row.items() if k != "history"} for row in results["rows"]]
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({n: json.dumps(v) if isinstance(v, dict) else v for n, v in row.items()})
    return text.getvalue()


def latex(results: Results) -> str:
    r"""Return a tabular per task for a paper, with `\usepackage{booktabs}`."""
    blocks = []
    for task in tasks(results):
        found = entries(results, task)
        columns = [c for c in columns_of(found) if c.key not in ("n", "seconds")]
        lines = [
            f"% {heading(results, task)}",
            rf"\begin{{tabular}}{{l{'r' * (len(columns) + 1)}}}",
            r"\toprule",
            " & ".join(["method", "$K$", *(_escaped(c.head) for c in columns)]) + r" \\",
            r"\midrule",
        ]
        for entry in found:
            cells = [_tex(cell(entry, column)) for column in columns]
            if entry["best"]:
                cells[0] = rf"\textbf{{{cells[0]}}}"
            lines.append(" & ".join([_escaped(entry["label"]), _tex(_k(entry)), *cells]) + r" \\")
        blocks.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(blocks) + "\n"


def _tex(text: str) -> str:
    text = "$-$" + text[1:] if text.startswith("-") else text
    for sign, tex in {"±": r"$\pm$", "×": r"$\times$", "–": "--", "<": "$<$"}.items():
        text = text.replace(sign, tex)
    return text


def _escaped(text: str) -> str:
    return "".join(f"\\{c}" if c in "&%$#_{}" else c for c in text)


def _k(entry: Entry) -> str:
    return "–" if entry["k"] is None else str(entry["k"])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _machine(environment: Mapping[str, str]) -> str:
    return (
        f"Machine: {environment['device']}, {environment['processors']} processors,"
        f" {environment['threads']} threads used; torch {environment['torch']}, Python"
        f" {environment['python']}, fewbits {environment['fewbits']}."
    )
