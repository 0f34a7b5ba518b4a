"""Valid files taken apart, changed and put together again with right checksums.

Written from the layout alone, without fewbits: what a stranger with a hex editor can do.
"""

import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HEAD = struct.Struct("<BBHHHHHI")  # of a "rans" stream
HEAD_FIELDS = ("precision", "mantissa", "lanes", "first", "second", "rest", "zero", "words")
_BLANK = '"header_crc32":"00000000"'


@dataclass
class Parts:
    """A file in pieces.

    Attributes:
        metadata: what stands in "__metadata__", without the checksums and the tensors.
        tensors: the list of tensors, as JSON.
        table: the entries.
        data: all that follows the header.
    """

    metadata: dict[str, Any]
    tensors: Any
    table: dict[str, Any]
    data: bytes

    def buffer(self, name: str) -> bytes:
        start, stop = self.table[name]["data_offsets"]
        return self.data[start:stop]

    def put(self, name: str, buffer: bytes) -> None:
        """Replace an entry's bytes and lay out the data anew; a row of bytes gets its length."""
        buffers = {n: self.buffer(n) for n in self.table} | {name: buffer}
        if self.table[name]["dtype"] == "U8" and len(self.table[name]["shape"]) == 1:
            self.table[name]["shape"] = [len(buffer)]
        self.data = b""
        for key in sorted(self.table, key=lambda key: self.table[key]["data_offsets"]):
            start = len(self.data)
            self.data += buffers[key]
            self.table[key]["data_offsets"] = [start, len(self.data)]

    def head(self, name: str, **fields: int) -> None:
        """Change fields of a "rans" stream's head."""
        stream = self.buffer(name)
        values = dict(zip(HEAD_FIELDS, HEAD.unpack_from(stream), strict=True))
        self.put(name, HEAD.pack(*(values | fields).values()) + stream[HEAD.size :])


def split(raw: bytes) -> Parts:
    size = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + size])
    metadata = table.pop("__metadata__")
    tensors = json.loads(metadata["tensors"])
    return Parts({"fewbits": metadata["fewbits"]}, tensors, table, raw[8 + size :])


def dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def join(parts: Parts) -> bytes:
    """Put a file together; every checksum is right, however wrong the rest is."""
    text = parts.tensors if isinstance(parts.tensors, str) else dump(parts.tensors)
    metadata = {
        "fewbits": parts.metadata["fewbits"],
        "header_crc32": "00000000",
        "entry_crc32": checksums(parts),
        "tensors": text,
    } | parts.metadata
    return seal(dump({"__metadata__": metadata} | parts.table).encode("utf-8", "surrogatepass"),
                parts.data)  # fmt: skip


def checksums(parts: Parts) -> str:
    """The checksum of each entry in the order of the data, as far as the offsets make sense."""
    try:
        places = sorted((*row["data_offsets"], name) for name, row in parts.table.items())
        return "".join(f"{zlib.crc32(parts.data[start:stop]):08x}" for start, stop, _ in places)
    except (TypeError, KeyError, ValueError):
        return "00000000" * len(parts.table)


def seal(text: bytes, data: bytes) -> bytes:
    """Put length and checksum on a header in which the checksum is blank, if it has one."""
    text += b" " * (-len(text) % 8)
    blank = len(text).to_bytes(8, "little") + text
    if _BLANK.encode() not in blank:
        return blank + data
    at = blank.find(_BLANK.encode()) + len(_BLANK) - 9
    return blank[:at] + f"{zlib.crc32(blank):08x}".encode() + blank[at + 8 :] + data


def header_of(raw: bytes) -> bytes:
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")]


def retyped(raw: bytes, old: str | bytes, new: str | bytes) -> bytes:
    """Replace characters of the header, then make its length and checksum right."""
    old, new = (t.encode() if isinstance(t, str) else t for t in (old, new))
    text = header_of(raw)
    data = raw[8 + len(text) :]
    at = text.find(b'"header_crc32":"') + len('"header_crc32":"')
    text = text[:at] + b"00000000" + text[at + 8 :]
    assert text.count(old) == 1, text.count(old)
    return seal(text.rstrip(b" ").replace(old, new), data)


def blank(raw: bytes) -> tuple[bytes, bytes]:
    """The text of the header with a blank checksum, and the data."""
    text = header_of(raw)
    return text[:47] + b"00000000" + text[55:], raw[8 + len(text) :]


def changed(raw: bytes, change: Callable[[Parts], Any]) -> bytes:
    """A file with one change and right checksums."""
    parts = split(raw)
    change(parts)
    return join(parts)


def packed(values: list[int], width: int) -> bytes:
    """Integers in `width` bits each, least significant bit first."""
    held = sum(value << (i * width) for i, value in enumerate(values))
    return held.to_bytes(-(-len(values) * width // 8), "little")


def single(
    dtype: str, shape: list[int], coder: str, book: tuple[list[int], bytes], stream: bytes
) -> bytes:
    """A file with nothing but one coded tensor, w, along axis 0.

    Args:
        dtype: of the codebook and the tensor.
        shape: the tensor's.
        coder: how the indices are coded.
        book: shape and bytes of the codebook.
        stream: the coded indices.
    """
    size = len(book[1])
    table = {
        "w:codebook": {"dtype": dtype, "shape": book[0], "data_offsets": [0, size]},
        "w:indices": {"dtype": "U8", "shape": [len(stream)],
                      "data_offsets": [size, size + len(stream)]},
    }  # fmt: skip
    tensors = {"separator": ":", "coded": {"w": [dtype, shape, coder, 0]}, "cast": {}, "tied": {}}
    return join(Parts({"fewbits": "1"}, tensors, table, book[1] + stream))


def rans(lanes: int = 1, words: bytes = b"", tables: bytes = b"", **head: int) -> bytes:
    """A "rans" stream of fresh states; without tables, those of one sure symbol of 16 bits."""
    fields = dict(zip(HEAD_FIELDS, (1, 12, lanes, 1, 1, 1, 0, len(words) // 4), strict=True)) | head
    states = (1 << 32).to_bytes(8, "little") * lanes
    return HEAD.pack(*fields.values()) + (tables or b"\xff\xff") + states + words


def scrambled(rng: random.Random, raw: bytes) -> bytes:
    """Flip, overwrite, insert, delete or repeat a few bytes."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 30))
        how = rng.randrange(6)
        if how < 2 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            data[at : at + size] = rng.randbytes(size)
        elif how == 3:
            data[at:at] = rng.randbytes(size)
        elif how == 4:
            del data[at : at + size]
        else:
            data[at:at] = data[at : at + size]
    return bytes(data)
