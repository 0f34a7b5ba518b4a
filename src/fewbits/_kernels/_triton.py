"""The kernels for contiguous CUDA weights, in Triton; whatever else there is goes to `_eager`.

Each function is the twin of the one of the same name in `_eager`. Indices, counts and snapped
weights are equal; sums are formed in float32 over a thousand weights at most, then in float64, in
an order that follows from the shapes: the same call gives the same bits.

Many weights take one launch, each cut into parts by its shape alone. `measure_all` reads a weight
once, `pull_all` reads it and its gradient and writes the gradient once. Nothing waits for the
device, except that a new set of weights is described to it once.

Under `TRITON_INTERPRET=1` the kernels run in Triton's interpreter, on weights in the CPU's memory.
"""

import functools
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton.language as tl  # pyright: ignore[reportMissingImports]  # an extra
from torch import Tensor

from . import _eager, _triton_passes
from ._triton_cuts import TILE, Launch, cut, power_of_two

passes: Any = _triton_passes  # Triton makes of a function something that is launched by index
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.int32: tl.int32,
}
_WEIGHTS = frozenset([torch.float32, torch.bfloat16, torch.float16])

MOST_VALUES = 1 << 16  # an index takes 16 bits
# Sums by masks take time in proportion to K: beyond this, plain torch adds.
MOST_SUMMED = 1 << 12
# Lists of addresses to write to that a table keeps: gradients move to and fro between a few.
MOST_KEPT = 16

# 128 registers leave room for 16 warps on a multiprocessor of 64 K registers; ptxas would take up
# to 254. Products are rounded before they are added, as in `_eager`.
OPTIONS = {"num_warps": 1, "maxnreg": 128, "enable_fp_fusion": False}


class _Table:
    """Weights of one type on one device, cut into parts; kept from call to call.

    The results of a call are totals (L,), spreads (L,), counts (R, K) and sums (R, K) in one
    tensor; a part's sums go to places of their own in another, unless it is a whole row.
    """

    def __init__(self, weights: Sequence[Tensor], k: int):
        self.weights, self.k, self.device = weights, k, weights[0].device
        self.rows = sum(len(weight) for weight in weights)
        self.partial = 0  # places for partial sums
        self.launches: dict[tuple[int, int, bool], Launch] = {}
        self.clusters, self.totals = Launch(1, TILE, False), Launch(1, TILE, False)
        self.kept: dict[tuple[int, ...], Tensor] = {}
        row = 0
        for number, weight in enumerate(weights):
            if weight.numel():
                self._add(number, weight, row)
            row += len(weight)
        for launch in (*self.launches.values(), self.clusters, self.totals):
            launch.send(self.device)

    def _add(self, number: int, weight: Tensor, row: int) -> None:
        groups, members = weight.shape
        rows, columns, tiles, parts = cut(groups, members, self.k)
        programs = -(-groups // rows) * parts
        counts = 2 * len(self.weights) + row * self.k
        sums = counts + self.rows * self.k
        if parts > 1:
            # A row of the codebook is summed over its parts, and the parts lie side by side.
            size = groups * self.k
            for to in (counts, sums):
                self.clusters.add(size, self.partial, parts, to, 0)
                self.partial += size * parts
            counts, sums = self.partial - 2 * size * parts, self.partial - size * parts
        self.totals.add(1, self.partial, programs, number, weight.numel())
        aligned = weight.data_ptr() % 16 == 0 and members % 16 == 0
        launch = self.launches.setdefault((rows, columns, aligned), Launch(rows, columns, aligned))
        launch.add(
            programs,
            weight.data_ptr(),
            number,
            row,
            groups,
            members,
            parts,
            tiles,
            counts,
            sums,
            self.partial,
        )
        self.partial += 3 * programs

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

    def addresses(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the addresses of tensors, on the device; no wait for it."""
        stream = 0 if _INTERPRETED else torch.cuda.current_stream(self.device).cuda_stream
        key = (stream, *[tensor.data_ptr() for tensor in tensors])
        if key not in self.kept:
            if len(self.kept) == MOST_KEPT:
                self.kept.pop(next(iter(self.kept)))
            numbers = torch.tensor(key[1:], dtype=torch.int64)
            if not _INTERPRETED:
                numbers = numbers.pin_memory().to(self.device, non_blocking=True)
            self.kept[key] = numbers
        return self.kept[key]

    def search(self, codebook: Tensor, boundaries: Tensor | None) -> tuple[Tensor, Tensor, int]:
        """Return the codebook and boundaries, flat, and how far apart the boundaries' rows lie."""
        codebook = codebook.contiguous()
        if boundaries is not None:
            return codebook, _eager.narrow(boundaries), self.k - 1
        return codebook, _between(codebook), self.k

    def sum(
        self,
        operation: Any,
        codebook: Tensor,
        boundaries: Tensor | None,
        power: int = 1,
        others: Sequence[Tensor] = (),
        amounts: Tensor | None = None,
    ) -> Tensor:
        """Return the totals, spreads, counts and sums of an operation, as far as it has them."""
        count = len(self.weights)
        like = torch.empty(0, dtype=torch.float64, device=self.device)
        results = like.new_zeros(2 * count + 2 * self.rows * self.k)
        partial = like.new_empty(self.partial)
        own = (results if amounts is None else amounts.contiguous(), results, partial)
        self.launch(passes.sums, codebook, boundaries, others, own, (operation, power))
        combined = [self.clusters] if operation != passes.MOMENTS else []
        if operation in (passes.MEASURE, passes.MOMENTS):
            combined.append(self.totals)
        with _on(self.device):
            for some in combined:
                if some.programs:
                    add = passes.combine[(some.programs,)]
                    add(*some.place(), partial, results, count, **OPTIONS)
        return results

    def apply(
        self,
        operation: Any,
        outs: Sequence[Tensor],
        codebook: Tensor,
        boundaries: Tensor | None,
        power: int = 1,
        amounts: Tensor | None = None,
    ) -> None:
        """In place: write what an operation makes of the weights to `outs`."""
        own = (codebook if amounts is None else amounts.contiguous(),)
        self.launch(passes.apply, codebook, boundaries, outs, own, (operation, power))

    def launch(
        self,
        kernel: Any,
        codebook: Tensor,
        boundaries: Tensor | None,
        others: Sequence[Tensor],
        own: tuple[Tensor, ...],
        variant: tuple[Any, int],
    ) -> None:
        """In place: run a kernel on all weights and as many others, with arguments of its own."""
        padded = power_of_two(self.k)
        types = (self.weights[0].dtype, (others or self.weights)[0].dtype)
        summed = kernel is passes.sums and variant[0] != passes.MOMENTS
        chunks = -(-padded // passes.SUMMED.value) if summed else 1
        aligned = all(other.data_ptr() % 16 == 0 for other in others)
        with _on(self.device):
            codebook, boundaries, stride = self.search(codebook, boundaries)
            addresses = self.addresses(others) if others else own[0]
            for launch in self.launches.values():
                kernel[(launch.programs * chunks,)](
                    *launch.place(),
                    codebook,
                    boundaries,
                    self.k,
                    stride,
                    addresses,
                    *own,
                    *variant,
                    *[_TYPES[dtype] for dtype in types],
                    padded,
                    launch.rows,
                    launch.columns,
                    launch.aligned and aligned,
                    **OPTIONS,
                )

    def sums(self, results: Tensor) -> tuple[Tensor, Tensor]:
        """Return the counts and sums, (R, K) each, of what `sum` returned."""
        both = results[2 * len(self.weights) :].view(2, self.rows, self.k)
        return both[0], both[1]


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether kernels run on that device; tried once, with a warning where they do not."""
    one = torch.ones(1, device=device)
    try:
        with _on(device):
            passes.midpoints[(1,)](one, one, 1, **OPTIONS)
    except Exception as error:  # from a compiler, a driver or Triton, of any class
        warnings.warn(
            f"Triton does not work on {device}, so plain torch does its work, slowly: {error}",
            stacklevel=2,
        )
        return False
    return True


def _between(codebook: Tensor) -> Tensor:
    """Return what lies half-way from each number of a contiguous (G, K) codebook to the next."""
    boundaries, size = torch.empty_like(codebook), codebook.numel()
    passes.midpoints[(size // TILE + 1,)](codebook, boundaries, size, **OPTIONS)
    return boundaries


def _on(device: torch.device):
    """Return a context in which launches go to that device."""
    return nullcontext() if _INTERPRETED else torch.cuda.device(device)


def _fit(k: int, tensors: Sequence[Tensor]) -> bool:
    """Whether these kernels can take such weights, or what is shaped like them, at once."""
    return (
        len(tensors) > 0
        and k <= MOST_VALUES
        and all(
            t.dtype is tensors[0].dtype
            and t.dtype in _WEIGHTS
            and t.device.type == ("cpu" if _INTERPRETED else "cuda")
            and t.device == tensors[0].device
            and t.is_contiguous()
            and not t.is_neg()
            for t in tensors
        )
        and _works(tensors[0].device)
    )


def _table(weights: Sequence[Tensor], codebook: Tensor, most: int) -> _Table | None:
    k = codebook.shape[1]
    return _Table.of(weights, k) if codebook.dtype == torch.float32 and k <= most else None


def midpoints(codebook: Tensor) -> Tensor:
    """See `_eager.midpoints`."""
    if codebook.dtype != torch.float32 or not codebook.numel() or not _fit(1, [codebook]):
        return _eager.midpoints(codebook)
    with _on(codebook.device):
        return _between(codebook)[:, :-1].contiguous()


def assign(weight: Tensor, boundaries: Tensor) -> Tensor:
    """See `_eager.assign`."""
    k = boundaries.shape[1] + 1
    table = _Table.of([weight], k)
    if table is None:
        return _eager.assign(weight, boundaries)
    indices = torch.empty(weight.shape, dtype=_eager.index_dtype(k), device=weight.device)
    table.apply(passes.ASSIGN, [indices], boundaries.float(), boundaries)
    return indices


def snap(weight: Tensor, codebook: Tensor, boundaries: Tensor) -> Tensor:
    """See `_eager.snap`."""
    table = _Table.of([weight], codebook.shape[1])
    if table is None:
        return _eager.snap(weight, codebook, boundaries)
    snapped = torch.empty_like(weight)
    table.apply(passes.SNAP, [snapped], codebook.to(weight.dtype).float(), boundaries)
    return snapped


def cluster_sums(
    values: Tensor, weight: Tensor, boundaries: Tensor, power: int = 1
) -> tuple[Tensor, Tensor]:
    """See `_eager.cluster_sums`."""
    found = _cluster_sums([values], [weight], boundaries, power)
    return _eager.cluster_sums(values, weight, boundaries, power) if found is None else found


def sums_all(
    values: Sequence[Tensor], weights: Sequence[Tensor], boundaries: Tensor
) -> tuple[Tensor, Tensor]:
    """See `_eager.sums_all`."""
    found = _cluster_sums(values, weights, boundaries, 1)
    return _eager.sums_all(values, weights, boundaries) if found is None else found


def _cluster_sums(
    values: Sequence[Tensor], weights: Sequence[Tensor], boundaries: Tensor, power: int
) -> tuple[Tensor, Tensor] | None:
    k = boundaries.shape[1] + 1
    table = _Table.of(weights, k) if k <= MOST_SUMMED and _fit(k, values) else None
    if table is None:
        return None
    results = table.sum(passes.CLUSTER_SUMS, boundaries.float(), boundaries, power, values)
    return table.sums(results)


def measure_all(
    weights: Sequence[Tensor], codebook: Tensor, boundaries: Tensor | None, power: int
) -> _eager.Measures:
    """See `_eager.measure_all`."""
    table = _table(weights, codebook, MOST_SUMMED)
    if table is None:
        return _eager.measure_all(weights, codebook, boundaries, power)
    results = table.sum(passes.MEASURE, codebook, boundaries, power)
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
    table = _table(weights, codebook, MOST_VALUES) if _fit(1, outs) else None
    if table is None:
        _eager.pull_all(outs, weights, codebook, boundaries, power, factors)
        return
    table.apply(passes.PULL, outs, codebook, boundaries, power, factors)


def move_all(
    weights: Sequence[Tensor],
    codebook: Tensor,
    boundaries: Tensor | None,
    power: int,
    amounts: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `_eager.move_all`."""
    table = _table(weights, codebook, MOST_SUMMED)
    if table is None:
        return _eager.move_all(weights, codebook, boundaries, power, amounts)
    results = table.sum(passes.MOVE, codebook, boundaries, power, weights, amounts)
    if table.k > passes.SUMMED.value:
        table.apply(passes.MOVE, weights, codebook, boundaries, power, amounts)
    torch.autograd.graph.increment_version(weights)  # as torch does where it writes
    return table.sums(results)


def std(weight: Tensor) -> Tensor:
    """See `_eager.std`."""
    table = _Table.of([weight.reshape(1, -1)], 1) if weight.is_contiguous() else None
    if table is None or not weight.numel():
        return _eager.std(weight)
    none = torch.empty(1, 1, device=weight.device)
    spread = table.sum(passes.MOMENTS, none, none[:, :0])[1]
    return (spread / weight.numel()).sqrt().float()
