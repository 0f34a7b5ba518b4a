"""Exact one-dimensional k-means by dynamic programming, for many groups at once."""

import numpy as np
import torch
from torch import Tensor

from ._kernels import cluster_sums, midpoints

# Cells of the histogram that stands for a large weight: at 4,096 and K = 16 the distortion is
# within 0.01% of exact (tests/test_codebook.py measures it); the table below is K x cells.
MOST_CELLS = 4096
MOST_TABLE = 1 << 20
REFINEMENTS = 5


def kmeans(weight: Tensor, k: int) -> Tensor:
    """Return the k means of least squared error for each row.

    Exact where a row has at most 4,096 weights (fewer where k or the number of rows is large: 256
    at the least, so that the tables stay small).
    Larger rows are binned, the bins clustered exactly using the true sums of their weights, and
    the means refined by Lloyd's iterations on all weights.

    Args:
        weight: (G, n) floating point, finite, n >= 1.
        k: number of values, at least 1.

    Returns:
        (G, k) float64, each row ascending; a row with fewer than k distinct values repeats some.
    """
    groups, members = weight.shape
    cells = min(members, MOST_CELLS, max(256, MOST_TABLE // k), max(256, (1 << 18) // groups))
    if k >= members:  # every weight its own representative, the largest repeated
        ordered = weight.double().sort(dim=1).values
        return torch.cat([ordered, ordered[:, -1:].expand(groups, k - members)], dim=1)
    if k >= cells:
        return _refine(weight, _companded(weight, k))
    if members <= cells:
        ordered = weight.double().sort(dim=1).values.cpu().numpy()
        means = _cluster(np.ones_like(ordered), ordered, ordered**2, k)
        return torch.from_numpy(means).to(weight.device)
    means = _cluster(*_histogram(weight, cells), k)
    return _refine(weight, torch.from_numpy(means).to(weight.device))


def _companded(weight: Tensor, k: int) -> Tensor:
    """Place k values with density proportional to the cube root of the weights' density.

    The high-rate optimum of scalar quantization (Panter & Dite 1951), the start for large k.
    """
    groups, members = weight.shape
    cells = min(4 * MOST_CELLS, max(64, members // 8))
    counts = _histogram(weight, cells)[0]
    low = weight.amin(1).double().cpu().numpy()
    high = weight.amax(1).double().cpu().numpy()
    targets = (np.arange(k) + 0.5) / k
    result = np.empty((groups, k))
    for group in range(groups):
        mass = np.concatenate([[0.0], np.cumsum(np.cbrt(counts[group]))])
        edges = np.linspace(low[group], high[group], cells + 1)
        result[group] = np.interp(targets, mass / mass[-1], edges)
    return torch.from_numpy(result).to(weight.device)


def _refine(weight: Tensor, codebook: Tensor) -> Tensor:
    """Run Lloyd's iterations on all weights; never worse than the start."""
    for _ in range(REFINEMENTS):
        counts, sums = cluster_sums(weight, weight, midpoints(codebook))
        codebook = torch.where(counts > 0, sums / counts.clamp(min=1), codebook).sort(dim=1).values
    return codebook


def _histogram(weight: Tensor, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each cell's count, sum and sum of squares, each (G, cells) float64.

    The grid is even in value. The sums are those of the weights, not of the cells' centres, so
    that the cost of a run of cells is exact.
    """
    low = weight.amin(1, keepdim=True).double()
    high = weight.amax(1, keepdim=True).double()
    inner = torch.linspace(0, 1, cells + 1, dtype=torch.float64, device=weight.device)[1:-1]
    edges = low + (high - low) * inner
    counts, sums = cluster_sums(weight, weight, edges)
    _, squares = cluster_sums(weight, weight, edges, power=2)
    return counts.cpu().numpy(), sums.cpu().numpy(), squares.cpu().numpy()


def _cluster(counts: np.ndarray, sums: np.ndarray, squares: np.ndarray, k: int) -> np.ndarray:
    """Split ordered points into k runs of least squared error; return the runs' means.

    D_k[j] = min_i D_{k-1}[i] + cost(i, j), where cost(i, j) is the squared error of points
    i … j - 1 around their mean. The minimiser grows with j, so each row is solved by divide and
    conquer in O(M log M) (Wang & Song 2011 use the same recurrence).

    Args:
        counts: (G, M) number of weights in each point.
        sums: (G, M) their sum.
        squares: (G, M) sum of their squares.
        k: number of runs; empty runs are allowed.

    Returns:
        (G, k) float64, ascending.
    """
    groups, points = counts.shape
    total = counts.sum(1, keepdims=True)
    # Centred first: the cost subtracts squares of nearly equal size.
    mean = sums.sum(1, keepdims=True) / total
    squares = squares - 2 * mean * sums + mean**2 * counts
    sums = sums - mean * counts
    prefix = [np.pad(np.cumsum(a, axis=1), ((0, 0), (1, 0))).ravel() for a in (counts, sums)]
    prefix.append(np.pad(np.cumsum(squares, axis=1), ((0, 0), (1, 0))).ravel())

    def cost(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        n, s, q = (p[stop] - p[start] for p in prefix)
        return np.maximum(q - s * s / np.maximum(n, 1), 0)

    width = points + 1
    first = np.arange(groups)[:, None] * width
    ends = first + np.arange(width)
    best = cost(np.broadcast_to(first, ends.shape), ends)
    choices = []
    for _ in range(k - 1):
        best, choice = _next_row(best, cost, width)
        choices.append(choice)

    stop = ends[:, -1].copy()
    means = np.empty((groups, k))
    for run in range(k - 1, -1, -1):
        start = choices[run - 1].ravel()[stop] if run else first[:, 0]
        n, s = prefix[0][stop] - prefix[0][start], prefix[1][stop] - prefix[1][start]
        means[:, run] = np.where(n > 0, s / np.maximum(n, 1), np.nan)
        stop = start
    return _fill_empty(means) + mean


def _next_row(best: np.ndarray, cost, width: int) -> tuple[np.ndarray, np.ndarray]:
    """One step of the recurrence for all groups; positions are flat indices group x width + j."""
    groups = best.shape[0]
    base = np.arange(groups)[:, None] * width
    row = np.empty_like(best)
    choice = np.empty(best.shape, dtype=np.int64)
    flat_best, flat_row, flat_choice = best.ravel(), row.ravel(), choice.ravel()

    def solve(stop: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Fill in the flat positions `stop`, whose minimisers lie in low … high."""
        lengths = high - low + 1
        offsets = np.cumsum(lengths) - lengths
        owner = np.repeat(np.arange(len(stop)), lengths)
        start = np.arange(lengths.sum()) - offsets[owner] + low[owner]
        values = flat_best[start] + cost(start, stop[owner])
        least = np.minimum.reduceat(values, offsets)
        hits = np.flatnonzero(values == least[owner])
        winner = hits[np.searchsorted(owner[hits], np.arange(len(stop)))]
        flat_row[stop], flat_choice[stop] = least, start[winner]

    step = 1 << max(width - 1, 1).bit_length()
    solve(base.ravel(), base.ravel(), base.ravel())
    while step > 1:
        step //= 2
        column = np.arange(step, width, 2 * step)
        if not len(column):
            continue
        stop = (base + column).ravel()
        low = flat_choice[stop - step]
        above = column + step
        known = (base + np.minimum(above, width - 1)).ravel()
        inside = np.broadcast_to(above < width, (groups, len(column))).ravel()
        high = np.where(inside, flat_choice[known], stop)
        solve(stop, low, np.minimum(high, stop))
    return row, choice


def _fill_empty(means: np.ndarray) -> np.ndarray:
    """Give empty runs the value of the nearest filled run before them, else after them."""
    for run in range(1, means.shape[1]):
        means[:, run] = np.where(np.isnan(means[:, run]), means[:, run - 1], means[:, run])
    for run in range(means.shape[1] - 2, -1, -1):
        means[:, run] = np.where(np.isnan(means[:, run]), means[:, run + 1], means[:, run])
    return means
