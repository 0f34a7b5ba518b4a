"""Progress bars on stderr for the command line."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from .lab.progress import Progress


class Bars(Progress):
    """One bar per job with loss, penalty, accuracy, hardening gap and the time left."""

    def __init__(self, *, quiet: bool):
        self.quiet = quiet
        self.bar: tqdm | None = None
        self.last: dict[str, str] = {}

    def job(self, name: str, steps: int, done: int) -> None:
        """Open a bar."""
        if not self.quiet:
            self.bar = tqdm(
                desc=name, total=steps, initial=done, file=sys.stderr, mininterval=0.5,
                dynamic_ncols=True,
            )  # fmt: skip

    def step(self, metrics: dict[str, Any]) -> None:
        """Move the bar."""
        if self.bar is not None:
            shown = {"loss": f"{metrics['loss']:.3f}"}
            if metrics["penalty"]:
                shown["penalty"] = f"{metrics['penalty']:.3g}"
            self.bar.set_postfix(shown | self.last, refresh=False)
            self.bar.update()

    def epoch(self, job: str, history: list[dict[str, Any]]) -> None:
        """Keep the epoch's measurements in sight."""
        if history:
            self.last = {"accuracy": f"{history[-1]['accuracy']:.2f}"}
            gap = history[-1]["hardening_gap"]
            if gap is not None:
                self.last["gap"] = f"{gap:.2f}"

    def end(self) -> None:
        """Close the bar."""
        self.close()
        self.last = {}

    def close(self) -> None:
        """Close the bar if one is open."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def each(items: Iterable[Any], total: int, what: str = "loading data") -> Iterable[Any]:
    """Return `items` with a bar over them."""
    return tqdm(items, total=total, desc=what, file=sys.stderr, mininterval=0.5)
