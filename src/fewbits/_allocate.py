"""How many values each layer gets under a budget of bytes: measured sensitivity, one multiplier."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ._codebook import grouped, ungrouped
from ._errors import CodebookError, PlanError
from ._finetune import batch_norms, only_training
from ._plan import Plan, PlannedWeight, carried_out, check_k, unwrapped
from ._plan import plan as make_plan
from ._quantize import quantized_values

# What a layer may get: about a quarter of a bit apart up to 3 bits, wider beyond, where the loss
# hardly changes any more.
CANDIDATES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 64)

Losses = Mapping[str, Mapping[int, float]]


@torch.no_grad()
def allocate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    size_bytes: int,
    plan: Plan | None = None,
    candidates: Sequence[int] = CANDIDATES,
) -> Plan:
    """Choose the number of values of each layer, so that little is lost in so many bytes.

    Every layer alone is snapped to each number of values (by k-means), and the loss on `batches`
    measured: layers x candidates passes over the batches. Then the multiplier is sought at which
    each layer's best trade of loss against bytes fills the budget. The model is unchanged.

    Args:
        model: a trained module.
        batches: (inputs, targets) pairs; some hundred examples do. Kept in memory.
        loss: (outputs, targets) -> a mean over the batch, 0-d.
        size_bytes: what indices, codebooks and everything else in the state dict may take
            together. Indices count log2 K bits a weight, which no entropy-coded stream exceeds by
            more than its header; a file has about 100 bytes more per tensor.
        plan: which weights, and at what granularity; its numbers of values are not used. All
            weights with one codebook each if not given.
        candidates: numbers of values to choose from.

    Returns:
        The plan, for `Clustering` or `quantize`; print it to read it.

    Raises:
        PlanError: if the budget is below the smallest plan (with that size), there is no batch, or
            a candidate is out of range.
        CodebookError: if the loss of the model itself is not finite.

    References:
        docs/method.md, section 6; the allocation is that of Shoham & Gersho (1988).
    """
    model = unwrapped(model)
    plan = make_plan(model, k=max(candidates, default=0)) if plan is None else plan
    plan = carried_out(model, None, None, plan)
    ks = sorted({check_k(k, "candidates") for k in candidates})
    kept = list(batches)
    if not kept:
        raise PlanError("allocate: there is no batch. Pass a few training batches.")
    rest = _rest_bytes(model, plan)
    sizes = {w.name: {k: _size(w, k) for k in ks} for w in plan.selected}
    least = rest + sum(min(by_k.values()) for by_k in sizes.values())
    if size_bytes < least:
        raise PlanError(
            f"size_bytes is {size_bytes:,}, but with {ks[0]} values in every layer the model takes"
            f" {least:,} bytes, of which {rest:,} are not clustered. Give more bytes, or smaller"
            " candidates."
        )
    losses = _sensitivities(model, plan, kept, loss, ks)
    chosen = cheapest(losses, sizes, size_bytes - rest)
    rows = tuple(replace(w, k=min(chosen[w.name], _most(w))) for w in plan.selected)
    return replace(plan, selected=rows, notes=())


def planned_bytes(model: nn.Module, plan: Plan) -> int:
    """Return the bytes that a plan's model takes, counted as `allocate` does.

    Args:
        model: the plan's.
        plan: with its numbers of values.
    """
    return _rest_bytes(model, plan) + sum(_size(w, w.k) for w in plan.selected)


def cheapest(losses: Losses, sizes: Mapping[str, Mapping[int, int]], budget: int) -> dict[str, int]:
    """Choose one K per layer with a small sum of losses, whose sizes fit the budget.

    The choices that are best for some price per byte are found by bisection on the price; what
    the budget then leaves is spent on the layers where a byte buys most.

    Args:
        losses: by layer and K, how much the loss rises.
        sizes: likewise, bytes.
        budget: bytes; at least the sum of the smallest sizes.

    Returns:
        K by layer.
    """

    def at(price: float) -> dict[str, int]:
        return {
            name: min(by_k, key=lambda k: (by_k[k] + price * sizes[name][k], sizes[name][k]))
            for name, by_k in losses.items()
        }

    def total(chosen: Mapping[str, int]) -> int:
        return sum(sizes[name][k] for name, k in chosen.items())

    if total(at(0.0)) <= budget:
        return at(0.0)
    low, high = 0.0, 1.0
    while total(at(high)) > budget and math.isfinite(high):
        high *= 2
    chosen = at(high)
    for _ in range(200):  # to the last bit of the price
        middle = (low + high) / 2
        found = at(middle)
        if total(found) > budget:
            low = middle
        else:
            high, chosen = middle, found
    found = [_spent(chosen, losses, sizes, budget - total(chosen))]
    # One price cannot reach choices between those that are best for some price.
    for k in next(iter(losses.values())):
        even = dict.fromkeys(losses, k)
        if total(even) <= budget:
            found.append(_spent(even, losses, sizes, budget - total(even)))
    return min(found, key=lambda choice: math.fsum(losses[n][k] for n, k in choice.items()))


def _spent(
    chosen: dict[str, int], losses: Losses, sizes: Mapping[str, Mapping[int, int]], left: int
) -> dict[str, int]:
    """Spend what is left, step by step where a byte lowers the loss most."""
    while True:
        best: tuple[float, str, int] | None = None
        for name, now in chosen.items():
            for k, size in sizes[name].items():
                more, gain = size - sizes[name][now], losses[name][now] - losses[name][k]
                if 0 < more <= left and gain > 0 and (best is None or gain / more > best[0]):
                    best = (gain / more, name, k)
        if best is None:
            return chosen
        _, name, k = best
        left -= sizes[name][k] - sizes[name][chosen[name]]
        chosen = chosen | {name: k}


def _sensitivities(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    ks: Sequence[int],
) -> dict[str, dict[int, float]]:
    """Measure how much the loss rises when one layer is snapped; never less with fewer values."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, dict[int, float]] = {}
    with _batch_statistics(model):
        base = _mean_loss(model, batches, loss)
        if not math.isfinite(base):
            raise CodebookError(
                f"allocate: the loss of the model is {base} before anything is snapped."
                " Pass a trained model, and batches as it was trained on."
            )
        for planned in plan.selected:
            weight = weights[planned.name]
            before = weight.detach().clone()
            view = grouped(before, planned.groups, planned.axis)
            rises: dict[int, float] = {}
            try:
                for k in ks:
                    values = quantized_values(view, min(k, _most(planned)))
                    weight.copy_(ungrouped(values, before, planned.groups, planned.axis))
                    rise = _mean_loss(model, batches, loss) - base
                    rises[k] = rise if math.isfinite(rise) else math.inf
            finally:
                weight.copy_(before)
            found[planned.name] = _falling(rises)
    return found


def _falling(rises: Mapping[int, float]) -> dict[int, float]:
    """Return the rises made to fall with K: a rise with more values is noise of the batches."""
    least, falling = math.inf, {}
    for k in sorted(rises):
        least = min(least, max(rises[k], 0.0))
        falling[k] = least
    return falling


def _mean_loss(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> float:
    total, count = 0.0, 0
    for inputs, targets in batches:
        total += float(loss(model(inputs), targets)) * len(targets)
        count += len(targets)
    return total / count


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Evaluate with the batch's own normalization, as after re-estimation; nothing is changed."""
    norms = batch_norms(model)
    tracked = [norm.track_running_stats for norm in norms]
    with only_training(model, norms):
        try:
            for norm in norms:
                norm.track_running_stats = False
            yield
        finally:
            for norm, before in zip(norms, tracked, strict=True):
                norm.track_running_stats = before


def _most(planned: PlannedWeight) -> int:
    return planned.weights // planned.groups


def _size(planned: PlannedWeight, k: int) -> int:
    """Bytes of a weight's indices, at log2 K bits each, and codebooks, in float32."""
    k = min(k, _most(planned))
    return math.ceil(planned.weights * math.log2(k) / 8) + 4 * k * planned.groups


def _rest_bytes(model: nn.Module, plan: Plan) -> int:
    """Bytes of everything in the state dict that is not clustered, tied tensors once."""
    names = {name for w in plan.selected for name in (w.name, *w.aliases)}
    seen: dict[Any, int] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in names:
            seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
