"""Files with one wrong piece and right checksums against what a reader must do: refuse them.

The rules R9 to R30 of docs/format.md, which are about the entries and the list of tensors.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import pytest
from damage import Parts
from test_malformed import ONE, refused, valid

Change = Callable[[Parts], Any]


def put(value: Any, *place: str | int) -> Change:
    """Set a value somewhere below "table", "tensors" or "metadata"."""

    def change(parts: Parts) -> None:
        inside: Any = {"table": parts.table, "tensors": parts.tensors, "metadata": parts.metadata}
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = value

    return change


def entry(what: str, value: Any, name: str = "i") -> Change:
    return put(value, "table", name, what)


def row(number: int, value: Any, name: str = "w") -> Change:
    return put(value, "tensors", "coded", name, number)


def without(what: str, name: str) -> Change:
    return lambda parts: parts.table[name].pop(what)


def move(name: str, start: int, stop: int) -> Change:
    """Move both ends of an entry."""

    def change(parts: Parts) -> None:
        first, last = parts.table[name]["data_offsets"]
        parts.table[name]["data_offsets"] = [first + start, last + stop]

    return change


def add(name: str, dtype: str, shape: list[int], buffer: bytes) -> Change:
    """Append an entry."""

    def change(parts: Parts) -> None:
        start = len(parts.data)
        parts.table[name] = {"dtype": dtype, "shape": shape,
                             "data_offsets": [start, start + len(buffer)]}  # fmt: skip
        parts.data += buffer

    return change


def book(dtype: str, shape: list[int], buffer: bytes) -> Change:
    """Give w another codebook."""

    def change(parts: Parts) -> None:
        parts.table["w:codebook"] |= {"dtype": dtype, "shape": shape}
        parts.put("w:codebook", buffer)

    return change


def rename(old: str, new: str) -> Change:
    def change(parts: Parts) -> None:
        parts.table[new] = parts.table.pop(old)

    return change


def tensors(text: str) -> Change:
    def change(parts: Parts) -> None:
        parts.tensors = text

    return change


def grow(parts: Parts) -> None:
    parts.data += b"\0"


def shrink(parts: Parts) -> None:
    parts.data = parts.data[:-1]


# For each rule: the one thing that is wrong, and what is said of it and where.
PIECES: list[tuple[str, Change, str]] = [
    ("R9", tensors(""), "list of tensors is not JSON"),
    ("R9", tensors("[" * 50_000), "list of tensors is not JSON"),
    ("R9", tensors('"coded"'), "not separator, coded, cast and tied"),
    ("R9", tensors("[]"), "not separator, coded, cast and tied"),
    ("R9", tensors('{"separator":":","coded":{},"cast":{}}'), "not separator, coded, cast and"),
    ("R9", tensors('{"coded":{},"separator":":","cast":{},"tied":{}}'), "not separator, coded, ca"),
    ("R9", put({}, "tensors", "more"), "not separator, coded, cast and tied"),
    ("R9", put(5, "tensors", "separator"), "list of tensors has wrong types"),
    ("R9", put([], "tensors", "coded"), "list of tensors has wrong types"),
    ("R9", put(None, "tensors", "cast"), "list of tensors has wrong types"),
    ("R9", put("w", "tensors", "tied"), "list of tensors has wrong types"),
    ("R10", put("", "metadata", "entry_crc32"), "0 digits of checksums for 8 entries"),
    ("R10", put("0" * 63, "metadata", "entry_crc32"), "63 digits of checksums for 8 entries"),
    ("R10", put("0" * 72, "metadata", "entry_crc32"), "72 digits of checksums for 8 entries"),
    ("R10", put("0000000G" * 8, "metadata", "entry_crc32"), "'0000000G' is not hexadecimal"),
    ("R10", put("0000000A" * 8, "metadata", "entry_crc32"), "'0000000A' is not hexadecimal"),
    ("R10", put("00 0_00+" * 8, "metadata", "entry_crc32"), "'00 0_00.' is not hexadecimal"),
    ("R11", put(["I64", [3], [0, 24]], "table", "i"), "i: the entry is not dtype, shape and"),
    ("R11", put(None, "table", "i"), "i: the entry is not dtype, shape and data_offsets"),
    ("R11", without("shape", "i"), "i: the entry is not dtype, shape and data_offsets"),
    ("R11", entry("more", 0), "i: the entry is not dtype, shape and data_offsets"),
    ("R12", entry("dtype", "F4"), "i: there is no dtype 'F4'"),
    ("R12", entry("dtype", "complex64"), "i: there is no dtype 'complex64'"),
    ("R12", entry("dtype", "i64"), "i: there is no dtype 'i64'"),
    ("R12", entry("dtype", 5), "i: there is no dtype '5'"),
    ("R12", entry("dtype", ["I64"]), "i: there is no dtype"),
    *[
        ("R13", change, said)
        for shape in ([-3], [3.0], [True, 3], ["3"], [[3]], 3, None, {}, [3, float("nan")],
                      [float("inf")], [1] * 64 + [3], [1 << 49], [1 << 24, (1 << 24) + 1],
                      [0, 1 << 49], [10**4000], [1 << 32] * 64)
        for change, said in ((entry("shape", shape), "i: .*is no shape"),
                             (row(1, shape), "w: .*is no shape"))
    ],
    ("R14", entry("data_offsets", [0]), "i: .* are no offsets"),
    ("R14", entry("data_offsets", [0, 24, 24]), "i: .* are no offsets"),
    ("R14", entry("data_offsets", 24), "i: .* are no offsets"),
    ("R14", entry("data_offsets", [0.0, 24.0]), "i: .* are no offsets"),
    ("R14", entry("data_offsets", [False, 24]), "i: .* are no offsets"),
    ("R14", entry("data_offsets", ["0", "24"]), "i: .* are no offsets"),
    ("R14", entry("data_offsets", [-24, 0]), "i: .* are no offsets"),
    ("R14", entry("data_offsets", [1 << 64, (1 << 64) + 24]), "i: .* are no offsets"),
    ("R14", entry("data_offsets", [(1 << 48) - 23, (1 << 48) + 1]), "i: .* are no offsets"),
    ("R14", entry("data_offsets", [24, 0]), "i: bytes 24 … 0 for 24 bytes"),
    ("R14", entry("data_offsets", [0, 1 << 48]), "i: bytes 0 … 281,474,976,710,656 for 24 bytes"),
    ("R14", entry("shape", [4]), "i: bytes .* for 32 bytes"),
    ("R14", entry("dtype", "I32"), "i: bytes .* for 12 bytes"),
    ("R15", move("w:codebook", 1, 1), "w:codebook: begins at byte 1 of the data, not at 0"),
    ("R15", move("i", -8, -8), "i: begins at byte .* of the data, not at"),
    ("R15", move("i", 8, 8), "begins at byte .* of the data, not at"),
    ("R15", entry("data_offsets", [1 << 47, (1 << 47) + 24]), "begins at byte .*, not at"),
    ("R16", grow, "the data end at byte .*, the file has .* bytes of data"),
    ("R16", shrink, "the data end at byte .*, the file has .* bytes of data"),
    ("R17", put(["F32", [10, 6], "packed"], "tensors", "coded", "w"), "w: the description is not"),
    ("R17", put(["F32", [60], "packed", 0, 0], "tensors", "coded", "w"), "w: the description is"),
    ("R17", put({"0": 1, "1": 2, "2": 3, "3": 4}, "tensors", "coded", "w"), "w: the description"),
    ("R17", put("four", "tensors", "coded", "w"), "w: the description is not dtype, shape, coder"),
    ("R18", row(0, "F31"), "w: there is no dtype 'F31'"),
    ("R18", row(0, "complex64"), "w: there is no dtype 'complex64'"),
    ("R18", row(0, ["F32"]), "w: there is no dtype"),
    ("R18", row(0, "F32", "c"), "c: there is no dtype 'F32'"),
    ("R19", row(2, "lzma"), "w: there is no coder 'lzma'"),
    ("R19", row(2, None), "w: there is no coder 'None'"),
    ("R19", row(2, ["packed"]), "w: there is no coder"),
    ("R20", row(3, -1), "w: there is no axis -1"),
    ("R20", row(3, 2), "w: there is no axis 2"),
    ("R20", row(3, 1 << 70), "w: there is no axis 1180591620717411303424"),
    ("R20", row(3, 0.0), "w: there is no axis 0.0"),
    ("R20", row(3, False), "w: there is no axis False"),
    ("R20", row(3, None), "w: there is no axis None"),
    ("R20", row(3, 1, "c"), "c: there is no axis 1"),
    ("R20", put(["F32", [], "packed", 1], "tensors", "coded", "w"), "w: there is no axis 1"),
    ("R21", rename("w:indices", "x"), "w: has no entry 'w:indices'"),
    ("R21", rename("w:codebook", "x"), "w: has no entry 'w:codebook'"),
    ("R21", rename("c:indices", "x"), "c: has no entry 'c:indices'"),
    ("R21", put(["F32", [1], "packed", 0], "tensors", "coded", "n"), "n: has no entry 'n:indices'"),
    ("R21", put("::", "tensors", "separator"), "w: has no entry 'w::indices'"),
    ("R22", entry("dtype", "I8", "w:indices"), "w:indices: is no row of bytes"),
    ("R22", entry("shape", [4, 7], "w:indices"), "w:indices: is no row of bytes"),
    ("R22", entry("dtype", "BOOL", "c:indices"), "c:indices: is no row of bytes"),
    ("R23", row(1, [3], "c"), "c: 16 bytes for 3 elements"),
    ("R23", row(1, [1], "c"), "c: 16 bytes for 1 elements"),
    ("R23", row(1, [0, 2], "c"), "c: 16 bytes for 0 elements"),
    ("R24", entry("dtype", "I32", "w:codebook"), "w:codebook: is no codebook of F32"),
    ("R24", row(0, "F64"), "w:codebook: is no codebook of F64"),
    ("R24", entry("shape", [5], "w:codebook"), "w:codebook: is no codebook of F32"),
    ("R24", entry("shape", [1, 1, 5], "w:codebook"), "w:codebook: is no codebook of F32"),
    ("R24", book("F32", [1, 0], b""), "w:codebook: is no codebook of F32"),
    ("R24", book("F32", [1, 65_537], bytes(4 * 65_537)), "w:codebook: is no codebook of F32"),
    ("R25", book("F32", [3, 5], bytes(60)), "w: 3 codebooks for 10 channels"),
    ("R25", book("F32", [20, 5], bytes(400)), "w: 20 codebooks for 10 channels"),
    ("R25", book("F32", [0, 5], b""), "w: 0 codebooks for 10 channels"),
    ("R25", put(["F32", [], "packed", 0], "tensors", "coded", "g"), "g: 4 codebooks for 1 channel"),
    ("R26", row(1, [10, 0]), "w: 0 elements in 28 bytes"),
    ("R26", row(1, [10, 11_469]), "w: 114,690 elements in 28 bytes"),
    ("R26", row(1, [1 << 48]), "w: 281,474,976,710,656 elements in 28 bytes"),
    ("R27", add("w", "F32", [1], ONE), "w: stored twice"),
    ("R27", add("c", "F32", [1], ONE), "c: stored twice"),
    ("R28", put("F32", "tensors", "cast", "w"), "w: cannot be cast to 'F32'"),
    ("R28", put("F64", "tensors", "cast", "w:codebook"), "w:codebook: cannot be cast to 'F64'"),
    ("R28", put("F32", "tensors", "cast", "nowhere"), "nowhere: cannot be cast to 'F32'"),
    ("R28", put("F32", "tensors", "cast", "t"), "t: cannot be cast to 'F32'"),
    ("R28", put("F32", "tensors", "cast", "i"), "i: cannot be cast to 'F32'"),
    ("R28", put("I64", "tensors", "cast", "b"), "b: cannot be cast to 'I64'"),
    ("R28", put("F8_E4M3", "tensors", "cast", "b"), "b: cannot be cast to 'F8_E4M3'"),
    ("R28", put(None, "tensors", "cast", "b"), "b: cannot be cast to 'None'"),
    ("R28", put(["F32"], "tensors", "cast", "b"), "b: cannot be cast to"),
    ("R29", put("nowhere", "tensors", "tied", "u"), "u: tied to 'nowhere', which is not there"),
    ("R29", put("t", "tensors", "tied", "u"), "u: tied to 't', which is not there"),
    ("R29", put("u", "tensors", "tied", "u"), "u: tied to 'u', which is not there"),
    ("R29", put("w:indices", "tensors", "tied", "u"), "u: tied to 'w:indices', which is not"),
    ("R29", put(0, "tensors", "tied", "u"), "u: tied to '0', which is not there"),
    ("R29", put(["w"], "tensors", "tied", "u"), "u: tied to .*, which is not there"),
    ("R30", put("i", "tensors", "tied", "w"), "w: stored and tied"),
    ("R30", put("w", "tensors", "tied", "i"), "i: stored and tied"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "change", "said"), PIECES)
def test_one_wrong_piece_is_refused(tmp_path: Path, rule: str, change: Change, said: str):
    found = refused(tmp_path / "x", damage.changed(valid(), change))
    assert re.search(said, found), rule


def test_a_codebook_of_a_tensor_that_has_none_is_refused(tmp_path: Path):
    table = {
        "x:indices": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
        "x:codebook": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
    }
    tensors = {
        "separator": ":", "coded": {"x": ["complex64", [1], "raw", 0]}, "cast": {},
        "tied": {"y": "x:codebook"},
    }  # fmt: skip
    raw = damage.join(Parts({"fewbits": "1"}, tensors, table, b"\0" * 12))
    assert "x:codebook" in refused(tmp_path / "x", raw)
