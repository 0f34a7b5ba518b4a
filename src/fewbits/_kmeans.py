"""Exact one-dimensional k-means by dynamic programming, for many groups at once."""

import numpy as np
import torch
from torch import Tensor

from ._kernels import best_runs, cluster_sums, midpoints

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

    Args:
        counts: (G, M) number of weights in each point.
        sums: (G, M) their sum.
        squares: (G, M) sum of their squares.
        k: number of runs; empty runs are allowed.

    Returns:
        (G, k) float64, ascending.
    """
    total = counts.sum(1, keepdims=True)
    # Centred first: the cost subtracts squares of nearly equal size.
    mean = sums.sum(1, keepdims=True) / total
    squares = squares - 2 * mean * sums + mean**2 * counts
    sums = sums - mean * counts
    before = [np.pad(np.cumsum(a, axis=1), ((0, 0), (1, 0))) for a in (counts, sums, squares)]
    bounds = np.pad(best_runs(*before, k=k), ((0, 0), (0, 1)), constant_values=counts.shape[1])
    n, s = (np.diff(np.take_along_axis(a, bounds, axis=1)) for a in before[:2])
    return _fill_empty(s / np.maximum(n, 1), n > 0) + mean


def _fill_empty(means: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Give empty runs the value of the nearest filled run before them, else after them."""
    last = np.maximum.accumulate(np.where(filled, np.arange(means.shape[1]), 0), axis=1)
    source = np.maximum(last, filled.argmax(1)[:, None])
    return np.take_along_axis(means, source, axis=1)
