"""The packed kernels against a float64 product of matrices, and the compiled ones against plain."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits._indexed import Indexed
from fewbits._packed import PackedWeight, _eager

try:
    from fewbits._packed import _cpu
except ImportError:
    _cpu = None

compiled = pytest.mark.skipif(_cpu is None, reason="built without a C compiler")
BACKENDS = [_eager] if _cpu is None else [_eager, _cpu]
backend = pytest.mark.parametrize("made", BACKENDS, ids=lambda m: m.__name__.rpartition(".")[2])


def example(shape, k, groups, axis, dtype=torch.float32) -> tuple[PackedWeight, Tensor]:
    """A packed weight and the dense one, by NumPy alone."""
    indices = np.random.default_rng(0).integers(k, size=shape)
    codebook = torch.randn(groups, k, dtype=torch.float64).to(dtype)
    of = np.arange(shape[axis]) // max(1, shape[axis] // groups)
    of = of.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    bits = codebook.view(getattr(torch, f"int{8 * codebook.element_size()}")).numpy()
    found = Indexed(
        bits.view(f"<u{codebook.element_size()}"),
        np.full(groups, k),
        indices.reshape(-1).astype(np.uint16),
        axis,
        shape,
    )
    dense = codebook.reshape(-1)[torch.from_numpy(of * k + indices)]
    return PackedWeight(found, dtype, torch.device("cpu")), dense


@st.composite
def weights(draw):
    """A shape of two axes, a number of values, and codebooks along one of the axes."""
    shape = draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 7, 8, 31, 64, 66, 130, 203, 256]))
    axis = draw(st.integers(0, 1))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, shape[axis]) if shape[axis] % g == 0]))
    k = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 100, 200, 256, 257, 5000]))
    return shape, k, groups, axis


@backend
@settings(max_examples=80)
@given(given=weights(), dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
       cut=st.tuples(st.floats(0, 1), st.floats(0, 1)))  # fmt: skip
def test_any_span_decodes_to_its_values(made, given, dtype, cut):
    packed, dense = example(*given, dtype=getattr(torch, dtype))
    start, stop = sorted(round(part * dense.numel()) for part in cut)
    arguments = packed.indices, packed.codebook, packed.shape, packed.axis
    values = made.decode(*arguments, (start, stop))
    assert torch.equal(values, dense.reshape(-1)[start:stop])
    assert torch.equal(made.decode(*arguments, (0, dense.numel())).view(dense.shape), dense)


@backend
@settings(max_examples=120)
@given(given=weights(), batch=st.one_of(st.integers(0, 19), st.sampled_from([32, 33, 80])))
def test_a_product_is_that_of_the_dense_weight(made, given, batch):
    packed, dense = example(*given)
    inputs = torch.randn(batch, dense.shape[1])
    result = made.linear(inputs, packed.indices, packed.codebook, len(dense), packed.axis)
    expected = inputs.double() @ dense.double().t()
    # Each of n products and sums rounds by at most 2^-24 of the sum of magnitudes.
    bound = dense.shape[1] * 2.0**-23 * (inputs.double().abs() @ dense.double().abs().t())
    assert result.shape == expected.shape and result.dtype == torch.float32
    assert ((result - expected).abs() <= bound).all()


@st.composite
def convolutions(draw):
    """Shape of a weight, images that it fits, number of values and of codebooks, and how."""
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    shape = draw(st.integers(1, 14)), draw(st.sampled_from([1, 3, 8, 64])), *kernel
    how = [draw(st.tuples(st.integers(low, 2), st.integers(low, 2))) for low in (1, 0, 1)]
    size = [how[2][i] * (kernel[i] - 1) + 1 + draw(st.integers(0, 6)) for i in range(2)]
    groups = draw(st.sampled_from([1, shape[0]]))
    k = draw(st.sampled_from([2, 3, 16, 17, 100, 256, 257]))
    return shape, (draw(st.integers(1, 3)), shape[1], *size), k, groups, how


@backend
@settings(max_examples=150)
@given(given=convolutions())
def test_a_convolution_is_that_of_the_dense_weight(made, given):
    shape, images, k, groups, how = given
    packed, dense = example(shape, k, groups, 0)
    inputs = torch.randn(images)
    result = made.convolve(inputs, packed.indices, packed.codebook, shape, 0, *how)
    expected = torch.conv2d(inputs.double(), dense.double(), None, *how)
    whole = torch.conv2d(inputs.double().abs(), dense.double().abs(), None, *how)
    assert result.shape == expected.shape and result.dtype == torch.float32
    assert ((result - expected).abs() <= math.prod(shape[1:]) * 2.0**-23 * whole).all()


@compiled
def test_many_inputs_are_computed_in_parts(monkeypatch):
    assert _cpu is not None
    packed, dense = example((7, 6, 3, 3), 16, 1, 0)
    images, how = torch.randn(5, 6, 9, 9), [(1, 1), (1, 1), (1, 1)]
    flat, rows = packed.indices, torch.randn(150, 54)
    whole = _cpu.convolve(images, flat, packed.codebook, (7, 6, 3, 3), 0, *how)
    product = _cpu.linear(rows, flat, packed.codebook, 7, 0)
    monkeypatch.setattr(_cpu, "MOST_PANELS", 54 * 81)  # one image, 64 inputs at a time
    assert torch.equal(_cpu.convolve(images, flat, packed.codebook, dense.shape, 0, *how), whole)
    assert torch.equal(_cpu.linear(rows, flat, packed.codebook, 7, 0), product)


@backend
@settings(max_examples=80)
@given(given=weights(), batch=st.integers(1, 9))
def test_sums_of_bytes_are_exact(made, given, batch):
    assume(given[2] == 1 or given[3] == 0)  # codebooks along the outputs
    packed, dense = example(*given)
    codebook, factor = _eager.to_bytes(packed.codebook)
    assert codebook.abs().max() == 127 and factor.shape == (len(codebook), 1)
    packed.codebook = codebook.float()  # up to 127, as the inputs are: steps of one
    inputs = torch.randint(-127, 128, (batch, dense.shape[1])).float()
    inputs[:, 0] = 127
    inputs[0] = 127  # with values of 127 the largest sums there are
    result = made.linear_int8(inputs, packed.indices, packed.codebook, len(dense), packed.axis)
    assert torch.equal(result.double(), inputs.double() @ packed().double().t())


@backend
def test_the_largest_sums_of_bytes_do_not_overflow(made):
    for k in (2, 4, 8, 16):
        packed, _ = example((2, 4096), k, 1, 0)
        codebook, inputs = torch.full((1, k), -127.0), torch.full((5, 4096), 127.0)
        result = made.linear_int8(inputs, packed.indices, codebook, 2, 0)
        assert (result == -127 * 127 * 4096).all()


@given(rows=st.integers(1, 5), columns=st.integers(1, 40), scale=st.sampled_from([1e-30, 1, 1e30]))
def test_bytes_are_off_by_half_a_step_at_most(rows, columns, scale):
    values = scale * torch.randn(rows, columns)
    values[0] = 0
    integers, factor = _eager.to_bytes(values)
    assert not integers[0].any()
    error = (integers.double() * factor.double() - values.double()).abs()
    assert (error <= 0.5001 * factor.double()).all()  # the quotient is rounded as well


@compiled
@settings(max_examples=80)
@given(given=weights(), batch=st.integers(1, 9), scale=st.sampled_from([1e-30, 1, 1e30]),
       dtype=st.sampled_from([torch.float16, torch.float32]))  # fmt: skip
def test_eight_bit_products_are_those_of_plain_torch(given, batch, scale, dtype):
    assert _cpu is not None
    assume(given[2] == 1 or given[3] == 0)  # codebooks along the outputs
    packed, dense = example(*given, dtype=dtype)
    inputs = (scale * torch.randn(batch, dense.shape[1])).to(dtype)
    inputs[batch // 2 :: 3] = 0
    inputs[1:2, -1], inputs[2:3, 0] = math.nan, math.inf
    arguments = inputs, packed.indices, packed.codebook, len(dense), packed.axis
    found, expected = _cpu.linear_int8(*arguments), _eager.linear_int8(*arguments)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    if dtype == torch.float32 and batch > 2 and batch // 2 > 2:
        assert found[1:3].isnan().all() and not found[0].isnan().any()


@compiled
def test_inputs_are_rounded_in_parts():
    assert _cpu is not None
    packed, _ = example((7, 64), 16, 7, 0)
    inputs = torch.randn(2 * 256 + 3, 64)
    arguments = packed.indices, packed.codebook, 7, 0
    found, expected = (m.linear_int8(inputs, *arguments) for m in (_cpu, _eager))
    assert torch.equal(found, expected)


@settings(max_examples=60)
@given(given=weights(), rows=st.lists(st.integers(0, 19), min_size=0, max_size=9))
def test_rows_are_taken_as_they_are(given, rows):
    packed, dense = example(*given)
    wanted = torch.tensor([row % len(dense) for row in rows], dtype=torch.int64)
    taken = _eager.take(wanted, packed.indices, packed.codebook, packed.shape, packed.axis)
    assert torch.equal(taken, dense[wanted])


@compiled
@pytest.mark.parametrize("simd", [False, True])
def test_with_and_without_avx2_the_values_are_equal(simd):
    assert _cpu is not None
    try:
        if _cpu.use_simd(simd) != simd:
            pytest.skip("no AVX2 here")
        for k in (3, 16, 33, 256):
            packed, dense = example((9, 203), k, 1, 0)
            span = 0, dense.numel()
            arguments = packed.indices, packed.codebook
            values = _cpu.decode(*arguments, packed.shape, 0, span)
            assert torch.equal(values.view(dense.shape), dense)
            inputs = torch.randn(3, 203)
            expected = _eager.linear(inputs, *arguments, 9, 0)
            torch.testing.assert_close(
                _cpu.linear(inputs, *arguments, 9, 0), expected, rtol=1e-5, atol=1e-4
            )
    finally:
        _cpu.use_simd(True)


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_shows_in_no_bit(threads):
    assert _cpu is not None
    packed, dense = example((301, 1024), 16, 1, 0)
    assert dense.numel() > _cpu.ALONE
    inputs = torch.randn(3, 1024)
    before = _cpu.linear(inputs, packed.indices, packed.codebook, 301, 0)
    coarse = _cpu.linear_int8(inputs, packed.indices, packed.codebook, 301, 0)
    one = _cpu.linear_int8(inputs[:1], packed.indices, packed.codebook, 301, 0)
    many = torch.randn(20, 1024)
    panels = _cpu.linear(many, packed.indices, packed.codebook, 301, 0)
    torch.set_num_threads(threads)
    after = _cpu.linear(inputs, packed.indices, packed.codebook, 301, 0)
    assert torch.equal(after, before)
    assert torch.equal(_cpu.linear(many, packed.indices, packed.codebook, 301, 0), panels)
    assert torch.equal(_cpu.linear_int8(inputs, packed.indices, packed.codebook, 301, 0), coarse)
    assert torch.equal(_cpu.linear_int8(inputs[:1], packed.indices, packed.codebook, 301, 0), one)
    assert torch.equal(packed(), dense)


@backend
@pytest.mark.parametrize("width", range(1, 9))
def test_nothing_outside_the_indices_is_read(made, width):
    # The last indices of a buffer, in front of memory of other content.
    count = 8 * 67
    around = torch.full((width * 67 + 64,), 255, dtype=torch.uint8)
    around[: width * 67] = 0
    packed = around[: width * 67]
    codebook = torch.full((1, 1 << width), math.nan)
    codebook[0, 0] = 1
    shape = (1, count)
    assert (made.decode(packed, codebook, shape, 0, (0, count)) == 1).all()
    assert made.linear(torch.ones(2, count), packed, codebook, 1, 0).tolist() == [[count], [count]]


@compiled
def test_too_few_indices_are_refused_before_they_are_read():
    assert _cpu is not None
    packed, codebook = torch.zeros(7, dtype=torch.uint8), torch.randn(1, 16)
    with pytest.raises(RuntimeError, match="7 bytes of indices"):
        _cpu.decode(packed, codebook, (4, 4), 0, (0, 16))
    with pytest.raises(RuntimeError, match="7 bytes of indices"):
        _cpu.linear(torch.randn(1, 4), packed, codebook, 4, 0)
