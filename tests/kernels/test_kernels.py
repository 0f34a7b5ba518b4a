"""Every kernel backend against brute force in float64: equal indices, not close ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.backends import BACKENDS, COMPILED, using
from reference import brute
from strategies import weights_and_codebooks

from fewbits import _kernels as kernels

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Around each change of search (16 and 256 values) and of index type, and up to the most there is.
SIZES = [1, 2, 3, 5, 8, 15, 16, 17, 64, 255, 256, 257, 1000]

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def distances(weight, codebook, indices):
    return (weight.double() - codebook.double().gather(1, indices.long())).abs()


def one(number):
    return torch.tensor([number], dtype=torch.float64)


def codebook_of(groups, k, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(groups, k).to(wide).sort(1).values


@every_backend
@given(weights_and_codebooks())
def test_each_weight_goes_to_the_nearest_representative(backend, pair):
    weight, codebook = pair
    with using(backend) as backend_kernels:
        found = backend_kernels.assign(weight, kernels.midpoints(codebook))
    # Where float64 cannot tell two distances apart, either representative is right.
    best = distances(weight, codebook, brute.nearest(weight, codebook))
    assert torch.equal(distances(weight, codebook, found), best)


@every_backend
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("groups", [1, 3])
def test_every_search_gives_the_same_indices(backend, k, dtype, groups):
    # 5,001 weights per group: enough for the lookup table, which small inputs do not reach.
    weight = torch.randn(groups, 5_001).to(dtype)
    codebook = codebook_of(groups, k, dtype)
    best = brute.nearest(weight, codebook)
    with using(backend) as some:
        assert torch.equal(some.assign(weight, kernels.midpoints(codebook)).long(), best)
        snapped = some.snap(weight, codebook, kernels.midpoints(codebook))
    assert torch.equal(snapped, codebook.to(dtype).gather(1, best))


@every_backend
def test_a_weight_on_a_boundary_takes_the_lower_representative(backend):
    codebook = torch.arange(-20.0, 21.0)[None]  # boundaries at the halves
    for k in (2, 16, 41):
        some_codebook = codebook[:, :k].contiguous()
        weight = (some_codebook[:, 1:] + some_codebook[:, :-1]) / 2
        with using(backend) as some:
            found = some.assign(weight, kernels.midpoints(some_codebook))
        assert found.tolist() == [list(range(k - 1))]


@every_backend
def test_weights_in_several_pieces_are_assigned_as_in_one(backend):
    weight = torch.randn(1, 3 * kernels.PIECE + 17)
    for k in (9, 300):
        boundaries = kernels.midpoints(torch.linspace(-2, 2, k)[None])
        with using(backend) as some:
            found = some.assign(weight, boundaries)
        assert torch.equal(found.long(), torch.bucketize(weight, boundaries[0]))


@every_backend
def test_the_largest_codebook_keeps_exact_indices(backend):
    codebook = torch.randn(1, 65_536).sort(1).values
    weight = codebook[:, torch.randperm(65_536)].repeat(1, 5)  # enough weights for a table
    with using(backend) as some:
        for part in (weight, weight[:, :65_536].contiguous()):
            assert torch.equal(some.snap(part, codebook, kernels.midpoints(codebook)), part)


@every_backend
def test_more_values_than_an_index_can_name_still_find_theirs(backend):
    codebook = torch.arange(-40_000.0, 40_000.0)[None]
    with using(backend) as some:
        assert torch.equal(some.snap(codebook, codebook, kernels.midpoints(codebook)), codebook)


@every_backend
def test_a_codebook_with_one_far_outlier_falls_back_to_bisection(backend):
    codebook = torch.cat([torch.linspace(0, 1e-3, 40), torch.tensor([1e6])])[None]
    weight = torch.rand(1, 100_000) * 2e-3  # enough for every grid that is tried
    with using(backend) as some:
        found = some.assign(weight, kernels.midpoints(codebook))
    assert torch.equal(found.long(), brute.nearest(weight, codebook))


@every_backend
@pytest.mark.parametrize("k", [5, 40])
def test_boundaries_at_infinity_belong_to_representatives_that_win_nowhere(backend, k):
    boundaries = torch.linspace(-1, 1, k - 1)[None]
    boundaries[:, 0], boundaries[:, -2:] = -torch.inf, torch.inf
    weight = torch.randn(1, 100_000)
    with using(backend) as some:
        found = some.assign(weight, boundaries)
    assert torch.equal(found.long(), (weight[:, :, None] > boundaries[:, None, :]).sum(2))


@every_backend
def test_boundaries_between_two_float32_numbers_decide_as_they_are(backend):
    number = torch.tensor([1.0])
    above = torch.nextafter(number, torch.tensor([2.0]))
    weight = torch.stack([number, above], 1)
    boundaries = (number.double() + above.double())[None] / 2
    with using(backend) as some:
        assert some.assign(weight, boundaries).tolist() == [[0, 1]]


@every_backend
@given(weights_and_codebooks())
def test_counts_and_sums_are_those_of_a_loop(backend, pair):
    weight, codebook = pair
    k = codebook.shape[1]
    boundaries = kernels.midpoints(codebook)
    values = weight.flip(1) * 2
    with using(backend) as some:
        indices = some.assign(weight, boundaries)
        counts, sums = some.cluster_sums(values, weight, boundaries)
        again, squares = some.cluster_sums(values, weight, boundaries, power=2)
    assert torch.equal(counts, again) and torch.equal(kernels.count(indices, k).double(), counts)
    for g in range(weight.shape[0]):
        for j in range(k):
            members = values[g][indices[g] == j].double()
            assert counts[g, j] == len(members)
            # float64 sums of at most 40 numbers below 2e3 or their squares, in another order
            torch.testing.assert_close(sums[g, j], members.sum(), rtol=0, atol=1e-9)
            torch.testing.assert_close(squares[g, j], members.square().sum(), rtol=0, atol=1e-6)
    accumulated = kernels.accumulate(values, indices, k)
    torch.testing.assert_close((counts, sums), accumulated, rtol=0, atol=1e-9)


def measured_by_brute_force(weight, codebook, power):
    """The sum of |d|^power, squared deviations, members, and sums of sgn(d) |d|^(power - 1)."""
    indices = brute.nearest(weight, codebook)
    distance = weight.to(codebook.dtype) - codebook.gather(1, indices)  # rounded, as is specified
    member = torch.nn.functional.one_hot(indices, codebook.shape[1]).double()
    wide = distance.double()
    slope = wide if power == 2 else wide.sign()
    spread = (weight.double() - weight.double().mean()).square().sum()
    sums = (member * slope[:, :, None]).sum(1)
    return wide.abs().pow(power).sum(), spread, member.sum(1), sums


@every_backend
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize(("groups", "members"), [(1, 1), (1, 7), (1, 8_205), (3, 501), (2, 8_193)])
def test_one_pass_measures_what_brute_force_sums(backend, k, dtype, groups, members):
    weight = torch.randn(groups, members).to(dtype)
    codebook = codebook_of(groups, k, dtype)
    for power in (1, 2):
        expected = measured_by_brute_force(weight, codebook, power)
        # float64 sums of 10^4 terms of size 1. Those of squares, and of what they are of, are in
        # float32 over some thousands where they are compiled.
        narrow = backend in COMPILED and dtype != torch.float64 and power == 2
        tolerance = 1e-6 if narrow else 1e-11
        off = (tolerance * expected[0].sqrt() * weight.numel() ** 0.5).item() + 1e-11
        with using(backend) as some:
            for boundaries in (None, kernels.midpoints(codebook)):
                found = some.measure_all([weight], codebook, boundaries, power)
                found = (found[0][0], found[1][0], *found[2:])
                # The spread is as exact as a float32 standard deviation.
                torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=1e-11)
                torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
                assert torch.equal(found[2], expected[2])
                torch.testing.assert_close(found[3], expected[3], rtol=1e-11, atol=off)


@every_backend
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("k", [1, 4, 16, 17, 300])
@pytest.mark.parametrize(("groups", "members"), [(1, 1), (1, 9_003), (3, 501)])
def test_the_pull_adds_the_penaltys_gradient(backend, k, dtype, groups, members):
    weight = torch.randn(groups, members).to(dtype)
    codebook = codebook_of(groups, k, dtype)
    distance = weight.to(codebook.dtype) - codebook.gather(1, brute.nearest(weight, codebook))
    for power in (1, 2):
        slope = distance.double() if power == 2 else distance.double().sign()
        before = torch.randn(groups, members).to(dtype)
        out = before.clone()
        with using(backend) as some:
            some.pull_all([out], [weight], codebook, None, power, one(0.3))
        # One rounding of the product, one of the sum, one to `dtype`.
        exact = before.double() + 0.3 * slope
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


@every_backend
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("k", [1, 16, 300])
@pytest.mark.parametrize("amount", [0.0, 0.2, 0.75])
def test_a_move_goes_part_of_the_way_and_never_past(backend, k, dtype, amount):
    weight = torch.randn(2, 5_001).to(dtype)
    codebook = codebook_of(2, k, dtype)
    weight[:, :k] = codebook.to(dtype)[:, : weight.shape[1]]
    nearest = codebook.gather(1, brute.nearest(weight, codebook)).double()
    way = nearest - weight.double()
    tolerance = 4 * torch.finfo(dtype).eps  # a few roundings of numbers up to 4
    for power in (1, 2):
        share = way * amount if power == 2 else way.sign() * way.abs().clamp(max=amount)
        moved = weight.clone()
        with using(backend) as some:
            some.move_all([moved], codebook, None, power, one(amount))
        torch.testing.assert_close(
            moved.double(), weight.double() + share, rtol=tolerance, atol=tolerance
        )
        if power == 1:
            arrived = way.abs() <= 0.999 * amount
            assert torch.equal(moved[arrived], nearest[arrived].to(dtype)), "arrived exactly"


@every_backend
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("k", [1, 4, 16, 40])
@pytest.mark.parametrize("power", [1, 2])
def test_many_weights_in_one_call_are_done_as_each_alone(backend, power, k, dtype):
    shapes = [(1, 1), (3, 501), (1, 140_003), (1, 0), (2, 9_001), (1, 4_096), (70, 2_000)]
    many = kernels.Weights(torch.randn(shape).to(dtype) for shape in shapes)
    codebook = codebook_of(sum(groups for groups, _ in shapes), k, dtype)
    rows = codebook.split([groups for groups, _ in shapes])
    factors = torch.rand(len(many), dtype=torch.float64)
    with using(backend) as some:
        for boundaries in (None, kernels.midpoints(codebook)):
            together = some.measure_all(many, codebook, boundaries, power)
            alone = [some.measure_all([w], c, None, power) for w, c in zip(many, rows, strict=True)]
            for found, parts in zip(together, zip(*alone, strict=True), strict=True):
                assert torch.equal(found, torch.cat(parts))
        outs, expected = ([torch.ones_like(w) for w in many] for _ in range(2))
        some.pull_all([o.view(-1) for o in outs], many, codebook, None, power, factors)
        moved = kernels.Weights(w.clone() for w in many)
        some.move_all(moved, codebook, None, power, factors)
        for i, (weight, own) in enumerate(zip(many, rows, strict=True)):
            some.pull_all([expected[i]], [weight], own, None, power, factors[i : i + 1])
            assert torch.equal(outs[i], expected[i])
            weight = weight.clone()
            some.move_all([weight], own, None, power, factors[i : i + 1])
            assert torch.equal(moved[i], weight)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_narrow_number_is_read_and_written_as_torch_does(backend, dtype):
    # All finite numbers of the type, each its own representative.
    every = torch.arange(65_536).to(torch.uint16).view(dtype)
    weight = every[every.isfinite()].view(1, -1)
    wide = weight.float().unique()[None]  # unique makes the two zeros one
    with using(backend) as some:
        snapped = some.snap(weight, wide, kernels.midpoints(wide))
        assert torch.equal(snapped, weight)
        # Rounding: what lies between two numbers goes where torch's conversion sends it.
        odd = torch.randn(1, 60_001) * torch.tensor(10.0).pow(torch.randint(-9, 5, (1, 60_001)))
        wide = odd.unique()[None]
        weight = odd.to(dtype)
        found = some.snap(weight, wide, kernels.midpoints(wide))
        assert torch.equal(found, wide.gather(1, brute_force_search(weight, wide)).to(dtype))


def brute_force_search(weight, codebook):
    """As `brute.nearest`, for codebooks too large to compare with each weight."""
    boundaries = (codebook[0, 1:].double() + codebook[0, :-1].double()) / 2
    return torch.bucketize(weight.double(), boundaries)


@every_backend
@pytest.mark.parametrize("dtype", TYPES)
def test_the_standard_deviation_is_that_of_float64(backend, dtype):
    weight = (torch.randn(3, 30_011) * 1e-3 + 5).to(dtype)
    with using(backend) as some:
        found = some.std(weight)
        equal = some.std(torch.full((2, 1001), 0.1, dtype=dtype))
        broken = some.std(torch.tensor([[1.0, math.nan, 2.0]], dtype=dtype))
    expected = weight.double().std(correction=0)
    # 1e-4: torch's own float32 standard deviation of numbers 5,000 times as large
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    assert equal == 0 and broken.isnan()


@every_backend
def test_the_spread_is_right_however_far_off_the_codebook_lies(backend):
    # float64 holds 16 digits; the squares of the distances are 10^12 times the spread.
    weight = torch.randn(1, 9_000) * 1e-3
    with using(backend) as some:
        for codebook in (torch.tensor([[1e3]]), torch.tensor([[-1e3, 1e3]])):
            _, spread, *_ = some.measure_all([weight], codebook, None, 2)
            expected = (weight.double() - weight.double().mean()).square().sum()
            torch.testing.assert_close(spread[0], expected, rtol=1e-5, atol=0)
            equal = some.measure_all([torch.full((1, 9_000), 0.1)], codebook, None, 2)
            assert equal[1] == 0


@every_backend
def test_sums_of_many_equal_weights_do_not_stall(backend):
    # A float32 running sum of 2^25 ones stops at 2^24.
    weight = torch.ones(1, 2**25, dtype=torch.bfloat16)
    codebook = torch.tensor([[-2.0, 0.0]])
    with using(backend) as some:
        _, sums = some.cluster_sums(weight, weight, torch.tensor([[-1.0]]))
        total, _, counts, distance = some.measure_all([weight], codebook, None, 2)
    assert sums.tolist() == counts.tolist() == distance.tolist() == [[0.0, float(2**25)]]
    assert total == 2**25


@every_backend
@pytest.mark.parametrize("k", [1, 4, 9, 16, 64, 3000])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-18, 1e20])
def test_sizes_whose_squares_float32_does_not_hold_are_measured(backend, k, size):
    weight = torch.linspace(-1, 1, 20_003)[None] * size
    codebook = torch.linspace(-0.9, 1.1, k)[None] * size
    total, _, counts, sums = measured_by_brute_force(weight, codebook, 2)
    with using(backend) as some:
        found = some.measure_all([weight], codebook, None, 2)
    torch.testing.assert_close(found[0][0], total, rtol=1e-6, atol=0)
    if size:  # else all representatives are equal
        assert torch.equal(found[2], counts)
    torch.testing.assert_close(found[3], sums, rtol=1e-6, atol=1e-6 * 20_003 * size)


@every_backend
@pytest.mark.parametrize("k", [2, 9, 40])
def test_sums_of_one_crowded_cluster_do_not_drift(backend, k):
    # All weights alike: float32 sums of many equal numbers round to one side.
    weight = torch.full((1, 1_000_003), 0.1)
    codebook = torch.cat([torch.tensor([0.3 / 7]), torch.arange(1.0, k)])[None]
    distance = weight[0, 0].double() - codebook[0, 0].double()
    with using(backend) as some:
        total, _, counts, sums = some.measure_all([weight], codebook, None, 2)
    assert counts[0].tolist() == [1_000_003.0] + [0.0] * (k - 1)
    torch.testing.assert_close(sums[0, 0], 1_000_003 * distance, rtol=1e-4, atol=0)
    torch.testing.assert_close(total[0], 1_000_003 * distance**2, rtol=1e-5, atol=0)


@every_backend
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, ::2],
        lambda t: t.T,
        lambda t: t[:, 3:],
        lambda t: t[:1].expand(4, -1),
    ],
    ids=["every second", "transposed", "cut", "expanded"],
)
def test_weights_that_are_not_contiguous_are_measured_as_their_copies(backend, view):
    weight = view(torch.randn(60, 90))
    codebook = torch.randn(len(weight), 5).sort(1).values
    boundaries = kernels.midpoints(codebook)
    copy = weight.contiguous()
    with using(backend) as some:
        assert torch.equal(some.assign(weight, boundaries), some.assign(copy, boundaries))
        for one, other in zip(
            some.measure_all([weight], codebook, None, 2),
            some.measure_all([copy], codebook, None, 2),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-4)  # another order


@every_backend
@given(weights_and_codebooks())
def test_snapping_twice_changes_nothing(backend, pair):
    weight, codebook = pair
    with using(backend) as some:
        once = some.snap(weight, codebook, kernels.midpoints(codebook))
        twice = some.snap(once, codebook, kernels.midpoints(codebook))
    assert torch.equal(once, twice)
    for g in range(weight.shape[0]):
        assert set(once[g].tolist()) <= set(codebook[g].tolist())


@every_backend
@settings(max_examples=30)
@given(st.integers(0, 3), st.integers(0, 2))
def test_empty_inputs_give_empty_outputs(backend, groups, k_minus_one):
    weight = torch.empty(groups, 0)
    boundaries = torch.zeros(groups, k_minus_one)
    with using(backend) as some:
        assert some.assign(weight, boundaries).shape == (groups, 0)
        counts, sums = some.cluster_sums(weight, weight, boundaries)
    assert counts.shape == sums.shape == (groups, k_minus_one + 1)
    assert not counts.any() and not sums.any()
