"""From a file to tensors: nothing is believed before it is checked."""

import itertools
import os
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._errors import FileError, printable
from .._indexed import Indexed, bits_of
from .._plan import unwrapped
from . import _coders
from ._atomic import check_path
from ._format import (
    DTYPES,
    OTHERS,
    Coded,
    Damage,
    Entry,
    Header,
    dtype_name,
    header_size,
    parse,
)
from ._parallel import Progress, check_threads, in_order


class Reader:
    """An open file: its header, and its tensors one at a time, from any thread.

    Attributes:
        header: what the file says of its tensors.
        size: bytes of the file.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._lock = file, threading.Lock()
        self.size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        size = header_size(head, self.size)
        text = file.read(size)
        if len(text) != size:
            raise Damage("the file ends inside its header")
        self.header: Header = parse(head + text, self.size)
        self._data = 8 + size

    def tensor(self, name: str) -> Tensor:
        """Return a stored tensor, bit for bit as it was saved.

        Raises:
            Damage: if its bytes are not what the header says, or no such tensor.
        """
        row = self.header.coded.get(name)
        if row is None:
            return self._plain(name)
        out = _empty(row.shape, (DTYPES | OTHERS)[row.dtype])
        if row.coder == "raw":
            self._fill(self.header.part(name, "indices"), self.header.indices(name), bits_of(out))
        else:
            self._decode(name, row, bits_of(out))
        return out

    def _plain(self, name: str) -> Tensor:
        entry = self.header.entries[name]
        out = _empty(entry.shape, DTYPES[entry.dtype])
        bits = bits_of(out)
        self._fill(name, entry, bits)
        _check_bool(name, entry.dtype, bits)
        cast = self.header.cast.get(name)
        return out if cast is None else out.to(DTYPES[cast])

    def indexed(self, name: str) -> Indexed | None:
        """Return a clustered tensor as its codebooks and indices; None for any other.

        Raises:
            Damage: if its bytes are not what the header says.
        """
        row = self.header.coded.get(name)
        if row is None or row.coder == "raw":
            return None
        book, stream = self._parts(name, row)
        try:
            indices = _coders.decode_indices(row.coder, stream, row.shape, book.shape[1])
        except ValueError as error:
            raise Damage(f"{name}: {error}") from error
        sizes = np.full(len(book), book.shape[1], np.int64)
        return Indexed(book, sizes, indices, row.axis, row.shape)

    def _decode(self, name: str, row: Coded, out: NDArray[Any]) -> None:
        book, stream = self._parts(name, row)
        try:
            _coders.decode(row.coder, stream, row.shape, book, row.axis, out)
        except ValueError as error:
            raise Damage(f"{name}: {error}") from error

    def _parts(self, name: str, row: Coded) -> tuple[NDArray[Any], memoryview]:
        """Return a clustered tensor's codebooks, the bits of the values, and its stream."""
        entry, stream = self.header.codebook(name), self.header.indices(name)
        book = np.empty(entry.shape, f"<u{DTYPES[row.dtype].itemsize}")
        self._fill(self.header.part(name, "codebook"), entry, book)
        _check_bool(name, entry.dtype, book.reshape(-1))
        data = np.empty(stream.shape[0], np.uint8)
        self._fill(self.header.part(name, "indices"), stream, data)
        return book, data.data

    def _fill(self, name: str, entry: Entry, out: NDArray[Any]) -> None:
        """Read an entry's bytes into an array of their size."""
        view = out.reshape(-1).view(np.uint8).data
        with self._lock:
            self._file.seek(self._data + entry.start)
            got = self._file.readinto(view) if len(view) else 0  # pyright: ignore[reportAttributeAccessIssue]
        if got != len(view):
            raise Damage(f"{name}: ends at byte {self._data + entry.stop:,}, beyond the file")
        if zlib.crc32(view) != entry.crc32:
            raise Damage(f"{name}: its checksum is wrong")


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:  # torch's way to say that memory is full
        raise MemoryError(str(error)) from error


def _check_bool(name: str, dtype: str, bits: NDArray[Any]) -> None:
    if dtype == "BOOL" and len(bits) and int(bits.max()) > 1:
        raise Damage(f"{name}: a byte of it is neither false nor true")


@contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """Open a file for reading; whatever is wrong with it becomes a `FileError` with its name."""
    check_path(path)
    try:
        with open(path, "rb") as file:
            yield Reader(file)
    except Damage as error:
        raise FileError(
            f"{path}: {printable(str(error))}."
            " The file is damaged or not made by fewbits; get it anew."
        ) from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except MemoryError as error:
        raise FileError(f"{path}: needs more memory than there is.") from error


def load(
    path: str | os.PathLike[str],
    *,
    into: nn.Module | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor] | nn.Module:
    """Load what `save` wrote, bit for bit; see `fewbits.load`."""
    path, count = Path(path), check_threads(threads)
    with reading(path) as reader:
        names = list(reader.header.tensors())
        if into is None:
            wrapped = progress(names, len(names)) if progress else names
            return _with_aliases(
                reader.header, zip(names, in_order(reader.tensor, wrapped, count), strict=True)
            )
        targets = find_targets(path, reader.header, unwrapped(into).state_dict())
        twice = [*names, *names]
        wrapped = iter(progress(twice, len(twice)) if progress else twice)
        # Once to see that all of it is sound, then again for good: two of everything would not
        # fit where one does.
        for _ in in_order(reader.tensor, itertools.islice(wrapped, len(names)), count):
            pass
        check_tied(path, reader, targets)
        with torch.no_grad():
            for name, tensor in zip(names, in_order(reader.tensor, wrapped, count), strict=True):
                for target in targets[name]:
                    target.copy_(tensor)
    return into


def _with_aliases(header: Header, items: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    others: dict[str, list[str]] = {}
    for alias, name in header.tied.items():
        others.setdefault(name, []).append(alias)
    return {key: tensor for name, tensor in items for key in (name, *others.get(name, ()))}


def find_targets(
    path: Path, header: Header, state: dict[str, Any], *, meta: bool = False
) -> dict[str, list[Tensor]]:
    """Return where each stored tensor goes, or refuse a model that differs.

    Args:
        path: for the error.
        header: the file's.
        state: the model's state dict.
        meta: whether its tensors may be without memory.
    """
    stored = {name: _type_of(header, name) for name in header.tensors()}
    wanted = stored | {alias: stored[name] for alias, name in header.tied.items()}
    there = {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for name, t in state.items()
        if isinstance(t, Tensor)
    }
    differences = [f"{printable(name)} is in the file only" for name in wanted if name not in there]
    differences += [f"{name} is in the model only" for name in there if name not in wanted]
    for name in wanted.keys() & there.keys():
        if wanted[name] != there[name]:
            (dtype, shape), (now, form) = wanted[name], there[name]
            differences.append(f"{name} is {dtype} {shape} in the file, {now} {form} in the model")
    differences += [
        f"{name} cannot be written to, {why}" for name, t in state.items()
        if isinstance(t, Tensor) and not (meta and t.is_meta) and (why := _why_fixed(t))
    ]  # fmt: skip
    if differences:
        raise FileError(
            f"{path}: does not fit the model: {'; '.join(sorted(differences))}. Build the model as"
            " it was when it was saved; nothing in it was changed."
        )
    result = {name: [state[name]] for name in stored}
    for alias, name in header.tied.items():
        result[name].append(state[alias])
    return result


def _why_fixed(tensor: Tensor) -> str | None:
    """Return why a tensor of the model cannot be overwritten, or nothing."""
    if tensor.is_meta:
        return "it is on the meta device (to_empty() gives it memory)"
    if tensor.is_inference():
        return "it was made in inference mode"
    if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
        return "its elements share memory"
    return None


def check_tied(path: Path, reader: Reader, targets: dict[str, list[Tensor]]) -> None:
    """Refuse different values for what is one tensor in the model."""
    owners: dict[int, str] = {}
    for name, tensors in targets.items():
        for target in tensors:
            if not target.numel():
                continue
            # Without memory, one tensor is one object.
            place = id(target) if target.is_meta else target.data_ptr()
            first = owners.setdefault(place, name)
            if first != name and not (
                bits_of(reader.tensor(first)).tobytes() == bits_of(reader.tensor(name)).tobytes()
            ):
                both = printable(f"{first} and {name}")
                raise FileError(
                    f"{path}: {both} are one tensor in the model, and differ in the file."
                    " Untie them first; nothing in the model was changed."
                )


def _type_of(header: Header, name: str) -> tuple[str, tuple[int, ...]]:
    row = header.coded.get(name)
    if row is not None:
        return dtype_name(row.dtype), row.shape
    entry = header.entries[name]
    return dtype_name(header.cast.get(name, entry.dtype)), entry.shape
