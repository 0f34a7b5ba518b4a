"""From a tensor of few distinct values to its codebook and an index per element, bit for bit."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _symbols

MOST_VALUES = 65_536
Maps = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
# Cells of the table of channels x values that says which values each channel has.
_MOST_CELLS = 1 << 22


@dataclass(frozen=True)
class Indexed:
    """A tensor as codebooks and indices.

    Attributes:
        codebook: (G, K) unsigned integers, the bits of the values; each row ascending by value, its
            last value repeated where it has fewer than K.
        sizes: (G,) how many distinct values each row has.
        indices: (N,) uint16, in row-major order of the tensor.
        axis: the axis that is cut into G equal runs of channels.
        shape: the tensor's.
    """

    codebook: NDArray[Any]
    sizes: NDArray[np.int64]
    indices: NDArray[np.uint16]
    axis: int
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Bits of a fixed-width index."""
        return _width(self.codebook.shape[1])

    @property
    def bytes_fixed(self) -> int:
        """Bytes of the packed indices and the codebooks."""
        groups, k = self.codebook.shape
        return _bytes_fixed(len(self.indices), groups, k, self.codebook.itemsize)

    def layout(self) -> tuple[int, int, int]:
        """Return the elements' shape as (outer, groups, run)."""
        return layout(self.shape, self.axis, len(self.codebook))


def layout(shape: tuple[int, ...], axis: int, groups: int) -> tuple[int, int, int]:
    """Return (outer, groups, run) for an axis cut into groups; row-major order is kept."""
    outer = math.prod(shape[:axis])
    return outer, groups, math.prod(shape[axis:]) // groups


def axes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return a shape as (first axis, second axis, all others)."""
    first, second = (*shape, 1, 1)[:2]
    return first, second, math.prod(shape[2:])


def one_axis(shape: tuple[int, int, int], axis: int) -> tuple[Maps, tuple[int, int, int]]:
    """Return the classes that tell the positions of one of three axes apart, and their numbers."""
    maps = [np.zeros(size, np.int32) for size in shape]
    counts = [1, 1, 1]
    maps[axis], counts[axis] = np.arange(shape[axis], dtype=np.int32), shape[axis]
    return (maps[0], maps[1], maps[2]), (counts[0], counts[1], counts[2])


def bits_of(tensor: Tensor) -> NDArray[Any]:
    """Return the elements' bits in row-major order: (N,) unsigned, without a copy if possible.

    Complex numbers of 16 bytes come as two elements of 8.
    """
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).reshape(-1)
    size = tensor.element_size()
    if not tensor.numel():
        return np.empty(0, f"<u{size}")
    return tensor.view(torch.uint8).numpy().view(f"<u{size}")


def indexed(tensor: Tensor, groups: tuple[int, int] | None = None) -> Indexed | None:
    """Find the codebooks under which a tensor takes the least room at a fixed width.

    One codebook for the whole tensor is tried, and one per channel, or per group of neighbouring
    channels of one size, along the first two axes.

    Args:
        tensor: any real type and shape.
        groups: take this number of codebooks along this axis instead.

    Returns:
        The codebooks and indices, or None where the tensor has more than 65,536 distinct values
        in a group, or is empty.
    """
    bits = bits_of(tensor)
    if not len(bits) or tensor.is_complex():
        return None
    shape = tuple(tensor.shape)
    if groups is not None:
        return _index(bits, tensor.dtype, shape, groups[1], groups[0])
    whole = _index(bits, tensor.dtype, shape, 0, 1)
    best = whole
    for axis in range(min(2, len(shape))) if len(shape) > 1 else ():
        if whole is not None:
            count = _best_groups(whole, axis)
            if count == 1:
                continue
            found = _index(bits, tensor.dtype, shape, axis, count)
        else:
            found = _grow_groups(bits, tensor.dtype, shape, axis)
        if found and (best is None or found.bytes_fixed < best.bytes_fixed):
            best = found
    return best


def _width(k: int | np.integer) -> int:
    """Return the bits that tell k values apart."""
    return (int(k) - 1).bit_length()


def _bytes_fixed(n: int, groups: int, k: int, size: int) -> int:
    return math.ceil(n * _width(k) / 8) + groups * k * size


def _index(
    bits: NDArray[Any], dtype: torch.dtype, shape: tuple[int, ...], axis: int, groups: int
) -> Indexed | None:
    if groups == 1:
        found = _distinct(bits, dtype)
        if found is None:
            return None
        return Indexed(found[0][None], np.array([len(found[0])]), found[1], axis, shape)
    outer, _, run = layout(shape, axis, groups)
    indices = np.empty((outer, groups, run), np.uint16)
    rows = []
    view = bits.reshape(outer, groups, run)
    for group in range(groups):
        found = _distinct(np.ascontiguousarray(view[:, group]).reshape(-1), dtype)
        if found is None:
            return None
        rows.append(found[0])
        indices[:, group] = found[1].reshape(outer, run)
    sizes = np.array([len(row) for row in rows])
    codebook = np.stack([np.pad(row, (0, int(sizes.max()) - len(row)), "edge") for row in rows])
    return Indexed(codebook, sizes, indices.reshape(-1), axis, shape)


def _distinct(
    bits: NDArray[Any], dtype: torch.dtype
) -> tuple[NDArray[Any], NDArray[np.uint16]] | None:
    """Return the distinct values, ascending, and each element's index; None if too many."""
    most = min(len(bits), MOST_VALUES)
    values, indices = np.empty(most, np.uint64), np.empty(len(bits), np.uint16)
    count = _symbols.distinct(bits, most, indices, values)
    if count < 0:
        return None
    found = values[:count].astype(bits.dtype)
    order = np.argsort(_sort_key(found, dtype))
    ranks = np.empty(count, np.uint16)
    ranks[order] = np.arange(count)
    _symbols.remap(indices, ranks)
    return found[order], indices


def _sort_key(bits: NDArray[Any], dtype: torch.dtype) -> NDArray[Any]:
    """Unsigned integers in the order of the values; -0.0 before 0.0, NaN at the ends."""
    if dtype == torch.bool or not dtype.is_signed:
        return bits
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    if not dtype.is_floating_point:
        return bits ^ sign
    return np.where(bits & sign, ~bits, bits | sign)


def _best_groups(whole: Indexed, axis: int) -> int:
    """Return the number of codebooks along an axis that takes the least room."""
    sizes, k = axes(whole.shape), whole.codebook.shape[1]
    channels = sizes[axis]
    if channels < 2 or channels * k > _MOST_CELLS:
        return 1
    first = whole.indices.reshape(sizes)[0] if axis == 0 else whole.indices.reshape(sizes)[:, 0]
    if _width(np.count_nonzero(np.bincount(first.reshape(-1)))) == whole.width:
        return 1  # some channel needs the whole width; most often it is the first
    table = np.zeros(channels * k, np.int64)
    _symbols.histogram(whole.indices, *one_axis(sizes, axis), table)
    there = table.reshape(channels, k) > 0

    def room(groups: int) -> int:
        most = int(there.reshape(groups, -1, k).any(axis=1).sum(axis=1).max())
        return _bytes_fixed(len(whole.indices), groups, most, whole.codebook.itemsize)

    if _width(there.sum(axis=1).max()) == whole.width:
        return 1
    return min((g for g in range(1, channels + 1) if channels % g == 0), key=room)


def _grow_groups(
    bits: NDArray[Any], dtype: torch.dtype, shape: tuple[int, ...], axis: int
) -> Indexed | None:
    """Index channels of a tensor with too many values in all, in ever larger groups."""
    channels = shape[axis]
    outer, _, run = layout(shape, axis, channels)
    first = np.ascontiguousarray(bits.reshape(outer, channels, run)[:, 0]).reshape(-1)
    values = np.empty(max(1, len(first) // 2), np.uint64)
    if _symbols.distinct(first, len(values), np.empty(len(first), np.uint16), values) < 0:
        return None  # the first channel alone rules it out
    best = None
    for groups in (g for g in range(channels, 1, -1) if channels % g == 0):
        found = _index(bits, dtype, shape, axis, groups)
        if found is None or (best and found.bytes_fixed >= best.bytes_fixed):
            break
        best = found
    return best
