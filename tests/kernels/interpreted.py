"""The Triton kernels against brute force in float64, in Triton's interpreter, on small inputs.

Not collected by itself: `test_triton.py` runs it in a process that has TRITON_INTERPRET=1 from its
start, and so does

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted.py
"""

import math

import pytest
import torch
from hypothesis import given, settings
from kernels.test_kernels import codebook_of, distances
from kernels.triton_cases import CASES, ROUNDING, TYPES, assert_measured, numbers
from reference import brute
from strategies import weights_and_codebooks

from fewbits._kernels import _eager
from fewbits._kernels import _triton as kernels

every_case = pytest.mark.parametrize(("groups", "members", "k"), CASES)
every_type = pytest.mark.parametrize("dtype", TYPES)


@settings(max_examples=10)
@given(weights_and_codebooks())
def test_each_weight_goes_to_the_nearest_representative(pair):
    weight, codebook = pair
    boundaries = _eager.midpoints(codebook)
    found = kernels.assign(weight, boundaries)
    best = distances(weight, codebook, brute.nearest(weight, codebook))
    assert torch.equal(distances(weight, codebook, found), best)
    assert torch.equal(found, _eager.assign(weight, boundaries)), "ties as well"
    assert torch.equal(kernels.snap(weight, codebook, boundaries), codebook.gather(1, found.long()))


@settings(max_examples=6)
@given(weights_and_codebooks())
def test_counts_and_sums_are_those_of_a_loop(pair):
    weight, codebook = pair
    boundaries = _eager.midpoints(codebook)
    values = weight.flip(1) * 2
    for power in (1, 2):
        counts, sums = kernels.cluster_sums(values, weight, boundaries, power)
        expected = _eager.cluster_sums(values, weight, boundaries, power)
        sizes = _eager.cluster_sums(values.abs(), weight, boundaries, power)[1]
        assert torch.equal(counts, expected[0])
        assert ((sums - expected[1]).abs() <= ROUNDING * sizes + 1e-30).all()


@every_type
@every_case
def test_one_pass_measures_what_brute_force_sums(groups, members, k, dtype):
    weight = torch.randn(groups, members).to(dtype)
    codebook = codebook_of(groups, k, dtype)
    for power, boundaries in ((1, None), (2, _eager.midpoints(codebook))):
        found = kernels.measure_all([weight], codebook, boundaries, power)
        assert_measured((found[0][0], found[1][0], *found[2:]), weight, codebook, power)


@every_type
@every_case
def test_every_operation_writes_what_plain_torch_does(groups, members, k, dtype):
    weight = torch.randn(groups, members).to(dtype)
    weight[:, : min(k, 3)] = torch.randn(groups, 1).to(dtype)
    codebook = codebook_of(groups, k, dtype)
    boundaries = _eager.midpoints(codebook)
    assert torch.equal(kernels.assign(weight, boundaries), _eager.assign(weight, boundaries))
    snapped = kernels.snap(weight, codebook, boundaries)
    assert torch.equal(snapped, _eager.snap(weight, codebook, boundaries))
    # The interpreter cuts a bfloat16 off where a device rounds; float32 is rounded as by torch,
    # but for fused products.
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2**-6}[dtype]
    for power in (1, 2):
        out = torch.randn(groups, members).to(dtype)
        expected = out.clone()
        kernels.pull_all([out], [weight], codebook, None, power, numbers(0.3))
        _eager.pull_all([expected], [weight], codebook, None, power, numbers(0.3))
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        for amount in (0.2, 0.75):
            moved, expected = weight.clone(), weight.clone()
            found = kernels.move_all([moved], codebook, boundaries, power, numbers(amount))
            left = _eager.move_all([expected], codebook, boundaries, power, numbers(amount))
            assert torch.equal(found[0], left[0])
            # Rounding of numbers of size 1, of which a cluster has as many as it has members.
            assert ((found[1] - left[1]).abs() <= 2**-22 * (1 + left[0])).all()
            torch.testing.assert_close(moved, expected, rtol=tolerance, atol=tolerance)


def test_many_weights_in_one_call_are_each_as_alone():
    # Of several tile shapes, aligned and not, one empty: several launches, in any order.
    shapes = [(1, 5_000), (40, 9), (1, 33), (3, 0), (2, 600), (6, 32)]
    weights = _eager.Weights(torch.randn(shape) for shape in shapes)
    codebook = torch.randn(sum(map(len, weights)), 3).sort(1).values
    factors = torch.rand(len(weights), dtype=torch.float64)
    outs = [torch.randn(shape) for shape in shapes]
    before = [out.clone() for out in outs]
    values = [torch.randn(shape) for shape in shapes]
    counts, sums = kernels.sums_all(values, weights, _eager.midpoints(codebook))
    expected = _eager.sums_all(values, weights, _eager.midpoints(codebook))
    assert torch.equal(counts, expected[0])
    torch.testing.assert_close(sums, expected[1], rtol=0, atol=ROUNDING * 5_000)
    together = kernels.measure_all(weights, codebook, None, 2)
    again = kernels.measure_all(weights, codebook, None, 2)  # with the table that was kept
    assert all(map(torch.equal, together, again))
    kernels.pull_all(outs, weights, codebook, None, 2, factors)
    moved = [weight.clone() for weight in weights]
    kernels.move_all(moved, codebook, None, 1, factors)
    row = 0
    for i, weight in enumerate(weights):
        rows = slice(row, row + len(weight))
        alone = kernels.measure_all([weight], codebook[rows], None, 2)
        found = together[0][i], together[1][i], together[2][rows], together[3][rows]
        assert torch.equal(found[0], alone[0][0]) and torch.equal(found[1], alone[1][0])
        assert torch.equal(found[2], alone[2]) and torch.equal(found[3], alone[3])
        if weight.numel():
            assert_measured(found, weight, codebook[rows], 2)
        kernels.pull_all([before[i]], [weight], codebook[rows], None, 2, factors[i : i + 1])
        assert torch.equal(outs[i], before[i])
        expected = weight.clone()
        _eager.move_all([expected], codebook[rows], None, 1, factors[i : i + 1])
        torch.testing.assert_close(moved[i], expected, rtol=1e-6, atol=1e-6)  # rounding
        row += len(weight)


def test_midpoints_are_rounded_as_in_plain_torch():
    steps = torch.tensor([1.0, 1e-45, 1e-39, 1e38, 0.1, 2.0**-126])
    low = torch.cat([torch.randn(500), -steps, steps, torch.zeros(2)])
    high = torch.cat([torch.nextafter(low, torch.tensor(torch.inf)), -low, low * 3])
    codebook = torch.stack([low.repeat(3), high]).sort(0).values.T.contiguous()
    assert torch.equal(kernels.midpoints(codebook), _eager.midpoints(codebook))
    wide = torch.randn(3, 700).sort(1).values
    assert torch.equal(kernels.midpoints(wide), _eager.midpoints(wide))


def test_the_largest_codebook_keeps_exact_indices():
    codebook = torch.randn(1, 65_536).sort(1).values
    weight = codebook[:, torch.randperm(65_536)[:1_000]].contiguous()
    assert torch.equal(kernels.snap(weight, codebook, _eager.midpoints(codebook)), weight)


@pytest.mark.parametrize("k", [2, 16, 41])
def test_a_weight_on_a_boundary_takes_the_lower_representative(k):
    codebook = torch.arange(k, dtype=torch.float32)[None]
    boundaries = _eager.midpoints(codebook)
    assert kernels.assign(boundaries, boundaries).tolist() == [list(range(k - 1))]


def test_boundaries_decide_as_they_are():
    boundaries = torch.linspace(-1, 1, 40)[None]
    boundaries[:, 0], boundaries[:, -2:] = -torch.inf, torch.inf
    weight = torch.randn(1, 900)
    for few in (boundaries, boundaries[:, [0, 7, -1]]):
        found = kernels.assign(weight, few)
        assert torch.equal(found.long(), (weight[:, :, None] > few[:, None, :]).sum(2))
    one = torch.tensor([1.0])
    above = torch.nextafter(one, torch.tensor([2.0]))
    between = (one.double() + above.double())[None] / 2
    assert kernels.assign(torch.stack([one, above], 1), between).tolist() == [[0, 1]]


@every_type
def test_the_standard_deviation_is_that_of_float64(dtype):
    weight = (torch.randn(3, 2_011) * 1e-2 + 5).to(dtype)
    weight[0, 0] = -300.0  # what is first has no say
    expected = weight.double().std(correction=0)
    # 2^-22: the variance is as exact as a sum of squares in float32, the root twice as much
    torch.testing.assert_close(kernels.std(weight).double(), expected, rtol=2**-22, atol=0)
    assert kernels.std(torch.full((2, 1_001), 0.1, dtype=dtype)) == 0
    assert kernels.std(torch.tensor([[1.0, math.nan, 2.0]], dtype=dtype)).isnan()


def test_the_spread_is_right_however_far_off_the_codebook_lies():
    weight = torch.randn(1, 3_000) * 1e-3
    found = kernels.measure_all([weight], torch.tensor([[-1e3, 1e3]]), None, 2)
    spread = (weight.double() - weight.double().mean()).square().sum()
    torch.testing.assert_close(found[1][0], spread, rtol=2 * ROUNDING, atol=0)
    equal = kernels.measure_all([torch.full((1, 2_000), 0.1)], torch.tensor([[1e3]]), None, 1)
    assert equal[1] == 0


def test_sums_of_many_weights_are_exact_beyond_float32():
    # Tiles are added up in float64: in float32 a sum above 2^24 cannot be odd.
    weight = torch.ones(1, 3_073)
    counts, sums = kernels.cluster_sums(weight * 8_193, weight, torch.tensor([[-1.0]]))
    assert counts.tolist() == [[0.0, 3_073.0]]
    assert sums.tolist() == [[0.0, 3_073.0 * 8_193]]


@pytest.mark.parametrize("view", [lambda t: t[:, ::2], lambda t: t.T, lambda t: t[:, 3:]])
def test_weights_that_are_not_contiguous_go_to_plain_torch(view):
    weight = view(torch.randn(9, 30))
    codebook = torch.randn(len(weight), 3).sort(1).values
    found = kernels.measure_all([weight], codebook, None, 2)
    expected = _eager.measure_all([weight], codebook, None, 2)
    assert all(map(torch.equal, found, expected))


def test_weights_at_any_address_are_read_and_written_in_place():
    store = torch.randn(1_200)
    before = store.clone()
    weight = store[1:1_089].view(1, -1)  # 1,088 weights from 4 bytes on: whole tiles, not aligned
    codebook = torch.tensor([[-1.0, 0.0, 1.0]])
    found = kernels.measure_all([weight], codebook, None, 1)
    assert_measured((found[0][0], found[1][0], *found[2:]), weight, codebook, 1)
    kernels.move_all([weight], codebook, None, 2, numbers(1.0))
    assert torch.equal(weight, codebook[:, brute.nearest(before[None, 1:1_089], codebook)[0]])
    assert store[0] == before[0] and torch.equal(store[1_089:], before[1_089:])
