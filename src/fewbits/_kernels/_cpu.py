"""The kernels for contiguous weights on the CPU, compiled; whatever else there is goes to `_eager`.

Each function is the twin of the one of the same name in `_eager`. Indices, counts and snapped
weights are equal; sums are of the same float32 numbers in float64, in another order.

A weight is cut into parts by its shape alone and the parts' sums are added up in order, so the
number of threads shows in no bit of a result.
"""

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


def _fits(weight: Tensor, *others: Tensor) -> bool:
    """Whether the compiled kernels can take a weight and what is shaped like it."""
    return weight.numel() > 0 and all(
        t.dtype in _WEIGHTS and t.device.type == "cpu" and t.is_contiguous() and not t.is_neg()
        for t in (weight, *others)
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
        operation: int,
        weight: Tensor,
        boundaries: Tensor,
        *,
        codebook: Tensor | None = None,
        out: Tensor | None = None,
        power: int = 1,
        amount: float = 0.0,
    ):
        groups, members = weight.shape
        k = boundaries.shape[1] + 1
        self.operation, self.parts, self.weights = operation, _parts(groups, members, k), groups
        self.weights *= members
        boundaries = _narrow(boundaries)
        # Where no representative is needed, any numbers will do.
        codebook = boundaries.new_zeros(groups, k) if codebook is None else codebook.contiguous()
        rows = self.parts if groups == 1 else groups
        summed = operation in (MEASURE, SUMS)
        self.counts = torch.zeros(rows if summed else 0, k, dtype=torch.float64)
        self.sums = torch.zeros_like(self.counts)
        self.totals = torch.zeros(self.parts, 2, dtype=torch.float64)
        self.kept = (weight, boundaries, codebook, out)
        self.packed = _JOB.pack(
            weight.data_ptr(),
            0 if out is None else out.data_ptr(),
            codebook.data_ptr(),
            boundaries.data_ptr(),
            self.counts.data_ptr() if summed else 0,
            self.sums.data_ptr() if summed else 0,
            self.totals.data_ptr(),
            _TYPES[weight.dtype],
            0 if out is None else _TYPES[out.dtype],
            groups,
            members,
            k,
            power,
            self.parts,
            amount,
        )

    def run(self) -> None:
        _run(self.operation, self.packed, self.parts, self.weights)
        if self.parts > 1:
            _native.combine(self.packed)


def assign(weight: Tensor, boundaries: Tensor) -> Tensor:
    """See `_eager.assign`."""
    if not _fits(weight):
        return _eager.assign(weight, boundaries)
    indices = torch.empty(weight.shape, dtype=_eager.index_dtype(boundaries.shape[1] + 1))
    _Job(ASSIGN, weight, boundaries, out=indices).run()
    return indices


def snap(weight: Tensor, codebook: Tensor, boundaries: Tensor) -> Tensor:
    """See `_eager.snap`."""
    if not _fits(weight):
        return _eager.snap(weight, codebook, boundaries)
    snapped = torch.empty_like(weight)
    values = codebook.to(weight.dtype).float()
    _Job(SNAP, weight, boundaries, codebook=values, out=snapped).run()
    return snapped


def cluster_sums(
    values: Tensor, weight: Tensor, boundaries: Tensor, power: int = 1
) -> tuple[Tensor, Tensor]:
    """See `_eager.cluster_sums`."""
    if not _fits(weight, values):
        return _eager.cluster_sums(values, weight, boundaries, power)
    job = _Job(SUMS, weight, boundaries, out=values, power=power)
    job.run()
    return job.counts[: len(weight)], job.sums[: len(weight)]


def measure(
    weight: Tensor, codebook: Tensor, boundaries: Tensor, power: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `_eager.measure`."""
    if not _fits(weight) or codebook.dtype != torch.float32:
        return _eager.measure(weight, codebook, boundaries, power)
    job = _Job(MEASURE, weight, boundaries, codebook=codebook, power=power)
    job.run()
    return job.totals[0, 0], job.counts[: len(weight)], job.sums[: len(weight)]


def pull(
    out: Tensor, weight: Tensor, codebook: Tensor, boundaries: Tensor, power: int, factor: float
) -> None:
    """See `_eager.pull`."""
    if not _fits(weight, out) or codebook.dtype != torch.float32:
        _eager.pull(out, weight, codebook, boundaries, power, factor)
        return
    _Job(PULL, weight, boundaries, codebook=codebook, out=out, power=power, amount=factor).run()


def move(weight: Tensor, codebook: Tensor, boundaries: Tensor, power: int, amount: float) -> None:
    """See `_eager.move`."""
    if not _fits(weight) or codebook.dtype != torch.float32:
        _eager.move(weight, codebook, boundaries, power, amount)
        return
    _Job(MOVE, weight, boundaries, codebook=codebook, out=weight, power=power, amount=amount).run()


def std(weight: Tensor) -> Tensor:
    """See `_eager.std`."""
    if not _fits(weight):
        return _eager.std(weight)
    flat = weight.view(1, -1)
    job = _Job(MOMENTS, flat, torch.empty(1, 0))
    job.run()
    total, squares = job.totals[0]
    size = weight.numel()
    return ((squares / size - (total / size).square()).clamp(min=0)).sqrt().float()
