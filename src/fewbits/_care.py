"""What goes wrong with codebooks in training: numbers gone bad, collapse, dead representatives."""

import logging
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from ._attach import Attached
from ._codebook import split_largest
from ._errors import CodebookError
from ._kernels import assign

log = logging.getLogger("fewbits")

# Representatives revived in one layer at one look; each costs a pass over the layer.
MOST_REVIVED = 16


def check_numbers(
    layers: Iterable[Attached],
    numbers: list[Tensor],
    step: int,
    penalties: Iterable[tuple[list[str], Tensor]] = (),
) -> None:
    """Raise a `CodebookError` that names the layer if weights or codebooks are NaN or infinite.

    Args:
        layers: those to look at where a number is not finite.
        numbers: tensors that are finite where the layers' weights and codebooks are.
        step: the step that is being finished, for the message.
        penalties: (names of L layers, their penalties (L,)) of the last loss.
    """
    when = f" at step {step}"
    penalties = list(penalties)
    if _all_finite(numbers + [values for _, values in penalties]):
        return
    for layer in layers:
        layer.check_finite(when)
        if not bool(layer.std().isfinite()):
            raise CodebookError(
                f"{layer.name}: the weights are too large to square{when}."
                " They have diverged: lower the learning rate or the strength."
            )
    for names, values in penalties:
        for name, value in zip(names, values.tolist(), strict=True):
            if not math.isfinite(value):
                raise CodebookError(
                    f"{name}: the penalty is {value}{when}."
                    " The weights have diverged: lower the learning rate or the strength."
                )


def _all_finite(numbers: list[Tensor]) -> bool:
    """Whether all numbers are finite; waits for each device once."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for number in numbers:
        by_device.setdefault(number.device, []).append(number.double().reshape(-1))
    return all(bool(torch.cat(some).isfinite().all()) for some in by_device.values())


class Watch:
    """Watches whether the optimizer writes to the codebooks when it first writes to the weights.

    What is compared is torch's count of writes: a step of the optimizer is one, whatever the
    gradient and the learning rate (torch counts none of a fused one's). A step that a gradient
    scaler skips writes to neither.
    """

    def __init__(self, layers: Iterable[Attached]):
        self._layers: list[Attached] | None = list(layers)
        self._before: list[tuple[int, int]] = []

    def begin(self) -> None:
        """In place: note the counts, before the optimizer's step."""
        if self._layers is not None:
            self._before = [self._counts(layer) for layer in self._layers]

    def end(self) -> None:
        """In place: after the step, warn of codebooks that no optimizer has; once."""
        if self._layers is None or not self._before:
            return
        pairs = list(zip(self._layers, self._before, strict=True))
        moved = [(layer, b[1]) for layer, b in pairs if self._counts(layer)[0] != b[0]]
        forgotten = [
            layer.name
            for layer, before in moved
            if layer.codebook.requires_grad and self._counts(layer)[1] == before
        ]
        if moved:
            self._layers = None
        if forgotten:
            more = f" and of {len(forgotten) - 1} more" if len(forgotten) > 1 else ""
            warnings.warn(
                f"{forgotten[0]}: the optimizer has moved the weights but not their"
                f" representatives{more}, so these would never follow. Make the optimizer from"
                " clustering.param_groups(…), or from model.parameters() after attaching.",
                stacklevel=4,
            )

    @staticmethod
    def _counts(layer: Attached) -> tuple[int, int]:
        return layer.weight._version, layer.codebook._version


def look_after(layer: Attached, step: int, *, revive: bool) -> Tensor:
    """In place: note what moved, warn once of a collapse, and revive the dead where wanted.

    Args:
        layer: the layer.
        step: for the messages.
        revive: whether dead representatives get weights again.

    Returns:
        (G, K) members of each representative, before reviving.
    """
    layer.note_movement()
    codebook, order = layer.rows()
    counts = layer.counts()
    if (
        codebook.shape[1] > 1
        and not layer.collapse_reported
        and bool((counts > 0).sum(1).eq(1).all())
    ):
        layer.collapse_reported = True
        warnings.warn(
            f"{layer.name}: all weights share one representative at step {step}."
            " Lower the strength, or start the pull later.",
            stacklevel=4,
        )
    dead = counts == 0
    if revive and bool(dead.any()):
        _revive(layer, codebook, order, dead, step)
    layer.look()
    return counts


def _revive(layer: Attached, codebook: Tensor, order: Tensor, dead: Tensor, step: int) -> None:
    fresh, boundaries, parts = codebook.clone(), layer.boundaries(), layer.parts()
    for group in dead.any(1).nonzero().flatten().tolist():
        first = dead[group] & (dead[group].cumsum(0) <= MOST_REVIVED)
        row = slice(group, group + 1)
        own = _row_of(parts, group, layer.weight)
        indices = assign(own, boundaries[row])
        fresh[row] = split_largest(own, codebook[row], first, indices, layer.add_up, layer.largest)
    revived = int((fresh != codebook).logical_and(dead).sum())
    if revived:
        layer.write_codebook(fresh, order)
        log.info(
            "%s: revived %d of %d dead representatives at step %d",
            layer.name,
            revived,
            int(dead.sum()),
            step,
        )


def _row_of(parts: list[tuple[Tensor, slice]], group: int, weight: Tensor) -> Tensor:
    """Return this process's weights of one group, (1, n); n is 0 where it has none."""
    for view, rows in parts:
        if rows.start <= group < rows.stop:
            return view[group - rows.start][None]
    return torch.zeros(1, 0, dtype=weight.dtype, device=weight.device)
