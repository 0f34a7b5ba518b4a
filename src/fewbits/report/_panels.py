"""The small drawings of a layer as inline SVG strings: weight histograms and usage bars."""

import math
from collections.abc import Callable, Sequence

from ._svg import scale, usable
from ._values import Value, coordinate, element

WIDTH, HEIGHT, BASE = 190, 96, 72  # in user units
MOST_MARKS = 64  # beyond it neighbors share a mark: a panel is 190 units wide
MOST_BARS = 16  # beyond it bars are one shape that cannot be read, to keep the page light


def histogram(
    counts: Sequence[int],
    bounds: tuple[float, float],
    *,
    span: tuple[float, float],
    representatives: Sequence[float],
    title: str,
) -> str:
    """Draw where the weights of a layer lie, with the representatives marked below.

    Args:
        counts: weights in each bin of equal width.
        bounds: lower edge of the first bin and upper edge of the last.
        span: the values at the left and right edge of the drawing.
        representatives: any number; more than `MOST_MARKS` share marks with their neighbors.
        title: what the drawing shows, for a reader who cannot see it.

    Returns:
        HTML of one element, as `element` gives; heights are relative to its tallest bin.
    """
    low, high = span if span[1] > span[0] else (span[0] - 0.5, span[0] + 0.5)
    x = scale(low, high, 4, WIDTH - 4)
    tallest = max([*counts, 1])
    width = (bounds[1] - bounds[0]) / max(len(counts), 1)
    steps = ""
    for i, count in enumerate(counts):
        if count:
            left, right = x(bounds[0] + i * width), x(bounds[0] + (i + 1) * width)
            # A bin of few weights, or a narrow one, still shows as a line.
            height = max(count / tallest * (BASE - 6), 1.0)
            right = max(right, left + 1.2)
            steps += f"M{coordinate(left)} {BASE}v{coordinate(-height)}H{coordinate(right)}V{BASE}z"
    shapes, values = _marks(representatives, x)
    parts = [f'<path class="bins" d="{steps}"/>', *shapes]
    parts.append(f'<path class="axis" d="M0 {BASE}H{WIDTH}"/>')
    edges = [(low, 4.0, "start"), (high, WIDTH - 4.0, "end")]
    if WIDTH * 0.3 < x(0) < WIDTH * 0.7:
        edges.append((0.0, x(0), "middle"))
    parts += [
        f'<text x="{coordinate(at)}" y="{HEIGHT - 2}" text-anchor="{anchor}">{value:.3g}</text>'
        for value, at, anchor in edges
    ]
    return element("panel", WIDTH, HEIGHT, title, parts, values)


def usage_bars(usage: Sequence[float], values: Sequence[float], *, title: str) -> str:
    """Draw the share of weights on each representative, in the order of their values.

    Args:
        usage: shares that sum to 1; more than `MOST_MARKS` are added up with their neighbors.
        values: the representatives, as many as shares, or none if they are not known.
        title: what the drawing shows, for a reader who cannot see it.

    Returns:
        HTML of one element, as `element` gives.
    """
    size = -(-len(usage) // MOST_MARKS) or 1
    sums = [math.fsum(usage[i : i + size]) for i in range(0, len(usage), size)]
    tallest = max([*sums, 0.0]) or 1.0
    pitch = (WIDTH - 8) / max(len(sums), 1)
    bar = min(pitch * 0.8, 40.0)
    shapes: list[str] = []
    marks: list[Value] = []
    for i, share in enumerate(sums):
        left, height = 4 + (i + 0.5) * pitch - bar / 2, share / tallest * (BASE - 6)
        shapes.append(f"M{coordinate(left)} {BASE}v{coordinate(-height)}h{coordinate(bar)}V{BASE}z")
        group = values[i * size : (i + 1) * size] if len(values) == len(usage) else []
        name = " to ".join(f"{v:.4g}" for v in dict.fromkeys([*group[:1], *group[-1:]]))
        said = f"{name or i + 1}: {share:.1%} of the weights"
        marks.append(Value(left + bar / 2, BASE - height, said))
    if len(sums) > MOST_BARS:
        shapes, marks = ["".join(shapes)], []
    parts = [f'<path class="bar" d="{shape}"/>' for shape in shapes]
    parts.append(f'<path class="axis" d="M0 {BASE}H{WIDTH}"/>')
    note = f"highest {max([*sums, 0.0]):.1%}" + (f", {size} a bar" if size > 1 else "")
    parts.append(f'<text x="4" y="{HEIGHT - 2}">{note}</text>')
    return element("panel", WIDTH, HEIGHT, title, parts, marks)


def _marks(
    representatives: Sequence[float], x: Callable[[float], float]
) -> tuple[list[str], list[Value]]:
    """Draw a triangle for each of few representatives, a tick for each cell of many."""
    cells: dict[float, list[float]] = {}
    kept = [value for value in representatives if usable(value)]
    for value in kept:
        place = x(value)
        if len(kept) > MOST_MARKS:
            pitch = WIDTH / MOST_MARKS
            place = (math.floor(place / pitch) + 0.5) * pitch
        cells.setdefault(place, []).append(value)
    shape = "v7" if len(kept) > 16 else "l3.5 7h-7z"
    parts: list[str] = []
    marks: list[Value] = []
    for place, values in cells.items():
        name = f"{values[0]:.4g}"
        if len(values) > 1:
            name = f"{len(values)} representatives from {min(values):.4g} to {max(values):.4g}"
        parts.append(f'<path class="representative" d="M{coordinate(place)} {BASE + 1}{shape}"/>')
        marks.append(Value(place, BASE + 4.5, name))
    return parts, marks
