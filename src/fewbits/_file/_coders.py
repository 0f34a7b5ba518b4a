"""Indices to bytes and back: fixed width, zstd over fixed width, and an entropy coder.

Pure: no file is touched here. docs/format.md describes the bytes; everything that a reader must
reject is refused here with a `ValueError`, before memory is taken for it.
"""

import math
import struct
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import _symbols
from .._indexed import Indexed, axes, layout
from . import _model

Array = NDArray[Any]
Coder = Literal["packed", "zstd", "rans"]
Choice = Literal["smallest", "fast", "packed"]
CODERS: tuple[Coder, ...] = ("packed", "zstd", "rans")
CHOICES: tuple[Choice, ...] = ("smallest", "fast", "packed")

# A stream is at least this small a part of its elements, so that a short file cannot ask for much
# memory. Writers pad.
MOST_ELEMENTS_PER_BYTE = 4096
ALIGNMENT = 8
MOST_WINDOW = 1 << 27  # bytes that a zstd frame may refer back to

# precision, mantissa, lanes, classes on three axes, zero, number of words
_HEAD = struct.Struct("<BBHHHHHI")
_ZSTD_LEVEL = 3
# A lane costs 6 bytes: its state starts at 2^32, holds 48 bits on average and is stored in 64. This
# share of the stream may go to them; more lanes decode faster, and beyond 32 no longer.
_LANE_BYTES, _LANE_SHARE, _MOST_LANES = 6, 2e-4, 32


def encode(found: Indexed, choice: Choice) -> tuple[Coder, bytes]:
    """Return the coder and stream that take the fewest bytes.

    Args:
        found: the indices, at least one.
        choice: "smallest" tries all coders; "fast" only those that decode at memory speed;
            "packed" is fixed width, whose elements can be read singly.

    Returns:
        The coder's name and the stream, not yet padded.
    """
    packed = _pack(found)
    options: list[tuple[Coder, bytes]] = [("packed", packed)]
    if choice != "packed" and packed:
        options.append(("zstd", _zipped(packed)))
    if choice == "smallest" and packed:
        k = found.codebook.shape[1]
        model, bits = _model.choose(found.indices, axes(found.shape), k)
        if bits / 8 + _HEAD.size < min(len(stream) for _, stream in options):
            options.append(("rans", _encode_rans(found, model, bits)))
    return min(options, key=lambda option: len(option[1]))


def padded_size(size: int, elements: int, offset: int) -> int:
    """Return the bytes a stream of `size` takes at `offset`, so that its end is aligned.

    Args:
        size: bytes of the stream.
        elements: how many indices it holds.
        offset: where it begins in the data.
    """
    size = max(size, -(-elements // MOST_ELEMENTS_PER_BYTE))
    return size + -(offset + size) % ALIGNMENT


def decode(
    coder: str, stream: memoryview, shape: tuple[int, ...], codebook: Array, axis: int, out: Array
) -> None:
    """Write the values of a stream's elements.

    Args:
        coder: "packed", "zstd" or "rans".
        stream: the bytes, with padding.
        shape: the tensor's; at least one element.
        codebook: (G, K) unsigned integers.
        axis: which axis the G codebooks run along.
        out: (N,) like `codebook`, written to; half-written after an error.

    Raises:
        ValueError: if the stream is not one of such a tensor.
    """
    groups, k = codebook.shape
    where = layout(shape, axis, groups)
    book = np.ascontiguousarray(codebook).reshape(-1)
    if coder == "rans":
        _symbols.expand(_decode_rans(stream, shape, k), where, k, book, out)
        return
    packed, width = _fixed_width(coder, stream, math.prod(shape), k)
    _symbols.unpack_expand(packed, width, where, k, book, out)


def decode_indices(coder: str, stream: memoryview, shape: tuple[int, ...], k: int) -> Array:
    """Return (N,) uint16, the indices of a stream's elements; see `decode`.

    Raises:
        ValueError: if the stream is not one of such a tensor.
    """
    if coder == "rans":
        indices = _decode_rans(stream, shape, k)
    else:
        packed, width = _fixed_width(coder, stream, math.prod(shape), k)
        indices = np.empty(math.prod(shape), np.uint16)
        _symbols.unpack(packed, width, indices)
    if int(indices.max()) >= k:
        raise ValueError(f"index {int(indices.max()):,} into {k:,} values")
    return indices


def _fixed_width(coder: str, stream: memoryview, elements: int, k: int) -> tuple[Array, int]:
    """Return the packed indices of a stream, and their width."""
    width = (k - 1).bit_length()
    size = -(-elements * width // 8)
    data = _unzipped(stream, size) if coder == "zstd" else stream[:size]
    if len(data) != size:
        raise ValueError(f"{len(data):,} bytes of indices where {size:,} are due")
    return np.frombuffer(data, np.uint8), width


def _pack(found: Indexed) -> bytes:
    packed = np.zeros(-(-len(found.indices) * found.width // 8), np.uint8)
    _symbols.pack(found.indices, found.width, packed)
    return packed.tobytes()


def _zipped(packed: bytes) -> bytes:
    import zstandard  # here: importing fewbits should not wait for it

    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(packed)


def _unzipped(stream: memoryview, size: int) -> bytes:
    """Decompress exactly `size` bytes; a frame that claims another size is refused first."""
    import zstandard

    try:
        frame = zstandard.get_frame_parameters(stream)
        if frame.content_size != size:
            raise ValueError(f"zstd claims {frame.content_size:,} bytes where {size:,} are due")
        if frame.window_size > MOST_WINDOW:
            raise ValueError(f"zstd wants a window of {frame.window_size:,} bytes")
        return zstandard.ZstdDecompressor().decompress(stream, size)
    except (zstandard.ZstdError, MemoryError) as error:
        raise ValueError(f"zstd: {error}") from error


def _encode_rans(found: Indexed, model: _model.Model, bits: float) -> bytes:
    symbols = found.indices
    if model.counts != (1, 1, 1):
        symbols = np.empty_like(found.indices)
        _symbols.reorder(found.indices, model.maps, model.counts, symbols, False)
    affordable = max(1.0, bits / 8 * _LANE_SHARE / _LANE_BYTES)
    lanes = min(1 << int(math.log2(affordable)), _MOST_LANES)
    shares = model.shares()
    k = shares.shape[1]
    coded = _symbols.encode(symbols, model.lengths(), shares.reshape(-1), k, model.precision, lanes)
    words = (len(coded) - 8 * lanes) // 4
    parts = [_HEAD.pack(model.precision, model.mantissa, lanes, *model.counts, 0, words)]
    for classes, count in zip(model.maps, model.counts, strict=True):
        parts.append(_packed(classes.astype(np.uint16), (count - 1).bit_length()))
    parts.append(_packed(model.codes.reshape(-1), _model.EXPONENT_BITS + model.mantissa))
    return b"".join([*parts, coded])


def _packed(values: Array, width: int) -> bytes:
    packed = np.zeros(-(-len(values) * width // 8), np.uint8)
    _symbols.pack(values, width, packed)
    return packed.tobytes()


def _decode_rans(stream: memoryview, shape: tuple[int, ...], k: int) -> Array:
    """Return (N,) uint16 indices."""
    if len(stream) < _HEAD.size:
        raise ValueError("the stream ends inside its head")
    precision, mantissa, lanes, *counts, zero, words = _HEAD.unpack_from(stream)
    counts = (counts[0], counts[1], counts[2])
    contexts = counts[0] * counts[1] * counts[2]
    if not 1 <= precision <= 16 or not 1 <= mantissa <= 12 or not 1 <= lanes <= 256 or zero:
        raise ValueError(f"head out of range: {precision}, {mantissa}, {lanes}, {zero}")
    sizes = axes(shape)
    if not all(1 <= n <= min(256, max(1, size)) for n, size in zip(counts, sizes, strict=True)):
        raise ValueError(f"{counts} classes for {sizes} channels")
    if contexts << precision > _model.MOST_SLOTS:
        raise ValueError(f"{contexts:,} contexts of 2^{precision} slots")
    position = _HEAD.size

    def take(count: int, width: int) -> Array:
        nonlocal position
        size = -(-count * width // 8)
        if size > len(stream) - position:
            raise ValueError("the stream ends inside its tables")
        values = np.empty(count, np.uint16)
        data = np.frombuffer(stream[position : position + size], np.uint8)
        _symbols.unpack(data, width, values)
        position += size
        return values

    if contexts == 1:
        lengths = np.array([math.prod(shape)])
        maps = None
    else:
        first, second, rest = (
            take(size, (count - 1).bit_length()).astype(np.int32)
            for size, count in zip(sizes, counts, strict=True)
        )
        maps = first, second, rest
        if any(len(m) and int(m.max()) >= c for m, c in zip(maps, counts, strict=True)):
            raise ValueError("a channel's class is out of range")
        lengths = _model.lengths(maps, counts)
    codes = take(contexts * k, _model.EXPONENT_BITS + mantissa).reshape(contexts, k)
    shares = _model.shares(codes, mantissa, precision)
    if 8 * lanes + 4 * words > len(stream) - position:
        raise ValueError("the stream ends inside its words")
    coded = np.frombuffer(stream[position : position + 8 * lanes + 4 * words], np.uint8)
    symbols = np.empty(math.prod(shape), np.uint16)
    _symbols.decode(coded, lengths, shares.reshape(-1), k, precision, lanes, symbols)
    if maps is None:
        return symbols
    indices = np.empty_like(symbols)
    _symbols.reorder(symbols, maps, counts, indices, True)
    return indices
