"""What the functions of `_symbols` do, in plain NumPy: the definition and the fallback.

`_native.c` has the same functions, compiled; the tests hold the two against each other. All take
flat C-contiguous arrays and write their results into an array that the caller passes last.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOW_STATE = 1 << 16
_CHUNK = 1 << 18  # elements at a time where temporaries are wider than the elements

Array = NDArray[Any]


def _chunks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK))


def distinct(data: Array, most: int, indices: Array, values: Array) -> int:
    """Number the distinct items of `data` in the order in which they first appear.

    Args:
        data: (n,) unsigned integers of 1, 2, 4 or 8 bytes.
        most: how many distinct items there may be, at most 65,536.
        indices: (n,) uint16, filled with each item's number.
        values: (most,) uint64, filled with the items.

    Returns:
        How many there are, or -1 where they are more than `most`.
    """
    known, number = data[:0], np.empty(0, np.int64)
    for part in _chunks(len(data)):
        found, first, inverse = np.unique(data[part], return_index=True, return_inverse=True)
        at = np.searchsorted(known, found)
        old = at < len(known)
        old[old] = known[at[old]] == found[old]
        if len(known) + int((~old).sum()) > most:
            return -1
        numbers = np.empty(len(found), np.int64)
        numbers[old] = number[at[old]]
        new = np.flatnonzero(~old)
        numbers[new[np.argsort(first[new])]] = len(known) + np.arange(len(new))
        values[numbers[new]] = found[new]
        known = np.insert(known, at[new], found[new])
        number = np.insert(number, at[new], numbers[new])
        indices[part] = numbers[inverse.reshape(-1)]
    return len(known)


def remap(indices: Array, ranks: Array) -> None:
    """In place: replace each index by its rank; both uint16."""
    if len(indices) and int(indices.max()) >= len(ranks):
        raise ValueError("remap: index out of range")
    for part in _chunks(len(indices)):
        indices[part] = ranks[indices[part]]


def histogram(indices: Array, shape: tuple[int, int, int], counts: Array) -> None:
    """Add to `counts` how often each value occurs in each group.

    Args:
        indices: (outer x groups x run,) uint16.
        shape: (outer, groups, run), as which they lie.
        counts: (groups x k,) int64.

    Raises:
        ValueError: if an index is not below k.
    """
    groups = shape[1]
    k = len(counts) // groups
    if len(indices) and int(indices.max()) >= k:
        raise ValueError("histogram: wrong sizes or index out of range")
    view, table = indices.reshape(shape), counts.reshape(groups, k)
    for group in range(groups):
        table[group] += np.bincount(view[:, group].reshape(-1), minlength=k)


def reorder(
    source: Array, target: Array, first: Array, second: Array, rest: Array,
    counts: tuple[int, int, int], back: bool,
) -> None:  # fmt: skip
    """Copy (A, B, T) indices into the order of their contexts, or back.

    The context of position (a, b, t) is the triple of classes (first[a], second[b], rest[t]).
    Contexts come in lexicographic order, the positions of one context in theirs.

    Args:
        source: (A x B x T,) uint16.
        target: the same, written to.
        first: (A,) uint8, class of each position on the first axis.
        second: (B,) uint8.
        rest: (T,) uint8.
        counts: number of classes on each axis.
        back: whether `source` is in context order.

    Raises:
        ValueError: if a class is not below its count.
    """
    maps = (first, second, rest)
    if any(len(m) and int(m.max()) >= count for m, count in zip(maps, counts, strict=True)):
        raise ValueError("reorder: wrong sizes or class out of range")
    shape = tuple(len(m) for m in maps)
    done = 0
    for context in np.ndindex(*counts):
        where = np.ix_(*(np.flatnonzero(m == c) for m, c in zip(maps, context, strict=True)))
        size = int(np.prod([len(axis.reshape(-1)) for axis in where]))
        if back:
            block = source[done : done + size].reshape([axis.size for axis in where])
            target.reshape(shape)[where] = block
        else:
            target[done : done + size] = source.reshape(shape)[where].reshape(-1)
        done += size


def pack(indices: Array, width: int, packed: Array) -> None:
    """Write each index in `width` bits, least significant bit first, into whole bytes.

    Raises:
        ValueError: if an index needs more bits.
    """
    if len(indices) and int(indices.max()) >> width:
        raise ValueError("pack: wrong sizes or index too wide")
    if width == 0:
        return
    for part in _chunks(len(indices)):
        bits = (indices[part, None] >> np.arange(width, dtype=np.uint16)) & 1
        data = np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")
        first = part.start * width // 8
        packed[first : first + len(data)] = data


def unpack(packed: Array, width: int, indices: Array) -> None:
    """Undo `pack`."""
    if width == 0:
        indices[:] = 0
        return
    for part in _chunks(len(indices)):
        data = packed[part.start * width // 8 : -(-part.stop * width // 8)]
        size = part.stop - part.start
        bits = np.unpackbits(data, bitorder="little", count=size * width).reshape(size, width)
        indices[part] = (bits.astype(np.uint16) << np.arange(width, dtype=np.uint16)).sum(axis=1)


def expand(
    indices: Array, shape: tuple[int, int, int], k: int, codebook: Array, out: Array
) -> None:
    """Write the value of each index into `out`.

    Args:
        indices: (outer x groups x run,) uint16, at least one.
        shape: (outer, groups, run), as which they lie; each group has a codebook.
        k: values in a codebook.
        codebook: (groups x k,) unsigned integers of 1, 2, 4 or 8 bytes.
        out: like `indices`, of the codebook's type.

    Raises:
        ValueError: if an index is not below `k`.
    """
    if int(indices.max()) >= k:
        raise ValueError("expand: wrong sizes or index out of range")
    view, target = indices.reshape(shape), out.reshape(shape)
    for group, values in enumerate(codebook.reshape(shape[1], k)):
        target[:, group] = values[view[:, group]]


def unpack_expand(
    packed: Array, width: int, shape: tuple[int, int, int], k: int, codebook: Array, out: Array
) -> None:
    """`unpack`, then `expand`."""
    indices = np.empty(shape[0] * shape[1] * shape[2], np.uint16)
    unpack(packed, width, indices)
    expand(indices, shape, k, codebook, out)


def _slots(shares: Array, precision: int) -> tuple[Array, Array]:
    share = shares.astype(np.int64)
    if int(share.sum()) != 1 << precision:
        raise ValueError("the shares do not add up")
    return share, np.cumsum(share) - share


def encode(
    symbols: Array, lengths: Array, shares: Array, k: int, precision: int, lanes: int
) -> bytes:
    """Code symbols by range asymmetric numeral systems (Duda 2013), lanes side by side.

    Args:
        symbols: (n,) uint16, in context order.
        lengths: (contexts,) int64, how many of them each context has.
        shares: (contexts x k,) uint32, of 2^precision in each context that is not empty.
        k: number of symbols.
        precision: 1 … 16.
        lanes: number of states; symbol i of a context goes to lane i modulo `lanes`.

    Returns:
        The lanes' states, uint32 little-endian, then words of 16 bits in the order of reading.

    Raises:
        ValueError: if a symbol has no share, or shares do not add up.
    """
    state = np.full(lanes, LOW_STATE, np.int64)
    words: list[Array] = []
    stop = len(symbols)
    table = shares.reshape(-1, k)
    for context in range(len(lengths) - 1, -1, -1):
        start = stop - int(lengths[context])
        if start == stop:
            continue
        share, below = _slots(table[context], precision)
        for first in range(start + (stop - start - 1) // lanes * lanes, start - 1, -lanes):
            part = symbols[first : min(first + lanes, stop)]
            if int(part.max()) >= k or not share[part].all():
                raise ValueError("encode: a symbol has no share")
            x, f = state[: len(part)], share[part]
            full = x >= f << (32 - precision)
            words.append(x[full][::-1] & 0xFFFF)
            x = np.where(full, x >> 16, x)
            quotient, remainder = np.divmod(x, f)
            state[: len(part)] = (quotient << precision) + remainder + below[part]
        stop = start
    tail = np.concatenate([np.empty(0, np.int64), *words])[::-1]
    return state.astype("<u4").tobytes() + tail.astype("<u2").tobytes()


def decode(
    data: Array, lengths: Array, shares: Array, k: int, precision: int, lanes: int, symbols: Array
) -> None:
    """Undo `encode`: fill `symbols`.

    Raises:
        ValueError: if shares do not add up, or the data end too early or too late.
    """
    state = data[: 4 * lanes].view("<u4").astype(np.int64)
    words = data[4 * lanes :].view("<u2").astype(np.int64)
    if (state < LOW_STATE).any():
        raise ValueError("the words do not fit the symbols")
    position, start = 0, 0
    for context, table in enumerate(shares.reshape(-1, k)):
        stop = start + int(lengths[context])
        if start == stop:
            continue
        share, below = _slots(table, precision)
        symbol_at = np.repeat(np.arange(k), share)
        for first in range(start, stop, lanes):
            size = min(lanes, stop - first)
            slot = state[:size] & ((1 << precision) - 1)
            part = symbol_at[slot]
            x = share[part] * (state[:size] >> precision) + slot - below[part]
            short = x < LOW_STATE
            more = words[position : position + int(short.sum())]
            if len(more) < int(short.sum()):
                raise ValueError("the words do not fit the symbols")
            x[short] = x[short] << 16 | more
            position += len(more)
            state[:size] = x
            symbols[first : first + size] = part
        start = stop
    if position < len(words) or (state != LOW_STATE).any():
        raise ValueError("the words do not fit the symbols")
