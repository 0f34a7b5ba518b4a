"""The report page: one self-contained HTML document from saved results."""

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from .._errors import FewbitsError
from ._charts import distortion, legend, methods_of, size_charts, training
from ._layers import parts_of
from ._tables import cell, columns_of, comparison, float_entry, number
from ._verdict import Entry, chosen, duels, headline, lead, values_per_weight


def page(rows: Sequence[Entry], details: Entry, metrics: Sequence[Entry]) -> str:
    """Render the report of a run.

    Args:
        rows: the content of `rows.json`, at least one row.
        details: the content of `details.json`.
        metrics: the lines of `metrics.jsonl`; empty leaves the training curves out.

    Returns:
        HTML that refers to nothing outside itself; every name in it is escaped.

    Raises:
        FewbitsError: if jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise FewbitsError(
            "the report needs jinja2, which is not installed. pip install 'fewbits[cli]'"
        ) from error
    before = {_key(r): r.get("accuracy_before_reestimation") for r in details["rows"]}
    rows = [{**r, "accuracy_before_reestimation": before.get(_key(r))} for r in rows]
    entries = comparison(rows)
    reference = float_entry(rows) | {"bytes": details["float_bytes"]}
    methods = methods_of(entries)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["minus"] = _minus
    source = files("fewbits.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        headline=headline(entries, reference["accuracy"], details["data"]["name"]),
        lead=lead(rows, entries),
        details=details,
        seeds=list(dict.fromkeys(row["seed"] for row in rows)),
        abouts=[(m, about) for m, about in details.get("methods", {}).items() if m in methods],
        config=[(name, _plain(value)) for name, value in details["config"].items()],
        table=_table(reference, entries),
        duels=duels(rows, entries),
        size=size_charts(entries, reference["accuracy"], methods),
        legend=legend(methods.values()),
        curves=training(metrics, methods, reference["accuracy"]),
        distortion=distortion(details["layers"], methods),
        parts=parts_of(details["layers"], entries, methods, chosen(entries)),
        number=number,
    )


def _key(row: Entry) -> tuple[str, int | None, int]:
    return row["method"], row["k"], row["seed"]


def _table(reference: Entry, entries: Sequence[Entry]) -> dict[str, Any]:
    """Arrange the comparison: the float network, then by k, the most accurate first."""
    columns = columns_of([reference, *entries])
    groups: dict[int | None, list[Entry]] = {}
    for entry in sorted(entries, key=_rank):
        groups.setdefault(entry["k"], []).append(entry)
    return {
        "best": any(entry["best"] for entry in entries),
        "heads": [column.title for column in columns],
        "groups": [
            (title, [(e, [cell(e, column) for column in columns]) for e in members])
            for title, members in [
                ("", [reference]),
                *((values_per_weight(k), found) for k, found in groups.items()),
            ]
        ],
    }


def _rank(entry: Entry) -> tuple[float, float]:
    accuracy = -math.inf if entry["accuracy"] is None else entry["accuracy"]
    return math.inf if entry["k"] is None else entry["k"], -accuracy


def _plain(value: Any) -> str:
    """Print a value of the configuration as a person would write it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {v}" for k, v in value.items()) or "none"
    return "none" if value is None or value == "" else str(value)


def _minus(text: str) -> str:
    """Print a negative number with a minus sign, which is as wide as the plus."""
    return f"\u2212{text[1:]}" if text.startswith("-") else text
