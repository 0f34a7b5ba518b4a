"""Rows of results summed up over seeds, and printed as Markdown or aligned text."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

NOTHING = "–"


class Column(NamedTuple):
    """How one number of the comparison is headed and printed."""

    key: str
    head: str  # for a terminal
    title: str  # for a page
    decimals: int
    suffix: str = ""
    spread: bool = False  # printed with its standard deviation


COLUMNS = (
    Column("accuracy", "accuracy", "Accuracy, %", 2, spread=True),
    Column("drop", "drop", "Drop, points", 2, spread=True),
    Column(
        "accuracy_before_reestimation",
        "before re-est.",
        "Accuracy before re-estimation, %",
        2,
        spread=True,
    ),
    Column("hardening_gap", "gap", "Hardening gap, points", 2, spread=True),
    Column("bits_fixed", "bpw fixed", "Bits per weight, fixed", 2),
    Column("bits_entropy", "bpw entropy", "Bits per weight, entropy", 2),
    Column("bytes", "bytes", "Bytes", 0),
    Column("ratio", "ratio", "Ratio", 1, suffix="×"),
    Column("file_bytes", "file bytes", "Bytes of the model file", 0),
    Column("seconds", "seconds", "Time, s", 1),
    Column("n", "seeds", "Seeds", 0),
)
_MEASURED = ("float_accuracy", *(column.key for column in COLUMNS if column.key != "n"))


def mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Compute the mean and the sample standard deviation.

    Args:
        values: any number of values, in one unit.

    Returns:
        The mean, None without values, and the deviation (divisor n - 1), None with fewer than
        two; both in the unit of `values`.
    """
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def comparison(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sum up rows over seeds, one entry per (method, k) in first-seen order.

    Args:
        rows: one result each, with the keys of `rows.json`. A value that is null or absent is
            left out of its mean.

    Returns:
        Dicts with `method`, `k`, `n` (rows summed up), `best` (the highest mean accuracy where
        several methods share a k) and, for each measured key of a row, the mean under its name
        and the sample standard deviation under its name + "_sd"; None where undefined.
    """
    groups: dict[tuple[str, int | None], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["k"]), []).append(row)
    entries: list[dict[str, Any]] = []
    for (method, k), members in groups.items():
        entry: dict[str, Any] = {"method": method, "k": k, "n": len(members)}
        for key in _MEASURED:
            values = [row[key] for row in members if row.get(key) is not None]
            entry[key], entry[f"{key}_sd"] = mean_and_sd(values)
        entries.append(entry)
    for entry in entries:
        rivals = [e["accuracy"] for e in entries if e["k"] == entry["k"]]
        known = [accuracy for accuracy in rivals if accuracy is not None]
        entry["best"] = len(rivals) > 1 and bool(known) and entry["accuracy"] == max(known)
    return entries


def float_entry(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up the float accuracy, counted once a seed, as an entry of the comparison.

    Args:
        rows: one result each, with the keys of `rows.json`.

    Returns:
        An entry with the accuracy in percent and its deviation, 32 bits and a ratio of 1.
    """
    by_seed = {row["seed"]: row["float_accuracy"] for row in rows}
    mean, sd = mean_and_sd([value for value in by_seed.values() if value is not None])
    entry: dict[str, Any] = dict.fromkeys(_MEASURED)
    entry |= {"method": "float", "k": None, "n": len(by_seed), "best": False}
    return entry | {"accuracy": mean, "accuracy_sd": sd, "bits_fixed": 32, "ratio": 1.0}


def cell(entry: Mapping[str, Any], column: Column) -> str:
    """Print one number of an entry: rounded, with its deviation where the column asks.

    Args:
        entry: one of `comparison` or `float_entry`.
        column: one of `COLUMNS`.

    Returns:
        Such as "98.30 ± 0.12"; a dash where there is no number.
    """
    value = entry[column.key]
    if not column.spread and value and round(value, column.decimals) == 0:
        return f"<{10**-column.decimals:g}{column.suffix}"  # 0.0 seconds would look like a fault
    sd = entry.get(f"{column.key}_sd") if column.spread else None
    spread = "" if sd is None else f" ± {sd:.{column.decimals}f}"
    return number(value, f"z,.{column.decimals}f", f"{spread}{column.suffix}")


def number(value: float | None, form: str, suffix: str = "") -> str:
    """Print a number that may be missing.

    Args:
        value: in any unit.
        form: a format specification, such as ".2f"; with a "z" there is no negative zero.
        suffix: follows the number.

    Returns:
        The number; a dash for none.
    """
    if value is None:
        return NOTHING
    return f"{value:{form}}{suffix}"


def columns_of(entries: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Choose the columns in which at least one entry has a number.

    Args:
        entries: those of one table.

    Returns:
        Members of `COLUMNS`, in their order.
    """
    return [c for c in COLUMNS if any(entry[c.key] is not None for entry in entries)]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Print the comparison as a Markdown table, the best accuracy per k in bold.

    Args:
        rows: one result each, with the keys of `rows.json`.

    Returns:
        Lines that end in a newline; the first row is the float network.
    """
    entries = [float_entry(rows), *comparison(rows)]
    columns = columns_of(entries)
    lines = [["method", "k", *(c.head for c in columns)], ["---", *["---:"] * (len(columns) + 1)]]
    for entry in entries:
        cells = [cell(entry, c) for c in columns]
        if entry["best"]:
            cells[0] = f"**{cells[0]}**"
        lines.append([entry["method"].replace("|", "\\|"), _k(entry), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Print the comparison as aligned columns for a terminal.

    Args:
        rows: one result each, with the keys of `rows.json`.

    Returns:
        Lines of equal width, the float network first, then a line on the star if there is one;
        ends in a newline.
    """
    entries = [float_entry(rows), *comparison(rows)]
    columns = columns_of(entries)
    # The star has a column of its own, so that the digits stay aligned.
    lines = [["method", "k", columns[0].head, "", *(c.head for c in columns[1:])]]
    for entry in entries:
        first, *others = (cell(entry, c) for c in columns)
        lines.append([entry["method"], _k(entry), first, "*" if entry["best"] else "", *others])
    if not any(entry["best"] for entry in entries):
        lines = [line[:3] + line[4:] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    printed = ""
    for line in lines:
        cells = (c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))
        printed += "  ".join([line[0].ljust(widths[0]), *cells]) + "\n"
    if any(entry["best"] for entry in entries):
        printed += "* highest mean accuracy at its k\n"
    return printed


def _k(entry: Mapping[str, Any]) -> str:
    """Print the number of values, a dash for the float network."""
    return NOTHING if entry["k"] is None else str(entry["k"])
