"""Initial codebooks against brute force and dynamic programming; assignment with a rate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute
from strategies import weights, weights_and_codebooks

from fewbits._codebook import (
    grouped,
    initial_codebook,
    rate_aware_boundaries,
    snap_to_nearest,
    split_largest,
    ungrouped,
)
from fewbits._kernels import assign


def error(weight, codebook):
    return float(
        (weight.double() - snap_to_nearest(weight.double(), codebook.double())).square().sum()
    )


@settings(max_examples=60)
@given(weights(groups=2), st.integers(1, 4))
def test_kmeans_has_the_least_squared_error_there_is(weight, k):
    weight = weight[:, :9].double()
    codebook = initial_codebook(weight, k, "kmeans")
    for row, values in zip(weight, codebook, strict=True):
        least = brute.kmeans_error(row.tolist(), k)
        scale = float(row.square().sum()) + 1
        # float64 sums of squares, cancelled against each other
        assert error(row[None], values[None]) <= least + 1e-12 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled passes, plain ones
def test_binned_kmeans_is_within_a_ten_thousandth_of_exact(dtype):
    # 4,096 weights are clustered exactly; 40,960 copies of them go through the histogram.
    weight = torch.distributions.Laplace(0.0, 1.0).sample((1, 4096)).to(dtype)
    for k in (2, 4, 16, 64):
        exact = error(weight, initial_codebook(weight, k, "kmeans"))
        many = weight.repeat(1, 10)
        binned = error(many, initial_codebook(many, k, "kmeans")) / 10
        # 1e-6: rounding of float32 codebooks
        assert exact * (1 - 1e-6) <= binned <= exact * 1.0001, k


@pytest.mark.parametrize("init", ["kmeans", "quantile", "uniform"])
@pytest.mark.parametrize("k", [1, 2, 7, 300, 5000])
def test_initial_codebooks_ascend_and_repeat_bit_for_bit(init, k):
    weight = torch.randn(2, 6000)
    first, second = (initial_codebook(weight, k, init) for _ in range(2))
    assert first.shape == (2, k)
    assert torch.equal(first, second)
    assert (first.diff(dim=1) >= 0).all()
    assert first.min() >= weight.min() and first.max() <= weight.max()


def test_quantiles_hold_equal_mass_and_uniform_is_even():
    weight = torch.randn(1, 10_000)
    quantile = initial_codebook(weight, 4, "quantile")
    below = torch.stack([(weight < c).double().mean() for c in quantile[0]])
    torch.testing.assert_close(
        below, torch.tensor([0.125, 0.375, 0.625, 0.875]).double(), rtol=0, atol=1e-3
    )
    steps = initial_codebook(weight, 5, "uniform").diff(dim=1)
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps))


@given(weights(), st.integers(1, 60))
def test_more_representatives_than_distinct_weights_leave_no_error(weight, k):
    distinct = max(len(row.unique()) for row in weight)
    codebook = initial_codebook(weight.double(), max(k, distinct), "kmeans")
    torch.testing.assert_close(
        snap_to_nearest(weight.double(), codebook), weight.double(), rtol=1e-9, atol=1e-5
    )


@given(weights_and_codebooks(), st.data())
def test_a_rate_moves_assignment_exactly_as_brute_force_says(pair, data):
    weight, codebook = pair
    costs = st.lists(st.floats(0, 4), min_size=codebook.numel(), max_size=codebook.numel())
    cost = torch.tensor(data.draw(costs)).view(codebook.shape)
    boundaries = rate_aware_boundaries(codebook.double(), cost)
    assert (boundaries[:, 1:] >= boundaries[:, :-1]).all()
    found = assign(weight.double(), boundaries).long()
    best = brute.rate_aware_indices(weight, codebook, cost)

    def price(indices):
        values = codebook.double().gather(1, indices)
        return (weight.double() - values).square() + cost.double().gather(1, indices)

    # Ties may go either way; what is paid may not differ.
    torch.testing.assert_close(price(found), price(best), rtol=1e-9, atol=1e-9)


def test_without_a_rate_assignment_is_nearest():
    codebook = torch.randn(2, 8).sort(1).values
    weight = torch.randn(2, 500)
    boundaries = rate_aware_boundaries(codebook, torch.zeros_like(codebook))
    assert torch.equal(assign(weight, boundaries).long(), brute.nearest(weight, codebook))


def test_a_dead_representative_halves_the_worst_cluster():
    weight = torch.tensor([[0.0, 0.1, 5.0, 7.0, 5.0, 7.0]])
    codebook = torch.tensor([[0.0, 6.0, 100.0]])
    indices = assign(weight, torch.tensor([[3.0, 50.0]]))
    revived = split_largest(weight, codebook, torch.tensor([False, False, True]), indices)
    assert revived.tolist() == [[0.0, 5.0, 7.0]]


def test_reviving_gives_up_where_no_cluster_can_be_split():
    weight = torch.tensor([[1.0, 1.0, 1.0]])
    codebook = torch.tensor([[1.0, 2.0]])
    indices = torch.zeros(1, 3, dtype=torch.uint8)
    revived = split_largest(weight, codebook, torch.tensor([False, True]), indices)
    assert torch.equal(revived, codebook)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3), (4, 6, 2), (6,)])
@pytest.mark.parametrize("axis", [0, 1])
def test_grouping_and_ungrouping_are_inverse_in_every_layout(shape, axis):
    axis = min(axis, len(shape) - 1)
    tensor = torch.randn(shape)
    layouts = [tensor, tensor.transpose(0, -1).contiguous().transpose(0, -1)]
    if len(shape) == 4:
        layouts.append(tensor.contiguous(memory_format=torch.channels_last))
    for layout in layouts:
        for groups in (1, shape[axis], shape[axis] // 2):
            view = grouped(layout, groups, axis)
            assert view.shape == (groups, tensor.numel() // groups)
            assert torch.equal(ungrouped(view, layout, groups, axis), tensor)
            if groups == 1:
                assert view.data_ptr() == layout.data_ptr(), "a view, not a copy"
