"""Finding how many boundaries lie below each weight, in plain torch."""

from collections.abc import Callable

import torch
from torch import Tensor


def search_for(boundaries: Tensor, members: int) -> Callable[[Tensor, slice], Tensor]:
    """Choose how to search: table, comparisons or bisection; all give the same indices.

    Args:
        boundaries: (G, K - 1), each row ascending.
        members: how many weights of each group will be searched for.

    Returns:
        a function of weights (g, m) and of the groups that they belong to, giving indices (g, m).
    """
    groups, count = boundaries.shape
    if count == 0:
        return lambda part, rows: torch.zeros(part.shape, dtype=torch.uint8, device=part.device)
    if groups == 1 and members >= 4096:
        table = _Table.build(boundaries[0])
        if table is not None:
            return lambda part, rows: table.search(part)
        return lambda part, rows: torch.bucketize(part, boundaries[0], out_int32=True)
    if count <= 15:  # up to 15 comparisons beat a bisection of 20 ns
        return lambda part, rows: _compare(part, boundaries[rows])
    return lambda part, rows: torch.searchsorted(
        boundaries[rows].contiguous(), part.contiguous(), out_int32=True
    )


def _compare(part: Tensor, boundaries: Tensor) -> Tensor:
    indices = torch.zeros(part.shape, dtype=torch.uint8, device=part.device)
    for column in boundaries.split(1, dim=1):
        indices += part > column
    return indices


class _Table:
    """A lookup table from a weight's cell on an even grid to the boundaries below that cell.

    The cell of a number is a monotone function of it, and the same function is applied to weights
    and boundaries. So a boundary in a lower cell lies below the weight, one in a higher cell does
    not, and only the few boundaries in the weight's own cell need a comparison. That is exact, and
    about 4 ns a weight where bisection takes 20 to 50.
    """

    MOST_COMPARISONS = 4  # beyond this many boundaries in one cell bisection is as fast

    def __init__(self, low: Tensor, per_unit: Tensor, below: Tensor, boundaries: Tensor, most: int):
        self.low, self.per_unit, self.below, self.most = low, per_unit, below, most
        self.boundaries = torch.cat([boundaries, boundaries.new_full((1,), torch.inf)])

    @classmethod
    def build(cls, boundaries: Tensor) -> "_Table | None":
        """Return a table for (K - 1,) boundaries, or nothing where they are too unevenly spread."""
        cells = max(4096, 32 * len(boundaries))
        low = boundaries[0]
        per_unit = (cells - 2) / (boundaries[-1] - low)
        if not torch.isfinite(per_unit):
            return None
        cell = cls._cell(boundaries, low, per_unit, cells)
        counts = torch.bincount(cell, minlength=cells)
        most = int(counts.max())
        if most > cls.MOST_COMPARISONS:
            return None
        return cls(low, per_unit, (counts.cumsum(0) - counts).int(), boundaries, most)

    @staticmethod
    def _cell(values: Tensor, low: Tensor, per_unit: Tensor, cells: int) -> Tensor:
        # Clamped before the integer cast: a cast of a number out of range is undefined.
        # And after it: NaN passes the first clamp; what it is assigned to does not matter.
        return ((values - low) * per_unit).clamp_(-1, cells - 2).add_(1).int().clamp_(min=0)

    def search(self, part: Tensor) -> Tensor:
        cell = self._cell(part.reshape(-1), self.low, self.per_unit, len(self.below))
        indices = self.below.index_select(0, cell)
        flat = part.reshape(-1)
        for _ in range(self.most):
            indices += flat > self.boundaries.index_select(0, indices)
        return indices.view(part.shape)
