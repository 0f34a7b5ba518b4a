"""Streams with one thing wrong and right checksums against what a reader must do: refuse them.

The rules R31 to R41 of docs/format.md, and how much time and memory a small file can ask for.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import damage
import pytest
import reader
from damage import Parts, packed
from test_malformed import ONE, refused, valid

import fewbits

Change = Callable[[Parts], Any]
CRC = "its checksum is wrong"
WORDS = "r: the words do not fit the symbols"
TABLES = "r: the stream ends inside its tables"

LIMITED = """
import resource, sys, time
import torch
import fewbits
torch.set_num_threads(1)
# Memory of this process as it is, in pages of 4 KB, and a bit more.
most = 4096 * int(open("/proc/self/statm").read().split()[0]) + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for path in sys.argv[2:]:
    began = time.process_time()
    try:
        fewbits.load(path, threads=1)
        print("loaded")
    except fewbits.FileError as error:
        print(error)
    assert time.process_time() - began < 4, path
"""


limited = pytest.mark.skipif(sys.platform != "linux", reason="needs limits and /proc of Linux")


def under_limit(room: int, *paths: Path) -> list[str]:
    """What loading says of each file, in a process that can take only so many bytes more."""
    arguments = [sys.executable, "-c", LIMITED, str(room), *map(str, paths)]
    run = subprocess.run(arguments, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize(
    "name", ["w:codebook", "w:indices", "g:codebook", "g:indices", "c:indices", "m", "b", "i"]
)
def test_a_wrong_byte_of_any_entry_is_refused(tmp_path: Path, name: str):
    start, stop = damage.split(valid()).table[name]["data_offsets"]
    begin = 8 + len(damage.header_of(valid()))
    for place in (begin + start, begin + stop - 1):
        raw = bytearray(valid())
        raw[place] ^= 1
        assert f"{name}: {CRC}" in refused(tmp_path / "x", bytes(raw)), "R31"


def single(coder: str, shape: list[int], k: int, stream: bytes) -> bytes:
    """A file of one tensor r, of type U8, with the codebook 0 … k - 1."""
    raw = damage.single("U8", shape, coder, ([1, k], bytes(range(k))), stream)
    return damage.changed(raw, named)


def named(parts: Parts) -> None:
    parts.tensors["coded"] = {"r": parts.tensors["coded"]["w"]}
    parts.table = {name.replace("w:", "r:"): row for name, row in parts.table.items()}


def frame(content: bytes, descriptor: int = 0x80, window: int = 0, identity: bytes = b"") -> bytes:
    """A Zstandard frame (RFC 8878) of one uncompressed block; its size in 4 bytes."""
    block = (len(content) << 3 | 1).to_bytes(3, "little") + content
    size = len(content).to_bytes(4, "little")
    return b"\x28\xb5\x2f\xfd" + bytes([descriptor, window]) + identity + size + block


def bomb(claimed: int, size: int) -> bytes:
    """A Zstandard frame of runs of 128 KiB that claims another size than it has."""
    head = b"\x28\xb5\x2f\xfd\xc0\x00" + claimed.to_bytes(8, "little")
    runs, run = size >> 17, 1 << 17
    return head + (run << 3 | 2).to_bytes(3, "little") + b"\0" + (
        ((run << 3 | 2).to_bytes(3, "little") + b"\0") * (runs - 2)
        + (run << 3 | 3).to_bytes(3, "little") + b"\0"
    )  # fmt: skip


SIXTEEN = packed([0, 1, 2, 3] * 16, 2)
SINGLES: list[tuple[str, bytes, str]] = [
    ("R32", damage.join(Parts(
        {"fewbits": "1"}, {"separator": ":", "coded": {}, "cast": {}, "tied": {}},
        {"m": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}, b"\0\1\2",
    )), "m: a byte of it is neither false nor true"),
    ("R32", damage.single("BOOL", [8], "packed", ([1, 2], b"\0\2"), b"\0"),
     "w: a byte of it is neither false nor true"),
    ("R33", single("packed", [64], 4, SIXTEEN[:-1]), "r: 15 bytes of indices where 16 are due"),
    ("R33", single("packed", [43], 5, bytes(16)), "r: 16 bytes of indices where 17 are due"),
    ("R33", single("packed", [8], 2, b""), "8 elements in 0 bytes"),
    ("R34", single("zstd", [64], 4, b""), "r: 64 elements in 0 bytes"),
    ("R34", single("zstd", [64], 4, SIXTEEN), "r: zstd: .*frame"),
    ("R34", single("zstd", [64], 4, frame(SIXTEEN)[:-1]), "r: zstd: "),
    ("R34", single("zstd", [64], 4, frame(SIXTEEN)[:5]), "r: zstd: "),
    ("R34", single("zstd", [64], 4, frame(SIXTEEN + b"\0")), "zstd claims 17 bytes where 16 are"),
    ("R34", single("zstd", [64], 4, frame(SIXTEEN[:-1])), "zstd claims 15 bytes where 16 are due"),
    ("R34", single("zstd", [64], 4, frame(SIXTEEN)[:6] + frame(SIXTEEN)[10:]), "r: zstd"),
    ("R34", single("zstd", [64], 4, frame(SIXTEEN, descriptor=0)), "r: zstd"),  # size not stated
    ("R34", single("zstd", [64], 4, frame(SIXTEEN, descriptor=0x84)), "r: zstd: "),  # its checksum
    ("R34", single("zstd", [64], 4, frame(SIXTEEN, 0x81, identity=b"\5")), "r: zstd: .*[Dd]iction"),
    ("R34", single("zstd", [64], 4, frame(SIXTEEN, window=18 << 3)), "r: zstd wants a window"),
    ("R34", single("zstd", [64], 4, bomb(16, 1 << 20)), "r: zstd: "),
    ("R34", single("zstd", [64], 4, bomb(1 << 40, 1 << 20)), "zstd claims 1,099,511,627,776"),
    ("R35", single("packed", [8], 5, packed([0, 1, 2, 3, 4, 5, 0, 0], 3)), "r: .*out of range"),
    ("R35", single("packed", [8], 5, packed([0, 0, 0, 0, 0, 0, 0, 7], 3)), "r: .*out of range"),
    ("R35", single("packed", [2], 255, b"\0\xff"), "r: .*out of range"),
    ("R35", single("zstd", [64], 3, frame(SIXTEEN)), "r: .*out of range"),
    ("R35", damage.single("U8", [4, 8], "packed", ([4, 3], bytes(12)), packed([0] * 31 + [3], 2)),
     "w: .*out of range"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "raw", "said"), SINGLES)
def test_a_wrong_stream_is_refused(tmp_path: Path, rule: str, raw: bytes, said: str):
    assert re.search(said, refused(tmp_path / "x", raw)), rule


ROWS = [[(r * c + r // 5) % 8 for c in range(64)] for r in range(32)]


@cache
def coded() -> bytes:
    """A file whose one tensor r is coded by frequencies that differ between four sorts of rows."""
    precision, mantissa, classes = 12, 2, [r % 4 for r in range(32)]
    weights = [[(7 * c + 5 * s) % 60 + 1 for s in range(8)] for c in range(4)]
    state, words = 1 << 32, b""
    for context in (3, 2, 1, 0):  # a writer goes backward
        share = reader.shares(
            [reader.small_float(w, mantissa) for w in weights[context]], precision
        )
        for index in reversed(
            [i for r, row in enumerate(ROWS) if classes[r] == context for i in row]
        ):
            if state >= share[index] << 64 - precision:
                words = (state & 0xFFFFFFFF).to_bytes(4, "little") + words
                state >>= 32
            state = (state // share[index] << precision) + state % share[index] + sum(share[:index])
    stream = damage.HEAD.pack(precision, mantissa, 1, 4, 1, 1, 0, len(words) // 4)
    stream += packed(classes, 2) + packed([w for row in weights for w in row], 4 + mantissa)
    return single("rans", [32, 64], 8, stream + state.to_bytes(8, "little") + words)


def test_the_file_that_these_are_made_from_is_sound(tmp_path: Path):
    (tmp_path / "x").write_bytes(coded())
    assert fewbits.load(tmp_path / "x")["r"].tolist() == ROWS


def head(**fields: int) -> Change:
    return lambda parts: parts.head("r:indices", **fields)


def sections() -> tuple[int, int, int, int]:
    """Where the weights, the states and the words of `coded` begin and end."""
    stream = damage.split(coded()).buffer("r:indices")
    _, mantissa, lanes, first, *_, words = damage.HEAD.unpack_from(stream)
    weights = 16 + 32 * 2 // 8
    states = weights + -(-first * 8 * (4 + mantissa) // 8)
    return weights, states, states + 8 * lanes, states + 8 * lanes + 4 * words


def cut(section: int) -> Change:
    """End the stream a byte before the end of a section."""

    def change(parts: Parts) -> None:
        parts.put("r:indices", parts.buffer("r:indices")[: (16, *sections())[section] - 1])

    return change


def overwrite(section: int, value: bytes, offset: int = 0) -> Change:
    """Put bytes at the start of a section, or counted from there."""

    def change(parts: Parts) -> None:
        at, stream = sections()[section] + offset, parts.buffer("r:indices")
        parts.put("r:indices", stream[:at] + value + stream[at + len(value) :])

    return change


def more_words(parts: Parts) -> None:
    """Append one word that no symbol takes."""
    stream = parts.buffer("r:indices")[: sections()[3]]
    parts.put("r:indices", stream + b"\1\0\0\0")
    parts.head("r:indices", words=damage.HEAD.unpack_from(stream)[-1] + 1)


def fewer_words(parts: Parts) -> None:
    parts.head("r:indices", words=damage.HEAD.unpack_from(parts.buffer("r:indices"))[-1] - 1)


def rans(shape: list[int], k: int, **stream: Any) -> bytes:
    """A file of a stream of one sure symbol of 16 bits; `head_…` are fields of its head."""
    raw = damage.rans(**stream)
    return single("rans", shape, k, raw.ljust(len(raw) + 64, b"\0"))


RANS: list[tuple[str, Change, str]] = [
    ("R36", cut(0), "r: the stream ends inside its head"),
    *[("R36", head(precision=value), "r: head out of range") for value in (0, 17, 255)],
    *[("R36", head(mantissa=value), "r: head out of range") for value in (0, 13, 255)],
    *[("R36", head(lanes=value), "r: head out of range") for value in (0, 257, 65_535)],
    *[
        ("R36", head(**{axis: value}), r"r: \(.*\) classes for \(32, 64, 1\) channels")
        for axis in ("first", "second", "rest") for value in (0, 257, 65_535)
    ],
    ("R36", head(zero=1), "r: head out of range"),
    ("R36", head(zero=65_535), "r: head out of range"),
    ("R37", head(precision=16, first=32, second=3), r"r: 96 contexts of 2\^16 slots"),
    ("R37", head(precision=12, first=32, second=64), r"r: 2,048 contexts of 2\^12 slots"),
    ("R38", cut(1), TABLES),
    ("R38", cut(2), TABLES),
    ("R38", head(second=64, precision=12), TABLES),
    ("R38", cut(3), "r: the stream ends inside its words"),
    ("R38", cut(4), "r: the stream ends inside its words"),
    ("R38", head(words=1 << 20), "r: the stream ends inside its words"),
    ("R38", head(words=(1 << 32) - 1), "r: the stream ends inside its words"),
    ("R38", head(lanes=256), "r: the stream ends inside its words"),
    ("R39", head(first=3), "r: a channel's class is out of range"),
    ("R40", overwrite(0, bytes(16)), "r: the shares do not add up"),
    ("R40", head(precision=1), "r: a context has more symbols than slots"),
    ("R41", overwrite(1, bytes(8)), WORDS),
    ("R41", overwrite(1, ((1 << 32) - 1).to_bytes(8, "little")), WORDS),
    ("R41", overwrite(1, b"\xff" * 8), WORDS),
    ("R41", fewer_words, WORDS),
    ("R41", more_words, WORDS),
    ("R41", overwrite(3, b"\xa5", offset=-1), WORDS),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "change", "said"), RANS)
def test_a_wrong_entropy_coded_stream_is_refused(
    tmp_path: Path, rule: str, change: Change, said: str
):
    assert re.search(said, refused(tmp_path / "x", damage.changed(coded(), change))), rule


@pytest.mark.parametrize(
    ("lanes", "states", "good"),
    [(1, [1 << 32], True), (2, [1 << 32, 1 << 32], True), (2, [1 << 32, (1 << 32) + 1], False),
     (2, [(1 << 32) + 1, 1 << 32], False), (2, [1 << 32, (1 << 32) - 1], False)],
)  # fmt: skip
def test_every_lane_ends_where_it_began(tmp_path: Path, lanes: int, states: list[int], good: bool):
    # The one symbol has all slots: it changes no state.
    stream = damage.rans(lanes)[: -8 * lanes] + b"".join(s.to_bytes(8, "little") for s in states)
    raw = single("rans", [8], 1, stream)
    if not good:
        assert WORDS in refused(tmp_path / "x", raw), "R41"
        return
    (tmp_path / "x").write_bytes(raw)
    assert fewbits.load(tmp_path / "x")["r"].tolist() == [0] * 8


def test_more_classes_than_positions_are_refused(tmp_path: Path):
    # 256 classes for an axis of 1 would make a file of 4 KB take 9 seconds.
    tables = b"\0" + packed([0xFFFF] * 256, 16)
    stream = damage.rans(tables=tables, rest=256).ljust(1024, b"\0")
    assert "classes" in refused(tmp_path / "x", single("rans", [2048, 2048], 1, stream))


def huge_entry(parts: Parts) -> None:
    parts.table["i"] |= {"shape": [1 << 37], "data_offsets": [0, 1 << 40]}


@limited
def test_a_file_of_a_kilobyte_that_asks_for_a_terabyte_takes_neither_time_nor_memory(
    tmp_path: Path,
):
    terabyte = [1 << 20, 1 << 20]
    asks = {
        "entry": damage.changed(valid(), huge_entry),
        "packed": single("packed", terabyte, 1, bytes(500)),
        "rans": single("rans", terabyte, 1, damage.rans().ljust(500, b"\0")),
        "zstd": single("zstd", terabyte, 2, bomb(1 << 37, 1 << 24)),
        "bomb": single("zstd", [64], 4, bomb(1 << 40, 1 << 24)),
        "liar": single("zstd", [64], 4, bomb(16, 1 << 24)),
        "words": single("rans", [64], 1, damage.rans()[:12] + b"\xff" * 4 + bytes(500)),
        "lanes": single("rans", [64], 1, damage.rans(lanes=256)[:100]),
    }
    for name, raw in asks.items():
        assert len(raw) < 2000, name
        (tmp_path / name).write_bytes(raw)
    said = under_limit(50 << 20, *(tmp_path / name for name in asks))
    assert [line.partition(":")[0] for line in said] == [str(tmp_path / name) for name in asks]


@limited
def test_the_most_that_a_file_can_ask_for_is_in_proportion_to_its_size(tmp_path: Path):
    # 4,096 elements of 8 bytes for each of 500 bytes, 16 MB, and their indices.
    book = [1, 1], bytes(8)
    (tmp_path / "a").write_bytes(damage.single("F64", [4096 * 500], "packed", book, bytes(500)))
    (tmp_path / "b").write_bytes(
        damage.single("F64", [4096 * 500], "rans", book, damage.rans(lanes=32).ljust(500, b"\0"))
    )
    assert under_limit(80 << 20, tmp_path / "a", tmp_path / "b") == ["loaded", "loaded"]


@limited
@pytest.mark.parametrize("coder", ["packed", "rans"])
def test_more_memory_than_there_is_is_refused(tmp_path: Path, coder: str):
    path, size = tmp_path / "x", 20_000
    stream = (damage.rans() if coder == "rans" else b"").ljust(size, b"\0")
    path.write_bytes(damage.single("F64", [4096 * size], coder, ([1, 1], ONE + ONE), stream))
    (said,) = under_limit(50 << 20, path)  # of the 655 MB that it takes
    assert said == f"{path}: needs more memory than there is."
