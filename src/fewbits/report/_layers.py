"""The layers of the page: histograms, usage and facts of each, by method and k."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._panels import MOST_BARS, histogram, usage_bars
from ._tables import COLUMNS, cell, number
from ._verdict import Entry


def parts_of(
    layers: Iterable[Entry], entries: Sequence[Entry], methods: Iterable[str], shown: Entry
) -> list[dict[str, Any]]:
    """Gather the layers of each method and k.

    Args:
        layers: of `details.json`.
        entries: `comparison` of the rows.
        methods: names in the order of legends.
        shown: the entry whose layers are open when the page is.

    Returns:
        Dicts with `title`, `summary`, `layers`, `warned` (how many have a warning) and `open`,
        k ascending; exactly one is open.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for layer in layers:
        groups.setdefault((layer["method"], layer["k"]), []).append(_layer(layer))
    found = {(e["method"], e["k"]): e for e in entries}
    # A method that the table does not know goes last rather than stopping the report.
    order = {method: i for i, method in enumerate(methods)}
    ordered = sorted(groups, key=lambda g: (g[1], order.get(g[0], len(order))))
    opened = next((g for g in ordered if g == (shown["method"], shown["k"])), None)
    parts: list[dict[str, Any]] = []
    for method, k in ordered:
        summary = ""
        if (method, k) in found:
            e = found[method, k]
            bits = number(e["bits_entropy"], ".2f")
            summary = f"{cell(e, COLUMNS[0])}%, {bits} bits per weight entropy"
        members = groups[method, k]
        parts.append(
            {
                "title": f"{method}, k = {k}",
                "summary": summary,
                "layers": members,
                "warned": sum(bool(m["warnings"]) for m in members),
                "open": (method, k) == (opened or ordered[0]),
            }
        )
    return parts


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Turn one layer into its drawings, facts and warnings."""
    name, usage = layer["name"], layer["usage"]
    stages = [s for s in layer["stages"] if None not in (s["low"], s["high"])]
    # One span for all stages, so that a reader sees how far the weights moved.
    span = (min((s["low"] for s in stages), default=0), max((s["high"] for s in stages), default=0))
    drawings: list[tuple[str, str]] = []
    for stage in stages:
        values = stage["representatives"]
        title = (
            f"Weights of {name}, {stage['stage']}: {sum(stage['counts']):,} from "
            f"{stage['low']:.4g} to {stage['high']:.4g}, {len(values)} representatives."
        )
        svg = histogram(
            stage["counts"],
            (stage["low"], stage["high"]),
            span=span,
            representatives=values,
            title=title,
        )
        drawings.append((stage["stage"], svg))
    values = stages[-1]["representatives"] if stages else []
    title = f"Usage of {name}: share of the weights on each of {len(usage)} representatives."
    if len(usage) <= MOST_BARS:  # few enough to be read out
        title += f" {', '.join(f'{share:.1%}' for share in usage)}."
    warnings: list[str] = []
    if layer["dead"]:
        warnings.append(f"{layer['dead']} dead, used by no weight")
    if layer["merged"]:
        warnings.append(f"{layer['merged']} merged, equal to a neighbor")
    return {
        "name": name,
        "shape": " × ".join(map(str, layer["shape"])),
        "weights": f"{layer['weights']:,}",
        "distortion": number(layer["distortion"], ".3g"),
        "entropy": number(layer["bits_entropy"], ".2f"),
        "drawings": drawings,
        "usage": usage_bars(usage, values, title=title),
        "warnings": warnings,
    }
