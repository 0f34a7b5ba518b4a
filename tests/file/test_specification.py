"""docs/format.md against the files: a reader written from the page, golden files, safetensors."""

import hashlib
import itertools
import json
import math
import re
import struct
import sys
from pathlib import Path

import damage
import pytest
import reader
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fewbits

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "format.md"
GOLDEN = Path(__file__).parent / "golden" / "v1"

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "complex32": torch.complex32, "complex64": torch.complex64, "complex128": torch.complex128,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz, "float8_e5m2fnuz": torch.float8_e5m2fnuz,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TYPES.items()}


def as_read(tensor):
    """What the plain reader returns for a tensor."""
    flat = tensor.detach().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return NAMES[tensor.dtype], tuple(tensor.shape), data


def all_as_read(state):
    return {name: as_read(tensor) for name, tensor in state.items()}


def header_of(path):
    """The JSON of a file's header, and the place where the data begin."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), start


def described(path):
    """The metadata's list of tensors."""
    return json.loads(header_of(path)[0]["__metadata__"]["tensors"])


def coder(path, name):
    return described(path)["coded"][name][2]


def codebooks(path, name):
    """(axis, G, K) of a clustered tensor."""
    return described(path)["coded"][name][3], *header_of(path)[0][f"{name}:codebook"]["shape"]


def rans_head(path, name):
    """(precision, mantissa, lanes, (C1, C2, C3), words) of an entropy-coded tensor."""
    header, start = header_of(path)
    place = start + header[f"{name}:indices"]["data_offsets"][0]
    fields = struct.unpack_from("<BBHHHHHI", path.read_bytes(), place)
    return (*fields[:3], fields[3:6], fields[7])


def scrambled(*shape):
    """Numbers in 0 … 65,535 by a formula in integers: the same on every machine, for ever."""
    x = torch.arange(math.prod(shape))
    for factor, shift in ((2654435761, 15), (2246822519, 13), (3266489917, 16)):
        x = x * factor % 2**32
        x = x ^ (x >> shift)
    return (x % 65536).reshape(shape)


def skewed(*shape, k=8):
    """Indices that are mostly 0, how mostly depends on the place along each of three axes."""
    a, b, t = torch.meshgrid(
        torch.arange(shape[0]), torch.arange(shape[1]), torch.arange(math.prod(shape[2:])),
        indexing="ij",
    )  # fmt: skip
    step = 2000 * (1 + 5 * (a % 4 == 1)) * (1 + 5 * (b % 3 == 0)) * (1 + 5 * (t == 4))
    return (scrambled(*shape) // step.reshape(shape)).clamp(max=k - 1)


LOW = 1 << 32  # the least state of an entropy coder
VALUES = torch.tensor([0.0, -0.125, 0.125, -0.5, 0.5, -1.0, 1.0, 3.0])


# --- The files of fewbits.save ------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    """A function that saves a state dict, with what safetensors must find in the file."""

    def write(state, **options):
        path = tmp_path / "model.fewbits"
        fewbits.save(state, path, **options)
        return path

    return write


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 17, 300])
@pytest.mark.parametrize("choice", ["packed", "fast", "smallest"])
def test_page_reads_any_number_of_values(written, choice, k):
    state = {"w": torch.linspace(-1, 2, k)[scrambled(60, 70) % k]}
    path = written(state, coder=choice)
    assert codebooks(path, "w") == (0, 1, k)
    assert reader.read(path.read_bytes()) == all_as_read(state)


def test_page_reads_65536_values_of_16_bits(written):
    state = {"w": torch.arange(65536.0, dtype=torch.float64).repeat(2).reshape(256, 512)}
    path = written(state, coder="packed")
    assert codebooks(path, "w") == (0, 1, 65536)
    assert reader.read(path.read_bytes()) == all_as_read(state)


@pytest.mark.parametrize("name", ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8"])
def test_page_reads_clustered_tensors_of_every_size(written, name):
    state = {"w": torch.tensor([1, 0, 3], dtype=TYPES[name])[scrambled(64, 64) % 3]}
    path = written(state)
    assert set(described(path)["coded"]) == {"w"}
    assert reader.read(path.read_bytes()) == all_as_read(state)


def test_page_reads_every_bit_of_the_values(written):
    bits = torch.tensor([0, 1 << 31, 1, 0x7F800000, 0x7FC00123, 0xFFC00007, 0x7F800001])
    values = bits.to(torch.uint32).view(torch.float32)  # ±0, denormal, infinity, three NaNs
    state = {"w": values.view(torch.int32)[scrambled(40, 40) % 7].view(torch.float32)}
    with pytest.warns(UserWarning, match="NaN"):
        path = written(state)
    assert reader.read(path.read_bytes()) == all_as_read(state)


@pytest.mark.parametrize("choice", ["packed", "fast", "smallest"])
@pytest.mark.parametrize(
    ("shape", "axis", "groups"),
    [((6, 200), 0, 6), ((6, 200), 0, 3), ((50, 6, 4), 1, 6), ((50, 6, 4), 1, 2)],
)
def test_page_reads_codebooks_by_channel_and_by_group(written, choice, shape, axis, groups):
    channel = torch.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    group = channel * groups // shape[axis]
    state = {"w": (scrambled(*shape) % 4 + 10 * group).float()}
    path = written(state, coder=choice)
    assert codebooks(path, "w") == (axis, groups, 4)
    assert reader.read(path.read_bytes()) == all_as_read(state)


def test_page_reads_zstd(written):
    state = {"w": VALUES[torch.arange(4000).reshape(50, 80) // 50 % 5]}
    path = written(state, coder="fast")
    assert coder(path, "w") == "zstd"
    assert reader.read(path.read_bytes()) == all_as_read(state)


@pytest.mark.parametrize("shape", [(90, 90), (9, 900), (16, 16, 3, 3), (300, 20)])
def test_page_reads_rans_without_classes(written, shape):
    state = {"w": VALUES[(scrambled(*shape) // 3000).clamp(max=7)]}
    path = written(state)
    assert coder(path, "w") == "rans"
    assert rans_head(path, "w")[3] == (1, 1, 1)
    assert reader.read(path.read_bytes()) == all_as_read(state)


def test_page_reads_rans_with_classes_of_channels(written):
    state = {"w": VALUES[skewed(64, 48, 3, 3)]}
    path = written(state)
    assert coder(path, "w") == "rans"
    assert rans_head(path, "w")[3] != (1, 1, 1)
    assert reader.read(path.read_bytes()) == all_as_read(state)


def test_page_reads_rans_in_several_lanes(written):
    state = {"w": (scrambled(300, 400) % 65).float()}  # 6.02 bits where fixed width takes 7
    path = written(state)
    assert rans_head(path, "w")[2] > 1
    assert reader.read(path.read_bytes()) == all_as_read(state)


def test_page_reads_all_that_is_not_clustered(written):
    numbers = scrambled(3, 5)
    state = {
        "w": VALUES[scrambled(16, 16) % 8],
        "0-d": torch.tensor(2.5),
        "none": torch.empty(0, 3),
    }
    state |= {name: numbers.to(TYPES[name]) for name in TYPES if name not in ("F32", "complex32")}
    state["complex32"] = numbers.to(torch.int32).view(torch.complex32)
    state |= {"café/权重:": torch.randn(7), "": torch.randn(2), 'a"\\\n': torch.randn(3)}
    state |= {"no complex": torch.empty(0, dtype=torch.complex64), "int 0-d": torch.tensor(7)}
    path = written(state)
    assert described(path)["coded"]["complex64"] == ["complex64", [3, 5], "raw", 0]
    assert reader.read(path.read_bytes()) == all_as_read(state)


def test_page_reads_names_that_look_like_parts(written):
    w = VALUES[scrambled(16, 16) % 8]
    state = {"w": w, "w:codebook": torch.randn(3), "w::indices": torch.randn(4)}
    path = written(state)
    assert described(path)["separator"] == ":::"
    assert reader.read(path.read_bytes()) == all_as_read(state)


def test_page_reads_tied_tensors(written):
    w, b = VALUES[scrambled(16, 16) % 8], torch.randn(5)
    state = {"w": w, "b": b, "w again": w, "b again": b, "w thrice": w}
    path = written(state)
    assert described(path)["tied"] == {"w again": "w", "b again": "b", "w thrice": "w"}
    assert reader.read(path.read_bytes()) == all_as_read(state)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_page_reads_casts(written, narrow):
    dense = {"F32": torch.randn(9), "F64": torch.randn(9).double(), "F16": torch.randn(9).half()}
    dense["odd"] = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-7, 6e-5])
    path = written({"w": VALUES[scrambled(16, 16) % 8], **dense}, dense_dtype=narrow)
    assert described(path)["cast"] == {"F32": "F32", "F64": "F64", "odd": "F32"}
    rounded = {n: t if n == "F16" else t.to(narrow).to(t.dtype) for n, t in dense.items()}
    found = reader.read(path.read_bytes())
    assert {name: found[name] for name in rounded} == all_as_read(rounded)


def test_page_reads_the_padding_of_long_constant_tensors(written):
    state = {"w": torch.full((300, 300), 0.5), "v": VALUES[scrambled(5, 5) % 3]}
    path = written(state)
    header, _ = header_of(path)
    assert header["w:indices"]["shape"][0] >= 90_000 / 4096
    assert all(header[f"{n}:indices"]["data_offsets"][1] % 8 == 0 for n in state)
    assert reader.read(path.read_bytes()) == all_as_read(state)


def test_every_entry_begins_at_a_multiple_of_its_elements_size(written):
    dense = {name: scrambled(3, 5).to(TYPES[name]) for name in ("U8", "F16", "I64", "F32")}
    w = VALUES[scrambled(16, 15) % 5]
    path = written({**dense, "w": w, "wide": w.double(), "z": w[0].to(torch.complex64)})
    header, start = header_of(path)
    assert start % 8 == 0
    del header["__metadata__"]
    for entry in header.values():
        assert entry["data_offsets"][0] % TYPES[entry["dtype"]].itemsize == 0


def test_safetensors_lists_the_entries_and_reads_what_is_not_clustered(written):
    dense = {name: scrambled(3, 5).to(TYPES[name]) for name in ("F64", "BF16", "I16", "BOOL", "U8")}
    path = written({"w": VALUES[scrambled(16, 16) % 8], **dense})
    header, start = header_of(path)
    del header["__metadata__"]
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(header) == {"w:codebook", "w:indices", *dense}
        assert file.metadata()["fewbits"] == "1"
        assert {n: file.get_slice(n).get_shape() for n in header} == {
            name: entry["shape"] for name, entry in header.items()
        }
    arrays = load_file(path)
    assert all_as_read({name: arrays[name] for name in dense}) == all_as_read(dense)
    assert torch.equal(arrays["w:codebook"], VALUES.sort().values[None])
    place = header["w:indices"]["data_offsets"]
    stream = path.read_bytes()[start + place[0] : start + place[1]]
    assert as_read(arrays["w:indices"])[2] == stream


@pytest.mark.parametrize(("damaged", "place"), [("header", "start"), ("b", "end")])
def test_plain_reader_sees_one_changed_bit(written, damaged, place):
    path = written({"w": VALUES[scrambled(16, 16) % 8], "b": torch.randn(3)})
    data = bytearray(path.read_bytes())
    data[{"start": header_of(path)[1] - 9, "end": len(data) - 1}[place]] ^= 1
    with pytest.raises(ValueError, match=f"^{damaged}$"):
        reader.read(bytes(data))


# --- What the page allows beyond what fewbits.save writes ---------------------------------------


def packed(values, width):
    return sum(v << i * width for i, v in enumerate(values)).to_bytes(
        -(-len(values) * width // 8), "little"
    )


def rans_stream(indices, k, model):
    """A stream as a writer makes it by docs/format.md; all lists."""
    precision, mantissa, lanes, counts, maps, codes = model
    contexts = [[] for _ in range(math.prod(counts))]
    for index, (a, b, t) in zip(indices, itertools.product(*maps), strict=True):
        contexts[(a * counts[1] + b) * counts[2] + t].append(index)
    states, words = [LOW] * lanes, []
    for number in range(len(contexts) - 1, -1, -1):
        weights = [reader.small_float(c, mantissa) for c in codes[number * k : number * k + k]]
        share = reader.shares(weights, precision)
        for i in range(len(contexts[number]) - 1, -1, -1):
            s, x = contexts[number][i], states[i % lanes]
            if x >= share[s] * LOW * LOW >> precision:
                words.insert(0, x % LOW)
                x //= LOW
            states[i % lanes] = (x // share[s] << precision) + x % share[s] + sum(share[:s])
    parts = [struct.pack("<BBHHHHHI", precision, mantissa, lanes, *counts, 0, len(words))]
    parts += [packed(m, (count - 1).bit_length()) for m, count in zip(maps, counts, strict=True)]
    parts += [
        packed(codes, 4 + mantissa),
        b"".join(x.to_bytes(8, "little") for x in states),
    ]
    return b"".join([*parts, *(word.to_bytes(4, "little") for word in words)])


@pytest.mark.parametrize("shape", [(7, 6, 2, 2), (7, 24), (168,), (7, 1, 24)])
@pytest.mark.parametrize(
    ("k", "precision", "mantissa", "lanes", "counts"),
    [
        (2, 1, 1, 1, (1, 1, 1)),
        (1, 9, 3, 2, (2, 1, 1)),
        (5, 3, 2, 3, (1, 1, 1)),
        (6, 5, 4, 5, (3, 1, 1)),
        (300, 16, 12, 256, (1, 1, 1)),
        (9, 12, 7, 100, (5, 5, 3)),
        (4, 15, 1, 4, (7, 4, 4)),
    ],
)
def test_both_readers_read_any_stream_that_the_page_allows(
    tmp_path, shape, k, precision, mantissa, lanes, counts
):
    sizes = [*(*shape, 1, 1)[:2], math.prod(shape[2:])]
    counts = [min(count, n) for count, n in zip(counts, sizes, strict=True)]
    # Of five or more classes the last has no positions.
    maps = [
        (torch.arange(n).flip(0) % (count - (count > 4))).tolist()
        for n, count in zip(sizes, counts, strict=True)
    ]
    codes = (scrambled(*counts, k) % (1 << 4 + mantissa)).clamp(min=1)
    for axis in range(3):
        if counts[axis] > 4:
            codes.select(axis, counts[axis] - 1).zero_()
    indices = scrambled(*shape) % k
    model = (precision, mantissa, lanes, counts, maps, codes.reshape(-1).tolist())
    stream = rans_stream(indices.reshape(-1).tolist(), k, model)
    book = torch.arange(k).to(torch.float64).flip(0)  # in no order
    raw = damage.single("F64", list(shape), "rans", ([1, k], as_read(book)[2]), stream + b"\x55")
    (tmp_path / "x").write_bytes(raw)
    expected = {"w": as_read(book[indices])}
    assert reader.read(raw) == expected
    assert all_as_read(fewbits.load(tmp_path / "x")) == expected


def test_plain_reader_sees_words_that_do_not_fit():
    indices = (scrambled(200) % 4).tolist()
    model = (10, 3, 2, [1, 1, 1], [[0] * 200, [0], [0]], [9, 9, 9, 9])
    stream = rans_stream(indices, 4, model)
    assert reader.rans(stream, [200], 4) == indices
    words = struct.unpack_from("<I", stream, 12)[0]
    one_more = stream[:12] + struct.pack("<I", words + 1) + stream[16:] + bytes(4)
    other_end = stream[:-4] + bytes([stream[-4] ^ 1]) + stream[-3:]  # the last word read
    for damaged in (one_more, other_end):
        with pytest.raises(ValueError, match="the words do not fit"):
            reader.rans(damaged, [200], 4)


def test_both_readers_take_no_notice_of_order_alignment_spaces_and_padding(tmp_path):
    book, bias = torch.tensor([[2.0, -1.0, 2.0], [-0.0, 7.0, 0.0]]), torch.tensor([0.5])
    indices = [0, 1, 2, 2, 1, 0]
    stream = bytes([0b10_10_01_00, 0b1111_0001, 0xFF])  # bits and a byte of padding, not zero
    table = {
        "b": {"shape": [1], "data_offsets": [3, 7], "dtype": "F32"},
        "w:codebook": {"data_offsets": [7, 31], "dtype": "F32", "shape": [2, 3]},
        "w:indices": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "nothing": {"dtype": "I64", "shape": [0], "data_offsets": [7, 7]},
    }
    tensors = json.dumps(
        {"separator": ":", "coded": {"w": ["F32", [2, 3], "packed", 0]}, "cast": {}, "tied": {}},
        indent=1,
    )
    data = stream + as_read(bias)[2] + as_read(book)[2]
    raw = damage.join(damage.Parts({"fewbits": "1"}, tensors, table, data))
    size = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + size].replace(b',"entry_crc32":', b' ,\n\t"entry_crc32" : ')
    at = 8 + text.index(b'crc32":"')
    raw = damage.seal(text[:at] + b"00000000" + text[at + 8 :], data)
    (tmp_path / "x").write_bytes(raw)
    values = torch.tensor([book[n // 3][i] for n, i in enumerate(indices)]).reshape(2, 3)
    expected = all_as_read({"b": bias, "w": values, "nothing": torch.empty(0, dtype=torch.int64)})
    assert reader.read(raw) == expected
    assert all_as_read(fewbits.load(tmp_path / "x")) == expected
    assert set(load_file(tmp_path / "x")) == set(table)


# --- The page -----------------------------------------------------------------------------------


def blocks(language):
    found = re.finditer(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [match[1] for match in found]


def test_the_dump_on_the_page_is_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in blocks("python") if "fewbits.save" in block]
    exec(compile(code, str(PAGE), "exec"), {})
    data = Path("tiny.fewbits").read_bytes()
    rows = [
        re.fullmatch(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} )+) *(.*)", row)
        for row in "".join(blocks("text")).splitlines() if re.match(r"[0-9a-f]{4}  ", row)
    ]  # fmt: skip
    shown = b""
    for row in rows:
        assert row
        assert int(row[1], 16) == len(shown)
        part = bytes.fromhex(row[2])
        assert row[3] == "".join(chr(c) if 32 <= c < 127 else "." for c in part).rstrip()
        shown += part
    assert shown == data
    assert f"Its {len(data)} bytes" in PAGE.read_text()


def test_the_rules_on_the_page_are_numbered_in_order():
    numbers = [int(n) for n in re.findall(r"^\| R(\d+) \|", PAGE.read_text(), re.MULTILINE)]
    assert numbers == list(range(1, 42))


# --- Golden files -------------------------------------------------------------------------------


def golden_packed():
    """Codebooks of each shape, and one of each kind of tensor that is not clustered."""
    whole, rows = scrambled(12, 20), torch.arange(12).reshape(-1, 1)
    return {
        "whole": VALUES[whole % 5],
        "one value": torch.full((40, 50), -0.75, dtype=torch.float64),
        "by row": (whole % 2 + 8 * rows).to(torch.float32),
        "by group of rows": (scrambled(12, 40) % 3 + 8 * (rows // 4)).to(torch.float64),
        "by column": (whole.T % 2 + 8 * rows.T).to(torch.float32).contiguous(),
        "int8": (scrambled(40, 40) % 4 - 2).to(torch.int8),
        "bias": torch.arange(-3, 4, dtype=torch.float32) / 8,
        "half": torch.arange(5, dtype=torch.float16) / 4,
        "mask": torch.arange(6) % 3 == 0,
        "steps": torch.tensor(1234567890123),
        "empty": torch.empty(0, 4),
        "complex": torch.complex(torch.arange(3.0), -torch.arange(3.0)),
        "gewöhnlich/重み": torch.arange(4, dtype=torch.bfloat16),
    }


def golden_zstd():
    """Indices in long runs; dense tensors that bfloat16 holds exactly, to be stored in it."""
    return {
        "w": VALUES[torch.arange(6000).reshape(60, 100) // 7 % 6],
        "b": torch.arange(-8, 8, dtype=torch.float32) / 4,
        "d": torch.arange(8, dtype=torch.float64) / 2,
    }


def golden_rans():
    """Classes of channels on each axis, and a layer without."""
    return {
        "conv": VALUES[skewed(64, 48, 3, 3)],
        "linear": VALUES[(scrambled(40, 50) // 5000).clamp(max=7)].to(torch.bfloat16),
    }


GOLDEN_FILES = {
    "packed": (golden_packed, "8b565d85efa0d0c6eb99a2092eb0a47321e4e29e061e7697884fa14b531097e0"),
    "zstd": (golden_zstd, "b6eacbfd451f9363525dab510ab4c2e4c51fbc16387747e399b9ab4a9c0bcb8d"),
    "rans": (golden_rans, "f5724f46181d82e53ea11409d70b4aaa4e35464f15ed24cef6533c6dadf92d07"),
}


def golden_state(name):
    state = GOLDEN_FILES[name][0]()
    first = next(iter(state))
    return state | {"tied": state[first]}


def make_golden(folder):
    """Write the golden files anew: for a new version of the format, into a folder of its own."""
    options = {"packed": {"coder": "packed"}, "zstd": {"coder": "fast"}, "rans": {}}
    options["zstd"]["dense_dtype"] = torch.bfloat16
    for name in GOLDEN_FILES:
        path = Path(folder, f"{name}.fewbits")
        fewbits.save(golden_state(name), path, **options[name])
        print(hashlib.sha256(path.read_bytes()).hexdigest(), path.name)


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_golden_file_is_the_one_that_was_made_once(name):
    data = (GOLDEN / f"{name}.fewbits").read_bytes()
    assert hashlib.sha256(data).hexdigest() == GOLDEN_FILES[name][1]
    assert GOLDEN_FILES[name][1] in (GOLDEN / "README.md").read_text()


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_golden_file_loads_as_its_formula(name):
    found = fewbits.load(GOLDEN / f"{name}.fewbits")
    assert all_as_read(found) == all_as_read(golden_state(name))


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_plain_reader_reads_golden_file_as_its_formula(name):
    data = (GOLDEN / f"{name}.fewbits").read_bytes()
    assert reader.read(data) == all_as_read(golden_state(name))


def test_golden_files_have_every_coder_and_kind_of_codebook():
    paths = sorted(GOLDEN.glob("*.fewbits"))
    assert {path.stem for path in paths} == set(GOLDEN_FILES)
    rows = list(itertools.chain(*(described(path)["coded"].values() for path in paths)))
    assert {row[2] for row in rows} == {"packed", "zstd", "rans", "raw"}
    packed = GOLDEN / "packed.fewbits"
    assert codebooks(packed, "one value") == (0, 1, 1)
    assert codebooks(packed, "by row") == (0, 12, 2)
    assert codebooks(packed, "by group of rows") == (0, 3, 3)
    assert codebooks(packed, "by column") == (1, 12, 2)
    assert described(GOLDEN / "zstd.fewbits")["cast"] == {"b": "F32", "d": "F64"}
    assert min(rans_head(GOLDEN / "rans.fewbits", "conv")[3]) > 1
    assert rans_head(GOLDEN / "rans.fewbits", "linear")[3] == (1, 1, 1)
    assert all(described(path)["tied"] for path in paths)


if __name__ == "__main__":
    make_golden(sys.argv[1])
