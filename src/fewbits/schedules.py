"""Strengths and temperatures over time: pure functions from a step to a number."""

import math
from dataclasses import dataclass
from typing import Literal

from ._errors import PlanError


@dataclass(frozen=True)
class Schedule:
    """A number that moves from `begin` to `end`: call it with a step.

    Made by `constant`, `linear`, `cosine` and `cubic`.

    Attributes:
        begin: value up to step `start`.
        end: value from step `start + steps` on.
        start: step at which it begins to move.
        steps: steps it takes; 0 jumps at `start`.
        shape: how it moves in between.
    """

    begin: float
    end: float
    start: int = 0
    steps: int = 0
    shape: Literal["linear", "cosine", "cubic"] = "linear"

    def __post_init__(self) -> None:
        """Refuse numbers that are not finite and steps below zero."""
        for name in ("begin", "end"):
            if not math.isfinite(getattr(self, name)):
                raise PlanError(f"schedule: {name} is {getattr(self, name)}. Give a finite number.")
        for name in ("start", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise PlanError(f"schedule: {name} is {value!r}. Give a whole number, 0 or more.")
        if self.shape not in ("linear", "cosine", "cubic"):
            raise PlanError(
                f"schedule: shape is {self.shape!r}. Use 'linear', 'cosine' or 'cubic'."
            )

    def __call__(self, step: int) -> float:
        """Return the value at `step`, counted from 0."""
        if step < self.start:
            return self.begin
        if step >= self.start + self.steps:
            return self.end
        t = (step - self.start) / self.steps
        if self.shape == "cosine":
            t = (1 - math.cos(math.pi * t)) / 2
        elif self.shape == "cubic":
            t = t**3
        return self.begin + (self.end - self.begin) * t


def constant(value: float, *, start: int = 0) -> Schedule:
    """Return a schedule that is 0 before step `start` and `value` from it on.

    Args:
        value: the value.
        start: first step at which it holds.
    """
    return Schedule(0.0 if start else value, value, start)


def linear(begin: float, end: float, *, steps: int, start: int = 0) -> Schedule:
    """Return a schedule that moves evenly from `begin` to `end`.

    Args:
        begin: value up to `start`.
        end: value at the end and after.
        steps: how many steps the move takes.
        start: step at which it begins.
    """
    return Schedule(begin, end, start, steps, "linear")


def cosine(begin: float, end: float, *, steps: int, start: int = 0) -> Schedule:
    """Return a schedule that moves along half a cosine: slow, fast, slow.

    Args:
        begin: value up to `start`.
        end: value at the end and after.
        steps: how many steps the move takes.
        start: step at which it begins.
    """
    return Schedule(begin, end, start, steps, "cosine")


def cubic(begin: float, end: float, *, steps: int, start: int = 0) -> Schedule:
    """Return a schedule that moves with the cube of time: most of it at the end.

    Args:
        begin: value up to `start`.
        end: value at the end and after.
        steps: how many steps the move takes.
        start: step at which it begins.
    """
    return Schedule(begin, end, start, steps, "cubic")


def as_schedule(value: "float | Schedule") -> Schedule:
    """Return `value` itself if it is a schedule, else the constant.

    Args:
        value: a number or a schedule.

    Raises:
        PlanError: if it is neither.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PlanError(f"{value!r} is neither a number nor a schedule (fewbits.schedules).")
    return constant(float(value))
