"""The compiled functions on indices against their NumPy definitions, and both against plain Python.

Asymmetric numeral systems are held against the information content of the message.
"""

import math
from collections import Counter
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits import _symbols
from fewbits._symbols import _numpy

BACKENDS = [
    pytest.param(_numpy, id="numpy"),
    pytest.param(
        _symbols.native, id="compiled",
        marks=pytest.mark.skipif(_symbols.native is None, reason="built without a C compiler"),
    ),
]  # fmt: skip
each = pytest.mark.parametrize("backend", BACKENDS)
sizes = st.sampled_from([1, 2, 4, 8])
lists = st.lists(st.integers(0, 65_535), max_size=200)


@each
@given(data=st.data(), size=sizes)
def test_distinct_numbers_values_as_they_first_appear(backend: ModuleType, data, size):
    pool = data.draw(st.lists(st.integers(0, 2 ** (8 * size) - 1), min_size=1, max_size=9))
    items = data.draw(st.lists(st.sampled_from(pool), max_size=60))
    numbers = {value: i for i, value in enumerate(dict.fromkeys(items))}
    indices, values = np.empty(len(items), np.uint16), np.empty(9, np.uint64)
    assert backend.distinct(np.array(items, f"u{size}"), 9, indices, values) == len(numbers)
    assert [int(v) for v in values[: len(numbers)]] == list(numbers)
    assert indices.tolist() == [numbers[item] for item in items]


@each
@pytest.mark.parametrize("most", [1, 2, 65_535, 65_536])
def test_distinct_refuses_one_value_too_many(backend: ModuleType, most):
    items = np.arange(most + 1, dtype=np.uint32)
    indices, values = np.empty(most + 1, np.uint16), np.empty(most, np.uint64)
    assert backend.distinct(items[:most], most, indices[:most], values) == most
    assert backend.distinct(items, most, indices, values) == -1


@each
def test_distinct_finds_values_that_first_appear_far_into_the_data(backend: ModuleType):
    items = np.zeros(600_000, np.uint32)
    items[[270_000, 530_000]] = [9, 7]
    indices, values = np.empty(len(items), np.uint16), np.empty(5, np.uint64)
    assert backend.distinct(items, 5, indices, values) == 3
    assert values[:3].tolist() == [0, 9, 7]
    assert np.flatnonzero(indices).tolist() == [270_000, 530_000]


@each
@given(items=lists, width=st.integers(0, 16))
def test_packing_is_least_significant_bit_first(backend: ModuleType, items, width):
    items = [item & ((1 << width) - 1) for item in items]
    number = sum(item << (width * i) for i, item in enumerate(items))
    size = -(-len(items) * width // 8)
    packed = np.zeros(size, np.uint8)
    backend.pack(np.array(items, np.uint16), width, packed)
    assert packed.tobytes() == number.to_bytes(size, "little")
    back = np.empty(len(items), np.uint16)
    backend.unpack(packed, width, back)
    assert back.tolist() == items


@each
def test_packing_refuses_an_index_wider_than_its_field(backend: ModuleType):
    with pytest.raises(ValueError, match="too wide"):
        backend.pack(np.array([3, 4], np.uint16), 2, np.zeros(1, np.uint8))


@each
@given(data=st.data(), size=sizes)
def test_expanding_takes_each_value_from_its_groups_codebook(backend: ModuleType, data, size):
    outer, groups, run, k = (data.draw(st.integers(1, 5)) for _ in range(4))
    n = outer * groups * run
    items = data.draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n))
    book = np.arange(groups * k).astype(f"u{size}")
    expected = [book[i // run % groups * k + item] for i, item in enumerate(items)]
    out = np.empty(n, book.dtype)
    backend.expand(np.array(items, np.uint16), (outer, groups, run), k, book, out)
    assert out.tolist() == expected
    width = (k - 1).bit_length()
    packed = np.zeros(-(-n * width // 8), np.uint8)
    backend.pack(np.array(items, np.uint16), width, packed)
    out[:] = 0
    backend.unpack_expand(packed, width, (outer, groups, run), k, book, out)
    assert out.tolist() == expected


@each
def test_expanding_refuses_an_index_beyond_the_codebook(backend: ModuleType):
    book, out = np.zeros(5, np.uint32), np.zeros(5000, np.uint32)
    indices = np.zeros(5000, np.uint16)
    indices[4999] = 5
    with pytest.raises(ValueError, match="out of range"):
        backend.expand(indices, (1, 1, 5000), 5, book, out)
    packed = np.zeros(1875, np.uint8)
    packed[1874] = 5 << 5  # the last of 5,000 fields of 3 bits
    with pytest.raises(ValueError, match="out of range"):
        backend.unpack_expand(packed, 3, (1, 1, 5000), 5, book, out)


@st.composite
def tensors_with_classes(draw):
    shape = tuple(draw(st.integers(1, 5)) for _ in range(3))
    counts = tuple(draw(st.integers(1, 3)) for _ in range(3))
    maps = tuple(
        np.array([draw(st.integers(0, c - 1)) for _ in range(n)], np.int32)
        for n, c in zip(shape, counts, strict=True)
    )
    n = math.prod(shape)
    items = draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    return shape, counts, maps, items


@each
@given(tensors_with_classes())
def test_reordering_sorts_by_context_and_back(backend: ModuleType, drawn):
    shape, counts, maps, items = drawn
    contexts = [
        (int(maps[0][a]), int(maps[1][b]), int(maps[2][t])) for a, b, t in np.ndindex(*shape)
    ]
    expected = [item for _, item in sorted(zip(contexts, items, strict=True), key=lambda p: p[0])]
    source, target = np.array(items, np.uint16), np.empty(len(items), np.uint16)
    backend.reorder(source, maps, counts, target, False)
    assert target.tolist() == expected
    back = np.empty_like(target)
    backend.reorder(target, maps, counts, back, True)
    assert back.tolist() == items
    table = np.zeros(math.prod(counts) * 7, np.int64)
    backend.histogram(source, maps, counts, table)
    counted = Counter(zip(contexts, items, strict=True))
    for context, row in zip(np.ndindex(*counts), table.reshape(-1, 7), strict=True):
        assert row.tolist() == [counted[context, item] for item in range(7)]


@each
def test_a_class_out_of_range_is_refused(backend: ModuleType):
    source, target = np.zeros(8, np.uint16), np.zeros(8, np.uint16)
    for bad in (-1, 2):
        maps = np.array([0, bad], np.int32), np.zeros(2, np.int32), np.zeros(2, np.int32)
        with pytest.raises(ValueError, match="out of range"):
            backend.reorder(source, maps, (2, 1, 1), target, False)
        with pytest.raises(ValueError, match="out of range"):
            backend.histogram(source, maps, (2, 1, 1), np.zeros(2, np.int64))


def message(n: int, k: int, precision: int, contexts: int = 1, seed: int = 0):
    """Symbols drawn from shares that are exact, so that their information content is known."""
    rng = np.random.default_rng(seed)
    shares = np.stack([
        rng.multinomial((1 << precision) - k, rng.dirichlet(np.full(k, 0.5))) + 1
        for _ in range(contexts)
    ]).astype(np.uint32)  # fmt: skip
    lengths = np.full(contexts, n // contexts, np.int64)
    symbols = np.concatenate(
        [rng.choice(k, size, p=row / row.sum()) for size, row in zip(lengths, shares, strict=True)]
    ).astype(np.uint16)
    which = np.repeat(np.arange(contexts), lengths)
    content = float((precision - np.log2(shares[which, symbols])).sum())
    return symbols, lengths, shares.reshape(-1), content


@each
@pytest.mark.parametrize("lanes", [1, 3, 64])
@pytest.mark.parametrize(("k", "precision", "contexts"), [
    (2, 12, 1), (16, 12, 7), (300, 14, 2), (3, 16, 1), (4096, 16, 1),
])  # fmt: skip
def test_coded_size_is_the_information_content_and_at_most_64_bits_a_lane(
    backend: ModuleType, k, precision, contexts, lanes
):
    symbols, lengths, shares, content = message(21_000, k, precision, contexts)
    coded = backend.encode(symbols, lengths, shares, k, precision, lanes)
    # A lane's state starts with 32 bits that are no information, and is stored in 64 of which it
    # fills 32 to 64. Bits of a symbol vary by the state's remainder, 1 in 2^16 at most.
    assert 0.9999 * content < 8 * len(coded) < 1.0001 * content + 64 * lanes
    back = np.empty_like(symbols)
    backend.decode(np.frombuffer(coded, np.uint8), lengths, shares, k, precision, lanes, back)
    assert (back == symbols).all()


@pytest.mark.skipif(_symbols.native is None, reason="built without a C compiler")
@given(st.integers(0, 400), st.integers(1, 40), st.integers(1, 9), st.integers(1, 4))
def test_both_backends_write_the_same_bytes(n, k, lanes, contexts):
    symbols, lengths, shares, _ = message(n, k, 12, contexts)
    ours = _numpy.encode(symbols, lengths, shares, k, 12, lanes)
    assert _symbols.native.encode(symbols, lengths, shares, k, 12, lanes) == ours


@each
def test_a_context_of_one_symbol_costs_nothing(backend: ModuleType):
    symbols, lengths = np.zeros(10_000, np.uint16), np.array([10_000], np.int64)
    shares = np.array([1 << 12, 0], np.uint32)
    assert len(backend.encode(symbols, lengths, shares, 2, 12, 4)) == 4 * 8


@each
def test_encoding_refuses_a_symbol_without_a_share(backend: ModuleType):
    lengths = np.array([2], np.int64)
    with pytest.raises(ValueError, match="share"):
        backend.encode(np.array([0, 1], np.uint16), lengths, np.array([256, 0], np.uint32), 2, 8, 1)
    with pytest.raises(ValueError, match="add up"):
        backend.encode(np.array([0, 0], np.uint16), lengths, np.array([200, 0], np.uint32), 2, 8, 1)


@each
@given(cut=st.integers(1, 30), data=st.data())
def test_decoding_refuses_words_that_do_not_fit(backend: ModuleType, cut, data):
    symbols, lengths, shares, _ = message(500, 16, 12)
    coded = backend.encode(symbols, lengths, shares, 16, 12, 2)
    back = np.empty_like(symbols)
    short = np.frombuffer(coded[: -4 * cut], np.uint8)
    longer = np.frombuffer(coded + data.draw(st.binary(min_size=4, max_size=4)), np.uint8)
    for wrong in (short, longer):
        with pytest.raises(ValueError, match="words do not fit"):
            backend.decode(wrong, lengths, shares, 16, 12, 2, back)
