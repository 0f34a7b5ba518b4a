"""Codebooks as tensors: where they start, which weight goes where, what snapping costs."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ._errors import CodebookError
from ._kernels import accumulate, compute_dtype, gather, midpoints, snap, std
from ._kmeans import kmeans

Init = Literal["kmeans", "quantile", "uniform"]
INITS: tuple[Init, ...] = ("kmeans", "quantile", "uniform")


def grouped(tensor: Tensor, groups: int, axis: int) -> Tensor:
    """View a weight as (groups, members), copying only where strides do not allow a view.

    Args:
        tensor: any shape and layout.
        groups: G; 1 takes the elements in memory order, so that channels-last is a view as well.
        axis: the channel axis that is cut into G equal runs.

    Returns:
        (G, N / G). The order within a row is unspecified but equal for equal strides.
    """
    if tensor.is_contiguous() and (groups == 1 or axis == 0):
        return tensor.view(groups, tensor.numel() // groups)
    if groups == 1:
        return tensor.permute(_memory_order(tensor)).reshape(1, -1)
    return tensor.movedim(axis, 0).reshape(groups, -1)


def grouped_like(tensor: Tensor, weight: Tensor, groups: int, axis: int) -> Tensor:
    """View `tensor` as `grouped(weight)` orders its elements, whatever its own strides are."""
    if weight.is_contiguous() and tensor.is_contiguous():
        return grouped(tensor, groups, axis)
    if groups == 1:
        return tensor.permute(_memory_order(weight)).reshape(1, -1)
    return tensor.movedim(axis, 0).reshape(groups, -1)


def ungrouped(values: Tensor, weight: Tensor, groups: int, axis: int) -> Tensor:
    """Undo `grouped`: return (groups, members) `values` in the shape of `weight`."""
    if groups == 1:
        order = _memory_order(weight)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return values.reshape([weight.shape[i] for i in order]).permute(inverse)
    moved = weight.movedim(axis, 0)
    return values.reshape(moved.shape).movedim(0, axis)


def _memory_order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=lambda i: -tensor.stride(i))


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in the same storage: whether `grouped` gave a view."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def check_finite(name: str, values: Tensor, when: str = "") -> None:
    """Raise a `CodebookError` if a weight or codebook holds NaN or infinity."""
    refuse_bad(name, int((~torch.isfinite(values)).sum()), values.numel(), when)


def refuse_bad(name: str, bad: int, size: int, when: str = "") -> None:
    """Raise a `CodebookError` if there are values that are NaN or infinite."""
    if bad:
        raise CodebookError(
            f"{name}: {bad:,} of {size:,} values are NaN or infinite{when}."
            " Load a good checkpoint, or lower the learning rate that led here."
        )


def pooled_variance(sizes: Sequence[int], stds: Sequence[Tensor]) -> float:
    """Return the mean squared deviation of all weights from the mean of their own layer.

    Args:
        sizes: weights of each layer.
        stds: the standard deviation of each, 0-d.

    Returns:
        In squared units of the weights; 0 without any.
    """
    total = sum(size * float(std) ** 2 for size, std in zip(sizes, stds, strict=True))
    return total / max(sum(sizes), 1)


def std_of(weight: Tensor) -> Tensor:
    """Return the standard deviation of all weights together, in one pass without a copy.

    Args:
        weight: any shape, floating point.

    Returns:
        0-d float32, float64 for float64 weights; 0 where all are equal, NaN or infinite where a
        weight is.
    """
    if weight.numel() < 2:
        return (weight.to(compute_dtype(weight)).sum() * 0).detach()
    return std(grouped(weight.detach(), 1, 0))


def initial_codebook(weight: Tensor, k: int, init: Init) -> Tensor:
    """Return a codebook for each row; deterministic.

    Args:
        weight: (G, n) floating point, finite, n >= 1.
        k: number of representatives.
        init: "kmeans", exact least squared error; "quantile", equal mass; "uniform", an even
            grid from the smallest to the largest weight.

    Returns:
        (G, k), float64 if `weight` is, else float32; each row ascending.
    """
    weight = weight.detach()
    if init == "kmeans":
        codebook = kmeans(weight, k)
    elif init == "quantile":
        ordered = weight.double().sort(dim=1).values
        middle = (torch.arange(k, dtype=torch.float64) + 0.5) / k * weight.shape[1]
        codebook = ordered[:, middle.long().to(weight.device)]
    else:
        low, high = weight.amin(1, keepdim=True).double(), weight.amax(1, keepdim=True).double()
        even = torch.linspace(0, 1, k, dtype=torch.float64, device=weight.device)
        codebook = low + (high - low) * even if k > 1 else (low + high) / 2
    return codebook.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)


def rate_aware_boundaries(codebook: Tensor, cost: Tensor) -> Tensor:
    """Return the boundaries of assignment by (w - c_j)^2 + cost_j.

    Less w^2, each cost is a line in w with slope -2 c_j; the winner is the lower envelope of K
    lines, found in one pass over the sorted codebook. A representative that wins nowhere gets two
    equal boundaries.

    Args:
        codebook: (G, K) ascending.
        cost: (G, K) non-negative, in squared units of the codebook.

    Returns:
        (G, K - 1) ascending, dtype of `codebook`.

    References:
        docs/method.md, eq. 7; entropy-constrained quantization (Chou, Lookabaugh & Gray 1989).
    """
    rows = [
        _envelope(c, r)
        for c, r in zip(codebook.double().tolist(), cost.double().tolist(), strict=True)
    ]
    width = codebook.shape[1] - 1
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), width).to(codebook)


def boundaries_of(codebook: Tensor, cost: Tensor | None) -> Tensor:
    """Return the (G, K - 1) boundaries of an ascending codebook; midpoints without a cost."""
    return midpoints(codebook) if cost is None else rate_aware_boundaries(codebook, cost)


def _envelope(codebook: list[float], cost: list[float]) -> list[float]:
    kept: list[int] = []  # representatives on the envelope so far
    starts: list[float] = []  # where each of them begins to win
    for j, c in enumerate(codebook):
        start = -math.inf
        while kept:
            i = kept[-1]
            if c == codebook[i]:
                start = -math.inf if cost[j] < cost[i] else math.inf
            else:
                start = (c + codebook[i]) / 2 + (cost[j] - cost[i]) / (2 * (c - codebook[i]))
            if start > starts[-1]:
                break
            kept.pop()
            starts.pop()
            start = -math.inf
        if start < math.inf:
            kept.append(j)
            starts.append(start)
    boundaries: list[float] = []
    for j, start in zip(kept, starts, strict=True):
        boundaries += [start] * (j - len(boundaries))
    return boundaries + [math.inf] * (len(codebook) - 1 - len(boundaries))


def snap_to_nearest(weight: Tensor, codebook: Tensor) -> Tensor:
    """Return each weight's nearest representative.

    Args:
        weight: (G, n) floating point, finite.
        codebook: (G, K) ascending.

    Returns:
        (G, n), dtype of `weight`.
    """
    return snap(weight, codebook, midpoints(codebook))


def distortion_of(weight: Tensor, snapped: Tensor) -> float:
    """Return the mean squared snap error over the mean squared weight; 0 for all-zero weights."""
    error = (weight - snapped).double().square().sum()
    power = weight.double().square().sum()
    return float(error / power) if power > 0 else 0.0


def split_largest(
    weight: Tensor,
    codebook: Tensor,
    dead: Tensor,
    indices: Tensor,
    add_up: Callable[[Tensor], Tensor] = lambda values: values,
    largest: Callable[[Tensor], Tensor] = lambda values: values,
) -> Tensor:
    """Give each dead representative half of the cluster with the largest distortion.

    The cluster is cut at its mean: its representative takes the mean of the lower half, the dead
    one the mean of the upper half (one step of Linde, Buzo & Gray's splitting).

    Args:
        weight: (1, n) one group, or this process's part of it.
        codebook: (1, K) ascending.
        dead: (K,) bool.
        indices: (1, n) assignment under `codebook`.
        add_up: sums float64 numbers over all processes that hold a part.
        largest: the same for the largest number.

    Returns:
        (1, K) new codebook, not sorted; unchanged where no cluster has two distinct weights.
    """
    codebook = codebook.clone()
    k = codebook.shape[1]
    indices = indices.to(torch.int32)
    error = (weight - gather(codebook.to(weight.dtype), indices)).double().square()
    counts, distortion = add_up(torch.stack(accumulate(error, indices, k)))
    distortion[counts < 2] = 0

    def sums(members: Tensor) -> Tensor:
        return torch.stack([members.sum(), members.new_tensor(float(members.numel()))])

    for j in dead.nonzero().flatten().tolist():
        widest = int(distortion[0].argmax())
        members = weight[indices == widest].double()
        ends = members.new_full((2,), -torch.inf)
        if members.numel():
            ends = torch.stack([-members.amin(), members.amax()])
        low, high = largest(ends).tolist()
        if distortion[0, widest] <= 0 or -low == high:
            break
        total, size = add_up(sums(members))
        above = members > total / size
        (lower, lower_size), (upper, upper_size) = add_up(
            torch.stack([sums(members[~above]), sums(members[above])])
        )
        codebook[0, widest], codebook[0, j] = lower / lower_size, upper / upper_size
        indices[(indices == widest) & (weight.double() > total / size)] = j
        errors = [
            (weight[indices == cluster].double() - codebook[0, cluster].double()).square().sum()
            for cluster in (widest, j)
        ]
        distortion[0, widest], distortion[0, j] = add_up(torch.stack(errors))
    return codebook
