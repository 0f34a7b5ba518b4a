"""The report page: one self-contained HTML document from saved results."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

from .._errors import FewbitsError
from ._svg import Point, Series, chart, histogram, swatch, usage_bars
from ._tables import COLUMNS, cell, columns_of, comparison, float_entry

_Entry = Mapping[str, Any]
_CURVES = (
    ("loss", "Loss"),
    ("accuracy", "Held-out accuracy, %"),
    ("hardening_gap", "Hardening gap, points"),
)
# A network that loses more than this is seldom wanted however small its file is.
_HEADLINE_DROP = 1.0
# When results spread over more than the first, those within the second get a chart of their own.
_WIDE, _NEAR = 10.0, 4.0


def page(
    rows: Sequence[_Entry], details: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> str:
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
    methods = _own_first(entries)
    shown = columns_of([reference, *entries])
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("fewbits.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        headline=headline(_chosen(entries), reference["accuracy"]),
        lead=_lead(entries, reference["n"]),
        details=details,
        heads=[column.title for column in shown],
        table=[(e, [cell(e, column) for column in shown]) for e in [reference, *entries]],
        size=_size_charts(entries, reference["accuracy"], methods),
        curves=_training_curves(metrics, methods),
        parts=_layer_parts(details["layers"], entries, methods),
    )


def headline(entry: _Entry, float_accuracy: float) -> str:
    """State one result in plain words.

    Args:
        entry: one of `comparison`.
        float_accuracy: of the float network, in percent.

    Returns:
        A sentence without a full stop.
    """
    k, ratio = entry["k"], entry["ratio"]
    values = "1 value" if k == 1 else f"{k} values"
    bits = f"{math.log2(k):.3g}"
    size = f"a {ratio:.1f}× smaller file" if ratio >= 1 else f"a {1 / ratio:.1f}× larger file"
    return (
        f"{values} per weight ({bits}\u00a0bit{'' if bits == '1' else 's'}): "
        f"{entry['accuracy']:.1f}% against {float_accuracy:.1f}% float; {size}"
    )


def _key(row: _Entry) -> tuple[str, int | None, int]:
    return row["method"], row["k"], row["seed"]


def _is_own(entry: _Entry) -> bool:
    """Tell fewbits' trained methods: only they harden, so only they have a gap."""
    return entry["hardening_gap"] is not None


def _own_first(entries: Iterable[_Entry]) -> list[str]:
    """List the methods, those with a hardening gap first, else in first-seen order."""
    ordered = sorted(entries, key=lambda e: not _is_own(e))
    return list(dict.fromkeys(e["method"] for e in ordered))


def _chosen(entries: Sequence[_Entry]) -> _Entry:
    """Choose the result of the headline by the rule that the page states."""
    own = [e for e in entries if _is_own(e)] or entries
    close = [e for e in own if e["drop"] <= _HEADLINE_DROP]
    if close:
        return max(close, key=lambda e: (e["ratio"], e["accuracy"]))
    return max(own, key=lambda e: e["accuracy"])


def _lead(entries: Sequence[_Entry], seeds: int) -> str:
    """Say which result the headline quotes, why, and who does better at the same k."""
    chosen = _chosen(entries)
    count = f"mean of {chosen['n']} seeds" if chosen["n"] > 1 else "one seed"
    rule = f"the smallest file that loses at most {_HEADLINE_DROP:g} point"
    if chosen["drop"] > _HEADLINE_DROP:
        rule = f"the most accurate, as none loses at most {_HEADLINE_DROP:g} point"
    if len(entries) > 1:
        rule += " among those trained here" if any(map(_is_own, entries)) else ""
        said = f"Method {chosen['method']}, {count}: {rule}."
    else:
        said = f"Method {chosen['method']}, {count}."
    rivals = [e for e in entries if e["k"] == chosen["k"]]
    best = max(rivals, key=lambda e: e["accuracy"])
    if best["accuracy"] > chosen["accuracy"]:
        said += (
            f" With as many values {best['method']} is more accurate, {best['accuracy']:.2f}% "
            f"against {chosen['accuracy']:.2f}%."
        )
    return said


def _legend(series: Iterable[Series]) -> dict[str, str]:
    """Map each name to its swatch."""
    return {s.name: swatch(s) for s in series}


def _size_charts(entries: Sequence[_Entry], level: float, methods: Sequence[str]) -> dict[str, Any]:
    """Draw accuracy against bits per weight: everything, and what lies near the float line."""
    series: list[Series] = []
    for style, method in enumerate(methods):
        points: list[Point] = []
        for e in sorted((e for e in entries if e["method"] == method), key=lambda e: e["k"]):
            label = (
                f"{method}, k = {e['k']}: {cell(e, COLUMNS[0])}% at {e['bits_entropy']:.2f} bits"
            )
            points.append(Point(e["bits_entropy"], e["accuracy"], label, e["accuracy_sd"]))
        series.append(Series(method, tuple(points), style))
    every = [p for s in series for p in s.points]
    near = [replace(s, points=tuple(p for p in s.points if level - p.y <= _NEAR)) for s in series]
    kept = sum(len(s.points) for s in near)
    sets = [("All results", series)]
    if level - min(p.y for p in every) > _WIDE and kept > 1:
        left_out = len(every) - kept
        more = f"{left_out} lower result{'s are' if left_out > 1 else ' is'} left out"
        sets.append((f"Within {_NEAR:g} points of float; {more}", near))
    drawings = [
        {
            "caption": caption,
            "svg": chart(
                chosen,
                title=f"Accuracy against bits per weight. {caption}. The table has the numbers.",
                x_label="bits per weight, entropy",
                y_label="accuracy, %",
                level=level,
            ),
        }
        for caption, chosen in sets
    ]
    return {"drawings": drawings, "legend": _legend(series)}


def _training_curves(
    metrics: Iterable[Mapping[str, Any]], methods: Sequence[str]
) -> dict[str, Any]:
    """Draw each measured quantity over epochs, one line per job, seeds in one color."""
    jobs: dict[str, list[Mapping[str, Any]]] = {}
    for line in metrics:
        jobs.setdefault(line["job"], []).append(line)
    ks = sorted({lines[0]["k"] for lines in jobs.values() if lines[0]["k"] is not None})
    drawings: list[dict[str, str]] = []
    legend: dict[str, str] = {}
    for key, caption in _CURVES:
        series: list[Series] = []
        for job, lines in jobs.items():
            method, k = lines[0]["method"], lines[0]["k"]
            points = tuple(
                Point(e["epoch"], e[key], f"{job}, epoch {e['epoch']}: {e[key]:.4g}")
                for e in lines
                if e[key] is not None
            )
            style = methods.index(method) if method in methods else None
            name = method if k is None else f"{method}, k = {k}"
            if points:
                dash = 0 if k is None else ks.index(k)
                series.append(Series(name, points, style, dash, marked=len(points) == 1))
        title = f"{caption} over epochs, {len(series)} trained networks."
        svg = chart(series, title=title, x_label="epoch", y_label="", whole_x=True)
        legend |= _legend(series)
        if svg:
            drawings.append({"caption": caption, "svg": svg})
    return {"drawings": drawings, "legend": legend}


def _layer_parts(
    layers: Iterable[Mapping[str, Any]], entries: Sequence[_Entry], methods: Sequence[str]
) -> list[dict[str, Any]]:
    """Gather the layers of each (method, k), fewbits' own methods first."""
    groups: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for layer in layers:
        groups.setdefault((layer["method"], layer["k"]), []).append(_layer(layer))
    found = {(e["method"], e["k"]): e for e in entries}
    # A method that the table does not know goes last rather than stopping the report.
    order = {method: i for i, method in enumerate(methods)}
    parts: list[dict[str, Any]] = []
    for method, k in sorted(groups, key=lambda g: order.get(g[0], len(order))):
        summary = ""
        if (method, k) in found:
            e = found[method, k]
            summary = f"{cell(e, COLUMNS[0])}%, {e['bits_entropy']:.2f} bits per weight entropy"
        members = groups[method, k]
        warnings = sum(bool(m["warnings"]) for m in members)
        title = f"{method}, k = {k}"
        parts.append({"title": title, "summary": summary, "layers": members, "warned": warnings})
    return parts


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Turn one layer into its drawings, facts and warnings."""
    stages, name = layer["stages"], layer["name"]
    # One span for the three stages, so that a reader sees how far the weights moved.
    span = (min((s["low"] for s in stages), default=0), max((s["high"] for s in stages), default=0))
    drawings: list[tuple[str, str]] = []
    for stage in stages:
        title = (
            f"Weights of {name}, {stage['stage']}: {sum(stage['counts']):,} from "
            f"{stage['low']:.4g} to {stage['high']:.4g}, "
            f"{len(stage['representatives'])} representatives."
        )
        svg = histogram(
            stage["counts"],
            (stage["low"], stage["high"]),
            span=span,
            representatives=stage["representatives"],
            title=title,
        )
        drawings.append((stage["stage"], svg))
    values = stages[-1]["representatives"] if stages else []
    usage = layer["usage"]
    title = f"Usage of {name}: share of the weights on each of {len(usage)} representatives."
    drawings.append(("usage", usage_bars(usage, values, title=title)))
    warnings: list[str] = []
    if layer["dead"]:
        warnings.append(f"{layer['dead']} dead, used by no weight")
    if layer["merged"]:
        warnings.append(f"{layer['merged']} merged, equal to a neighbor")
    return {
        "name": name,
        "shape": " × ".join(map(str, layer["shape"])),
        "weights": f"{layer['weights']:,}",
        "distortion": f"{layer['distortion']:.4g}",
        "entropy": f"{layer['bits_entropy']:.2f}",
        "drawings": drawings,
        "warnings": warnings,
    }
