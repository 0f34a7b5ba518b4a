"""The plots of a study as SVG and PDF, drawn by matplotlib from its results only."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._errors import FewbitsError
from ._study import Entry, Results, entries, heading, label, options_of, tasks

_MARKS = "os^Dv<>PX*hd"


def plots(results: Results) -> dict[str, tuple[str, Callable[[str], bytes]]]:
    """Return the plots that the results allow.

    Args:
        results: a study's, with at least one row.

    Returns:
        by file name without suffix: alternative text, and a function from "svg" or "pdf" to the
        file's bytes, the same for the same results.

    Raises:
        FewbitsError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise FewbitsError("plots need: pip install 'fewbits[study]'") from error
    matplotlib.use("agg")
    found: dict[str, tuple[str, Callable[[str], bytes]]] = {}

    def add(name: str, about: str, draw: Callable[[Any], None]) -> None:
        found[name] = (about, lambda suffix: _render(draw, about, suffix))

    for number, task in enumerate(tasks(results), start=1):
        where = f"-{number}" if len(tasks(results)) > 1 else ""
        rows, what = entries(results, task), heading(results, task)
        if all(row["file_bytes"] for row in rows[1:]):
            add(f"accuracy-bytes{where}", f"Accuracy against bytes: {what}", _accuracy_bytes(rows))
        if len({row["k"] for row in rows[1:]}) > 1:
            add(f"drop-k{where}", f"Drop against K: {what}", _drop_k(rows))
        gaps = _gaps(results, task)
        if gaps:
            add(f"gap{where}", f"Hardening gap over training: {what}", _gap(gaps))
        for option in options_of(results):
            values = {row[option] for row in rows[1:] if isinstance(row[option], (int, float))}
            if len(values) > 2:
                about = f"Drop against {option}: {what}"
                add(f"drop-{option}{where}", about, _ablation(rows[1:], option))
    return found


def _render(draw: Callable[[Any], None], title: str, suffix: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    # No date and no random names in the file: the same results give the same bytes.
    settings: Any = {"svg.hashsalt": "fewbits", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        draw(axes)
        _legend(figure, axes)
        file = io.BytesIO()
        empty = {"Date": None} if suffix == "svg" else {"CreationDate": None}
        figure.savefig(file, format=suffix, metadata=empty)
    return file.getvalue()


def _legend(figure: Any, axes: Any) -> None:
    """In place: explain the curves in the plot, or beside it where they are many."""
    curves, names = axes.get_legend_handles_labels()
    if len(names) <= 8:
        axes.legend(fontsize=7)
        return
    width, height = figure.get_size_inches()  # 0.055 a letter and 0.16 a line at 7 points
    width += 0.5 + 0.055 * max(map(len, names))
    figure.set_size_inches(width, max(height, 0.5 + 0.16 * len(names)))
    figure.legend(curves, names, loc="outside right upper", fontsize=7)


def _curves(rows: Sequence[Entry], x: str, y: str) -> list[tuple[str, list[Entry]]]:
    names = dict.fromkeys(row["label"] for row in rows)
    of = {name: [r for r in rows if r["label"] == name and r[y] is not None] for name in names}
    return [(name, sorted(found, key=lambda r: r[x])) for name, found in of.items() if found]


def _errorbars(axes: Any, curves: Sequence[tuple[str, list[Entry]]], x: str, y: str) -> None:
    for number, (name, found) in enumerate(curves):
        axes.errorbar(
            [row[x] for row in found],
            [row[y] for row in found],
            yerr=[row[f"{y}_sd"] or 0 for row in found],
            label=name,
            marker=_MARKS[number % len(_MARKS)],
            markersize=4,
            linewidth=1.2,
            capsize=2,
        )


def _accuracy_bytes(rows: Sequence[Entry]) -> Callable[[Any], None]:
    from matplotlib import ticker

    def draw(axes: Any) -> None:
        _errorbars(axes, _curves(rows[1:], "file_bytes", "accuracy"), "file_bytes", "accuracy")
        axes.axhline(rows[0]["accuracy"], color="gray", linestyle="--", label="float")
        axes.set(xscale="log", xlabel="bytes of the model file", ylabel="accuracy, %")
        for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            which(ticker.EngFormatter(sep=""))

    return draw


def _drop_k(rows: Sequence[Entry]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        _errorbars(axes, _curves(rows[1:], "k", "drop"), "k", "drop")
        ks = sorted({row["k"] for row in rows[1:]})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks], minor=False)
        _points(axes)
        axes.set(xlabel="K, values per codebook", ylabel="drop, points")

    return draw


def _points(axes: Any) -> None:
    """Scale the y axis for points of accuracy: they span two decades, and may be negative."""
    from matplotlib import ticker

    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_locator(ticker.SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))


def _gaps(results: Results, task: Mapping[str, Any]) -> dict[str, list[list[tuple[int, float]]]]:
    """Return (epoch, hardening gap) of every seed, by label and K."""
    found: dict[str, list[list[tuple[int, float]]]] = {}
    for row in results["rows"]:
        if any(row[name] != value for name, value in task.items()):
            continue
        curve = [
            (epoch["epoch"], epoch["hardening_gap"])
            for epoch in row["history"]
            if epoch["hardening_gap"] is not None
        ]
        if curve:
            found.setdefault(f"{label(row, results)}, K = {row['k']}", []).append(curve)
    return found


def _gap(gaps: Mapping[str, list[list[tuple[int, float]]]]) -> Callable[[Any], None]:
    from matplotlib import ticker

    def draw(axes: Any) -> None:
        for number, (name, curves) in enumerate(gaps.items()):
            by_epoch: dict[int, list[float]] = {}
            for epoch, gap in (point for curve in curves for point in curve):
                by_epoch.setdefault(epoch, []).append(gap)
            epochs = sorted(by_epoch)
            means = [math.fsum(by_epoch[e]) / len(by_epoch[e]) for e in epochs]
            axes.plot(epochs, means, label=name, marker=_MARKS[number % len(_MARKS)], markersize=3)
        _points(axes)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.set(xlabel="epoch", ylabel="hardening gap, points")

    return draw


def _ablation(rows: Sequence[Entry], option: str) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        groups: dict[str, list[Entry]] = {}
        for row in rows:
            groups.setdefault(f"{row['method']}, K = {row['k']}", []).append(row)
        curves = [(n, sorted(g, key=lambda r: r[option])) for n, g in groups.items() if len(g) > 1]
        _errorbars(axes, curves, option, "drop")
        if min(row[option] for row in rows) > 0:
            values = sorted({row[option] for row in rows})
            axes.set_xscale("log")
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.set_xticks([], minor=True)
        axes.set(xlabel=option, ylabel="drop, points")

    return draw
