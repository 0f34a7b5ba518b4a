"""The kernels for contiguous weights on the CPU, compiled; whatever else there is goes to `_eager`.

Each function is the twin of the one of the same name in `_eager`. Indices, counts and snapped
weights are equal; sums are of the same float32 numbers in float64, in another order. Those of
`sums_all`, and of `measure_all` for nearest-2, are in float32 over some thousands of weights at a
time.

A weight is cut into parts by its shape alone and the parts' sums are added up in order, so the
number of threads shows in no bit of a result.
"""

import math
import struct
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._threads import spread
from . import _eager, _native  # pyright: ignore[reportAttributeAccessIssue]  # compiled

# As in _native.c.
MEASURE, SUMS, ADD, PULL, MOVE, SNAP, ASSIGN, MOMENTS = range(8)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.int32: 4}
_WEIGHTS = frozenset([torch.float32, torch.bfloat16, torch.float16])
_CALL = struct.Struct("@7P8q")

MOST_VALUES = 1 << 16  # an index takes 16 bits

# Weights in a part, and most parts of a weight: enough for 64 threads, while the parts' sums stay
# small beside the weight.
PART, MOST_PARTS = 1 << 16, 64
# Below this many weights a second thread costs more than it takes over (30 microseconds to wake).
ALONE = 1 << 17


def _parts(groups: int, members: int, k: int) -> int:
    size = max(PART, 64 * k)
    if groups == 1:
        return max(1, min(MOST_PARTS, members // size))
    return max(1, min(MOST_PARTS, groups, groups * members // size))


def _run(operation: int, call: bytes, parts: int, weights: int) -> None:
    """Run an operation over all parts of all weights, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), parts) if weights >= ALONE else 1
    spread(lambda first, last: _native.run(operation, call, first, last), parts, threads, rounds=4)


class _Table:
    """The addresses and parts of weights that one call works on, of one type, contiguous."""

    def __init__(self, weights: Sequence[Tensor], k: int):
        self.weights, self.k = weights, k
        self.type = _TYPES[weights[0].dtype]
        self.parts = self.slots = self.rows = self.size = 0
        entries = array("q")
        for weight in weights:
            groups, members = weight.shape
            parts = _parts(groups, members, k)
            entries.extend(
                (weight.data_ptr(), groups, members, parts, self.rows, self.slots, self.parts)
            )
            self.parts += parts
            self.slots += parts if groups == 1 else groups
            self.rows += groups
            self.size += weight.numel()
        self.entries = entries

    @classmethod
    def of(cls, weights: Sequence[Tensor], k: int) -> "_Table | None":
        """Return the table for these weights, kept where they are `Weights`; None if unfit."""
        if not isinstance(weights, _eager.Weights):
            return cls(weights, k) if _fit(k, weights) else None
        if weights.prepared is None:
            weights.prepared = {}
        if k not in weights.prepared:
            weights.prepared[k] = cls(tuple(weights), k) if _fit(k, weights) else None
        return weights.prepared[k]

    def run(
        self,
        operation: int,
        *,
        codebook: Tensor | None = None,
        boundaries: Tensor | None = None,
        outs: Sequence[Tensor] | None = None,
        power: int = 1,
        amounts: Tensor | None = None,
    ) -> Tensor:
        """Run an operation on all weights; return totals, counts and sums where it makes them."""
        boundaries = None if boundaries is None else _eager.narrow(boundaries)
        # Where no representative is needed, any numbers will do.
        codebook = torch.zeros(self.rows, self.k) if codebook is None else codebook.contiguous()
        addresses = None if outs is None else array("q", [out.data_ptr() for out in outs])
        summed = operation in (MEASURE, SUMS, ADD, MOVE, MOMENTS)
        count = len(self.weights)
        sizes = (2 * self.parts + 2 * self.slots * self.k, 2 * count + 2 * self.rows * self.k)
        work, results = (torch.empty(n if summed else 0, dtype=torch.float64) for n in sizes)
        call = _CALL.pack(
            self.entries.buffer_info()[0],
            0 if addresses is None else addresses.buffer_info()[0],
            codebook.data_ptr(),
            0 if boundaries is None else boundaries.data_ptr(),
            0 if amounts is None else amounts.data_ptr(),
            work.data_ptr() if summed else 0,
            results.data_ptr() if summed else 0,
            count,
            self.type,
            0 if outs is None else _TYPES[outs[0].dtype],
            self.k,
            power,
            self.parts,
            self.slots,
            self.rows,
        )
        _run(operation, call, self.parts, self.size)
        if summed:
            _native.combine(operation, call)
        return results

    def sums(self, results: Tensor) -> tuple[Tensor, Tensor]:
        """Return the counts and sums, (R, K) each, of what `run` returned."""
        both = results[2 * len(self.weights) :].view(2, self.rows, self.k)
        return both[0], both[1]


def _fit(k: int, tensors: Sequence[Tensor]) -> bool:
    """Whether the compiled kernels can take these weights, or what is shaped like them, at once."""
    return (
        len(tensors) > 0
        and k <= MOST_VALUES
        and all(
            t.dtype is tensors[0].dtype
            and t.dtype in _WEIGHTS
            and t.device.type == "cpu"
            and t.is_contiguous()
            and not t.is_neg()
            for t in tensors
        )
    )


def midpoints(codebook: Tensor) -> Tensor:
    """See `_eager.midpoints`."""
    if codebook.dtype != torch.float32 or codebook.device.type != "cpu" or not codebook.numel():
        return _eager.midpoints(codebook)
    codebook = codebook.contiguous()
    groups, k = codebook.shape
    middle = torch.empty(groups, k - 1)
    _native.midpoints(codebook.data_ptr(), middle.data_ptr(), groups, k)
    return middle


def assign(weight: Tensor, boundaries: Tensor) -> Tensor:
    """See `_eager.assign`."""
    k = boundaries.shape[1] + 1
    table = _Table.of([weight], k)
    if table is None:
        return _eager.assign(weight, boundaries)
    indices = torch.empty(weight.shape, dtype=_eager.index_dtype(k))
    table.run(ASSIGN, boundaries=boundaries, outs=[indices])
    return indices


def snap(weight: Tensor, codebook: Tensor, boundaries: Tensor) -> Tensor:
    """See `_eager.snap`."""
    snapped = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    snap_all([snapped], [weight], codebook, boundaries)
    return snapped


def snap_all(
    outs: Sequence[Tensor], weights: Sequence[Tensor], codebook: Tensor, boundaries: Tensor
) -> None:
    """See `_eager.snap_all`."""
    table = _Table.of(weights, codebook.shape[1]) if _fit(1, outs) else None
    if table is None:
        _eager.snap_all(outs, weights, codebook, boundaries)
        return
    values = codebook.to(weights[0].dtype).float()
    table.run(SNAP, codebook=values, boundaries=boundaries, outs=outs)


def cluster_sums(
    values: Tensor, weight: Tensor, boundaries: Tensor, power: int = 1
) -> tuple[Tensor, Tensor]:
    """See `_eager.cluster_sums`."""
    table = _Table.of([weight], boundaries.shape[1] + 1)
    if table is None or not _fit(1, [values]):
        return _eager.cluster_sums(values, weight, boundaries, power)
    return table.sums(table.run(SUMS, boundaries=boundaries, outs=[values], power=power))


def sums_all(
    values: Sequence[Tensor], weights: Sequence[Tensor], boundaries: Tensor
) -> tuple[Tensor, Tensor]:
    """See `_eager.sums_all`."""
    table = _Table.of(weights, boundaries.shape[1] + 1) if _fit(1, values) else None
    if table is None:
        return _eager.sums_all(values, weights, boundaries)
    return table.sums(table.run(ADD, boundaries=boundaries, outs=values))


def measure_all(
    weights: Sequence[Tensor], codebook: Tensor, boundaries: Tensor | None, power: int
) -> _eager.Measures:
    """See `_eager.measure_all`."""
    table = _Table.of(weights, codebook.shape[1]) if codebook.dtype == torch.float32 else None
    if table is None:
        return _eager.measure_all(weights, codebook, boundaries, power)
    results = table.run(MEASURE, codebook=codebook, boundaries=boundaries, power=power)
    count = len(weights)
    return results[:count], results[count : 2 * count], *table.sums(results)


def pull_all(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    codebook: Tensor,
    boundaries: Tensor | None,
    power: int,
    factors: Tensor,
) -> None:
    """See `_eager.pull_all`."""
    table = _Table.of(weights, codebook.shape[1]) if codebook.dtype == torch.float32 else None
    if table is None or not _fit(1, outs):
        _eager.pull_all(outs, weights, codebook, boundaries, power, factors)
        return
    table.run(
        PULL, codebook=codebook, boundaries=boundaries, outs=outs, power=power, amounts=factors
    )


def move_all(
    weights: Sequence[Tensor],
    codebook: Tensor,
    boundaries: Tensor | None,
    power: int,
    amounts: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `_eager.move_all`."""
    table = _Table.of(weights, codebook.shape[1]) if codebook.dtype == torch.float32 else None
    if table is None:
        return _eager.move_all(weights, codebook, boundaries, power, amounts)
    results = table.run(
        MOVE, codebook=codebook, boundaries=boundaries, outs=weights, power=power, amounts=amounts
    )
    torch.autograd.graph.increment_version(weights)  # as torch does where it writes
    return table.sums(results)


def std(weight: Tensor) -> Tensor:
    """See `_eager.std`."""
    table = _Table.of([weight.reshape(1, -1)], 1) if weight.is_contiguous() else None
    if table is None:
        return _eager.std(weight)
    total, squares = table.run(MOMENTS)[:2].tolist()
    size = weight.numel()
    spread = squares / size - (total / size) ** 2
    return torch.tensor(math.sqrt(spread) if spread > 0 else spread * 0)


def best_runs(counts: np.ndarray, sums: np.ndarray, squares: np.ndarray, k: int) -> np.ndarray:
    """See `_runs.best_runs`."""
    starts = np.empty((len(counts), k), dtype=np.int64)
    before = [np.ascontiguousarray(array) for array in (counts, sums, squares)]
    _native.best_runs(*before, starts, len(counts), k)
    return starts
