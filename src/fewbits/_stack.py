"""Many layers in one call: codebooks stacked row by row, weights measured and moved together.

For pulls whose passes are compiled (`Regularizer.power`) and whose assignment is to the nearest.
What is per layer here is a row of a tensor, so a network of 150 small layers costs a step hardly
more Python and torch calls than one of a single layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ._attach import Attached
from ._codebook import shares_memory
from ._kernels import Weights, compute_dtype, measure_all, move_all
from ._sharded import Sharding, is_sharded, process_group
from ._together import SMALL, Together
from .regularizers import Regularizer


def stackable(regularizer: Regularizer) -> bool:
    """Whether passes over many layers at once do what a regularizer wants."""
    uniform = torch.ones(1, 1)
    return regularizer.power is not None and regularizer.cost(uniform) is None


@dataclass(frozen=True)
class Measured:
    """What one pass over L layers with R rows of codebooks found, float64.

    Attributes:
        totals: (L,) sum of |d|^power, d the distance to the representative.
        std: (L,) standard deviation of the weights; 1 where all are equal.
        counts: (R, K) members of each representative.
        sums: (R, K) sum of sgn(d) |d|^(power - 1) over them.
    """

    totals: Tensor
    std: Tensor
    counts: Tensor
    sums: Tensor


class Stack:
    """Layers that share device, types and K, the small ones first.

    Attributes:
        members: which layers, in the order they were given.
        layers: L of them.
        parameters: their weights.
        codebooks: their codebooks.
        sharding: where their parts belong, if they are sharded.
        small: how many have their gradient computed together.
        weights: their (G, n) views.
        spans: each layer's rows among the R of all.
        row_layer: (R,) the layer that each row belongs to.
        sizes: (L,) float64 numbers of weights.
        usage: (R, K) running share of each representative; the layers' own are views of it.
    """

    def __init__(self, layers: Sequence[Attached]):
        self.members = tuple(map(id, layers))
        self.layers = sorted(layers, key=lambda layer: not _is_small(layer))
        self.small = sum(map(_is_small, layers))
        self.parameters: list[nn.Parameter] = [layer.weight for layer in self.layers]
        self.codebooks: list[nn.Parameter] = [layer.codebook for layer in self.layers]
        groups = [layer.planned.groups for layer in self.layers]
        sharded = is_sharded(self.parameters[0])
        self.sharding = Sharding(self.parameters, groups) if sharded else None
        self._views = Weights(() if sharded else (layer.view() for layer in self.layers))
        pairs = zip(self.parameters, self._views, strict=False)
        self._copies = not all(shares_memory(weight, view) for weight, view in pairs)
        self.small_weights = Weights(self._views[: self.small])
        ends = list(accumulate(groups))
        self.spans = [slice(end - g, end) for end, g in zip(ends, groups, strict=True)]
        device = self.parameters[0].device
        numbers = torch.arange(len(groups), device=device)
        self.row_layer = numbers.repeat_interleave(torch.tensor(groups, device=device))
        sizes = [weight.numel() for weight in self.parameters]
        self.sizes = torch.tensor(sizes, dtype=torch.float64, device=device)
        self.usage = torch.cat([layer.usage.to(device) for layer in self.layers])
        for layer, span in zip(self.layers, self.spans, strict=True):
            layer.usage = self.usage[span]
        self._sorted: tuple[Tensor, Tensor, Tensor] | None = None
        self._measured: tuple[list[int], Tensor, Measured] | None = None
        self._strengths: tuple[list[float], Tensor] | None = None

    def weights(self) -> Weights:
        """Return the weights as (G, n) each; views, or copies where strides allow none."""
        return Weights(layer.view() for layer in self.layers) if self._copies else self._views

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return all codebooks as (R, K) ascending, and the order that sorts them."""
        now = _flatten_dense_tensors(self.codebooks).detach()
        if self._sorted is None or not torch.equal(self._sorted[0], now):
            # Kept with what it was sorted from: a codebook may be written to through `.data`.
            wide = now.view(len(self.row_layer), -1).to(compute_dtype(now))
            self._sorted = (now.clone(), *wide.sort(dim=1))
        return self._sorted[1], self._sorted[2]

    def in_own_order(self, values: Tensor, order: Tensor) -> Tensor:
        """Return (R, K) values by rising representative in the order of the parameters."""
        return torch.empty_like(values).scatter_(1, order, values)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return (R, K) values as views shaped like each layer's codebook parameter."""
        return _unflatten_dense_tensors(values.view(-1), self.codebooks)  # pyright: ignore

    def strengths(self, values: list[float]) -> Tensor:
        """Return numbers, one a layer, as (L,) float64 on the weights' device."""
        if self._strengths is None or self._strengths[0] != values:
            numbers = torch.tensor(values, dtype=torch.float64, device=self.sizes.device)
            self._strengths = (values, numbers)
        return self._strengths[1]

    def measure(self, power: int) -> Measured:
        """Return sums and standard deviations, kept until a weight or a codebook changes."""
        codebook, _ = self.rows()
        versions = [weight._version for weight in self.parameters]
        known = self._measured
        if known is None or known[0] != versions or known[1] is not codebook:
            if self.sharding is None:
                found = measure_all(self.weights(), codebook, None, power)
            else:
                found = self.sharding.measure(codebook, power)
            totals, spreads, counts, sums = found
            std = (spreads / self.sizes.clamp(min=1)).sqrt()
            std = std.masked_fill(std == 0, 1.0)
            known = (versions, codebook, Measured(totals, std, counts, sums))
            self._measured = known
        return known[2]

    def forget(self) -> None:
        """In place: measure anew, for weights that were written through `.data`."""
        self._measured = None

    def note_usage(self, counts: Tensor, momentum: float) -> None:
        """In place: take the members of each representative, (R, K), into the running usage."""
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        self.usage.lerp_(share.to(self.usage.dtype), 1 - momentum)

    def move(self, power: int, strengths: list[float]) -> tuple[Tensor, Tensor]:
        """In place: give all weights one proximal step.

        Args:
            power: of the distance that pulls.
            strengths: one a layer; see `Proximal`.

        Returns:
            the members of each representative and the sum of the distances they are left at,
            (R, K) float64.
        """
        codebook, _ = self.rows()
        amounts = self.strengths(strengths)
        amounts = amounts / (1 + amounts) if power == 2 else amounts * self.measure(power).std
        if self.sharding is not None:
            self.forget()
            return self.sharding.move(codebook, power, amounts)
        views = self.weights()
        result = move_all(views, codebook, None, power, amounts)
        if self._copies:
            for layer, view in zip(self.layers, views, strict=True):
                layer.write_view(layer.weight.detach(), view)
        self.forget()
        return result

    def average(self, counts: Tensor, left: Tensor, share: float) -> None:
        """In place: move each representative a share of the way to its cluster's mean.

        Args:
            counts: (R, K) members of each.
            left: (R, K) sum of their distances to it.
            share: 0 … 1.
        """
        codebook, order = self.rows()
        moved = codebook.double() + share * left / counts.clamp(min=1)
        moved = self.in_own_order(moved.to(codebook.dtype), order)
        own = [codebook.detach() for codebook in self.codebooks]
        torch._foreach_copy_(own, self.split(moved))  # pyright: ignore[reportPrivateImportUsage]


def _is_small(layer: Attached) -> bool:
    weight = layer.weight
    return (
        not is_sharded(weight)
        and weight.numel() <= SMALL
        and weight.is_contiguous()
        and (layer.planned.groups == 1 or layer.planned.axis == 0)
    )


def together(layers: Sequence[Attached]) -> list[Together]:
    """In place: have small layers of one kind on the CPU snapped in one call, if several.

    Returns:
        what snaps them.
    """
    alike: dict[tuple, list[Attached]] = {}
    for layer in layers:
        weight = layer.weight
        layer.switch.together = None
        if _is_small(layer) and weight.device.type == "cpu" and layer.switch.active:
            kind = (weight.dtype, layer.codebook.dtype, layer.planned.k)
            alike.setdefault(kind, []).append(layer)
    found = []
    for some in alike.values():
        if len(some) > 1:
            found.append(Together([(*layer.owners[0], layer.planned.groups) for layer in some]))
            for layer in some:
                layer.switch.together = found[-1]
    return found


class Stacks:
    """All layers in as few stacks as there can be, put together anew when something has moved."""

    def __init__(self, layers: Sequence[Attached]):
        self.layers = list(layers)
        schedules = {id(layer.strength): layer.strength for layer in layers}
        places = {key: i for i, key in enumerate(schedules)}
        # One schedule may serve many layers.
        self._schedules = list(schedules.values())
        self._which = [places[id(layer.strength)] for layer in layers]
        self._key: Any = None
        self._stacks: list[tuple[Stack, list[float]]] = []

    def current(self, step: int, *, moving: bool = False) -> list[tuple[Stack, list[float]]]:
        """Return stacks of layers whose pull is on, and of layers whose pull is off.

        Args:
            step: for which strengths are wanted.
            moving: whether the pull of frozen weights counts as off.

        Returns:
            each with the strengths of its layers; none where their pull is off.
        """
        values = [schedule(step) for schedule in self._schedules]
        weights = [layer.weight for layer in self.layers]
        codebooks = [id(layer.codebook) for layer in self.layers]
        # Of a shard not the address, which may change on one process and not on another.
        pointers = [id(w) if is_sharded(w) else w.data_ptr() for w in weights]
        frozen = [moving and not weight.requires_grad for weight in weights]
        key = (values, codebooks, pointers, frozen)
        if key != self._key:
            strengths = {
                id(layer): values[i] for layer, i in zip(self.layers, self._which, strict=True)
            }
            alike: dict[tuple, list[Attached]] = {}
            for layer, still in zip(self.layers, frozen, strict=True):
                weight, codebook = layer.weight, layer.codebook
                on = strengths[id(layer)] > 0 and not still
                over = id(process_group(weight)) if is_sharded(weight) else None
                kind = (on, weight.device, weight.dtype, codebook.dtype, layer.planned.k, over)
                alike.setdefault(kind, []).append(layer)
            known = {} if self._key is None or self._key[1:] != key[1:] else self._by_layers()
            self._stacks = []
            for kind, some in alike.items():
                stack = known.get(tuple(map(id, some))) or Stack(some)
                own = [strengths[id(layer)] for layer in stack.layers] if kind[0] else []
                self._stacks.append((stack, own))
            self._key = key
        return self._stacks

    def _by_layers(self) -> dict[tuple[int, ...], Stack]:
        return {stack.members: stack for stack, _ in self._stacks}
