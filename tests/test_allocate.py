"""Allocation of values to layers: against all possible choices, and losses measured by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import fewbits
from fewbits import CodebookError, PlanError
from fewbits._allocate import cheapest, planned_bytes

KS = (2, 3, 4, 8)


def brute_force(losses, sizes, budget):
    """The least sum of losses over every choice that fits."""
    names = list(losses)
    fitting = [
        sum(losses[n][k] for n, k in zip(names, ks, strict=True))
        for ks in itertools.product(*(losses[n] for n in names))
        if sum(sizes[n][k] for n, k in zip(names, ks, strict=True)) <= budget
    ]
    return min(fitting)


@st.composite
def problems(draw, convex: bool = False):
    losses, sizes = {}, {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        weights = draw(st.sampled_from((100, 1000, 5000)))
        sizes[name] = {k: math.ceil(weights * math.log2(k) / 8) + 4 * k for k in KS}
        if convex:  # squared error of k values
            scale = draw(st.floats(0.1, 10))
            losses[name] = {k: scale / k**2 for k in KS}
        else:
            falling = sorted(draw(st.lists(st.floats(0, 10), min_size=4, max_size=4)), reverse=True)
            losses[name] = dict(zip(KS, falling, strict=True))
    least = sum(min(s.values()) for s in sizes.values())
    most = sum(max(s.values()) for s in sizes.values())
    return losses, sizes, draw(st.integers(least, most + 10))


@given(problems())
def test_a_choice_fits_its_budget_and_is_never_worse_than_one_k_for_all(problem):
    losses, sizes, budget = problem
    chosen = cheapest(losses, sizes, budget)
    assert sum(sizes[n][k] for n, k in chosen.items()) <= budget
    lost = sum(losses[n][k] for n, k in chosen.items())
    for k in KS:
        if sum(s[k] for s in sizes.values()) <= budget:
            assert lost <= sum(by_k[k] for by_k in losses.values()) + 1e-12


@given(problems(convex=True))
def test_a_choice_is_within_one_layers_step_of_the_best_of_all(problem):
    losses, sizes, budget = problem
    lost = sum(losses[n][k] for n, k in cheapest(losses, sizes, budget).items())
    steps = [b[j] - b[k] for b in losses.values() for j, k in itertools.pairwise(KS)]
    assert brute_force(losses, sizes, budget) - 1e-12 <= lost
    assert lost <= brute_force(losses, sizes, budget) + max(steps)


def test_the_worked_example():
    # 100 bytes to spend beyond the least: layer a gains 5 from them, layer b gains 3.
    losses = {"a": {2: 6.0, 4: 1.0}, "b": {2: 4.0, 4: 1.0}}
    sizes = {"a": {2: 100, 4: 200}, "b": {2: 100, 4: 200}}
    assert cheapest(losses, sizes, 200) == {"a": 2, "b": 2}
    assert cheapest(losses, sizes, 300) == {"a": 4, "b": 2}
    assert cheapest(losses, sizes, 400) == {"a": 4, "b": 4}


# -- with a model -----------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))


@pytest.fixture
def batches(model):
    inputs = torch.randn(4, 50, 16)
    return [(x, model(x).argmax(1)) for x in inputs]


def test_the_layer_whose_snapping_hurts_gets_more_values(batches):
    # The first layer's weights take two values already: nothing is lost by 2 there.
    first, second = nn.Linear(16, 32), nn.Linear(32, 4)
    with torch.no_grad():
        first.weight.copy_(first.weight.sign() / 4)
    model = nn.Sequential(first, nn.ReLU(), second)
    pairs = [(x, model(x).detach()) for x, _ in batches]
    even = fewbits.plan(model, k=3)
    chosen = fewbits.allocate(model, pairs, mse_loss, size_bytes=planned_bytes(model, even))
    assert [w.k for w in chosen.selected][0] == 2
    assert [w.k for w in chosen.selected][1] > 3


def test_the_plan_takes_no_more_bytes_than_asked_and_quantizes(model, batches):
    for size in (900, 1100, 1500, 4000):
        plan = fewbits.allocate(model, batches, cross_entropy, size_bytes=size)
        assert planned_bytes(model, plan) <= size
        copy = nn.Sequential(
            nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)
        )  # fmt: skip
        copy.load_state_dict(model.state_dict())
        fewbits.quantize(copy, plan=plan)
        assert [len(copy.get_parameter(w.name).unique()) for w in plan.selected] == [
            w.k for w in plan.selected
        ]


def test_a_model_file_is_hardly_larger_than_the_budget(model, batches, tmp_path):
    plan = fewbits.allocate(model, batches, cross_entropy, size_bytes=1200)
    fewbits.quantize(model, plan=plan)
    fewbits.save(model, tmp_path / "m.fewbits")
    tensors = len(model.state_dict())
    assert (tmp_path / "m.fewbits").stat().st_size <= 1200 + 150 * tensors


def test_the_model_is_unchanged(model, batches):
    model.train()
    model[0].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    fewbits.allocate(model, batches, cross_entropy, size_bytes=1200)
    assert [m.training for m in model.modules()] == modes
    assert model[1].track_running_stats and model[1].momentum == 0.1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_granularity_and_exclusions_of_a_plan_are_kept(model, batches):
    base = fewbits.plan(model, k=2, granularity="channel", overrides={"3": None})
    plan = fewbits.allocate(model, batches, cross_entropy, size_bytes=4000, plan=base)
    assert [(w.name, w.groups) for w in plan.selected] == [("0.weight", 32)]
    assert plan.selected[0].k <= 16  # a channel has 16 weights


def test_a_budget_below_the_smallest_plan_is_refused_with_that_size(model, batches):
    least = planned_bytes(model, fewbits.plan(model, k=2))
    with pytest.raises(PlanError, match=f"takes {least:,} bytes"):
        fewbits.allocate(model, batches, cross_entropy, size_bytes=least - 1)
    plan = fewbits.allocate(model, batches, cross_entropy, size_bytes=least)
    assert [w.k for w in plan.selected] == [2, 2]


def test_bad_input_is_refused(model, batches):
    with pytest.raises(PlanError, match="there is no batch"):
        fewbits.allocate(model, [], cross_entropy, size_bytes=2000)
    with pytest.raises(PlanError, match="k is 0 for candidates"):
        fewbits.allocate(model, batches, cross_entropy, size_bytes=2000, candidates=(0, 2))
    with torch.no_grad():
        model[3].bias.fill_(torch.nan)
    with pytest.raises(CodebookError, match="before anything is snapped"):
        fewbits.allocate(model, batches, cross_entropy, size_bytes=2000)
