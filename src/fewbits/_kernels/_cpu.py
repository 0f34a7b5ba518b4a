"""The kernels for contiguous weights on the CPU, compiled; whatever else there is goes to `_eager`.

Each function is the twin of the one of the same name in `_eager`. Indices, counts and snapped
weights are equal; sums are of the same float32 numbers in float64, in another order.

A weight is cut into parts by its shape alone and the parts' sums are added up in order, so the
number of threads shows in no bit of a result.
"""

import math
import os
import struct
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from . import _eager, _native  # pyright: ignore[reportAttributeAccessIssue]  # compiled

# As in _native.c.
MEASURE, SUMS, PULL, MOVE, SNAP, ASSIGN, MOMENTS = range(7)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.int32: 4}
_WEIGHTS = frozenset([torch.float32, torch.bfloat16, torch.float16])
_JOB = struct.Struct("@7P7qd")

MOST_VALUES = 1 << 16  # an index takes 16 bits

# Weights in a part, and most parts of a weight: enough for 64 threads, while the parts' sums stay
# small beside the weight.
PART, MOST_PARTS = 1 << 16, 64
# Below this many weights a second thread costs more than it takes over (30 microseconds to wake).
ALONE = 1 << 17

_workers: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.clear)  # a child has none of its parent's threads


def _parts(groups: int, members: int, k: int) -> int:
    size = max(PART, 64 * k)
    if groups == 1:
        return max(1, min(MOST_PARTS, members // size))
    return max(1, min(MOST_PARTS, groups, groups * members // size))


def _run(operation: int, jobs: bytes, parts: int, weights: int) -> None:
    """Run an operation over all parts of all jobs, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), parts)
    if threads == 1 or weights < ALONE:
        _native.run(operation, jobs, 0, parts)
        return
    workers = _workers.get(threads)
    if workers is None:
        workers = _workers[threads] = ThreadPoolExecutor(threads - 1, "fewbits")
    # A few runs of parts for each thread, so that none waits long for another.
    cuts = [parts * i // (4 * threads) for i in range(4 * threads + 1)]
    ranges = iter(list(zip(cuts, cuts[1:], strict=False)))

    def work() -> None:
        for first, last in ranges:  # under the GIL, so that each range is taken once
            if first < last:
                _native.run(operation, jobs, first, last)

    others = [workers.submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


def _fits(k: int, weight: Tensor, *others: Tensor) -> bool:
    """Whether the compiled kernels can take a weight and what is shaped like it."""
    return (
        weight.numel() > 0
        and k <= MOST_VALUES
        and all(
            t.dtype in _WEIGHTS and t.device.type == "cpu" and t.is_contiguous() and not t.is_neg()
            for t in (weight, *others)
        )
    )


def _narrow(boundaries: Tensor) -> Tensor:
    """Return float32 boundaries that decide as the given ones do for weights of float32 or less."""
    if boundaries.dtype == torch.float32:
        return boundaries.contiguous()
    near = boundaries.float()
    below = torch.nextafter(near, near.new_full((), -torch.inf))
    return torch.where(near.double() > boundaries, below, near).contiguous()


class _Job:
    """One weight's row in the table of jobs, with the tensors it points to kept alive."""

    def __init__(
        self,
        weight: Tensor,
        k: int,
        *,
        codebook: Tensor | None = None,
        boundaries: Tensor | None = None,
        out: Tensor | None = None,
        power: int = 1,
        amount: float = 0.0,
        summed: bool = False,
    ):
        groups, members = weight.shape
        self.groups, self.weights = groups, groups * members
        self.parts = _parts(groups, members, k)
        boundaries = None if boundaries is None else _narrow(boundaries)
        # Where no representative is needed, any numbers will do.
        codebook = torch.zeros(groups, k) if codebook is None else codebook.contiguous()
        rows = (self.parts if groups == 1 else groups) if summed else 0
        # Counts, sums and totals: one tensor, since making one takes longer than a small layer.
        self.results = torch.zeros(2 * rows * k + 2 * self.parts, dtype=torch.float64)
        self.k, self.rows = k, rows
        self.kept = (weight, boundaries, codebook, out)
        address = self.results.data_ptr()
        self.packed = _JOB.pack(
            weight.data_ptr(),
            0 if out is None else out.data_ptr(),
            codebook.data_ptr(),
            0 if boundaries is None else boundaries.data_ptr(),
            address + 16 * self.parts if summed else 0,
            address + 16 * self.parts + 8 * rows * k if summed else 0,
            address,
            _TYPES[weight.dtype],
            0 if out is None else _TYPES[out.dtype],
            groups,
            members,
            k,
            power,
            self.parts,
            amount,
        )

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the counts and sums, (G, K) each."""
        both = self.results[2 * self.parts :].view(2, self.rows, self.k)
        counts, sums = (both if self.rows == self.groups else both[:, : self.groups]).unbind(0)
        return counts, sums


def _do(operation: int, *jobs: _Job) -> None:
    """Run one operation over all jobs together, on as many threads as torch uses."""
    table = b"".join([job.packed for job in jobs])
    parts = sum(job.parts for job in jobs)
    _run(operation, table, parts, sum(job.weights for job in jobs))
    if operation == MEASURE or parts > len(jobs):
        _native.combine(operation, table)


def assign(weight: Tensor, boundaries: Tensor) -> Tensor:
    """See `_eager.assign`."""
    k = boundaries.shape[1] + 1
    if not _fits(k, weight):
        return _eager.assign(weight, boundaries)
    indices = torch.empty(weight.shape, dtype=_eager.index_dtype(k))
    _do(ASSIGN, _Job(weight, k, boundaries=boundaries, out=indices))
    return indices


def snap(weight: Tensor, codebook: Tensor, boundaries: Tensor) -> Tensor:
    """See `_eager.snap`."""
    if not _fits(codebook.shape[1], weight):
        return _eager.snap(weight, codebook, boundaries)
    snapped = torch.empty_like(weight)
    values = codebook.to(weight.dtype).float()
    _do(SNAP, _Job(weight, values.shape[1], codebook=values, boundaries=boundaries, out=snapped))
    return snapped


def cluster_sums(
    values: Tensor, weight: Tensor, boundaries: Tensor, power: int = 1
) -> tuple[Tensor, Tensor]:
    """See `_eager.cluster_sums`."""
    k = boundaries.shape[1] + 1
    if not _fits(k, weight, values):
        return _eager.cluster_sums(values, weight, boundaries, power)
    job = _Job(weight, k, boundaries=boundaries, out=values, power=power, summed=True)
    _do(SUMS, job)
    return job.sums()


def measure(
    weight: Tensor, codebook: Tensor, boundaries: Tensor | None, power: int
) -> _eager.Measures:
    """See `_eager.measure`."""
    if not _fits(codebook.shape[1], weight) or codebook.dtype != torch.float32:
        return _eager.measure(weight, codebook, boundaries, power)
    job = _Job(
        weight,
        codebook.shape[1],
        codebook=codebook,
        boundaries=boundaries,
        power=power,
        summed=True,
    )
    _do(MEASURE, job)
    return job.results[0], job.results[1], *job.sums()


def pull(
    out: Tensor,
    weight: Tensor,
    codebook: Tensor,
    boundaries: Tensor | None,
    power: int,
    factor: float,
) -> None:
    """See `_eager.pull`."""
    if not _fits(codebook.shape[1], weight, out) or codebook.dtype != torch.float32:
        _eager.pull(out, weight, codebook, boundaries, power, factor)
        return
    job = _Job(
        weight,
        codebook.shape[1],
        codebook=codebook,
        boundaries=boundaries,
        out=out,
        power=power,
        amount=factor,
    )
    _do(PULL, job)


def move(
    weight: Tensor, codebook: Tensor, boundaries: Tensor | None, power: int, amount: float
) -> None:
    """See `_eager.move`."""
    if not _fits(codebook.shape[1], weight) or codebook.dtype != torch.float32:
        _eager.move(weight, codebook, boundaries, power, amount)
        return
    job = _Job(
        weight,
        codebook.shape[1],
        codebook=codebook,
        boundaries=boundaries,
        out=weight,
        power=power,
        amount=amount,
    )
    _do(MOVE, job)


def std(weight: Tensor) -> Tensor:
    """See `_eager.std`."""
    if not _fits(1, weight):
        return _eager.std(weight)
    job = _Job(weight.view(1, -1), 1)
    _do(MOMENTS, job)
    total, squares = job.results[:2].tolist()
    size = weight.numel()
    spread = squares / size - (total / size) ** 2
    return torch.tensor(math.sqrt(spread) if spread > 0 else spread * 0)
