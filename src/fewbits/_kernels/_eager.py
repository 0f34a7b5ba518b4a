"""Plain torch kernels: assign by search, gather by index, sum by cluster.

All work on a weight viewed as (G, n), G groups that each have a codebook of K values, and take it
piece by piece: no tensor of G x n x K elements exists, and a piece's temporaries stay in cache.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._lookup import search_for

# What `measure_all` returns.
Measures = tuple[Tensor, Tensor, Tensor, Tensor]

# Weights per piece. Measured with K = 16 on one core: 2^14 costs 4.9 ns a weight (call overhead),
# 2^16 3.8, 2^18 3.5 but four times the temporaries.
PIECE = 1 << 16


class Weights(tuple[Tensor, ...]):
    """Weights that are worked on together time and again, (G_i, n_i) each.

    Any sequence of tensors does in its place.

    Attributes:
        prepared: what an implementation keeps of them, such as their addresses.
    """

    prepared: Any = None


def index_dtype(k: int) -> torch.dtype:
    """Return the smallest index type that torch can compute with for `k` values."""
    return torch.uint8 if k <= 256 else torch.int32


def pieces(groups: int, members: int, size: int = PIECE) -> Iterator[tuple[slice, slice]]:
    """Yield (rows, columns) slices that tile a (groups, members) view, `size` weights at most.

    Args:
        groups: number of rows G.
        members: number of columns n.
        size: most elements in one piece; at least 1.

    Yields:
        Pairs of slices, in row-major order.
    """
    if members == 0:
        return
    rows = max(1, size // members)
    columns = min(members, size)
    for row in range(0, groups, rows):
        for column in range(0, members, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type to compute in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def midpoints(codebook: Tensor) -> Tensor:
    """Return the boundaries between neighbouring representatives.

    Rounded towards minus infinity, so that `weight > boundary` in the codebook's precision
    decides exactly as in real arithmetic.

    Args:
        codebook: (G, K) float32 or float64, each row ascending.

    Returns:
        (G, K - 1), same dtype.
    """
    wide = codebook.double()
    exact = wide[:, :-1] + (wide[:, 1:] - wide[:, :-1]) / 2
    middle = exact.to(codebook.dtype)
    below = torch.nextafter(middle, middle.new_full((), -torch.inf))
    return torch.where(middle.double() > exact, below, middle)


def narrow(boundaries: Tensor) -> Tensor:
    """Return float32 boundaries that decide as the given ones do for weights of float32 or less.

    Args:
        boundaries: (G, K - 1) float32 or float64, each row ascending.

    Returns:
        (G, K - 1) contiguous; the same tensor where it is so already.
    """
    if boundaries.dtype == torch.float32:
        return boundaries.contiguous()
    near = boundaries.float()
    below = torch.nextafter(near, near.new_full((), -torch.inf))
    return torch.where(near.double() > boundaries, below, near).contiguous()


def assign(weight: Tensor, boundaries: Tensor) -> Tensor:
    """Find, for each weight, how many boundaries lie below it: the index of its representative.

    A weight on a boundary takes the lower representative.

    Args:
        weight: (G, n) floating point, finite.
        boundaries: (G, K - 1) float32 or float64, each row ascending.

    Returns:
        (G, n) indices below K; uint8 up to K = 256, else int32.
    """
    k = boundaries.shape[1] + 1
    indices = torch.empty(weight.shape, dtype=index_dtype(k), device=weight.device)
    for rows, columns, found in assign_pieces(weight, boundaries):
        indices[rows, columns] = found
    return indices


def assign_pieces(
    weight: Tensor, boundaries: Tensor, size: int = PIECE
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield rows, columns and the indices of `assign`, piece by piece.

    Args:
        weight: (G, n) floating point, finite.
        boundaries: (G, K - 1) ascending.
        size: most weights in one piece.

    Yields:
        Two slices and (g, m) integer indices.
    """
    search = search_for(boundaries, weight.shape[1])
    for rows, columns in pieces(weight.shape[0], weight.shape[1], size):
        yield rows, columns, search(weight[rows, columns].to(boundaries.dtype), rows)


def _flat(indices: Tensor, rows: slice, k: int) -> Tensor:
    """Indices of one piece into the flattened (G x K) codebook, int32 or, where needed, int64."""
    flat = indices.int() if k * (rows.stop or 1) < 2**31 else indices.long()
    first = rows.start or 0
    if indices.shape[0] > 1 or first > 0:
        row = torch.arange(first, first + indices.shape[0], device=indices.device)
        flat = flat + (row * k).to(flat.dtype)[:, None]
    return flat.reshape(-1)


def gather(codebook: Tensor, indices: Tensor, first_group: int = 0) -> Tensor:
    """Return the representative of each index; differentiable with respect to `codebook`.

    Args:
        codebook: (G, K) floating point.
        indices: (g, n) indices below K into rows first_group … first_group + g - 1.
        first_group: the row of `codebook` that the first row of `indices` refers to.

    Returns:
        (g, n), dtype of `codebook`.
    """
    rows = slice(first_group, first_group + indices.shape[0])
    flat = _flat(indices, rows, codebook.shape[1])
    return codebook.reshape(-1).index_select(0, flat).view(indices.shape)


def count(indices: Tensor, k: int) -> Tensor:
    """Count the members of each cluster.

    Args:
        indices: (G, n) cluster of each weight, below `k`.
        k: number of clusters.

    Returns:
        (G, k) int64.
    """
    groups = indices.shape[0]
    flat = _flat(indices, slice(0, groups), k) if groups > 1 else indices.reshape(-1)
    return torch.bincount(flat, minlength=groups * k).view(groups, k)


def accumulate(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Count the members of each cluster and sum a value over them.

    Args:
        values: (G, n) floating point: what to sum.
        indices: (G, n) cluster of each, below `k`.
        k: number of clusters.

    Returns:
        counts and sums, each (G, k) float64. Sums are in float64 throughout: a float32 sum over
        45 million weights is off by 0.4%.
    """
    groups = values.shape[0]
    counts = torch.zeros(groups, k, dtype=torch.float64, device=values.device)
    sums = torch.zeros_like(counts)
    for rows, columns in pieces(*values.shape):
        part = indices[rows, columns]
        flat = _flat(part, slice(0, len(part)), k)
        counts[rows] += torch.bincount(flat, minlength=len(part) * k).view(len(part), k)
        sums[rows].view(-1).index_add_(0, flat, values[rows, columns].double().reshape(-1))
    return counts, sums


def snap(weight: Tensor, codebook: Tensor, boundaries: Tensor) -> Tensor:
    """Return each weight's representative: assign and gather in one pass.

    Args:
        weight: (G, n) floating point, finite.
        codebook: (G, K) ascending.
        boundaries: (G, K - 1) ascending.

    Returns:
        (G, n) contiguous, dtype of `weight`; no other tensor of that size is formed.
    """
    snapped = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    values = codebook.to(weight.dtype)
    for rows, columns, indices in assign_pieces(weight, boundaries):
        snapped[rows, columns] = gather(values, indices, rows.start)
    return snapped


def cluster_sums(
    values: Tensor, weight: Tensor, boundaries: Tensor, power: int = 1
) -> tuple[Tensor, Tensor]:
    """Assign the weights and sum another value over each cluster, in one pass.

    Args:
        values: (G, n) what to sum; `weight` itself for the clusters' means.
        weight: (G, n) what decides the cluster.
        boundaries: (G, K - 1) ascending.
        power: 1, or 2 to sum the values' squares.

    Returns:
        counts and sums, each (G, K) float64.
    """
    k = boundaries.shape[1] + 1
    counts = torch.zeros(weight.shape[0], k, dtype=torch.float64, device=weight.device)
    sums = torch.zeros_like(counts)
    for rows, columns, indices in assign_pieces(weight, boundaries):
        part = values[rows, columns]
        some_counts, some_sums = accumulate(part.double() ** 2 if power == 2 else part, indices, k)
        counts[rows] += some_counts
        sums[rows] += some_sums
    return counts, sums


def _row_slices(weights: Sequence[Tensor]) -> Iterator[slice]:
    """Yield each weight's rows of what is stacked for all of them."""
    first = 0
    for weight in weights:
        yield slice(first, first + len(weight))
        first += len(weight)


def _distances(
    weight: Tensor, codebook: Tensor, boundaries: Tensor | None, own: slice
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield rows, columns, indices and weight - representative by the `own` rows of codebooks."""
    codebook = codebook[own]
    boundaries = midpoints(codebook) if boundaries is None else boundaries[own]
    for rows, columns, indices in assign_pieces(weight, boundaries):
        nearest = gather(codebook, indices, rows.start)
        yield rows, columns, indices, weight[rows, columns].to(codebook.dtype) - nearest


def measure_all(
    weights: Sequence[Tensor], codebook: Tensor, boundaries: Tensor | None, power: int
) -> Measures:
    """Assign L weights and sum their distances to the representatives, in one pass.

    With d = weight - representative, in the precision of `codebook`:

    Args:
        weights: (G_i, n_i) each, floating point, all on one device.
        codebook: (R, K) ascending; R = sum of G_i: the first weight's rows, then the second's, …
        boundaries: (R, K - 1) ascending; None for the midpoints.
        power: 1 or 2.

    Returns:
        each weight's sum of |d|^power and its sum of squared deviations from its mean, (L,)
        float64; the members of each cluster and their sum of sgn(d) |d|^(power - 1), (R, K)
        float64.
    """
    device = codebook.device
    totals = torch.zeros(len(weights), dtype=torch.float64, device=device)
    spreads = torch.zeros_like(totals)
    counts = torch.zeros(codebook.shape, dtype=torch.float64, device=device)
    sums = torch.zeros_like(counts)
    for i, (weight, own) in enumerate(zip(weights, _row_slices(weights), strict=True)):
        for rows, _, indices, distance in _distances(weight, codebook, boundaries, own):
            if power == 2:
                totals[i] += distance.reshape(-1).double().square().sum()
            else:
                totals[i] += distance.abs().sum(dtype=torch.float64)
                distance = distance.sign()
            some_counts, some_sums = accumulate(distance, indices, codebook.shape[1])
            counts[own][rows] += some_counts
            sums[own][rows] += some_sums
        if weight.numel():
            spreads[i] = std(weight).double().square() * weight.numel()
    return totals, spreads, counts, sums


def pull_all(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    codebook: Tensor,
    boundaries: Tensor | None,
    power: int,
    factors: Tensor,
) -> None:
    """In place: add factor x sgn(d) |d|^(power - 1) to each `out`, d = weight - representative.

    Args:
        outs: shaped as their weights, or of any shape where contiguous; floating point.
        weights: as in `measure_all`.
        codebook: as in `measure_all`.
        boundaries: as in `measure_all`.
        power: 1 or 2.
        factors: (L,) float64, on the weights' device: what multiplies;
            power / (N std^power) x strength makes it the penalty's gradient.
    """
    for i, (weight, own) in enumerate(zip(weights, _row_slices(weights), strict=True)):
        out = outs[i].view(weight.shape)
        for rows, columns, _, distance in _distances(weight, codebook, boundaries, own):
            out[rows, columns] += (distance if power == 2 else distance.sign()).mul_(factors[i])


def move_all(
    weights: Sequence[Tensor],
    codebook: Tensor,
    boundaries: Tensor | None,
    power: int,
    amounts: Tensor,
) -> tuple[Tensor, Tensor]:
    """In place: move each weight towards its representative, never past it.

    Args:
        weights: as in `measure_all`.
        codebook: as in `measure_all`.
        boundaries: as in `measure_all`.
        power: 2 moves by the share `amount` of the way, 1 by `amount` until it arrives.
        amounts: (L,) float64, on the weights' device, at least 0; in the weights' units where
            `power` is 1.

    Returns:
        the members of each cluster and the sum of weight - representative that they are left at,
        before rounding to a narrower type; (R, K) float64.
    """
    counts = torch.zeros(codebook.shape, dtype=torch.float64, device=codebook.device)
    left = torch.zeros_like(counts)
    for i, (weight, own) in enumerate(zip(weights, _row_slices(weights), strict=True)):
        amount = amounts[i].to(codebook.dtype)
        for rows, columns, indices, distance in _distances(weight, codebook, boundaries, own):
            nearest = gather(codebook[own], indices, rows.start)
            if power == 2:
                moved = torch.lerp(weight[rows, columns].to(codebook.dtype), nearest, amount)
            else:
                moved = nearest + (distance - distance.clamp(-amount, amount))
            weight[rows, columns] = moved.to(weight.dtype)
            some_counts, some_left = accumulate(moved - nearest, indices, codebook.shape[1])
            counts[own][rows] += some_counts
            left[own][rows] += some_left
    return counts, left


def snap_all(
    outs: Sequence[Tensor], weights: Sequence[Tensor], codebook: Tensor, boundaries: Tensor
) -> None:
    """In place: write what `snap` returns for each weight to its `out`; see `pull_all`."""
    for out, weight, own in zip(outs, weights, _row_slices(weights), strict=True):
        out.view(weight.shape).copy_(snap(weight, codebook[own], boundaries[own]))


def sums_all(
    values: Sequence[Tensor], weights: Sequence[Tensor], boundaries: Tensor
) -> tuple[Tensor, Tensor]:
    """As `cluster_sums` for many weights, for gradients: less exact where compiled; see `_cpu`."""
    each = zip(values, weights, _row_slices(weights), strict=True)
    found = [cluster_sums(v.view(w.shape), w, boundaries[own]) for v, w, own in each]
    return torch.cat([counts for counts, _ in found]), torch.cat([sums for _, sums in found])


def std(weight: Tensor) -> Tensor:
    """Return the standard deviation of all weights together, in one pass without a copy.

    Args:
        weight: (G, n) floating point, n >= 1.

    Returns:
        0-d float32, float64 for float64 weights; 0 where all are equal, NaN or infinite where a
        weight is.
    """
    # Shifted by one of the weights, so that equal weights give exactly 0, as torch.std does not.
    first = weight[0, 0].double()
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for rows, columns in pieces(*weight.shape):
        shifted = weight[rows, columns].double() - first
        total += shifted.sum()
        squares += shifted.square().sum()
    size = weight.numel()
    return (squares / size - (total / size).square()).clamp(min=0).sqrt().to(compute_dtype(weight))
