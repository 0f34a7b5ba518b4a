"""Checkpoints on disk, ours or safetensors, tensor by tensor, without the model's class."""

import fnmatch
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ._codebook import check_finite, grouped, ungrouped
from ._errors import FileError, PlanError, did_you_mean
from ._file import (
    NAMES,
    Choice,
    Header,
    Progress,
    Tensors,
    dtype_name,
    fill_atomically,
    is_weight,
    reading,
    write,
)
from ._indexed import bits_of
from ._quantize import DEFAULT_RATE, Method, mean_variance, quantized_values
from ._rules import Granularity, check_granularity, check_k


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, as it lies there.

    Attributes:
        name: the tensor's.
        dtype: its type on loading, such as "float32".
        shape: its shape.
        coder: how its indices are coded, or "dense".
        k: values in a codebook; None where it has none.
        codebooks: how many; 0 where it has none.
        bytes: what it takes in the file, without its share of the header.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    coder: str
    k: int | None
    codebooks: int
    bytes: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bits_file(self) -> float:
        """Bits of the file per element."""
        return 8 * self.bytes / max(self.elements, 1)


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: the file.
        size: its bytes.
        stored: its tensors, each once, in their order.
        tied: other names of a tensor, to the name it is stored under.
        tensor: returns a tensor by its name.
    """

    path: Path
    size: int
    stored: tuple[Stored, ...]
    tied: dict[str, str]
    tensor: Callable[[str], Tensor]


@contextmanager
def opened(path: Path) -> Iterator[Checkpoint]:
    """Open a fewbits file or a safetensors file.

    Raises:
        FileError: if it is neither, or cannot be read; also later, when a tensor is damaged.
    """
    if _is_ours(path):
        with reading(path) as reader:
            header = reader.header
            stored = tuple(_ours(header, name) for name in header.tensors())
            yield Checkpoint(path, reader.size, stored, dict(header.tied), reader.tensor)
        return
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            names = list(file.keys())
            size = path.stat().st_size
            stored = tuple(_theirs(name, file.get_slice(name)) for name in names)
            yield Checkpoint(path, size, stored, {}, file.get_tensor)
    except (safetensors.SafetensorError, OSError) as error:
        raise FileError(
            f"{path}: is no fewbits or safetensors file ({error}). Files of torch.save can run"
            " code when they are opened: convert them with safetensors.torch.save_file."
        ) from error


def _is_ours(path: Path) -> bool:
    """Whether a file begins as ours do."""
    try:
        with open(path, "rb") as file:
            return b'"fewbits"' in file.read(64)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}).") from error


def _ours(header: Header, name: str) -> Stored:
    row = header.coded.get(name)
    if row is None:
        entry = header.entries[name]
        dtype = dtype_name(header.cast.get(name, entry.dtype))
        return Stored(name, dtype, entry.shape, "dense", None, 0, entry.stop - entry.start)
    stream = header.indices(name)
    size, books, k = stream.stop - stream.start, 0, None
    if row.coder != "raw":
        book = header.codebook(name)
        size += book.stop - book.start
        books, k = book.shape
    coder = "dense" if row.coder == "raw" else row.coder
    return Stored(name, dtype_name(row.dtype), row.shape, coder, k, books, size)


def _theirs(name: str, piece: Any) -> Stored:
    dtype, shape = piece.get_dtype(), tuple(piece.get_shape())
    try:
        known = dtype_name(dtype)
    except KeyError:
        raise FileError(f"{name}: its type {dtype} is not known here.") from None
    size = math.prod(shape) * getattr(torch, known).itemsize
    return Stored(name, known, shape, "dense", None, 0, size)


def quantize_checkpoint(
    source: Path,
    target: Path,
    *,
    k: int,
    granularity: Granularity = "layer",
    method: Method = "kmeans",
    exclude: Sequence[str] = (),
    coder: Choice = "smallest",
    progress: Progress | None = None,
) -> None:
    """Quantize the weights of a checkpoint without training, and write a fewbits file.

    Weights are the floating-point tensors of two or more axes and 16 bits or more. One that would
    not get smaller stays as it is.

    Args:
        source: a fewbits or safetensors file.
        target: the file to write; replaced if it is there.
        k: values per codebook, 1 … 65,536.
        granularity: one codebook per "layer", or per "channel" of the first axis.
        method: as in `quantize`.
        exclude: globs on names of tensors to leave alone.
        coder: as in `save`.
        progress: as in `save`.

    Raises:
        FileError: if a file cannot be read or written.
        PlanError: if a number or word is not allowed, or a glob matches no weight.
        CodebookError: if a weight is not finite.
    """
    check_k(k)
    if check_granularity(granularity) == "group":
        raise PlanError("granularity 'group' needs the model. Use 'layer' or 'channel' here.")
    with opened(source) as checkpoint:
        weights = [row.name for row in checkpoint.stored if _wide(row)]
        for pattern in exclude:
            if not fnmatch.filter(weights, pattern):
                near = did_you_mean(pattern, weights)
                raise PlanError(f"no weight matches {pattern!r}.{near} `inspect` lists the names.")

        def chosen(row: Stored) -> bool:
            left = not _wide(row) or any(fnmatch.fnmatchcase(row.name, p) for p in exclude)
            return not left and _shrinks(row, k, granularity)

        worth = 0.0
        if method == "entropy":
            taken = (checkpoint.tensor(row.name) for row in checkpoint.stored if chosen(row))
            worth = DEFAULT_RATE * mean_variance(taken)

        def source_of(row: Stored) -> Callable[[], Tensor]:
            if not chosen(row):
                return lambda: checkpoint.tensor(row.name)
            groups = row.shape[0] if granularity == "channel" else 1
            return lambda: _quantized(
                row.name, checkpoint.tensor(row.name), k, groups, method, worth
            )

        sources = {row.name: source_of(row) for row in checkpoint.stored}
        write(target, Tensors(sources, checkpoint.tied), coder=coder, progress=progress)


def _wide(row: Stored) -> bool:
    dtype = getattr(torch, row.dtype)
    return is_weight(torch.empty((0,) * len(row.shape), dtype=dtype)) and dtype.itemsize >= 2


def _shrinks(row: Stored, k: int, granularity: Granularity) -> bool:
    size = getattr(torch, row.dtype).itemsize
    groups = row.shape[0] if granularity == "channel" else 1
    return groups * k * size + row.elements * (k - 1).bit_length() / 8 < row.elements * size


def _quantized(
    name: str, weight: Tensor, k: int, groups: int, method: Method, worth: float
) -> Tensor:
    check_finite(name, weight)
    values = quantized_values(grouped(weight, groups, 0), k, method, worth)
    return ungrouped(values, weight, groups, 0)


def unpack(source: Path, target: Path, *, progress: Progress | None = None) -> None:
    """Write the tensors of a fewbits file as a dense safetensors file.

    Args:
        source: a fewbits or safetensors file.
        target: the file to write; replaced if it is there. Tied tensors are written under each of
            their names.
        progress: as in `save`.

    Raises:
        FileError: if a file cannot be read or written, or a type has no name in safetensors.
    """
    with opened(source) as checkpoint:
        rows = {row.name: row for row in checkpoint.stored}
        for row in rows.values():
            if getattr(torch, row.dtype).is_complex:
                raise FileError(f"{row.name}: safetensors has no {row.dtype}. Load it instead.")
        names = {name: name for name in rows} | checkpoint.tied
        # Wide types first, so that every buffer lies at a multiple of its item size.
        order = sorted(names, key=lambda name: -getattr(torch, rows[names[name]].dtype).itemsize)
        wrapped = progress(order, len(order)) if progress else order

        def fill(file: BinaryIO) -> None:
            file.write(_dense_header([(name, rows[names[name]]) for name in order]))
            for name in wrapped:
                file.write(bits_of(checkpoint.tensor(names[name])).view(np.uint8).data)

        fill_atomically(target, fill)


def _dense_header(rows: list[tuple[str, Stored]]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, row in rows:
        start, end = end, end + row.elements * getattr(torch, row.dtype).itemsize
        table[name] = {
            "dtype": NAMES[getattr(torch, row.dtype)],
            "shape": row.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class Difference:
    """How one tensor differs between two checkpoints.

    Attributes:
        name: the tensor's.
        status: "equal", "differs", "only in A", "only in B", "other shape" or "other type".
        changed: how many elements have other bits; None where they cannot be compared.
        largest: the largest absolute difference; None likewise, NaN where a NaN differs.
        bytes_a: what it takes in the first file; None where it is not there.
        bytes_b: in the second.
    """

    name: str
    status: str
    changed: int | None
    largest: float | None
    bytes_a: int | None
    bytes_b: int | None


def differences(a: Path, b: Path, *, progress: Progress | None = None) -> list[Difference]:
    """Compare two checkpoints tensor by tensor.

    Args:
        a: a fewbits or safetensors file.
        b: another.
        progress: as in `save`.

    Raises:
        FileError: if one cannot be read.
    """
    with opened(a) as first, opened(b) as second:
        left, right = _by_name(first), _by_name(second)
        names = [*left, *(name for name in right if name not in left)]
        wrapped = progress(names, len(names)) if progress else names
        return [_difference(name, first, second, left, right) for name in wrapped]


def _by_name(checkpoint: Checkpoint) -> dict[str, Stored]:
    rows = {row.name: row for row in checkpoint.stored}
    return rows | {alias: rows[name] for alias, name in checkpoint.tied.items()}


def _difference(
    name: str,
    first: Checkpoint,
    second: Checkpoint,
    left: dict[str, Stored],
    right: dict[str, Stored],
) -> Difference:
    a, b = left.get(name), right.get(name)
    sizes = a.bytes if a else None, b.bytes if b else None
    if a is None or b is None:
        return Difference(name, "only in B" if a is None else "only in A", None, None, *sizes)
    if a.shape != b.shape or a.dtype != b.dtype:
        status = "other shape" if a.shape != b.shape else "other type"
        return Difference(name, status, None, None, *sizes)
    x, y = first.tensor(a.name), second.tensor(b.name)
    changed = int((bits_of(x) != bits_of(y)).sum())
    if not changed:
        return Difference(name, "equal", 0, 0.0, *sizes)
    wide = torch.complex128 if x.is_complex() else torch.float64
    largest = float((x.to(wide) - y.to(wide)).abs().max())
    return Difference(name, "differs", changed, largest, *sizes)
