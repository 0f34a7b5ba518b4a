"""The functions of `_eager` for the CPU, compiled; whatever the kernels cannot take goes there.

Decoded weights are equal bit for bit, eight-bit sums are equal, float sums are rounded in another
order.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .._indexed import layout
from .._threads import spread
from . import _eager, _native  # pyright: ignore[reportAttributeAccessIssue]  # compiled

# Below this many weights a second thread costs more than it takes over.
ALONE = 1 << 18
# Up to so many inputs, for indices of up to 4 bits and of more, are multiplied one by one; more lie
# side by side in panels: 4096 x 4096 weights take 6.2 ms for 8 inputs at 4 bits, 8.1 in panels;
# 6.5 against 6.8 for 1 at 8 bits, 8.6 against 6.8 for 4.
FEW, FEW_WIDE = 8, 1
# Where panels cannot be (codebooks along the inputs): more than this go through decoded rows.
MOST_INPUTS, MOST_INPUTS_WIDE = 16, 8
# Inputs of a panel, rows that are multiplied with one at a time, floats of all panels at a time.
PANEL, TALL, MOST_PANELS = 16, 6, 1 << 19

SIMD = _native.use_simd(True)


def use_simd(wanted: bool) -> bool:
    """Switch the kernels for AVX2 on or off; return whether they are now used."""
    global SIMD
    SIMD = _native.use_simd(wanted)
    return SIMD


def _spread(work: Callable[[int, int], None], rows: int, weights: int) -> None:
    """Do work on ranges of rows, on as many threads as torch uses."""
    spread(work, rows, min(torch.get_num_threads(), rows) if weights >= ALONE else 1)


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
        and batch * rows * columns
        and _on_cpu(inputs, packed, codebook)
        and inputs.dtype == codebook.dtype == torch.float32
    ):
        return _eager.linear_by(decode, inputs, packed, codebook, rows, axis)
    even = axis == 0 or len(codebook) == 1
    few = (FEW, FEW_WIDE) if even else (MOST_INPUTS, MOST_INPUTS_WIDE)
    if batch > few[width > 4]:
        by_panels = _linear_by_panels if even else partial(_eager.linear_by, decode)
        return by_panels(inputs, packed, codebook, rows, axis)
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


def _products(
    packed: Tensor, codebook: Tensor, shape: tuple[int, int], panels: Tensor, count: int
) -> Tensor:
    """Return a weight, whose codebooks run along its rows, times panels, as (rows, count)."""
    rows, columns = shape
    weight = _weight(packed, codebook, shape, 0)
    result = panels.new_empty(rows, count)

    def work(first: int, last: int) -> None:
        first, last = TALL * first, min(TALL * last, rows)
        _native.products(*weight, panels.data_ptr(), count, columns, result.data_ptr(), first, last)

    _spread(work, -(-rows // TALL), rows * columns)
    return result


def _patches(
    images: Tensor, kernel: tuple[int, ...], stride: Sequence[int], dilation: Sequence[int],
    size: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """Return what each position of a convolution reads of padded images (N, C, H, W), as panels.

    The panels are (ceil(N x positions / PANEL), C x kernel, PANEL).
    """
    positions, columns = len(images) * math.prod(size), images.shape[1] * math.prod(kernel)
    panels = images.new_empty(-(-positions // PANEL), columns, PANEL)
    _native.patches(
        images.data_ptr(), *images.shape, *kernel, *stride, *dilation, *size, panels.data_ptr()
    )
    return panels


def _linear_by_panels(
    inputs: Tensor, packed: Tensor, codebook: Tensor, rows: int, axis: int
) -> Tensor:
    batch, columns = inputs.shape
    result = inputs.new_empty(batch, rows)
    some = max(4 * PANEL, MOST_PANELS // columns // PANEL * PANEL)
    for start in range(0, batch, some):
        part = inputs[start : start + some]
        panels = _patches(part[:, :, None, None], (1, 1), (1, 1), (1, 1), (1, 1))
        product = _products(packed, codebook, (rows, columns), panels, len(part))
        result[start : start + some] = product.t()
    return result


def convolution_pays(images: int, size: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether `convolve` is faster than torch's convolution with the decoded weight.

    Laying out what the positions read pays by the output channels, decoding by the positions.

    Args:
        images: how many.
        size: height and width of the output.
        shape: of the weight.
    """
    positions = math.prod(size)
    few = images * positions <= 2 * shape[0]
    return few and positions * math.prod(shape[1:]) <= MOST_PANELS


def convolve(
    inputs: Tensor, packed: Tensor, codebook: Tensor, shape: tuple[int, ...], axis: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """See `_eager.convolve`."""
    images, size = len(inputs), _eager.output_size(inputs.shape, shape, stride, padding, dilation)
    width = _eager.width_of(codebook)
    if not (
        SIMD
        and 1 <= width <= 8
        and images * math.prod(size) * math.prod(shape)
        and (axis == 0 or len(codebook) == 1)
        and _on_cpu(packed, codebook)
        and inputs.device.type == "cpu"
        and inputs.dtype == codebook.dtype == torch.float32
    ):
        weight = decode(packed, codebook, shape, axis, (0, math.prod(shape))).view(shape)
        return torch.conv2d(inputs, weight, None, stride, padding, dilation)
    positions, rows, columns = math.prod(size), shape[0], math.prod(shape[1:])
    if images * positions <= (FEW if width <= 4 else FEW_WIDE):
        patches = torch.nn.functional.unfold(
            inputs, shape[2:], tuple(dilation), tuple(padding), tuple(stride)
        )
        patches = patches.transpose(1, 2).reshape(-1, columns).contiguous()
        result = linear(patches, packed, codebook, rows, axis).view(images, positions, rows)
        return result.transpose(1, 2).reshape(images, rows, *size)
    padded = torch.nn.functional.pad(inputs, (padding[1], padding[1], padding[0], padding[0]))
    padded = padded.contiguous().resolve_neg()
    some, parts = max(1, MOST_PANELS // (positions * columns)), []
    for start in range(0, images, some):
        part = padded[start : start + some]
        panels = _patches(part, shape[2:], stride, dilation, size)
        product = _products(packed, codebook, (rows, columns), panels, len(part) * positions)
        parts.append(product.view(rows, len(part), *size).transpose(0, 1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()


def linear_int8(inputs: Tensor, packed: Tensor, codebook: Tensor, rows: int, axis: int) -> Tensor:
    """See `_eager.linear_int8`."""
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
        return _eager.linear_int8(inputs, packed, codebook, rows, axis)
    floats, books = inputs.float(), codebook.float()
    weight = _weight(packed, books, (rows, columns), axis)
    result = floats.new_empty(batch, rows)

    def work(first: int, last: int) -> None:
        _native.linear_int8(
            *weight, floats.data_ptr(), batch, columns, result.data_ptr(), rows, first, last
        )

    _spread(work, rows, rows * columns * batch)
    return result.to(inputs.dtype)
