"""The functions of `_eager` for the CPU, compiled; whatever the kernels cannot take goes there.

Decoded weights are equal bit for bit, eight-bit sums are equal, float sums are rounded in another
order.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .._indexed import layout
from . import _eager, _native  # pyright: ignore[reportAttributeAccessIssue]  # compiled

# Below this many weights a second thread costs more than it takes over.
ALONE = 1 << 18
# More inputs than this, for indices of up to 4 bits and of more, go through a block of decoded rows
# and torch's own product: 4096 x 4096 weights take 12.2 ms against 13.6 for 16 inputs at 4 bits,
# 12.2 against 16.5 for 8 at 8 bits, 25.0 against 17.3 for 16.
MOST_INPUTS, MOST_INPUTS_WIDE = 16, 8

_workers: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.clear)  # a child has none of its parent's threads

SIMD = _native.use_simd(True)


def use_simd(wanted: bool) -> bool:
    """Switch the kernels for AVX2 on or off; return whether they are now used."""
    global SIMD
    SIMD = _native.use_simd(wanted)
    return SIMD


def _spread(work: Callable[[int, int], None], rows: int, weights: int) -> None:
    """Do work on ranges of rows, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), rows)
    if threads <= 1 or weights < ALONE:
        work(0, rows)
        return
    workers = _workers.get(threads)
    if workers is None:
        workers = _workers[threads] = ThreadPoolExecutor(threads - 1, "fewbits")
    cuts = [rows * i // threads for i in range(threads + 1)]
    others = [workers.submit(work, *cut) for cut in zip(cuts[1:], cuts[2:], strict=False)]
    work(cuts[0], cuts[1])
    for other in others:
        other.result()


def _on_cpu(*tensors: Tensor) -> bool:
    return all(t.device.type == "cpu" and t.is_contiguous() and not t.is_neg() for t in tensors)


def _weight(packed: Tensor, codebook: Tensor, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Return a packed weight as the compiled functions take it."""
    groups, k = codebook.shape
    run = layout(shape, axis, groups)[2]
    width = _eager.width_of(codebook)
    if len(packed) < -(-math.prod(shape) * width // 8):
        raise RuntimeError(f"{len(packed):,} bytes of indices for {shape} at {width} bits")
    return packed.data_ptr(), len(packed), codebook.data_ptr(), width, k, groups, run


def decode(
    packed: Tensor,
    codebook: Tensor,
    shape: tuple[int, ...],
    axis: int,
    span: tuple[int, int],
    values: Tensor | None = None,
) -> Tensor:
    """See `_eager.decode`."""
    if not _on_cpu(packed, codebook) or codebook.element_size() > 8:
        return _eager.decode(packed, codebook, shape, axis, span, values)
    weight = _weight(packed, codebook, shape, axis)
    size, (start, stop) = codebook.element_size(), span
    values = codebook.new_empty(stop - start) if values is None else values
    eights, address = -(-(stop - start) // 8), values.data_ptr()

    def work(first: int, last: int) -> None:
        at, end = start + 8 * first, min(start + 8 * last, stop)
        if at < end:
            _native.decode(*weight, size, at, end, address + 8 * first * size)

    _spread(work, eights, stop - start)
    return values


def linear(inputs: Tensor, packed: Tensor, codebook: Tensor, rows: int, axis: int) -> Tensor:
    """See `_eager.linear`."""
    batch, columns = inputs.shape
    width = _eager.width_of(codebook)
    if not (
        SIMD
        and 1 <= width <= 8
        and 1 <= batch <= (MOST_INPUTS if width <= 4 else MOST_INPUTS_WIDE)
        and rows * columns
        and _on_cpu(inputs, packed, codebook)
        and inputs.dtype == codebook.dtype == torch.float32
    ):
        return _eager.linear_by(decode, inputs, packed, codebook, rows, axis)
    weight = _weight(packed, codebook, (rows, columns), axis)
    result = inputs.new_empty(batch, rows)
    arranged = None
    if width == 4 and columns % 2 == 0 and (axis == 0 or len(codebook) == 1):
        arranged = torch.empty_like(inputs)
        _native.arrange_floats(inputs.data_ptr(), batch, columns, arranged.data_ptr())
    blocks = 0 if arranged is None else arranged.data_ptr()

    def work(first: int, last: int) -> None:
        _native.linear(
            *weight, inputs.data_ptr(), blocks, batch, columns, result.data_ptr(), rows,
            first, last,
        )  # fmt: skip

    _spread(work, rows, rows * columns)
    return result


def to_bytes(values: Tensor) -> tuple[Tensor, Tensor]:
    """See `_eager.to_bytes`."""
    if not (SIMD and values.dtype == torch.float32 and _on_cpu(values) and values.numel()):
        return _eager.to_bytes(values)
    integers, factor = torch.empty(values.shape, dtype=torch.int8), values.new_empty(len(values), 1)
    _native.to_bytes(values.data_ptr(), *values.shape, integers.data_ptr(), factor.data_ptr())
    return integers, factor


def linear_bytes(inputs: Tensor, packed: Tensor, codebook: Tensor, rows: int, axis: int) -> Tensor:
    """See `_eager.linear_bytes`."""
    batch, columns = inputs.shape
    width = _eager.width_of(codebook)
    if not (
        SIMD
        and 1 <= width <= _eager.MOST_BYTE_BITS
        and columns * width % 8 == 0
        and columns <= _eager.MOST_BYTE_COLUMNS
        and (axis == 0 or len(codebook) == 1)
        and rows * columns * batch
        and _on_cpu(inputs, packed, codebook)
    ):
        return _eager.linear_bytes(inputs, packed, codebook, rows, axis)
    weight = _weight(packed, codebook, (rows, columns), axis)
    block = 64 if width == 3 else 256 // width
    padded = -(-columns // block) * block
    arranged = torch.empty(batch, padded, dtype=torch.int8)
    _native.arrange(inputs.data_ptr(), batch, columns, width, padded, arranged.data_ptr())
    result = torch.empty(batch, rows, dtype=torch.int32)

    def work(first: int, last: int) -> None:
        _native.linear_bytes(
            *weight, arranged.data_ptr(), batch, columns, padded, result.data_ptr(), rows,
            first, last,
        )  # fmt: skip

    _spread(work, rows, rows * columns * batch)
    return result
