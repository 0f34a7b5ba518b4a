"""What a run tells while it goes."""

from typing import Any


class Progress:
    """Hears of jobs, steps and epochs; this one says nothing. The command line draws bars."""

    def job(self, name: str, steps: int, done: int) -> None:
        """Hear that a job begins: its steps in all, and those done before an interruption."""

    def step(self, metrics: dict[str, Any]) -> None:
        """Hear that a step ended, with running means of the epoch."""

    def epoch(self, job: str, history: list[dict[str, Any]]) -> None:
        """Hear that an epoch ended, or with what history a job begins again or was found done."""

    def end(self) -> None:
        """Hear that the job ended."""
