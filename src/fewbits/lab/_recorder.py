"""What is written down as a job goes: its history, the run's metrics, TensorBoard's events."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ._folder import write_json
from .progress import Progress

_SCALARS = ("loss", "penalty", "train_accuracy", "accuracy", "hardening_gap", "seconds")


class Recorder(Progress):
    """Passes everything on to a listener, and writes the metrics of every epoch as it ends."""

    def __init__(self, run: Path, job: str, write_metrics: Callable[[], None], listener: Progress):
        self.folder, self.write_metrics, self.listener = run / "jobs" / job, write_metrics, listener
        self.events = _events(run / "tensorboard" / job)

    def job(self, name: str, steps: int, done: int) -> None:
        """Pass on."""
        self.listener.job(name, steps, done)

    def step(self, metrics: dict[str, Any]) -> None:
        """Pass on."""
        self.listener.step(metrics)

    def epoch(self, job: str, history: list[dict[str, Any]]) -> None:
        """Write the job's history, the run's metrics.jsonl and the epoch's scalars; pass on."""
        write_json(self.folder / "history.json", history)
        self.write_metrics()
        if self.events and history:
            with self._best_effort():
                for name in _SCALARS:
                    if history[-1].get(name) is not None:
                        self.events.add_scalar(name, history[-1][name], history[-1]["epoch"])
                self.events.flush()
        self.listener.epoch(job, history)

    def end(self) -> None:
        """Close the events; pass on."""
        if self.events:
            with self._best_effort():
                self.events.close()
        self.listener.end()

    @contextmanager
    def _best_effort(self) -> Iterator[None]:
        """Do without TensorBoard's events from now on if they cannot be written: all is kept."""
        try:
            yield
        except OSError:
            self.events = None


def _events(folder: Path) -> Any:
    """Return a writer of TensorBoard's events, or None where there can be none."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder))
    except (ImportError, OSError):
        return None
