"""Drawings whose marks can be read: by pointing, by touching and by keyboard, without a script.

Over each mark lies a radio button that the style sheet makes invisible. The browser itself makes
the buttons of one drawing a single stop of the Tab key, moves between them by the arrow keys and
says the value of each; the style sheet shows it beside the mark.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Value:
    """What a mark says."""

    x: float  # of the mark's middle, in user units of its drawing
    y: float
    text: str


def element(
    kind: str, width: int, height: int, title: str, parts: Iterable[str], values: Sequence[Value]
) -> str:
    """Wrap parts into an <svg> element with a name, and lay the values of its marks over it.

    Args:
        kind: class of the <svg> element.
        width: of the drawing, in user units.
        height: of the drawing, in user units.
        title: what the drawing shows, for a reader who cannot see it.
        parts: SVG elements, in drawing order.
        values: in the order in which the arrow keys reach them.

    Returns:
        An <svg> element; where there are values, within a <form>, which keeps its radio buttons
        apart from those of other drawings.
    """
    svg = (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
    if not values:
        return svg
    labels = "".join(
        f'<label style="--x:{coordinate(value.x / width * 100)}%;'
        f'--y:{coordinate(value.y / height * 100)}%">'
        f'<input type="radio" name="value"><span>{escape(value.text)}</span></label>'
        for value in values
    )
    return (
        f'<form class="plot" autocomplete="off">{svg}<div role="radiogroup" '
        f'aria-label="Values of: {escape(title)}">{labels}</div></form>'
    )


def coordinate(value: float) -> str:
    """Print a coordinate to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")
