"""What the functions of `_symbols` do, in plain NumPy: the definition and the fallback.

`_native.c` and `_rans.c` have the same functions, compiled; the tests hold the two against each
other. All take flat C-contiguous arrays and write their results into an array that the caller
passes last.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOW_STATE = 1 << 32
_CHUNK = 1 << 18  # elements at a time where temporaries are wider than the elements

Array = NDArray[Any]
Maps = tuple[Array, Array, Array]


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


def histogram(indices: Array, maps: Maps, counts: tuple[int, int, int], table: Array) -> None:
    """Add to `table` how often each index occurs in each context.

    The context of position (a, b, t) is the triple of classes (maps[0][a], maps[1][b], maps[2][t]).

    Args:
        indices: (A x B x T,) uint16.
        maps: (A,), (B,) and (T,) int32, the class of each position on its axis.
        counts: number of classes on each axis.
        table: (contexts x k,) int64, contexts in lexicographic order.

    Raises:
        ValueError: if a class is not below its count, or an index not below k.
    """
    contexts = counts[0] * counts[1] * counts[2]
    _check_maps(maps, counts)
    k = len(table) // contexts
    if len(indices) and int(indices.max()) >= k:
        raise ValueError("histogram: index out of range")
    view = indices.reshape(len(maps[0]), -1)
    inner = (maps[1][:, None].astype(np.int64) * counts[2] + maps[2]).reshape(-1)
    for row, first in zip(view, maps[0], strict=True):  # a row at a time: contexts are 8 bytes each
        context = int(first) * counts[1] * counts[2] + inner
        table += np.bincount(context * k + row, minlength=len(table))


def reorder(
    source: Array, maps: Maps, counts: tuple[int, int, int], target: Array, back: bool
) -> None:
    """Copy indices into the order of their contexts, or back.

    Contexts come in lexicographic order, the positions of one context in theirs.

    Args:
        source: (A x B x T,) uint16.
        maps: as in `histogram`.
        counts: as in `histogram`, at most 256 each.
        target: like `source`, written to.
        back: whether `source` is in context order.

    Raises:
        ValueError: if a class is not below its count.
    """
    _check_maps(maps, counts)
    shape = tuple(len(m) for m in maps)
    done = 0
    for context in np.ndindex(*counts):
        where = np.ix_(*(np.flatnonzero(m == c) for m, c in zip(maps, context, strict=True)))
        block = [axis.size for axis in where]
        part = slice(done, done + block[0] * block[1] * block[2])
        if back:
            target.reshape(shape)[where] = source[part].reshape(block)
        else:
            target[part] = source.reshape(shape)[where].reshape(-1)
        done = part.stop


def _check_maps(maps: Maps, counts: tuple[int, int, int]) -> None:
    for classes, count in zip(maps, counts, strict=True):
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < count:
            raise ValueError("a class is out of range")


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
    share = shares.astype(np.uint64)
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
        The lanes' states, uint64 little-endian, then words of 32 bits in the order of reading.

    Raises:
        ValueError: if a symbol has no share, or shares do not add up.
    """
    state = np.full(lanes, LOW_STATE, np.uint64)
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
            full = x >> (64 - precision) >= f
            words.append(x[full][::-1] & 0xFFFFFFFF)
            x = np.where(full, x >> 32, x)
            quotient, remainder = np.divmod(x, f)
            state[: len(part)] = (quotient << precision) + remainder + below[part]
        stop = start
    tail = np.concatenate([np.empty(0, np.uint64), *words])[::-1]
    return state.astype("<u8").tobytes() + tail.astype("<u4").tobytes()


def decode(
    data: Array, lengths: Array, shares: Array, k: int, precision: int, lanes: int, symbols: Array
) -> None:
    """Undo `encode`: fill `symbols`.

    Raises:
        ValueError: if shares do not add up, or the data end too early or too late.
    """
    state = data[: 8 * lanes].copy().view("<u8")
    words = data[8 * lanes :].copy().view("<u4").astype(np.uint64)
    if (state < LOW_STATE).any():
        raise ValueError("the words do not fit the symbols")
    position, start = 0, 0
    for context, table in enumerate(shares.reshape(-1, k)):
        stop = start + int(lengths[context])
        if start == stop:
            continue
        share, below = _slots(table, precision)
        symbol_at = np.repeat(np.arange(k), share.astype(np.int64))
        for first in range(start, stop, lanes):
            size = min(lanes, stop - first)
            slot = state[:size] & ((1 << precision) - 1)
            part = symbol_at[slot]
            x = share[part] * (state[:size] >> precision) + slot - below[part]
            short = x < LOW_STATE
            more = words[position : position + int(short.sum())]
            if len(more) < int(short.sum()):
                raise ValueError("the words do not fit the symbols")
            x[short] = x[short] << 32 | more
            position += len(more)
            state[:size] = x
            symbols[first : first + size] = part
        start = stop
    if position < len(words) or (state != LOW_STATE).any():
        raise ValueError("the words do not fit the symbols")
