"""One process that works on a study until no cell waits."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._floats import shared_folder
from .._folder import held, sweep
from ..compare import Comparison, environment
from ..data import ImageData
from ..progress import Progress
from ._cells import Cell, Study
from ._queue import Queue

# What is kept of an epoch, for the plots.
_EPOCH = ("epoch", "accuracy", "hardening_gap", "loss", "penalty")


@dataclass
class Worker:
    """Does a study's cells one after the other, in its folder.

    Attributes:
        study: what to do.
        folder: of the study.
        queue: shared with other processes.
        device: to train on.
        load: reads data by name and image size.
        progress: told of steps and epochs.
        said: told of each cell that has ended, in a line.
    """

    study: Study
    folder: Path
    queue: Queue
    device: torch.device
    load: Callable[[str, int], ImageData]
    progress: Progress
    said: Callable[[str], None]
    _data: dict[tuple[str, int], ImageData] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what cannot be trained or planned, before anything is.

        Raises:
            FewbitsError: with the reason.
        """
        looked: set[str] = set()
        for cell in self.study.cells:
            settings = {k: v for k, v in cell.settings().items() if k not in ("seed", "strength")}
            if repr(settings) not in looked:
                looked.add(repr(settings))
                self._comparison(cell).check()

    def run(self) -> None:
        """Do cells until none waits, nor was left behind by a process that died meanwhile."""
        cells = {cell.key: cell for cell in self.study.cells}
        while self.queue.do_next(cells, self._do) or self.queue.fill(self.study.cells):
            pass

    def _do(self, cell: Cell) -> tuple[float, dict[str, Any]]:
        settings = cell.settings()
        names = ("method", "k", "seed", *self.study.axes)
        name = " ".join(f"{name}={settings[name]}" for name in names)
        try:
            comparison = self._comparison(cell)
            # Taken for dead by mistake, when a clock was set, another process may still be at it.
            with held(comparison.folder, wait=True):
                sweep(comparison.folder)
                done = comparison.cell(cell.method, cell.k, cell.seed)
        except Exception as error:
            self.said(f"{name}: failed: {error}")
            raise
        row = done["row"]
        done_now = len(self.queue.done()) + 1
        self.said(
            f"[{done_now}/{len(self.study.cells)}] {name}: {row['accuracy']:.2f}%,"
            f" drop {row['drop']:.2f}, {row['seconds']:.0f} s"
        )
        history = [{key: epoch.get(key) for key in _EPOCH} for epoch in done["history"]]
        kept = {
            "row": row,
            "float_bytes": done["float_bytes"],
            "history": history,
            "environment": environment(self.device),
            "settings": asdict(cell.config),
        }
        return row["accuracy"], kept

    def _comparison(self, cell: Cell) -> Comparison:
        where = (cell.config.data, cell.config.image_size)
        if where not in self._data:
            self._data[where] = self.load(*where).to(self.device)
        return Comparison(
            cell.config,
            self.folder / "cells" / cell.name,
            self._data[where],
            self.device,
            self.progress,
            shared_folder(self.folder / "float"),
        )
