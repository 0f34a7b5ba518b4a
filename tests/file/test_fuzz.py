"""Random damage to files against the two outcomes there are: what was saved, or a FileError.

Where the checksums were made right again after the damage, other values than were saved are right
too: then those that the plain reader decodes. A model stays as it is after an error.

    python test_fuzz.py COUNT SEED

does COUNT mutations of each kind in a process of its own and says what came of them.
"""

import collections
import functools
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import damage
import pytest
import reader
import torch
from test_malformed import valid
from test_malformed_streams import coded
from torch import Tensor, nn

import fewbits

MOST_SECONDS = 5  # of processor time for one file of a few kilobytes
INTEGERS = [0, 1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097, 65_535,
            65_536, 65_537, *(2**n + d for n in (31, 32, 40, 47, 48, 63, 64) for d in (-1, 0, 1)),
            10**30, -1, -2, -(2**63)]  # fmt: skip
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "complex64",
    "complex128",
    "float8_e8m0fnu",
    "F4",
    "f32",
]
VALUES = [*INTEGERS, *DTYPES, "packed", "zstd", "rans", "raw", ":", "::", "", "w", "w:codebook",
          "é\n\0", None, True, False, 1.0, -0.0, 1e308, math.nan, math.inf, [], {}, [[]], [0],
          [1, 1], {"a": 1}, [0] * 65, json.loads("[" * 200 + "]" * 200)]  # fmt: skip


@functools.cache
def seeds() -> tuple[bytes, ...]:
    """Sound files, of every coder and kind of tensor."""
    torch.manual_seed(0)
    runs = (torch.arange(3000).reshape(50, 60) // 7 % 6).double()
    whole = {
        "z": runs / 8,
        "columns": torch.randint(3, (40, 12)) + 8.0 * torch.arange(12),
        "mask": torch.rand(64, 32) < 0.5,
        "bits": torch.randint(-2, 2, (40, 40)).to(torch.int8),
        "half": torch.randn(3).half(),
        "d": torch.randn(2).double(),
    }
    odd = {
        "é/权重:": torch.full((30, 40), -0.75),
        "": torch.randint(300, (20, 25)).to(torch.bfloat16),
        "0-d": torch.tensor(3),
        "none": torch.empty(0, 3),
        "c": torch.tensor([[1j], [2.0]], dtype=torch.complex128),
        "e:codebook": torch.tensor([True]),
    }
    plain = {"w": (torch.rand(40, 50) * 3).square().round() / 4, "b": torch.randn(4)}
    made = [valid(), coded()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x")
        for state, fast in ((whole, True), (odd, False), (plain, False)):
            fewbits.save(state, path, coder="fast" if fast else "smallest")
            made.append(path.read_bytes())
    rows = [row for raw in made for row in damage.split(raw).tensors["coded"].values()]
    assert {row[2] for row in rows} == {"packed", "zstd", "rans", "raw"}
    assert {row[3] for row in rows} == {0, 1}  # which axis has several codebooks
    return tuple(made)


# --- Kinds of damage: from a sound file to another ----------------------------------------------


def bytes_changed(rng: random.Random, raw: bytes) -> bytes:
    return damage.scrambled(rng, raw)


def files_spliced(rng: random.Random, raw: bytes) -> bytes:
    other = rng.choice(seeds())
    return raw[: rng.randrange(len(raw) + 1)] + other[rng.randrange(len(other) + 1) :]


def text_changed(rng: random.Random, raw: bytes) -> bytes:
    text, data = damage.blank(raw)
    return damage.seal(text[:56] + damage.scrambled(rng, text[56:].rstrip(b" ")), data)


def integer_changed(rng: random.Random, raw: bytes) -> bytes:
    text, data = damage.blank(raw)
    found = rng.choice(list(re.finditer(rb"(?<=[\[,])\d+(?=[\],])", text)))
    near = int(found[0]) + rng.choice((-8, -1, 1, 8))
    value = rng.choice((near, rng.choice(INTEGERS)))
    return damage.seal(text[: found.start()] + b"%d" % value + text[found.end() :], data)


def piece_changed(rng: random.Random, raw: bytes) -> bytes:
    """Put, drop, copy or rename something in the JSON."""
    parts = damage.split(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        inside: Any = rng.choice((parts.tensors, parts.tensors, parts.table))
        while True:
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(inside[key], (dict, list)) and inside[key] and rng.random() < 0.75:
                inside = inside[key]
                continue
            how = rng.randrange(6)
            if how < 3:
                inside[key] = rng.choice(VALUES)
            elif how == 3:
                del inside[key]
            elif how == 4:
                inside[key] = inside[rng.choice(keys)]
            elif isinstance(inside, dict):
                inside[rng.choice(("w", "t", "x", rng.choice(keys)))] = inside.pop(key)
            break
    return damage.join(parts)


def stream_changed(rng: random.Random, raw: bytes) -> bytes:
    """Change bytes of an entry, or all of them."""
    parts = damage.split(raw)
    name = rng.choice(list(parts.table))
    stream = parts.buffer(name)
    if rng.random() < 0.2:
        new = rng.randbytes(len(stream))
    elif rng.random() < 0.5:
        new = damage.scrambled(rng, stream) if stream else b"\0"
    else:
        other = damage.split(rng.choice(seeds()))
        new = other.buffer(rng.choice(list(other.table)))
    if rng.random() < 0.7:  # as long as before
        new = new[: len(stream)].ljust(len(stream), b"\0")
    parts.put(name, new)
    return damage.join(parts)


def head_changed(rng: random.Random, raw: bytes) -> bytes:
    """Change the head of an entropy-coded stream, or its weights and states."""
    raw = rng.choice(
        [seed for seed in seeds() if '"rans' in seed.decode("latin-1").replace("\\", "")]
    )
    parts = damage.split(raw)
    rows = parts.tensors["coded"].items()
    name = rng.choice([name for name, row in rows if row[2] == "rans"]) + ":indices"
    for field in rng.choices(damage.HEAD_FIELDS, k=rng.choice((0, 1, 1, 2, 3))):
        most = {"precision": 18, "mantissa": 14, "words": 400}.get(field, 40)
        value = rng.choice((rng.randrange(most), rng.choice((255, 256, 65_535))))
        parts.head(name, **{field: value & 255 if field in ("precision", "mantissa") else value})
    stream = bytearray(parts.buffer(name))
    if rng.random() < 0.5:
        at = rng.randrange(16, min(len(stream), 120))
        stream[at : at + 8] = rng.choice((rng.randbytes(8), bytes(8), b"\xff" * 8))
    parts.put(name, bytes(stream))
    return damage.join(parts)


def files_mixed(rng: random.Random, raw: bytes) -> bytes:
    """Give a tensor the description, codebook or stream of one of another file."""
    parts, other = damage.split(raw), damage.split(rng.choice(seeds()))
    coded_here, coded_there = parts.tensors["coded"], other.tensors["coded"]
    here, there = rng.choice(list(coded_here)), rng.choice(list(coded_there))
    for what in ("codebook", "indices"):
        names = [f"{n}{p.tensors['separator']}{what}" for n, p in ((here, parts), (there, other))]
        if rng.random() < 0.6 and names[0] in parts.table and names[1] in other.table:
            parts.table[names[0]] |= {k: other.table[names[1]][k] for k in ("dtype", "shape")}
            parts.put(names[0], other.buffer(names[1]))
    for number in range(4):
        if rng.random() < 0.6:
            coded_here[here][number] = coded_there[there][number]
    return damage.join(parts)


KINDS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    kind.__name__: kind
    for kind in (bytes_changed, files_spliced, text_changed, integer_changed, piece_changed,
                 stream_changed, head_changed, files_mixed)
}  # fmt: skip
# Kinds after which the checksums are not made right again.
ACCIDENTS = ("bytes_changed", "files_spliced")


# --- What has to come of them -------------------------------------------------------------------


class Holder(nn.Module):
    """A model with a state dict like a given one, all in one buffer, whose bytes are all 1."""

    def __init__(self, like: dict[str, Tensor]):
        super().__init__()
        self.bytes = torch.ones(sum(t.nbytes + 16 for t in like.values()), dtype=torch.uint8)
        self.held: dict[str, Tensor] = {}
        ties: dict[int, str] = {}
        at = 0
        for name, tensor in like.items():
            first = ties.setdefault(id(tensor), name)
            part = self.bytes[at : at + tensor.nbytes]
            at += -(-tensor.nbytes // 16) * 16
            mine = part.view(tensor.dtype).reshape(tensor.shape) if len(part) else tensor.clone()
            self.held[name] = self.held.get(first, mine)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        return self.held

    def untouched(self) -> bool:
        return bool((self.bytes == 1).all())


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if len(
        tensor.reshape(-1)) else b""  # fmt: skip


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        t.dtype == other[n].dtype
        and t.shape == other[n].shape
        and as_bytes(t) == as_bytes(other[n])
        for n, t in one.items()
    )


def check_decoded(raw: bytes, found: dict[str, Tensor]) -> None:
    """Compare with the description in the file, and small tensors with the plain reader."""
    parts = damage.split(raw)
    separator = parts.tensors["separator"]
    for name, (_, shape, coder, axis) in parts.tensors["coded"].items():
        assert list(found[name].shape) == shape
        if coder == "raw" or math.prod(shape) > 4000:
            continue
        stream = parts.buffer(f"{name}{separator}indices")
        if coder == "rans" and math.prod(damage.HEAD.unpack_from(stream)[3:6]) > 64:
            continue
        book = f"{name}{separator}codebook"
        expected = reader.clustered(
            coder, stream, shape, axis, parts.table[book]["shape"], parts.buffer(book)
        )
        assert as_bytes(found[name]) == expected, name


@dataclass
class Fuzz:
    """Mutations of the sound files, each loaded from one path.

    Attributes:
        path: where to write them.
        states: what the sound files hold.
        models: one for each sound file.
        outcomes: how often each came about.
    """

    path: Path
    states: list[dict[str, Tensor]]
    models: list[Holder]
    outcomes: collections.Counter[str]

    @classmethod
    def at(cls, path: Path) -> "Fuzz":
        states = []
        for raw in seeds():
            path.write_bytes(raw)
            states.append(fewbits.load(path))
        return cls(path, states, [Holder(state) for state in states], collections.Counter())

    def run(self, kind: str, number: int) -> None:
        """Do one mutation, which kind and number determine."""
        try:
            self._run(kind, random.Random(f"{kind} {number}"))
        except BaseException as error:
            error.add_note(f"It is mutation {number} of {kind}.")
            raise

    def _run(self, kind: str, rng: random.Random) -> None:
        which = rng.randrange(len(self.states))
        raw = KINDS[kind](rng, seeds()[which])
        self.path.write_bytes(raw)
        began = time.process_time()
        found = None
        threads = rng.choice((1, 1, 1, 2))
        try:
            found = fewbits.load(self.path, threads=threads)
        except fewbits.FileError:
            pass
        model = self.models[which]
        try:
            fewbits.load(self.path, into=model, threads=threads)
            fits = True
        except fewbits.FileError:
            fits = False
            assert model.untouched()
        assert time.process_time() - began < MOST_SECONDS
        if found is None:
            assert not fits
            self.outcomes["refused"] += 1
            return
        if kind in ACCIDENTS:
            assert any(same(found, state) for state in self.states)
            self.outcomes["as saved"] += 1
        else:
            check_decoded(raw, found)
            self.outcomes["loaded"] += 1
        if fits:
            assert same(model.held, {name: found[name] for name in model.held})
            model.bytes.fill_(1)
            self.outcomes["into the model"] += 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_loads_as_it_should(tmp_path: Path, kind: str):
    fuzz = Fuzz.at(tmp_path / "x")
    for number in range(500):
        fuzz.run(kind, number)
    assert fuzz.outcomes["refused"] > 50  # the damage is not all harmless
    # And not all are refused at the door: some reach the last check.
    assert kind in (*ACCIDENTS, "text_changed") or fuzz.outcomes["loaded"] > 5


def in_a_process(count: int, first: int, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, __file__, str(count), str(first)],
        capture_output=True, text=True, env=os.environ | environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def test_without_the_compiled_code_a_damaged_file_is_refused_too():
    said = in_a_process(30, 10**6, FEWBITS_NO_NATIVE="1")
    assert "compiled: False" in said


@pytest.mark.slow
def test_a_hundred_thousand_damaged_files_are_refused_or_load_as_they_should():
    said = in_a_process(13_000, 2 * 10**6)  # of each of the kinds
    grown = re.search(r"(\d+) MB more", said)
    assert grown, said
    assert int(grown[1]) < 1000, said


def main(count: int, first: int) -> None:
    import resource  # not on Windows

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz.at(Path(folder, "x"))
        began, before = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for kind in KINDS:
            fuzz.outcomes.clear()
            for number in range(first, first + count):
                fuzz.run(kind, number)
            print(f"{kind}: {count:,} mutations, {dict(fuzz.outcomes)}", flush=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    native = fewbits._symbols.native is not None  # pyright: ignore[reportAttributeAccessIssue]
    print(f"compiled: {native}; {time.time() - began:.0f} s; {grown >> 10} MB more")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
