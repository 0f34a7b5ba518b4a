"""The charts of the page: accuracy against bits, training curves, distortion of the layers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ._svg import Point, Series, chart, swatch
from ._tables import COLUMNS, cell
from ._verdict import Entry, is_own

_CURVES = (
    ("accuracy", "Held-out accuracy", "accuracy, %"),
    ("hardening_gap", "Hardening gap", "gap, points"),
    ("loss", "Training loss", "loss"),
)
# When results spread over more than the first, those within the second get a chart of their own.
_WIDE, _NEAR = 10.0, 4.0


def methods_of(entries: Iterable[Entry]) -> dict[str, Series]:
    """Give each method its look: fewbits' own first and filled, the others hollow and dashed.

    Args:
        entries: `comparison` of the rows.

    Returns:
        By name, a series without points, in the order of legends.
    """
    entries = list(entries)
    own = {e["method"] for e in entries if is_own(e)}
    names = dict.fromkeys(e["method"] for e in sorted(entries, key=lambda e: not is_own(e)))
    return {
        name: Series(name, (), style, dash=0 if name in own else 1, hollow=name not in own)
        for style, name in enumerate(names)
    }


def legend(series: Iterable[Series]) -> dict[str, str]:
    """Map each name to its swatch."""
    return {s.name: swatch(s) for s in series}


def size_charts(
    entries: Sequence[Entry], level: float | None, methods: Mapping[str, Series]
) -> list[dict[str, str]]:
    """Draw accuracy against bits per weight: everything, and what lies near the float line.

    Args:
        entries: `comparison` of the rows.
        level: accuracy of the float network, in percent.
        methods: of `methods_of`.

    Returns:
        One or two drawings with their captions; none without an accuracy.
    """
    series: list[Series] = []
    for method, look in methods.items():
        drawn = [e for e in entries if e["method"] == method]
        drawn = [e for e in drawn if None not in (e["accuracy"], e["bits_entropy"])]
        points = tuple(
            Point(
                e["bits_entropy"],
                e["accuracy"],
                f"{method}, k = {e['k']}: {cell(e, COLUMNS[0])}% at {e['bits_entropy']:.2f} bits",
                e["accuracy_sd"],
            )
            for e in sorted(drawn, key=lambda e: e["bits_entropy"])
        )
        series.append(replace(look, points=points))
    every = [p for s in series for p in s.points]
    sets = [("All results", series)]
    if every and level is not None and level - min(p.y for p in every) > _WIDE:
        near = [
            replace(s, points=tuple(p for p in s.points if level - p.y <= _NEAR)) for s in series
        ]
        kept = sum(len(s.points) for s in near)
        left_out = len(every) - kept
        more = f"{left_out} lower result{'s are' if left_out > 1 else ' is'} left out"
        sets += [(f"Within {_NEAR:g} points of float; {more}", near)] if kept > 1 else []
    drawings: list[dict[str, str]] = []
    for caption, shown in sets:
        title = f"Accuracy against bits per weight. {caption}. The table has the numbers."
        svg = chart(
            shown,
            title=title,
            x_label="bits per weight, entropy",
            y_label="accuracy, %",
            level=level,
            doubling=True,
            beside=True,
        )
        drawings += [{"caption": caption, "svg": svg}] if svg else []
    return drawings


def training(
    metrics: Iterable[Entry], methods: Mapping[str, Series], level: float | None
) -> list[dict[str, Any]]:
    """Draw each measured quantity over epochs, one line per trained network.

    Args:
        metrics: the lines of `metrics.jsonl`.
        methods: of `methods_of`.
        level: accuracy of the float network, in percent.

    Returns:
        One dict with `title`, `drawings` and `legend` per k, ascending, then one of the float
        networks.
    """
    jobs: dict[str, list[Entry]] = {}
    for line in metrics:
        jobs.setdefault(line["job"], []).append(line)
    ks = sorted({lines[0]["k"] for lines in jobs.values() if lines[0]["k"] is not None})
    groups: list[dict[str, Any]] = []
    for k in [*ks, None]:
        members = {job: lines for job, lines in jobs.items() if lines[0]["k"] == k}
        looks = _float_looks(members) if k is None else methods
        drawings: list[dict[str, str]] = []
        names: dict[str, Series] = {}
        for key, caption, unit in _CURVES:
            series = [_curve(job, lines, key, looks) for job, lines in members.items()]
            series = [s for s in series if s.points]
            title = f"{caption} over epochs, {len(series)} trained networks."
            drawn = level if key == "accuracy" and k is not None else None
            svg = chart(
                series, title=title, x_label="epoch", y_label=unit, level=drawn, whole_x=True
            )
            names |= {s.name: s for s in series}
            drawings += [{"caption": caption, "svg": svg}] if svg else []
        if drawings:
            title = "Float networks" if k is None else f"k = {k}"
            shown = legend(names[name] for name in looks if name in names)
            groups.append({"title": title, "drawings": drawings, "legend": shown})
    return groups


def distortion(layers: Iterable[Entry], methods: Mapping[str, Series]) -> list[dict[str, str]]:
    """Draw the distortion of every layer, one chart per k and one series per method.

    Args:
        layers: of `details.json`.
        methods: of `methods_of`.

    Returns:
        Drawings with their captions, k ascending.
    """
    groups: dict[int, dict[str, list[Entry]]] = {}
    for layer in layers:
        groups.setdefault(layer["k"], {}).setdefault(layer["method"], []).append(layer)
    drawings: list[dict[str, str]] = []
    for k in sorted(groups):
        series: list[Series] = []
        for method in [name for name in methods if name in groups[k]]:
            points = tuple(
                Point(place, found["distortion"], f"{method}, {found['name']}: {shown:.4g}")
                for place, found in enumerate(groups[k][method], start=1)
                if (shown := found["distortion"]) is not None
            )
            series.append(replace(methods[method], points=points))
        svg = chart(
            series,
            title=f"Distortion of each layer at k = {k}, {len(series)} methods.",
            x_label="layer, in the order of the network",
            y_label="distortion",
            whole_x=True,
        )
        drawings += [{"caption": f"k = {k}", "svg": svg}] if svg else []
    return drawings


def _curve(job: str, lines: Iterable[Entry], key: str, looks: Mapping[str, Series]) -> Series:
    """Make the curve of one trained network; its name is that of its method."""
    lines = list(lines)
    name = _head(job) if lines[0]["k"] is None else lines[0]["method"]
    points = tuple(
        Point(e["epoch"], e[key], f"{job}, epoch {e['epoch']}: {e[key]:.4g}")
        for e in lines
        if e[key] is not None
    )
    look = looks.get(name, Series(name, ()))
    return replace(look, points=points, dash=look.dash, marked=len(points) == 1)


def _float_looks(jobs: Iterable[str]) -> dict[str, Series]:
    """Tell float trainings apart by their dash, as they have no method."""
    names = dict.fromkeys(map(_head, jobs))
    return {name: Series(name, (), dash=dash) for dash, name in enumerate(names)}


def _head(job: str) -> str:
    """Name a job without its seed."""
    return job.rpartition("-seed")[0] or job
