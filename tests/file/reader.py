"""A reader of fewbits files in plain Python, written from docs/format.md: slow, and easy to port.

It checks the version, the checksums and the end of an entropy-coded stream. The other rules of
"A reader must reject" are left out here for the sake of a short text.
"""

import itertools
import json
import math
import struct
import zlib
from collections.abc import Sequence

Tensor = tuple[
    str, tuple[int, ...], bytes
]  # type, shape, little-endian elements in row-major order


def check(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)


def read(file: bytes) -> dict[str, Tensor]:
    """Return every tensor of a file, other names of tied tensors included."""
    start = 8 + int.from_bytes(file[:8], "little")
    begins = b'{"__metadata__":{"fewbits":"1","header_crc32":"'
    check(file[8:].startswith(begins), "no fewbits file of version 1")
    at = 8 + len(begins)
    blank = file[:at] + b"00000000" + file[at + 8 : start]
    check(int(file[at : at + 8], 16) == zlib.crc32(blank), "header")
    entries = json.loads(file[8:start])
    metadata = entries.pop("__metadata__")
    by_place = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    buffers: dict[str, bytes] = {}
    for number, name in enumerate(by_place):
        first, last = entries[name]["data_offsets"]
        buffers[name] = file[start + first : start + last]
        expected = int(metadata["entry_crc32"][8 * number : 8 * number + 8], 16)
        check(zlib.crc32(buffers[name]) == expected, name)

    about = json.loads(metadata["tensors"])
    tensors: dict[str, Tensor] = {}
    parts: set[str] = set()
    for name, (dtype, shape, coder, axis) in about["coded"].items():
        codebook, indices = (name + about["separator"] + part for part in ("codebook", "indices"))
        parts |= {codebook, indices}
        values = buffers[indices]
        if coder != "raw":
            groups_k = entries[codebook]["shape"]
            values = clustered(coder, values, shape, axis, groups_k, buffers[codebook])
        tensors[name] = dtype, tuple(shape), values
    for name in entries.keys() - parts:
        dtype, values = entries[name]["dtype"], buffers[name]
        if name in about["cast"]:
            values = cast(values, dtype, about["cast"][name])
            dtype = about["cast"][name]
        tensors[name] = dtype, tuple(entries[name]["shape"]), values
    return tensors | {alias: tensors[name] for alias, name in about["tied"].items()}


def clustered(
    coder: str, stream: bytes, shape: list[int], axis: int, groups_k: list[int], book: bytes
) -> bytes:
    """Return the bytes of a tensor from its codebooks and stream."""
    elements, (groups, k) = math.prod(shape), groups_k
    if coder == "rans":
        indices = rans(stream, shape, k)
    else:
        if coder == "zstd":
            import zstandard

            stream = zstandard.ZstdDecompressor().decompress(stream)
        indices = unpack(stream, elements, (k - 1).bit_length())
    run = math.prod(shape[axis:]) // groups
    size = len(book) // (groups * k)
    values = [book[i : i + size] for i in range(0, len(book), size)]
    return b"".join(values[n // run % groups * k + index] for n, index in enumerate(indices))


def unpack(data: bytes, count: int, width: int) -> list[int]:
    """Return `count` numbers of `width` bits, least significant bit first."""
    result = []
    for first in range(0, count * width, width) if width else [0] * count:
        three = int.from_bytes(data[first // 8 : first // 8 + 3], "little")
        result.append(three >> first % 8 & (1 << width) - 1)
    return result


def rans(stream: bytes, shape: Sequence[int], k: int) -> list[int]:
    """Return the indices of an entropy-coded stream."""
    head = struct.unpack_from("<BBHHHHHI", stream)
    precision, mantissa, lanes, counts, words = *head[:3], head[3:6], head[7]
    at = 16

    def take(count: int, width: int) -> list[int]:
        nonlocal at
        at, begin = at + -(-count * width // 8), at
        return unpack(stream[begin:at], count, width)

    sizes = (*shape, 1, 1)[:2] + (math.prod(shape[2:]),)
    maps = [take(n, (count - 1).bit_length()) for n, count in zip(sizes, counts, strict=True)]
    codes = take(math.prod(counts) * k, 4 + mantissa)
    members: list[list[int]] = [[] for _ in range(math.prod(counts))]
    for n, (a, b, t) in enumerate(itertools.product(*maps)):
        members[(a * counts[1] + b) * counts[2] + t].append(n)

    states = list(struct.unpack_from(f"<{lanes}Q", stream, at))
    rest = iter(struct.unpack_from(f"<{words}I", stream, at + 8 * lanes))
    indices = [0] * math.prod(shape)
    for context, positions in enumerate(members):
        weights = [small_float(c, mantissa) for c in codes[context * k : context * k + k]]
        share = shares(weights, precision)
        below = [0, *itertools.accumulate(share)]
        slots = [symbol for symbol in range(k) for _ in range(share[symbol])]
        for i, n in enumerate(positions):
            x = states[i % lanes]
            slot = x & (1 << precision) - 1
            symbol = slots[slot]
            x = share[symbol] * (x >> precision) + slot - below[symbol]
            states[i % lanes] = x if x >= 1 << 32 else x << 32 | next(rest)
            indices[n] = symbol
    check(set(states) == {1 << 32} and not list(rest), "the words do not fit the symbols")
    return indices


def small_float(code: int, mantissa: int) -> int:
    exponent, low = code >> mantissa, code & (1 << mantissa) - 1
    return low + (1 << mantissa) << exponent - 1 if exponent else low


def shares(weights: list[int], precision: int) -> list[int]:
    """Return how many of 2^precision slots each symbol has."""
    free = (1 << precision) - sum(weight > 0 for weight in weights)
    total = max(sum(weights), 1)
    edges = [upto * free // total for upto in (0, *itertools.accumulate(weights))]
    return [b - a + (w > 0) for w, a, b in zip(weights, edges, edges[1:], strict=False)]


def cast(data: bytes, stored: str, wanted: str) -> bytes:
    """Widen floating-point numbers."""
    letters = {"F16": "e", "F32": "f", "F64": "d"}
    if stored == "BF16":  # the upper half of an F32
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
        stored = "F32"
    values = [value for (value,) in struct.iter_unpack("<" + letters[stored], data)]
    return struct.pack(f"<{len(values)}{letters[wanted]}", *values)
