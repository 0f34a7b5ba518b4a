"""Charts as inline SVG strings, and the few parts that other drawings share.

Colors come from the page's style sheet through classes, so that one drawing serves light and
dark. Every function is pure, and escapes the names that it is given.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from ._values import Value, coordinate, element

# A chart, in user units. Where a chart is shown at 0.6 of its size, as on a phone, the
# style sheet enlarges its text, for which the margins leave room.
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 560, 330, 86, 14, 58
MOST_DOTS = 300  # beyond it a curve shows its line only, to keep the page light
_BESIDE = 10.0  # between marks that would cover each other
_COLORS = 8  # as many as the style sheet has
_DASHES = ("none", "6 3", "2 3", "9 3 2 3", "12 4", "2 7")
_SHAPES = (
    "m-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "m-4 -4h8v8h-8z",
    "m0 -5.5l5.2 9h-10.4z",
    "m0 -5.8l5.8 5.8l-5.8 5.8l-5.8 -5.8z",
    "m0 5.5l5.2 -9h-10.4z",
    "m-5.5 -2h3.5v-3.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5z",
    "m0 -5.5l5.5 4.2l-2.1 6.3h-6.8l-2.1 -6.3z",
    "m-5.5 -3h11v6h-11z",
)


@dataclass(frozen=True)
class Point:
    """One place on a chart."""

    x: float
    y: float
    label: str  # what a reader of its mark is told
    spread: float | None = None  # half the error bar, in the unit of y


@dataclass(frozen=True)
class Series:
    """Points in drawing order, joined by a line."""

    name: str
    points: tuple[Point, ...]
    style: int | None = None  # color and shape; None is neutral
    dash: int = 0
    marked: bool = True  # with the series' shape on every point
    hollow: bool = False  # that shape is an outline


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Choose round numbers for an axis.

    Args:
        low: the least value on the axis, finite.
        high: the greatest; above `low`.
        whole: only whole numbers.

    Returns:
        Three to seven multiples of 1, 2 or 5 times a power of ten within [low, high]; fewer
        where `whole` leaves fewer.
    """
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    level: float | None = None,
    whole_x: bool = False,
    doubling: bool = False,
    beside: bool = False,
) -> str:
    """Draw series of points with axes, ticks, error bars and marks that can be read.

    Args:
        series: what to draw; points that are not finite are left out.
        title: what the chart shows, for a reader who cannot see it.
        x_label: quantity and unit of x.
        y_label: quantity and unit of y.
        level: a dashed horizontal line at this y, called "float".
        whole_x: ticks of x are whole numbers.
        doubling: each step along x doubles it, unless some x is 0 or less.
        beside: points whose marks would cover each other are moved apart along x.

    Returns:
        HTML of one element, as `element` gives; the empty string where no point can be drawn.
    """
    drawn = [(s, [p for p in s.points if usable(p.x) and usable(p.y)]) for s in series]
    points = [p for _, kept in drawn for p in kept]
    if not points:
        return ""
    bend = math.log2 if doubling and min(p.x for p in points) > 0 else float
    x_low, x_high = _padded([bend(p.x) for p in points])
    ends = [p.y + sign * _spread(p) for p in points for sign in (-1, 1)]
    y_low, y_high = _padded([*ends, *([level] if level is not None else [])])
    right = WIDTH - (50 if level is not None else 14)  # "float" stands beside its line
    room = _BESIDE / 2 * len(series) if beside else 0.0  # for marks moved outwards
    x = scale(x_low, x_high, LEFT + room, right - room, bend)
    y = scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
    x_ticks = ticks(x_low, x_high, whole=whole_x)
    if bend is math.log2:
        x_ticks = [2.0**i for i in range(math.ceil(x_low), math.floor(x_high) + 1)]
        # Where the points lie within a doubling, ordinary ticks say more.
        x_ticks = x_ticks if len(x_ticks) > 1 else ticks(2**x_low, 2**x_high)
    parts = _axes(x_ticks, ticks(y_low, y_high), x, y, right)
    middle = coordinate((TOP + HEIGHT - BOTTOM) / 2)
    parts.append(
        f'<text class="label" x="{coordinate((LEFT + right) / 2)}" y="{HEIGHT - 6}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="label" transform="translate(15 {middle}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    if level is not None:
        parts.append(
            f'<path class="level" d="M{LEFT} {coordinate(y(level))}H{right}">'
            f"<title>float: {level:.2f}</title></path>"
            f'<text x="{right + 5}" y="{coordinate(y(level) + 4)}">float</text>'
        )
    dots, values = len(points) <= MOST_DOTS, list[Value]()
    places = [[x(p.x) for p in kept] for _, kept in drawn]
    places = _apart(places) if beside else places
    for (s, kept), across in zip(drawn, places, strict=True):
        on_paper = [(at, y(p.y), p) for at, p in zip(across, kept, strict=True)]
        parts += [_series(s, on_paper, y, dots=dots)] if kept else []
        shown = on_paper if dots or s.marked else on_paper[-1:]
        values += [Value(across, up, p.label) for across, up, p in shown]
    values += [Value(right, y(level), f"float: {level:.2f}")] if level is not None else []
    return element("chart", WIDTH, HEIGHT, title, parts, values)


def swatch(series: Series) -> str:
    """Draw the line and shape of a series, for a legend beside its name.

    Args:
        series: as given to `chart`.

    Returns:
        An <svg> element that assistive software skips, as the name follows it.
    """
    mark = f'<path class="{_kind(series)}" d="M14 7{_shape(series)}"/>' if series.marked else ""
    return (
        f'<svg class="swatch {_style(series)}" viewBox="0 0 28 14" width="28" height="14" '
        f'aria-hidden="true"><path class="line" d="M1 7H27" '
        f'stroke-dasharray="{_DASHES[series.dash % len(_DASHES)]}"/>{mark}</svg>'
    )


def _axes(
    x_ticks: list[float],
    y_ticks: list[float],
    x: Callable[[float], float],
    y: Callable[[float], float],
    right: int,
) -> list[str]:
    """Draw grid lines and tick labels."""
    floor = HEIGHT - BOTTOM
    parts = [f'<path class="axis" d="M{LEFT} {floor}H{right}"/>']
    for value, name in zip(y_ticks, _names(y_ticks), strict=True):
        parts.append(
            f'<path class="grid" d="M{LEFT} {coordinate(y(value))}H{right}"/>'
            f'<text x="{LEFT - 8}" y="{coordinate(y(value) + 4)}" text-anchor="end">{name}</text>'
        )
    for value, name in zip(x_ticks, _names(x_ticks), strict=True):
        parts.append(
            f'<path class="axis" d="M{coordinate(x(value))} {floor}v5"/>'
            f'<text x="{coordinate(x(value))}" y="{floor + 21}" text-anchor="middle">{name}</text>'
        )
    return parts


def _apart(places: Sequence[Sequence[float]]) -> list[list[float]]:
    """Move coordinates to `_BESIDE` apart at least, the least in squares that it takes.

    Isotonic regression by pooling: coordinates too near form a block around their mean.
    """
    # Within half a mark the order is that of the series, which is the same at every x.
    spots = [(at, i, j) for i, along in enumerate(places) for j, at in enumerate(along)]
    spots.sort(key=lambda spot: (round(spot[0] / _BESIDE * 2), *spot[1:]))
    blocks: list[tuple[float, int]] = []  # mean of (coordinate - rank * _BESIDE), and size
    for rank, (at, _, _) in enumerate(spots):
        mean, size = at - rank * _BESIDE, 1
        while blocks and blocks[-1][0] >= mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    level = [mean for mean, size in blocks for _ in range(size)]
    moved = [list(along) for along in places]
    for rank, (_, i, j) in enumerate(spots):
        moved[i][j] = level[rank] + rank * _BESIDE
    return moved


def _series(
    series: Series,
    points: Sequence[tuple[float, float, Point]],
    y: Callable[[float], float],
    *,
    dots: bool,
) -> str:
    """Draw one series: error bars, line, and a mark on each point."""
    parts: list[str] = []
    for across, _, p in points:
        if _spread(p):
            ends = (y(p.y + _spread(p)), y(p.y - _spread(p)))
            top, bottom = map(coordinate, ends)
            left = coordinate(across - 4)
            parts.append(f'<path class="error" d="M{left} {top}h8m-4 0V{bottom}m-4 0h8"/>')
    places = " ".join(f"{coordinate(across)},{coordinate(up)}" for across, up, _ in points)
    parts.append(
        f'<polyline class="{"line" if series.marked else "thin"}" points="{places}" '
        f'stroke-dasharray="{_DASHES[series.dash % len(_DASHES)]}">'
        f"<title>{escape(series.name)}</title></polyline>"
    )
    shape = _shape(series) if series.marked else "m-2 0a2 2 0 1 0 4 0a2 2 0 1 0 -4 0z"
    kind = _kind(series) if series.marked else "dot"
    for across, up, _ in points if dots or series.marked else points[-1:]:
        parts.append(f'<path class="{kind}" d="M{coordinate(across)} {coordinate(up)}{shape}"/>')
    return f'<g class="{_style(series)}">{"".join(parts)}</g>'


def usable(value: float | None) -> bool:
    """Tell whether a value has a place on an axis; a diverged loss of 1e30 or NaN has none."""
    return value is not None and abs(value) < 1e15


def _spread(point: Point) -> float:
    """Half the error bar, 0 where there is none."""
    return point.spread if point.spread is not None and usable(point.spread) else 0.0


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Find the ends of an axis: a little beyond the values, and never equal."""
    low, high = min(values), max(values)
    # A tiny difference is not blown up to fill the axis: 98.60 and 98.61 are nearly one place.
    room = max((high - low) * 0.05, max(abs(low), abs(high)) * 0.002)
    room = room if high > low else abs(high) * 0.05 or 0.5
    return low - room, high + room


def scale(
    low: float,
    high: float,
    start: float,
    stop: float,
    bend: Callable[[float], float] = float,
) -> Callable[[float], float]:
    """Make the map of values, bent, in [low, high] onto [start, stop] in user units."""
    return lambda value: start + (bend(value) - low) / (high - low) * (stop - start)


def _names(values: Sequence[float]) -> list[str]:
    """Print tick values with the decimals that their step needs."""
    step = min((b - a for a, b in zip(values, values[1:], strict=False)), default=1.0)
    return [f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" for value in values]


def _style(series: Series) -> str:
    """Name the color class of a series."""
    return "neutral" if series.style is None else f"s{series.style % _COLORS}"


def _kind(series: Series) -> str:
    """Name the class of a mark."""
    return "mark hollow" if series.hollow else "mark"


def _shape(series: Series) -> str:
    """Choose the mark of a series, so that color is not all that tells two apart."""
    return _SHAPES[(series.style or 0) % len(_SHAPES)]
