"""The plain torch kernels against brute force in float64: equal indices, not close ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute
from strategies import weights_and_codebooks

from fewbits import _kernels as kernels


@given(weights_and_codebooks())
def test_each_weight_goes_to_the_nearest_representative(pair):
    weight, codebook = pair
    found = kernels.assign(weight, kernels.midpoints(codebook))
    best = brute.nearest(weight, codebook)
    # Where float64 cannot tell two distances apart, either representative is right.
    distances = [
        (weight.double() - codebook.double().gather(1, i.long())).abs() for i in (found, best)
    ]
    assert torch.equal(*distances)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 3, 15, 16, 17, 64, 255, 256, 257, 1000])
@pytest.mark.parametrize("groups", [1, 3])
def test_every_search_gives_the_same_indices(k, dtype, groups):
    # 5,000 weights per group: enough for the lookup table, which small inputs do not reach.
    weight = torch.randn(groups, 5_000).to(dtype)
    codebook = torch.randn(groups, k).to(torch.float64 if dtype == torch.float64 else torch.float32)
    codebook = codebook.sort(1).values
    found = kernels.assign(weight, kernels.midpoints(codebook))
    assert torch.equal(found.long(), brute.nearest(weight, codebook))


def test_weights_in_several_pieces_are_assigned_as_in_one():
    weight = torch.randn(1, 3 * kernels.PIECE + 17)
    codebook = torch.linspace(-2, 2, 9)[None]
    found = kernels.assign(weight, kernels.midpoints(codebook))
    assert torch.equal(found.long(), torch.bucketize(weight, kernels.midpoints(codebook)[0]))


def test_the_largest_codebook_keeps_exact_indices():
    codebook = torch.randn(1, 65_536).sort(1).values
    weight = codebook[:, torch.randperm(65_536)]
    found = kernels.assign(weight, kernels.midpoints(codebook))
    assert torch.equal(kernels.gather(codebook, found), weight)


def test_a_codebook_with_one_far_outlier_falls_back_to_bisection():
    codebook = torch.cat([torch.linspace(0, 1e-3, 40), torch.tensor([1e6])])[None]
    weight = torch.rand(1, 10_000) * 2e-3
    found = kernels.assign(weight, kernels.midpoints(codebook))
    assert torch.equal(found.long(), brute.nearest(weight, codebook))


@given(weights_and_codebooks())
def test_counts_and_sums_are_those_of_a_loop(pair):
    weight, codebook = pair
    k = codebook.shape[1]
    boundaries = kernels.midpoints(codebook)
    indices = kernels.assign(weight, boundaries)
    counts, sums = kernels.accumulate(weight, indices, k)
    for g in range(weight.shape[0]):
        for j in range(k):
            members = weight[g][indices[g] == j].double()
            assert counts[g, j] == len(members)
            # float64 sums of at most 40 numbers below 1e3, in another order
            torch.testing.assert_close(sums[g, j], members.sum(), rtol=0, atol=1e-9)
    fused = kernels.cluster_sums(weight, weight, boundaries)
    torch.testing.assert_close(fused, (counts, sums), rtol=0, atol=0)
    assert torch.equal(kernels.count(indices, k).double(), counts)


def test_sums_of_many_equal_weights_do_not_stall():
    # A float32 running sum of 2^25 ones stops at 2^24.
    weight = torch.ones(1, 2**25, dtype=torch.bfloat16)
    _, sums = kernels.cluster_sums(weight, weight, torch.zeros(1, 1))
    assert sums.tolist() == [[0.0, float(2**25)]]


@given(weights_and_codebooks())
def test_snapping_twice_changes_nothing(pair):
    weight, codebook = pair
    once = kernels.snap(weight, codebook, kernels.midpoints(codebook))
    twice = kernels.snap(once, codebook, kernels.midpoints(codebook))
    assert torch.equal(once, twice)
    for g in range(weight.shape[0]):
        assert set(once[g].tolist()) <= set(codebook[g].tolist())


@settings(max_examples=30)
@given(st.integers(0, 3), st.integers(0, 2))
def test_empty_inputs_give_empty_outputs(groups, k_minus_one):
    weight = torch.empty(groups, 0)
    boundaries = torch.zeros(groups, k_minus_one)
    assert kernels.assign(weight, boundaries).shape == (groups, 0)
    counts, sums = kernels.cluster_sums(weight, weight, boundaries)
    assert counts.shape == sums.shape == (groups, k_minus_one + 1)
    assert not counts.any() and not sums.any()
