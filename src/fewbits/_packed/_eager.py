"""Packed indices to values in plain torch: the definition, and what runs on every device.

Indices lie one after the other in row-major order of the weight, each in `width` bits from the
lowest bit of the first byte on, as in the file: eight of them take `width` bytes.
"""

import torch
from torch import Tensor

from .._indexed import layout

# Elements decoded at a time: their int32 temporaries and the values stay in the L2 cache.
BLOCK = 1 << 16


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
    packed: Tensor, codebook: Tensor, shape: tuple[int, ...], axis: int, span: tuple[int, int]
) -> Tensor:
    """Return the values of the elements from span[0] to before span[1].

    Args:
        packed: (ceil(N x width / 8),) uint8.
        codebook: (G, K), any type.
        shape: of the weight, N elements.
        axis: which axis the G codebooks run along.
        span: first element and the one after the last.

    Returns:
        (span[1] - span[0],) like `codebook`.
    """
    values = codebook.new_empty(span[1] - span[0])
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
    result = inputs.new_empty(len(inputs), rows)
    some = max(1, 4 * BLOCK // max(1, columns))
    for start in range(0, rows, some):
        stop = min(start + some, rows)
        span = start * columns, stop * columns
        weight = decoder(packed, codebook, (rows, columns), axis, span).view(-1, columns)
        result[:, start:stop] = inputs @ weight.t()
    return result


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
