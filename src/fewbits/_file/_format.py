"""The header of a file, to and from bytes. Pure; docs/format.md is the specification.

The layout is that of safetensors: the header's length in 8 bytes, a header of JSON, then the raw
buffers. What safetensors does not know stands in its metadata.
"""

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .._indexed import MOST_VALUES
from ._coders import CODERS, MOST_ELEMENTS_PER_BYTE

VERSION = 1
MOST_HEADER = 100_000_000  # bytes, as safetensors has it
_START = '{"__metadata__":{"fewbits":"'
_CHECK = '","header_crc32":"'
_METADATA = ("fewbits", "header_crc32", "entry_crc32", "tensors")
MOST_SIZE = 1 << 48  # elements of a tensor, bytes of a file: no product below overflows 64 bits

# What every safetensors reader knows. Other types are kept as bytes.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
OTHERS: dict[str, torch.dtype] = {
    str(getattr(torch, name)).removeprefix("torch."): getattr(torch, name)
    for name in ("complex32", "complex64", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz",
                 "float8_e8m0fnu")
    if hasattr(torch, name)
}  # fmt: skip
# By the names that torch gives them, without "torch.".
_TORCH_NAMES = {n: str(dtype).removeprefix("torch.") for n, dtype in (DTYPES | OTHERS).items()}
NAMES = {dtype: name for name, dtype in (DTYPES | OTHERS).items()}
FLOATS = {"F64", "F32", "F16", "BF16"}


def dtype_name(name: str) -> str:
    """Return torch's name of a type, such as "float32", from the file's."""
    return _TORCH_NAMES[name]


class Damage(Exception):
    """What is wrong with a file's bytes, and where; without the file's name."""


@dataclass(frozen=True)
class Entry:
    """One buffer of the file.

    Attributes:
        dtype: a name in `DTYPES`.
        shape: its shape.
        start: first byte, counted from the end of the header.
        stop: the byte after its last.
        crc32: of its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    crc32: int


@dataclass(frozen=True)
class Coded:
    """A tensor that is not simply an entry.

    Attributes:
        dtype: a name in `DTYPES` or `OTHERS`.
        shape: the tensor's.
        coder: "raw" for a type unknown to safetensors, or how the indices are coded.
        axis: which axis the codebooks run along.
    """

    dtype: str
    shape: tuple[int, ...]
    coder: str
    axis: int


@dataclass(frozen=True)
class Header:
    """All that a file says of its tensors.

    Attributes:
        entries: the buffers by name, in the order of the tensors.
        coded: the tensors that are not entries themselves.
        cast: the type on loading, where it is not the entry's.
        tied: other names of a tensor, to the name it is stored under.
        separator: stands between a tensor's name and "codebook" or "indices".
    """

    entries: Mapping[str, Entry]
    coded: Mapping[str, Coded] = field(default_factory=dict)
    cast: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    separator: str = ":"

    def codebook(self, name: str) -> Entry:
        """Return the entry of a clustered tensor's codebook."""
        return self.entries[self.part(name, "codebook")]

    def indices(self, name: str) -> Entry:
        """Return the entry of a coded tensor's stream."""
        return self.entries[self.part(name, "indices")]

    def part(self, name: str, what: str) -> str:
        """Return the name of a coded tensor's entry."""
        return f"{name}{self.separator}{what}"

    def tensors(self) -> dict[str, Coded | Entry]:
        """Return what is stored, each tensor once, in the order of the model."""
        result: dict[str, Coded | Entry] = {}
        owner = {self.part(n, what): n for n in self.coded for what in ("codebook", "indices")}
        for key, entry in self.entries.items():
            name = owner.get(key)
            result[key if name is None else name] = entry if name is None else self.coded[name]
        return result


def render(header: Header) -> bytes:
    """Return the header's bytes with the length before them; a multiple of 8 long.

    Raises:
        UnicodeEncodeError: if a name has no UTF-8 (a lone surrogate).
    """
    tensors = {
        "separator": header.separator,
        "coded": {n: [c.dtype, list(c.shape), c.coder, c.axis] for n, c in header.coded.items()},
        "cast": dict(header.cast),
        "tied": dict(header.tied),
    }
    by_place = sorted(header.entries.values(), key=lambda entry: (entry.start, entry.stop))
    metadata = {
        "fewbits": str(VERSION),
        "header_crc32": "00000000",
        "entry_crc32": "".join(f"{entry.crc32:08x}" for entry in by_place),
        "tensors": _dump(tensors),
    }
    table = {
        name: {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.start, e.stop]}
        for name, e in header.entries.items()
    }
    text = _dump({"__metadata__": metadata} | table).encode()
    text += b" " * (-len(text) % 8)
    blank = len(text).to_bytes(8, "little") + text
    at = 8 + len(f"{_START}{VERSION}{_CHECK}")
    return blank[:at] + f"{zlib.crc32(blank):08x}".encode() + blank[at + 8 :]


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def header_size(head: bytes, file_size: int) -> int:
    """Return the length of the header from the file's first 8 bytes.

    Raises:
        Damage: if there cannot be such a header.
    """
    if len(head) < 8:
        raise Damage(f"the file has {file_size:,} bytes, too few for a header")
    size = int.from_bytes(head, "little")
    if size > file_size - 8:
        raise Damage(f"the header ends at byte {size + 8:,}, the file at {file_size:,}")
    if size > MOST_HEADER:
        raise Damage(f"the header has {size:,} bytes; at most {MOST_HEADER:,} are allowed")
    return size


def parse(head: bytes, file_size: int) -> Header:
    """Check every rule of the format that concerns the header, and return it.

    Args:
        head: the first bytes of the file, header included.
        file_size: bytes of the whole file.

    Raises:
        Damage: if a rule is broken.
    """
    text = head[8:]
    if not text.startswith(_START.encode()):
        raise Damage("it does not begin as a fewbits file does")
    version, quote, _ = text[len(_START) : len(_START) + 12].partition(b'"')
    if not quote or not version.isdigit():
        raise Damage("the format version cannot be read")
    if int(version) > VERSION:
        raise Damage(f"format version {int(version)} is newer than {VERSION}; upgrade fewbits")
    if version != str(VERSION).encode():
        raise Damage(f"there is no format version {version.decode()!r}")
    at = 8 + len(f"{_START}{VERSION}{_CHECK}")
    blank = head[:at] + b"00000000" + head[at + 8 :]
    if head[at : at + 8] != f"{zlib.crc32(blank):08x}".encode():
        raise Damage("the header's checksum is wrong")
    try:
        content = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Damage(f"the header is not JSON ({error})") from error
    metadata = content.pop("__metadata__")
    if not isinstance(metadata, dict) or tuple(metadata) != _METADATA:
        raise Damage(f"the metadata are not {', '.join(_METADATA)}")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise Damage("the metadata are not strings")
    if len(metadata["header_crc32"]) != 8:
        raise Damage("the header's checksum is not eight digits")
    entries = _entries(content, metadata["entry_crc32"], file_size - len(head))
    return _described(entries, metadata["tensors"])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name[:100]!r} stands twice")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the name {name[:100]!r} is no Unicode text") from None
        result[name] = value
    return result


def _shape(value: Any, name: str) -> tuple[int, ...]:
    whole = isinstance(value, list) and len(value) <= 64 and all(_is_count(v) for v in value)
    if not whole or math.prod(max(v, 1) for v in value) > MOST_SIZE:
        raise Damage(f"{name}: {str(value)[:100]} is no shape")
    return tuple(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_SIZE


def _entries(content: dict[str, Any], checks: str, data_size: int) -> dict[str, Entry]:
    """Return the entries; they must tile the data without gap or overlap."""
    if len(checks) != 8 * len(content):
        raise Damage(f"{len(checks):,} digits of checksums for {len(content):,} entries")
    rows = []
    for name, row in content.items():
        if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
            raise Damage(f"{name}: the entry is not dtype, shape and data_offsets")
        dtype, shape, offsets = row["dtype"], _shape(row["shape"], name), row["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise Damage(f"{name}: there is no dtype {str(dtype)[:100]!r}")
        if not isinstance(offsets, list) or [_is_count(o) for o in offsets] != [True, True]:
            raise Damage(f"{name}: {str(offsets)[:100]} are no offsets")
        size = math.prod(shape) * DTYPES[dtype].itemsize
        if offsets[1] - offsets[0] != size:
            raise Damage(f"{name}: bytes {offsets[0]:,} … {offsets[1]:,} for {size:,} bytes")
        rows.append((offsets[0], offsets[1], name, dtype, shape))
    found: dict[str, Entry] = {}
    end = 0
    for number, (start, stop, name, dtype, shape) in enumerate(sorted(rows)):
        if start != end:
            raise Damage(f"{name}: begins at byte {start:,} of the data, not at {end:,}")
        digits = checks[8 * number : 8 * number + 8]
        if not set(digits) <= set("0123456789abcdef"):
            raise Damage(f"{name}: the checksum {digits!r} is not hexadecimal")
        found[name] = Entry(dtype, shape, start, stop, int(digits, 16))
        end = stop
    if end != data_size:
        raise Damage(f"the data end at byte {end:,}, the file has {data_size:,} bytes of data")
    return {name: found[name] for name in content}


def _described(entries: dict[str, Entry], text: str) -> Header:
    """Check what the metadata say of coded, cast and tied tensors."""
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Damage(f"the list of tensors is not JSON ({error})") from error
    if not isinstance(content, dict) or list(content) != ["separator", "coded", "cast", "tied"]:
        raise Damage("the list of tensors is not separator, coded, cast and tied")
    separator, coded, cast, tied = content.values()
    if not isinstance(separator, str) or not all(isinstance(d, dict) for d in (coded, cast, tied)):
        raise Damage("the list of tensors has wrong types")
    rows = {name: _coded(name, row) for name, row in coded.items()}
    header = Header(entries, rows, cast, tied, separator)
    parts = set()
    for name, row in rows.items():
        parts |= _check_parts(header, name, row)
    plain = entries.keys() - parts
    for name, row in rows.items():
        if name in entries:
            raise Damage(f"{name}: stored twice")
        book = header.part(name, "codebook")
        if row.coder == "raw" and book in entries:
            raise Damage(f"{book}: {name} has no codebook")
    for name, dtype in cast.items():
        if name not in plain or entries[name].dtype not in FLOATS or dtype not in list(FLOATS):
            raise Damage(f"{name}: cannot be cast to {str(dtype)[:100]!r}")
    for alias, name in tied.items():
        if not isinstance(name, str) or (name not in plain and name not in rows):
            raise Damage(f"{alias}: tied to {str(name)[:100]!r}, which is not there")
        if alias in plain or alias in rows:
            raise Damage(f"{alias}: stored and tied")
    return header


def _coded(name: str, row: Any) -> Coded:
    if not isinstance(row, list) or len(row) != 4:
        raise Damage(f"{name}: the description is not dtype, shape, coder and axis")
    dtype, shape, coder, axis = row[0], _shape(row[1], name), row[2], row[3]
    known = OTHERS if coder == "raw" else DTYPES
    if not isinstance(dtype, str) or dtype not in known:
        raise Damage(f"{name}: there is no dtype {str(dtype)[:100]!r}")
    if coder not in ("raw", *CODERS):
        raise Damage(f"{name}: there is no coder {str(coder)[:100]!r}")
    if type(axis) is not int or not 0 <= axis < max(1, len(shape)):
        raise Damage(f"{name}: there is no axis {str(axis)[:100]}")
    return Coded(dtype, shape, coder, axis)


def _check_parts(header: Header, name: str, row: Coded) -> set[str]:
    """Check a coded tensor's entries against each other; return their names."""
    indices = header.part(name, "indices")
    if indices not in header.entries:
        raise Damage(f"{name}: has no entry {indices!r}")
    stream = header.indices(name)
    if stream.dtype != "U8" or len(stream.shape) != 1:
        raise Damage(f"{indices}: is no row of bytes")
    elements = math.prod(row.shape)
    if row.coder == "raw":
        if stream.shape[0] != elements * OTHERS[row.dtype].itemsize:
            raise Damage(f"{name}: {stream.shape[0]:,} bytes for {elements:,} elements")
        return {indices}
    codebook = header.part(name, "codebook")
    if codebook not in header.entries:
        raise Damage(f"{name}: has no entry {codebook!r}")
    book = header.codebook(name)
    if book.dtype != row.dtype or len(book.shape) != 2 or not 1 <= book.shape[1] <= MOST_VALUES:
        raise Damage(f"{codebook}: is no codebook of {row.dtype}")
    channels = (*row.shape, 1)[row.axis]
    if book.shape[0] < 1 or channels % book.shape[0]:
        raise Damage(f"{name}: {book.shape[0]:,} codebooks for {channels:,} channels")
    if not 1 <= elements <= MOST_ELEMENTS_PER_BYTE * stream.shape[0]:
        raise Damage(f"{name}: {elements:,} elements in {stream.shape[0]:,} bytes")
    return {codebook, indices}
