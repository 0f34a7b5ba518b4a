"""Ordered points split into runs of least squared error, by dynamic programming in NumPy.

This is the definition; `_cpu` is the same compiled, with the same result.
"""

import numpy as np


def best_runs(counts: np.ndarray, sums: np.ndarray, squares: np.ndarray, k: int) -> np.ndarray:
    """Return where each of k runs begins, so that the squared error around their means is least.

    D_k[j] = min_i D_{k-1}[i] + cost(i, j), where cost(i, j) is the squared error of points
    i … j - 1 around their mean (Wang & Song 2011 use the same recurrence). The minimiser grows with
    j and with k, as the cost fulfils the quadrangle inequality, so each row is solved by divide and
    conquer in O(M log M).

    Args:
        counts: (G, M + 1) float64, the number of weights in all points before each.
        sums: (G, M + 1) float64, their sum, best about their mean: what is subtracted is nearly
            equal.
        squares: (G, M + 1) float64, the sum of their squares.
        k: number of runs, at least 1; empty runs are allowed.

    Returns:
        (G, k) int64, each row ascending from 0: the first point of each run.
    """
    groups, width = counts.shape
    prefix = [array.ravel() for array in (counts, sums, squares)]

    def cost(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        n, s, q = (p[stop] - p[start] for p in prefix)
        return np.maximum(q - s * s / np.maximum(n, 1), 0)

    first = np.arange(groups)[:, None] * width
    ends = first + np.arange(width)
    best = cost(np.broadcast_to(first, ends.shape), ends)
    choices = [np.broadcast_to(first, ends.shape)]
    for _ in range(k - 1):
        best, choice = _next_row(best, choices[-1], cost, width)
        choices.append(choice)
    stop = ends[:, -1]
    starts = np.zeros((groups, k), dtype=np.int64)
    for run in range(k - 1, 0, -1):
        stop = choices[run].ravel()[stop]
        starts[:, run] = stop - first[:, 0]
    return starts


def _next_row(
    best: np.ndarray, before: np.ndarray, cost, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """One step of the recurrence for all groups; positions are flat indices group x width + j.

    Args:
        best: (G, width) what k runs cost up to each point.
        before: (G, width) where the last of them begins.
        cost: of the points between flat positions.
        width: points and 1.

    Returns:
        the same for one run more.
    """
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
        above = column + step
        known = (base + np.minimum(above, width - 1)).ravel()
        inside = np.broadcast_to(above < width, (groups, len(column))).ravel()
        high = np.where(inside, flat_choice[known], stop)
        high = np.minimum(high, stop)
        low = np.maximum(flat_choice[stop - step], before.ravel()[stop])
        solve(stop, np.minimum(low, high), high)
    return row, choice
