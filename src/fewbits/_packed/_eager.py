"""Packed indices to values in plain torch: the definition, and what runs on every device.

Indices lie one after the other in row-major order of the weight, each in `width` bits from the
lowest bit of the first byte on, as in the file: eight of them take `width` bytes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._indexed import layout

# Elements decoded at a time: their int32 temporaries and the values stay in the L2 cache.
BLOCK = 1 << 16
# What the kernels for int8 can take: indices that are looked up within a register, and columns
# whose products sum up to less than 2^31.
MOST_BYTE_BITS = 4
MOST_BYTE_COLUMNS = (1 << 31) // 127**2 - 1


def width_of(codebook: Tensor) -> int:
    """Return the bits of an index into a (G, K) codebook."""
    return (codebook.shape[1] - 1).bit_length()


def unpack(packed: Tensor, width: int, start: int, stop: int) -> Tensor:
    """Return the indices of the elements from `start` to before `stop`.

    Args:
        packed: (ceil(N x width / 8),) uint8.
        width: bits of an index, 0 … 16.
        start: an element, 0 … N.
        stop: an element, start … N.

    Returns:
        (stop - start,) int32.
    """
    first = start // 8
    eights = -(-stop // 8) - first
    if not width:
        return torch.zeros(stop - start, dtype=torch.int32, device=packed.device)
    data = packed[first * width : (first + eights) * width]
    if len(data) < eights * width:
        data = torch.cat([data, data.new_zeros(eights * width - len(data))])
    data = data.view(eights, width).to(torch.int32)
    indices = torch.empty(eights, 8, dtype=torch.int32, device=packed.device)
    for element in range(8):
        byte, shift = divmod(element * width, 8)
        value = data[:, byte] >> shift
        for more in range(1, (shift + width + 7) // 8):
            value = value | data[:, byte + more] << (8 * more - shift)
        indices[:, element] = value & ((1 << width) - 1)
    return indices.view(-1)[start - 8 * first : stop - 8 * first]


def places(
    packed: Tensor, codebook: Tensor, shape: tuple[int, ...], axis: int, span: tuple[int, int]
) -> Tensor:
    """Return where in the flat codebook the elements of a span find their values, int64."""
    groups, k = codebook.shape
    indices = unpack(packed, width_of(codebook), *span).long()
    if groups > 1:
        run = layout(shape, axis, groups)[2]
        elements = torch.arange(*span, device=packed.device)
        indices += elements.div_(run, rounding_mode="floor").remainder_(groups).mul_(k)
    return indices


def decode(
    packed: Tensor,
    codebook: Tensor,
    shape: tuple[int, ...],
    axis: int,
    span: tuple[int, int],
    values: Tensor | None = None,
) -> Tensor:
    """Return the values of the elements from span[0] to before span[1].

    Args:
        packed: (ceil(N x width / 8),) uint8.
        codebook: (G, K), any type.
        shape: of the weight, N elements.
        axis: which axis the G codebooks run along.
        span: first element and the one after the last.
        values: (span[1] - span[0],), where to write to; new memory if not given.

    Returns:
        (span[1] - span[0],) like `codebook`.
    """
    values = codebook.new_empty(span[1] - span[0]) if values is None else values
    flat = codebook.reshape(-1)
    for start in range(*span, BLOCK):
        stop = min(start + BLOCK, span[1])
        part = values[start - span[0] : stop - span[0]]
        torch.index_select(flat, 0, places(packed, codebook, shape, axis, (start, stop)), out=part)
    return values


def linear(inputs: Tensor, packed: Tensor, codebook: Tensor, rows: int, axis: int) -> Tensor:
    """Return inputs times the transposed weight, which is decoded a block of rows at a time.

    Args:
        inputs: (B, n), like `codebook`.
        packed: (ceil(rows x n x width / 8),) uint8.
        codebook: (G, K) floating point.
        rows: of the weight.
        axis: which axis the G codebooks run along.

    Returns:
        (B, rows) like `inputs`.
    """
    return linear_by(decode, inputs, packed, codebook, rows, axis)


def linear_by(
    decoder, inputs: Tensor, packed: Tensor, codebook: Tensor, rows: int, axis: int
) -> Tensor:
    """`linear` with the function that decodes a span."""
    columns = inputs.shape[1]
    some = min(rows, max(1, 4 * BLOCK // max(1, columns)))
    # One buffer for all blocks: new memory costs as much as what is written to it.
    block, turned = codebook.new_empty(some * columns), inputs.t()
    result = inputs.new_empty(rows, len(inputs))
    for start in range(0, rows, some):
        stop = min(start + some, rows)
        span = start * columns, stop * columns
        weight = block[: span[1] - span[0]]
        decoder(packed, codebook, (rows, columns), axis, span, weight)
        torch.mm(weight.view(-1, columns), turned, out=result[start:stop])
    return result.t().contiguous()


def output_size(
    inputs: Sequence[int], shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:  # fmt: skip
    """Return height and width of a convolution's output.

    Args:
        inputs: the shape (N, C, H, W) of what is convolved.
        shape: of the weight.
        stride: along height and width, and so the rest.
        padding: with zeros on both sides.
        dilation: of the kernel.
    """
    return tuple(
        (inputs[2 + i] + 2 * padding[i] - dilation[i] * (shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )


def convolve(
    inputs: Tensor, packed: Tensor, codebook: Tensor, shape: tuple[int, ...], axis: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """Return images convolved with a weight (in one group, without a bias).

    Args:
        inputs: (N, C, H, W), like `codebook`.
        packed: as for `decode`.
        codebook: (G, K) floating point.
        shape: of the weight, four axes.
        axis: which axis the G codebooks run along.
        stride: along height and width, and so the rest.
        padding: with zeros on both sides.
        dilation: of the kernel.

    Returns:
        (N, shape[0], height, width) like `inputs`.
    """
    weight = decode(packed, codebook, shape, axis, (0, math.prod(shape))).view(shape)
    return torch.conv2d(inputs, weight, None, stride, padding, dilation)


def take(
    rows: Tensor, packed: Tensor, codebook: Tensor, shape: tuple[int, ...], axis: int
) -> Tensor:
    """Return rows of a weight.

    Args:
        rows: (R,) integers, 0 … shape[0] - 1.
        packed: as for `decode`.
        codebook: as for `decode`.
        shape: of the weight, two axes.
        axis: as for `decode`.

    Returns:
        (R, shape[1]) like `codebook`.
    """
    width, (groups, k), columns = width_of(codebook), codebook.shape, shape[1]
    elements = torch.arange(columns, device=packed.device)
    if columns * width % 8 == 0:  # each row begins with a byte
        data = packed.view(shape[0], -1)[rows].reshape(-1)
        places = unpack(data, width, 0, len(rows) * columns).view(-1, columns).long()
    else:
        bits = (rows[:, None].long() * columns + elements) * width
        places = torch.zeros_like(bits)
        for more in range(3):  # 16 bits and a shift of 7 reach into a third byte
            byte = (bits // 8 + more).clamp_(max=len(packed) - 1)
            places += packed[byte].long() << (8 * more)
        places = places >> bits % 8 & ((1 << width) - 1)
    if groups > 1:
        of = rows.long()[:, None] if axis == 0 else elements
        places += of // (shape[axis] // groups) * k
    return codebook.reshape(-1)[places]


def linear_int8(inputs: Tensor, packed: Tensor, codebook: Tensor, rows: int, axis: int) -> Tensor:
    """`linear` with inputs and representatives rounded to eight bits.

    Each row of the inputs and each codebook has a factor of its own; the sums are exact.

    Args:
        inputs: (B, n) floating point.
        packed: as for `linear`.
        codebook: (G, K) floating point, G = 1 or along the first axis.
        rows: of the weight.
        axis: which axis the G codebooks run along.

    Returns:
        (B, rows) like `inputs`.
    """
    integers, factor = to_bytes(inputs)
    values, step = to_bytes(codebook)
    # Integers below 2^53 are exact in float64, where products of matrices are fast.
    sums = linear(integers.double(), packed, values.double(), rows, axis).to(torch.int32)
    steps = step if len(step) == 1 else step.repeat_interleave(rows // len(step), dim=0).t()
    return (sums * (factor * steps)).to(inputs.dtype)


def to_bytes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows as int8 and the float that each row's integers are to be multiplied by.

    The largest magnitude of a row becomes 127; a row that is not finite gives NaN.

    Args:
        values: (R, n) floating point.

    Returns:
        (R, n) int8 and (R, 1) float32.
    """
    values = values.float()
    factor = values.abs().amax(dim=1, keepdim=True) / 127
    safe = torch.where(factor > 0, factor, 1)
    return (values / safe).nan_to_num(0).round().to(torch.int8), factor
