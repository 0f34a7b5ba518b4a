"""How the pull is applied, and the one loop over pieces that every regularizer runs in."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ._codebook import boundaries_of
from ._errors import PlanError
from ._kernels import (
    PIECE,
    assign_pieces,
    compute_dtype,
    count,
    gather,
    measure_all,
    midpoints,
    move_all,
    pull_all,
)
from .regularizers import LayerState, Regularizer
from .schedules import Schedule, as_schedule

Strength = float | Schedule | Mapping[str, float | Schedule]

# Elements of weights x representatives in one piece for regularizers that compare all: 4 MB.
COMPARED = 1 << 20


def _check(strength: Strength) -> None:
    values = strength.values() if isinstance(strength, Mapping) else [strength]
    for value in values:
        schedule = as_schedule(value)
        if not all(math.isfinite(v) and v >= 0 for v in (schedule.begin, schedule.end)):
            raise PlanError(f"strength is {value!r}. Give a finite number, 0 or more.")


@dataclass(frozen=True)
class Penalty:
    """Add the regularizer to the loss, as in the paper.

    Attributes:
        strength: λ: a number, a schedule, or either per layer as {glob on the weight's name: …},
            where the last match wins and a weight that matches nothing gets no pull.
        even_rate: multiply each layer's R by N s², the sum of its squared deviations, and give a
            representative the mean of its members' gradients. Then under SGD the weights of every
            layer, and the representatives, move at one rate: with nearest-2, 2 x learning rate x
            strength of the way to their representative a step. Without it R is a mean, as in the
            paper's form, and all gradients are exact; a weight of a large layer hardly feels it.
    """

    strength: Strength = 0.003
    even_rate: bool = True

    def __post_init__(self) -> None:
        """Refuse negative strengths."""
        _check(self.strength)


@dataclass(frozen=True)
class Proximal:
    """Move the weights after the optimizer's step, decoupled as weight decay is in AdamW.

    Attributes:
        strength: the pull per step: nearest-2 moves a weight the share a / (1 + a) of the way,
            nearest-1 moves it by a standard deviations and stops on arrival. Not multiplied by
            the learning rate. A number, a schedule, or either per layer, as in `Penalty`.
        average: without the snapped forward no gradient reaches a representative; it moves this
            share of the way to its cluster's mean at every step.
        every: apply the pull at every so many steps only, and then as strongly as all of them
            together: the pass over the weights is spared in between.
    """

    strength: Strength = 0.01
    average: float = 0.1
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse negative strengths, and averages and steps out of range."""
        _check(self.strength)
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise PlanError(f"Proximal: every is {self.every!r}. Give a number of steps from 1.")
        if not 0 <= self.average <= 1:
            raise PlanError(f"Proximal: average is {self.average!r}. Give a share from 0 to 1.")

    def together(self, strength: float, power: int | None) -> float:
        """Return the strength of one pull that moves a weight as far as `every` pulls do.

        Args:
            strength: of each of them.
            power: of the distance that pulls: at 1 the ways add up, at 2 what is left of the way
                is multiplied by 1 / (1 + a) each time.
        """
        return self.every * strength if power == 1 else (1 + strength) ** self.every - 1

    @property
    def share(self) -> float:
        """The share of the way to its cluster's mean that a representative moves at one pull."""
        return 1 - (1 - self.average) ** self.every


@dataclass(frozen=True)
class Pieces:
    """One layer's weights with everything its regularizer needs, taken piece by piece.

    Attributes:
        weight: (G, n) any floating type.
        codebook: (G, K) ascending, float32 or float64, in the weights' units.
        std: the layer's standard deviation, above 0, a 0-d tensor.
        usage: (G, K) running share.
        parameters: the regularizer's own tensors, (G, K) each, in codebook order.
        step: steps taken.
        cost: (G, K) what assigning costs besides the squared distance, in squared units of the
            weights; None to assign to the nearest.
    """

    weight: Tensor
    codebook: Tensor
    std: Tensor
    usage: Tensor
    parameters: Mapping[str, Tensor]
    step: int
    cost: Tensor | None

    def boundaries(self) -> Tensor | None:
        """Return where assignment changes, (G, K - 1) ascending; None for the midpoints."""
        return None if self.cost is None else boundaries_of(self.codebook, self.cost)

    def walk(self, regularizer: Regularizer) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yield rows, columns, the normalised weights and their indices, piece by piece."""
        k = self.codebook.shape[1]
        size = max(1, COMPARED // k) if regularizer.compares_all else PIECE
        boundaries = self.boundaries()
        boundaries = midpoints(self.codebook) if boundaries is None else boundaries
        dtype = compute_dtype(self.weight)
        for rows, columns, indices in assign_pieces(self.weight, boundaries, size):
            yield rows, columns, self.weight[rows, columns].to(dtype) / self.std, indices

    def layer(self, rows: slice, codebook: Tensor, parameters: Mapping[str, Tensor]) -> LayerState:
        """Return what the penalty sees of rows `rows`."""
        own = {name: value[rows] for name, value in parameters.items()}
        return LayerState(codebook[rows], self.usage[rows], own, self.step)


def evaluate(regularizer: Regularizer, layer: Pieces) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return R, the members of each cluster, and the exact gradients of everything but weights.

    Args:
        regularizer: the formula.
        layer: the weights.

    Returns:
        the value, 0-d float64; counts, (G, K) float64; gradients by name, "codebook" and the
        regularizer's own, each (G, K) float64.
    """
    size = max(layer.weight.numel(), 1)
    if power := regularizer.power:
        boundaries = layer.boundaries()
        totals, _, counts, sums = measure_all([layer.weight], layer.codebook, boundaries, power)
        scale = 1 / (size * layer.std.double() ** power)
        return totals[0] * scale, counts, {"codebook": sums * (-power * scale)}
    k = layer.codebook.shape[1]
    free = {"codebook": layer.codebook / layer.std, **layer.parameters}
    value = torch.zeros((), dtype=torch.float64, device=layer.weight.device)
    counts = torch.zeros_like(layer.codebook, dtype=torch.float64)
    sums = {name: torch.zeros_like(v, dtype=torch.float64) for name, v in free.items()}
    for rows, _, part, indices in layer.walk(regularizer):
        with torch.enable_grad():
            leaves = {name: v[rows].detach().requires_grad_() for name, v in free.items()}
            own = {name: leaves[name] for name in layer.parameters}
            state = LayerState(leaves["codebook"], layer.usage[rows], own, layer.step)
            nearest = gather(leaves["codebook"], indices)
            total = regularizer.penalty(part, nearest, state).sum(dtype=torch.float64)
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        value += total.detach()
        for name, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                sums[name][rows] += gradient
        counts[rows] += count(indices, k)
    gradients = {name: total / size for name, total in sums.items()}
    gradients["codebook"] = gradients["codebook"] / layer.std
    return value / size, counts, gradients


def add_weight_gradient(
    regularizer: Regularizer, layer: Pieces, factor: Tensor | float, out: Tensor
) -> None:
    """In place: add factor x dR/dw to `out`, exactly; only a piece's temporaries are formed.

    Args:
        regularizer: the formula.
        layer: the weights.
        factor: what R is multiplied by in the loss.
        out: (G, n), ordered as the weights.
    """
    size = max(layer.weight.numel(), 1)
    if power := regularizer.power:
        scale = power * factor / (size * layer.std.double() ** power)
        boundaries = layer.boundaries()
        pull_all([out], [layer.weight], layer.codebook, boundaries, power, scale.view(1))
        return
    codebook = layer.codebook / layer.std
    scale = factor / (layer.std * size)
    for rows, columns, part, indices in layer.walk(regularizer):
        with torch.enable_grad():
            part = part.detach().requires_grad_()
            nearest = gather(codebook, indices, rows.start)
            state = layer.layer(rows, codebook, layer.parameters)
            total = regularizer.penalty(part, nearest, state).sum()
            (gradient,) = torch.autograd.grad(total, part)
        out[rows, columns] += gradient * scale


def proximal_step(regularizer: Regularizer, layer: Pieces, amount: float) -> None:
    """In place: give `layer.weight` one decoupled pull.

    Args:
        regularizer: the formula.
        layer: the weights.
        amount: strength of the pull; see `Proximal`.
    """
    out = layer.weight
    if power := regularizer.power:
        way = layer.std.new_full((1,), amount / (1 + amount) if power == 2 else amount).double()
        way = way if power == 2 else way * layer.std
        move_all([out], layer.codebook, layer.boundaries(), power, way)
        return
    codebook = layer.codebook / layer.std
    for rows, columns, part, indices in layer.walk(regularizer):
        nearest = gather(codebook, indices, rows.start)
        state = layer.layer(rows, codebook, layer.parameters)
        moved = regularizer.proximal(part, nearest, amount, state)
        # Arrived weights take the representative itself: dividing by std and multiplying again
        # would leave them a rounding error away.
        exact = gather(layer.codebook, indices, rows.start)
        out[rows, columns] = torch.where(moved == nearest, exact, moved * layer.std).to(out.dtype)
