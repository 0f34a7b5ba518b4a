"""Curves of a training that a Jupyter notebook redraws while it goes on."""

import sys
import time
from collections.abc import Mapping
from html import escape
from typing import Any, SupportsFloat

from ..report._svg import Point, Series, chart

MOST_POINTS = 100  # of a curve: as many as its width can show, and a redraw stays light

# For light and dark notebooks alike; nothing outside the plot is touched.
_STYLE = """<style>
.fewbits-live { display: flex; flex-wrap: wrap; gap: 1rem; }
.fewbits-live figure { flex: 0 1 22rem; margin: 0; }
.fewbits-live svg { display: block; width: 100%; height: auto; overflow: visible; }
.fewbits-live text { fill: currentColor; font-size: 17px; }
.fewbits-live path, .fewbits-live polyline { fill: none; stroke: currentColor; }
.fewbits-live .grid { opacity: 0.2; }
.fewbits-live .thin { stroke: #3b82c4; stroke-width: 2.5; }
.fewbits-live .dot { fill: #3b82c4; stroke: none; }
.fewbits-live .plot { position: relative; }
.fewbits-live input { position: absolute; left: var(--x); top: var(--y); width: 1rem; height: 1rem;
  margin: 0; translate: -50% -50%; appearance: none; border-radius: 50%; }
.fewbits-live span { position: absolute; z-index: 1; left: var(--x); top: var(--y); opacity: 0;
  width: max-content; padding: 0 0.3rem; pointer-events: none; transform: translate(-50%, -150%);
  background: Canvas; color: CanvasText; border: 1px solid; }
.fewbits-live input:is(:hover, :focus) + span { opacity: 1; }
</style>"""


class LivePlot:
    """Curves of what is logged, one chart a name, redrawn in a notebook's cell as values come.

    Where no notebook or other IPython shell is running, values are kept and nothing is shown, so
    the same loop runs as a script. As the last expression of a cell it shows what it holds.

    Args:
        every: seconds between two redraws at least.

    Examples:
        >>> plot = LivePlot()
        >>> for step in range(3):
        ...     plot.log({"loss": 1 / (1 + step)})
        >>> print(plot)
        LivePlot of loss, 3 steps
    """

    def __init__(self, *, every: float = 0.5):
        """Show nothing yet."""
        self.every = every
        self._curves: dict[str, list[tuple[float, float]]] = {}
        self._steps = 0
        self._drawn = -float("inf")
        self._display: Any = None

    def log(self, values: Mapping[str, SupportsFloat], step: float | None = None) -> None:
        """Add a value to the curve of each name, and redraw if it is time.

        Args:
            values: plain numbers or 0-d tensors, such as `{"loss": …, "moving": gap.moving}`; NaN
                and infinity leave a curve as it is.
            step: where along x; if not given, how many times `log` was called before.
        """
        x = self._steps if step is None else step
        for name, value in values.items():
            self._curves.setdefault(name, []).append((float(x), float(value)))
        self._steps += 1
        if time.monotonic() - self._drawn >= self.every:
            self.show()

    def show(self) -> None:
        """Redraw now: at the end of a training, say, for the values since the last time."""
        self._drawn = time.monotonic()
        # A notebook has loaded it long ago; where nothing has, there is nowhere to show.
        shell = sys.modules.get("IPython")
        if shell is None or shell.get_ipython() is None:
            return
        if self._display is None:
            from IPython.display import display  # pyright: ignore[reportMissingImports]

            self._display = display(self, display_id=True)
        else:
            self._display.update(self)

    def __str__(self) -> str:
        """Return in words what is drawn."""
        steps = f"{self._steps} step{'' if self._steps == 1 else 's'}"
        return f"LivePlot of {', '.join(self._curves) or 'nothing'}, {steps}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the charts as Jupyter shows them."""
        charts = (
            f"<figure>{_drawn(name, curve)}<figcaption>{escape(name)}</figcaption></figure>"
            for name, curve in self._curves.items()
        )
        return f'{_STYLE}<div class="fewbits-live">{"".join(charts)}</div>'


def _drawn(name: str, curve: list[tuple[float, float]]) -> str:
    """Return the chart of a curve, of so many points as can be told apart."""
    stride = -(-len(curve) // MOST_POINTS)
    kept = [*curve[:-1:stride], curve[-1]]
    points = tuple(Point(x, y, f"{name} at {x:g}: {y:.4g}") for x, y in kept)
    last = f"{name}, {len(curve)} values, the last {curve[-1][1]:.4g}"
    return chart(
        [Series(name, points, marked=False)], title=last, x_label="step", y_label=name, whole_x=True
    )
