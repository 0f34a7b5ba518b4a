"""Which symbols the entropy coder expects where: contexts by channel, and each context's shares.

A tensor is seen as (first axis, second axis, all others). The positions on each axis fall into
classes, and the classes of a weight's three positions are its context: channels with large weights
and channels with small ones get statistics of their own. docs/format.md says what a reader needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _symbols
from .._indexed import Maps, one_axis

Array = NDArray[Any]

EXPONENT_BITS = 4
PRECISIONS = (12, 14, 16)
MANTISSAS = (2, 3, 4, 5, 6, 8, 10, 12)
# A reader builds a table of 2^precision slots for each context.
MOST_SLOTS = 1 << 22

_MOST_CLASSES = (16, 16, 8)  # on each axis, powers of 2
_MOST_CELLS = 1 << 18  # of contexts x values while classes are chosen
_MOST_AXIS_CELLS = 1 << 22  # of channels x values
_ROUNDS = 3  # of reassigning channels to classes
# Elements from which the classes of the second axis and the others are chosen: a channel of 512 has
# 1,024 of them, whose frequencies of 16 values are off by 3%.
_SAMPLE = 1 << 19
_TABLE_BITS = 9.0  # of an entry, in the estimate that chooses the classes


@dataclass(frozen=True)
class Model:
    """Contexts and shares.

    Attributes:
        maps: (A,), (B,) and (T,) int32, the class of each position.
        counts: number of classes on each axis.
        precision: shares add up to 2^precision.
        mantissa: mantissa bits of the stored weights.
        codes: (contexts, k) uint16, the stored weights as small floats.
    """

    maps: Maps
    counts: tuple[int, int, int]
    precision: int
    mantissa: int
    codes: Array

    def lengths(self) -> Array:
        """Return how many elements each context has, (contexts,) int64."""
        return lengths(self.maps, self.counts)

    def shares(self) -> Array:
        """Return (contexts, k) uint32."""
        return shares(self.codes, self.mantissa, self.precision)


def lengths(maps: Maps, counts: tuple[int, int, int]) -> Array:
    """Return how many elements each context has, (contexts,) int64."""
    first, second, rest = (
        np.bincount(m, minlength=count).astype(np.int64)
        for m, count in zip(maps, counts, strict=True)
    )
    return (first[:, None, None] * second[:, None] * rest).reshape(-1)


def shares(codes: Array, mantissa: int, precision: int) -> Array:
    """Turn stored weights into shares that add up to 2^precision, in integers.

    Args:
        codes: (contexts, k) uint16, small floats; a weight of 0 has no share, any other at least 1.
        mantissa: their mantissa bits.
        precision: 1 … 16.

    Returns:
        (contexts, k) uint32; a row without weights is 0.

    Raises:
        ValueError: if a context has more symbols than 2^precision.
    """
    exponent, low = codes >> mantissa, codes & ((1 << mantissa) - 1)
    wide = low.astype(np.int64) + ((exponent > 0).astype(np.int64) << mantissa)
    weight = wide << np.maximum(exponent.astype(np.int64) - 1, 0)
    there = (weight > 0).astype(np.int64)
    free = (1 << precision) - there.sum(axis=1, keepdims=True)
    if (free < 0).any():
        raise ValueError("a context has more symbols than slots")
    upto = np.cumsum(weight, axis=1)
    total = np.maximum(upto[:, -1:], 1)
    upper = upto * free // total
    result = upper + there
    result[:, 1:] -= upper[:, :-1]
    return result.astype(np.uint32)


def _codes(table: Array, mantissa: int) -> Array:
    """Return counts as small floats, each row scaled to the largest float; at least 1 if not 0."""
    largest = ((2 << mantissa) - 1) << ((1 << EXPONENT_BITS) - 2)
    peak = np.maximum(table.max(axis=1, keepdims=True), 1)
    value = np.where(table > 0, np.maximum(table * (largest / peak), 1.0), 0.0)
    exponent = np.maximum(np.frexp(value)[1] - mantissa, 0)  # 0: below 2^mantissa
    low = np.rint(np.ldexp(value, -np.maximum(exponent - 1, 0))).astype(np.int64)
    carried = (low >> mantissa) - (exponent > 0)  # rounded up to the next power of two
    exponent = exponent + carried
    low = np.where(carried > 0, 0, low & ((1 << mantissa) - 1))
    return (exponent << mantissa | low).astype(np.uint16)


def _bits(table: Array, share: Array, precision: int) -> float:
    """Return the bits that counts cost under shares."""
    there = table > 0
    return float((table[there] * (precision - np.log2(share[there]))).sum())


def choose(indices: Array, shape: tuple[int, int, int], k: int) -> tuple[Model, float]:
    """Choose the contexts and shares that code indices in the fewest bits.

    Args:
        indices: (A x B x T,) uint16, at least one.
        shape: (A, B, T).
        k: number of values.

    Returns:
        The model, and the bits of indices, classes and shares together.
    """
    maps, counts, table = _contexts(indices, shape, k)
    most = int((table > 0).sum(1).max())
    best: tuple[float, Model] | None = None

    def consider(precision: int, mantissa: int) -> None:
        nonlocal best
        if len(table) << precision > MOST_SLOTS or most > 1 << precision:
            return
        codes = _codes(table, mantissa)
        stored = table.size * (EXPONENT_BITS + mantissa) + _map_bits(shape, counts)
        bits = _bits(table, shares(codes, mantissa, precision), precision) + stored
        if best is None or bits < best[0]:
            best = bits, Model(maps, counts, precision, mantissa, codes)

    for precision in PRECISIONS:
        consider(precision, 6)
    assert best is not None  # 16 bits of precision always fit one context of 65,536 symbols
    for mantissa in (m for m in MANTISSAS if m != 6):
        before = best[0]
        consider(best[1].precision, mantissa)
        if mantissa > 6 and best[0] == before:
            break  # finer shares pay less and less
    return best[1], best[0]


def _map_bits(shape: tuple[int, int, int], counts: tuple[int, int, int]) -> int:
    return sum(size * (count - 1).bit_length() for size, count in zip(shape, counts, strict=True))


def _contexts(
    indices: Array, shape: tuple[int, int, int], k: int
) -> tuple[Maps, tuple[int, int, int], Array]:
    """Return classes, their numbers, and the (contexts, k) histogram under them."""
    found = [_classes(indices, shape, k, axis) for axis in range(3)]
    maps, counts = [row[0] for row in found], [row[1] for row in found]
    table = next((t for *_, t in found if t is not None and len(t) == np.prod(counts)), None)
    while counts[0] * counts[1] * counts[2] * k > max(_MOST_CELLS, k):
        axis = int(np.argmax(counts))
        maps[axis], counts[axis] = maps[axis] // 2, counts[axis] // 2
        table = None
    maps, counts = (maps[0], maps[1], maps[2]), (counts[0], counts[1], counts[2])
    if table is None:
        table = histogram(indices, maps, counts, k)
    joint = table.reshape(*counts, k)
    best = None
    for chosen, merged in _coarser(joint):
        cost = _entropy(merged) + merged.size * _TABLE_BITS + _map_bits(shape, chosen)
        if best is None or cost < best[0]:
            best = cost, chosen, merged
    assert best is not None
    chosen = best[1]
    first, second, rest = (
        m // np.int32(count // few) for m, count, few in zip(maps, counts, chosen, strict=True)
    )
    return (first, second, rest), chosen, best[2].reshape(-1, k)


def _coarser(joint: Array) -> Iterator[tuple[tuple[int, int, int], Array]]:
    """Yield numbers of classes and the histogram under them, neighbouring classes merged."""
    for first in _halved(joint, 0):
        for second in _halved(first, 1):
            for rest in _halved(second, 2):
                yield (rest.shape[0], rest.shape[1], rest.shape[2]), rest


def _halved(table: Array, axis: int) -> Iterator[Array]:
    yield table
    while table.shape[axis] > 1:
        shape = list(table.shape)
        shape[axis : axis + 1] = [shape[axis] // 2, 2]
        table = table.reshape(shape).sum(axis=axis + 1)
        yield table


def histogram(indices: Array, maps: Maps, counts: tuple[int, int, int], k: int) -> Array:
    """Return how often each value occurs in each context, (contexts, k) int64."""
    contexts = counts[0] * counts[1] * counts[2]
    table = np.zeros(contexts * k, np.int64)
    _symbols.histogram(indices, maps, counts, table)
    return table.reshape(contexts, k)


def _entropy(table: Array) -> float:
    """Return the bits of symbols under each context's own frequencies; the last axis is k."""
    total = table.sum(axis=-1)
    return _sum_log(total) - _sum_log(table)


def _sum_log(counts: Array) -> float:
    return float((counts * np.log2(np.maximum(counts, 1))).sum())


def _classes(
    indices: Array, shape: tuple[int, int, int], k: int, axis: int
) -> tuple[Array, int, Array | None]:
    """Sort the positions of one axis into classes of like statistics.

    Classes are numbered by the bits that their symbols cost under the whole tensor's frequencies,
    so that neighbours are alike and can be merged.

    Returns:
        (size,) int32; the number of classes, a power of 2, some of them empty, 1 where more do not
        pay; and each class's histogram, (classes, k), where it was counted over all indices.
    """
    size, share = shape[axis], 1.0
    if axis and len(indices) > _SAMPLE and shape[0] > 1:
        rows = indices.reshape(shape[0], -1)[:: -(-len(indices) // _SAMPLE)]
        share, shape = len(rows) / shape[0], (len(rows), *shape[1:])
        indices = np.ascontiguousarray(rows).reshape(-1)
    if size < 2 or size * k > min(len(indices), _MOST_AXIS_CELLS):
        return np.zeros(size, np.int32), 1, None
    table = histogram(indices, *one_axis(shape, axis), k)
    energy = table @ _prices(table.sum(axis=0))
    few = min(_MOST_CLASSES[axis], 1 << (size.bit_length() - 1))
    classes = np.empty(size, np.int64)
    classes[np.argsort(energy, kind="stable")] = np.arange(size) * few // size
    for _ in range(_ROUNDS):
        classes = (table @ _prices(_merged(table, classes, few)).T).argmin(axis=1)
    count = np.bincount(classes, minlength=few)
    mean = np.bincount(classes, energy, minlength=few) / np.maximum(count, 1)
    mean[count == 0] = np.inf  # empty ones last
    ranks = np.empty(few, np.int32)
    ranks[np.argsort(mean, kind="stable")] = np.arange(few)
    classes = ranks[classes]
    options = list(_halved(_merged(table, classes, few), 0))
    costs = [
        _entropy(t) / share + t.size * _TABLE_BITS + size * (len(t) - 1).bit_length()
        for t in options
    ]
    best = int(np.argmin(costs))
    return classes >> best, few >> best, options[best] if share == 1 else None


def _merged(table: Array, classes: Array, few: int) -> Array:
    """Return the histogram of each class, (few, k)."""
    result = np.zeros((few, table.shape[1]), np.int64)
    np.add.at(result, classes, table)
    return result


def _prices(counts: Array) -> Array:
    """Return the bits of each symbol in 1/256, integers so that sums are exact everywhere."""
    smooth = counts + 0.5
    bits = np.log2(smooth.sum(axis=-1, keepdims=True) / smooth)
    return np.rint(256 * bits).astype(np.int64)
