"""From a model to a file: tensor by tensor, the file whole or not there."""

import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._errors import FileError, did_you_mean
from .._indexed import Indexed, bits_of, indexed
from .._packed import PACKED
from .._plan import CODEBOOK_SUFFIX, unwrapped
from . import _coders
from ._atomic import fill_atomically
from ._format import NAMES, OTHERS, Coded, Entry, Header, render
from ._parallel import Progress, check_threads, in_order

Source = Callable[[], Tensor]

# A tensor that is no weight is coded only where that saves more than its header entries take.
_ENTRY_BYTES = 256
_MOST_NAMED = 5


@dataclass(frozen=True)
class Tensors:
    """What is to be saved, each tensor once.

    Attributes:
        sources: by name, a function that returns the tensor.
        tied: other names of a tensor, to the name it is saved under.
    """

    sources: Mapping[str, Source]
    tied: Mapping[str, str] = field(default_factory=dict)


def save(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    coder: _coders.Choice = "smallest",
    dense_dtype: torch.dtype | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Save a model whose weights take few distinct values, bit for bit, in few bytes.

    It does not matter who made the values few. Everything else in the state dict is stored too.
    The file is deterministic, and whole or not there.

    Args:
        model: a hardened module, or a state dict.
        path: the file, usually NAME.fewbits; replaced if it is there.
        coder: "smallest" takes the fewest bytes; "fast" decodes at memory speed; "packed" is a
            fixed width, whose weights can be read singly.
        dense_dtype: `torch.float16` or `torch.bfloat16` to store wider floating-point tensors
            that are not clustered in half the bytes, rounded; loading gives their own type again.
        threads: how many tensors to code at a time; up to 4 if not given. The bytes are the same.
        progress: called with an iterable and its length; returns what to iterate over instead.

    Raises:
        FileError: if no weight has few values (harden or quantize first), the model is not
            hardened, a tensor cannot be stored, or the file cannot be written. An earlier file is
            then as it was.
    """
    tensors = _checked(model)
    write(Path(path), tensors, coder=coder, dense_dtype=dense_dtype, threads=threads,
          progress=progress)  # fmt: skip


def write(
    path: Path,
    tensors: Tensors,
    *,
    coder: _coders.Choice = "smallest",
    dense_dtype: torch.dtype | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Save tensors as `save` does, each fetched when its turn comes."""
    if coder not in _coders.CHOICES:
        near = did_you_mean(str(coder), _coders.CHOICES)
        raise FileError(f"coder is {coder!r}.{near} Use one of {', '.join(_coders.CHOICES)}.")
    if dense_dtype not in (None, torch.float16, torch.bfloat16):
        raise FileError(
            f"dense_dtype is {dense_dtype}. Use torch.float16, torch.bfloat16 or None (exact)."
        )
    count = check_threads(threads)
    writer = _Writer(tensors, coder, dense_dtype)
    items = list(tensors.sources.items())
    wrapped = progress(items, len(items)) if progress else items
    fill_atomically(path, lambda file: writer.fill(file, path.parent, wrapped, count))


def _checked(model: nn.Module | Mapping[str, Tensor]) -> Tensors:
    """Return what a model holds, or refuse what cannot be stored."""
    state = unwrapped(model).state_dict() if isinstance(model, nn.Module) else model
    if not isinstance(state, Mapping):
        raise FileError(f"{type(model).__name__} is no model or state dict.")
    seen: dict[Any, str] = {}
    sources: dict[str, Source] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        _check_tensor(name, tensor)
        views = tensor.is_conj(), tensor.is_neg()
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, views)
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        sources[name] = lambda tensor=tensor: tensor
    _refuse_attached(state)
    _refuse_compressed(state)
    return Tensors(sources, tied)


def _check_tensor(name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or name == "__metadata__":
        raise FileError(f"a tensor cannot be named {name!r}. Rename it.")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise FileError(f"{name!r} is no Unicode text. Rename the tensor.") from None
    if not isinstance(tensor, Tensor):
        raise FileError(
            f"{name}: is a {type(tensor).__name__}, not a tensor. Leave it out of the state dict."
        )
    if tensor.layout != torch.strided:
        raise FileError(f"{name}: is sparse ({tensor.layout}). Convert it with .to_dense().")
    if tensor.is_meta:
        raise FileError(f"{name}: is on the meta device, without values. Load the weights first.")
    if tensor.is_quantized or tensor.dtype not in NAMES:
        raise FileError(f"{name}: {tensor.dtype} cannot be stored. Convert it first.")


def _refuse_attached(state: Mapping[str, Tensor]) -> None:
    names = [
        base for name in state if name.endswith(CODEBOOK_SUFFIX)
        and (base := name.removesuffix(CODEBOOK_SUFFIX)) in state
    ]  # fmt: skip
    if names:
        raise FileError(
            f"the model is not hardened: {_counts(state, names)}."
            " Call harden() on its Clustering first."
        )


def _refuse_compressed(state: Mapping[str, Tensor]) -> None:
    end = f"{PACKED}.indices"
    names = [name.removesuffix(end) for name in state if f".{name}".endswith(f".{end}")]
    if names:
        layer = names[0].removesuffix(".") or "the model"
        raise FileError(
            f"the model is compressed: {layer} holds packed indices. Save it before"
            " fewbits.compressed.compress, or call fewbits.compressed.decompress first."
        )


def _counts(state: Mapping[str, Tensor], names: list[str]) -> str:
    """Say how many distinct values the first few of some weights have, and how many there are."""
    said = [
        f"{name} has {len(np.unique(bits_of(state[name]))):,} distinct values"
        f" in {state[name].numel():,} weights"
        for name in names[:_MOST_NAMED]
    ]
    more = f", and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return "; ".join(said) + more


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is of the kind that is clustered: floating point, two or more axes."""
    return tensor.is_floating_point() and tensor.dim() >= 2


@dataclass(frozen=True)
class _Encoded:
    """One tensor after coding.

    Attributes:
        name: the tensor's.
        dtype: its type.
        shape: its shape.
        found: its codebooks, or None where it is stored as it is.
        coder: how the indices are coded.
        stream: the coded indices.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    found: Indexed | None = None
    coder: str = ""
    stream: bytes = b""


class _Writer:
    """Codes tensors and lays them out in one file.

    The header comes first but needs every length, so the coded tensors wait in a nameless file.
    The others are fetched a second time, so that never more than a few are in memory.
    """

    def __init__(self, tensors: Tensors, coder: _coders.Choice, dense_dtype: torch.dtype | None):
        self.tensors, self.dense_dtype = tensors, dense_dtype
        self.coder: _coders.Choice = coder
        self.separator = _separator([*tensors.sources, *tensors.tied])
        self.entries: dict[str, Entry] = {}
        self.coded: dict[str, Coded] = {}
        self.cast: dict[str, str] = {}
        self.end = 0

    def fill(
        self, file: BinaryIO, folder: Path, items: Iterable[tuple[str, Source]], threads: int
    ) -> None:
        """Write the whole file."""
        with tempfile.TemporaryFile(dir=folder) as waiting:
            plain = []
            for encoded in in_order(self._encode, items, threads):
                if encoded.found is None:
                    plain.append(encoded)
                else:
                    self._append(waiting, encoded, encoded.found)
            if not self.coded:
                self._refuse_dense(plain)
            # Wide types first: then every buffer lies at a multiple of its item size.
            plain.sort(key=lambda encoded: -self._stored(encoded).itemsize)
            for encoded in plain:
                self._describe(encoded)
            names = [
                name for tensor in self.tensors.sources
                for name in (tensor, self._part(tensor, "codebook"), self._part(tensor, "indices"))
                if name in self.entries
            ]  # fmt: skip
            header = Header(
                {name: self.entries[name] for name in names},
                self.coded, self.cast, self.tensors.tied, self.separator,
            )  # fmt: skip
            file.write(render(header))
            waiting.seek(0)
            shutil.copyfileobj(waiting, file, 1 << 20)
        for encoded in plain:
            file.write(self._dense(encoded).data)

    def _encode(self, item: tuple[str, Source]) -> _Encoded:
        name, source = item
        tensor = source()
        as_it_is = _Encoded(name, tensor.dtype, tuple(tensor.shape))
        if tensor.dtype in OTHERS.values():
            return as_it_is
        found = indexed(tensor)
        margin = 0 if is_weight(tensor) else _ENTRY_BYTES
        if found is None or found.bytes_fixed + margin >= tensor.numel() * tensor.element_size():
            return as_it_is
        coder, stream = _coders.encode(found, self.coder)
        return _Encoded(name, tensor.dtype, tuple(tensor.shape), found, coder, stream)

    def _append(self, waiting: BinaryIO, encoded: _Encoded, found: Indexed) -> None:
        """Write a clustered tensor's codebook and stream."""
        name, dtype = encoded.name, NAMES[encoded.dtype]
        if encoded.dtype.is_floating_point:
            values = torch.from_numpy(found.codebook.view(np.uint8)).view(encoded.dtype)
            if bool(values.float().isnan().any()):
                warnings.warn(f"{name}: NaN is one of its values; stored as it is.", stacklevel=6)
        self.coded[name] = Coded(dtype, encoded.shape, encoded.coder, found.axis)
        book = found.codebook.tobytes()
        self._enter(self._part(name, "codebook"), dtype, found.codebook.shape, book)
        elements = len(found.indices)
        size = _coders.padded_size(len(encoded.stream), elements, self.end)
        stream = encoded.stream.ljust(size, b"\0")
        self._enter(self._part(name, "indices"), "U8", (size,), stream)
        waiting.write(book)
        waiting.write(stream)

    def _describe(self, encoded: _Encoded) -> None:
        """Enter a tensor that is stored as it is."""
        data = self._dense(encoded)
        dtype = NAMES[self._stored(encoded)]
        if encoded.dtype in OTHERS.values():
            name = self._part(encoded.name, "indices")
            self.coded[encoded.name] = Coded(NAMES[encoded.dtype], encoded.shape, "raw", 0)
            self._enter(name, "U8", (data.nbytes,), data.data)
            return
        if self._stored(encoded) != encoded.dtype:
            self.cast[encoded.name] = NAMES[encoded.dtype]
        self._enter(encoded.name, dtype, encoded.shape, data.data)

    def _enter(self, name: str, dtype: str, shape: tuple[int, ...], data: Any) -> None:
        size = memoryview(data).nbytes
        self.entries[name] = Entry(dtype, shape, self.end, self.end + size, zlib.crc32(data))
        self.end += size

    def _stored(self, encoded: _Encoded) -> torch.dtype:
        """Return the type a tensor is stored in; bytes for one that the container lacks."""
        if encoded.dtype in OTHERS.values():
            return torch.uint8
        narrow = self.dense_dtype
        if narrow and encoded.dtype in (torch.float32, torch.float64):
            return narrow
        return encoded.dtype

    def _dense(self, encoded: _Encoded) -> NDArray[Any]:
        tensor = self.tensors.sources[encoded.name]().detach()
        stored = self._stored(encoded)
        if stored == encoded.dtype or encoded.dtype in OTHERS.values():
            return bits_of(tensor).view(np.uint8)
        narrow = tensor.to(stored)
        lost = torch.isfinite(tensor) & ~torch.isfinite(narrow)
        if bool(lost.any()):
            worst = float(tensor[lost].abs().max())
            raise FileError(
                f"{encoded.name}: {worst:.3g} is too large for {stored}. Use torch.bfloat16, or"
                " leave dense_dtype out."
            )
        return bits_of(narrow).view(np.uint8)

    def _part(self, name: str, what: str) -> str:
        return f"{name}{self.separator}{what}"

    def _refuse_dense(self, plain: list[_Encoded]) -> None:
        """Refuse a model in which no weight has few values."""
        sources = self.tensors.sources
        names = [e.name for e in plain if len(e.shape) >= 2 and e.dtype.is_floating_point]
        if names:
            said = _counts({n: sources[n]() for n in names[:_MOST_NAMED]}, names)
            raise FileError(
                f"no weight has few values: {said}. Train with fewbits.Clustering and harden() it,"
                " or call fewbits.quantize."
            )


def _separator(names: list[str]) -> str:
    """Return what can stand between a name and its part without making another tensor's name."""
    separator = ":"
    taken = set(names)
    while any(f"{n}{separator}{part}" in taken for n in names for part in ("codebook", "indices")):
        separator += ":"
    return separator
