"""From what a user passed to `Clustering` to what it means for each layer."""

import fnmatch
from collections.abc import Iterable, Mapping

from ._codebook import INITS
from ._errors import PlanError, did_you_mean
from ._plan import Plan, PlannedWeight
from ._pull import Penalty, Proximal
from .regularizers import Regularizer
from .schedules import Schedule, as_schedule, constant


def strengths_of(plan: Plan, pull: Penalty | Proximal | None) -> dict[str, Schedule]:
    """Return the schedule of each clustered weight's pull, by its name.

    Raises:
        PlanError: if a pattern among the strengths matches no clustered weight.
    """
    if pull is None:
        return {row.name: constant(0.0) for row in plan.selected}
    if not isinstance(pull.strength, Mapping):
        return {row.name: as_schedule(pull.strength) for row in plan.selected}
    result = {row.name: constant(0.0) for row in plan.selected}
    for pattern, value in pull.strength.items():
        hits = [row for row in plan.selected if _matches(row, pattern)]
        if not hits:
            near = did_you_mean(pattern, (row.name for row in plan.selected))
            raise PlanError(
                f"strength: no clustered weight matches {pattern!r}.{near}"
                " print(clustering.plan) lists them."
            )
        result |= {row.name: as_schedule(value) for row in hits}
    return result


def _matches(row: PlannedWeight, pattern: str) -> bool:
    names = [n for name in (row.name, *row.aliases) for n in (name, name.rpartition(".")[0])]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def difference(theirs: Iterable[list], ours: Iterable[list]) -> str:
    """Return a sentence on the first weight in which two plans' fingerprints differ."""
    before, now = ({row[0]: row[1:] for row in rows} for rows in (theirs, ours))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            keys = ("shape", "k", "groups", "axis")
            parts = [
                "absent"
                if row is None
                else ", ".join(f"{a} {b}" for a, b in zip(keys, row, strict=True))
                for row in (before.get(name), now.get(name))
            ]
            return f"{name} was {parts[0]}, is {parts[1]}."
    return "the order of the weights differs."


def check_choices(regularizer: object, pull: object, init: object) -> None:
    """Raise a `PlanError` where `Clustering` was given something else than it takes."""
    if not isinstance(regularizer, Regularizer):
        raise PlanError(
            f"regularizer is {regularizer!r}. Pass an object such as regularizers.Nearest()."
        )
    if pull is not None and not isinstance(pull, (Penalty, Proximal)):
        raise PlanError(f"pull is {pull!r}. Pass fewbits.Penalty(…), fewbits.Proximal(…) or None.")
    if init not in INITS:
        raise PlanError(f"init is {init!r}.{did_you_mean(str(init), INITS)} Use one of {INITS}.")
