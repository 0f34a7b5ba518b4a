"""Post-training methods against brute force, the definition of their grids, and each other."""

import math
from typing import Any

import pytest
import torch
from helpers import distinct, parameter, two_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute
from torch import nn

import fewbits


def layer_of(weight):
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight.data.copy_(weight)
    return layer


def error(layer, weight):
    return float((layer.weight.detach().double() - weight.double()).square().sum())


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(4, 9))
def test_kmeans_leaves_the_least_squared_error_there_is(seed, k, members):
    torch.manual_seed(seed)
    weight = torch.randn(1, members)
    layer = layer_of(weight)
    fewbits.quantize(layer, k=k, method="kmeans")
    assert distinct(layer.weight) <= k
    least = brute.kmeans_error(weight[0].tolist(), k)
    assert error(layer, weight) == pytest.approx(least, rel=1e-4, abs=1e-9)  # float32 means


def test_uniform_is_an_even_grid_from_the_smallest_to_the_largest_weight():
    weight = torch.randn(50, 50)
    layer = layer_of(weight)
    fewbits.quantize(layer, bits=3, method="uniform")
    grid = torch.linspace(float(weight.min()), float(weight.max()), 8)
    nearest = grid[brute.nearest(weight.view(1, -1), grid[None])].view_as(weight)
    torch.testing.assert_close(layer.weight.detach(), nearest)


def entropy(layer):
    _, counts = layer.weight.detach().unique(return_counts=True)
    share = counts.double() / counts.sum()
    return float(-(share * share.log2()).sum())


def test_entropy_trades_bits_for_error_better_than_fewer_means():
    weight = torch.distributions.Laplace(0.0, 1.0).sample((200, 200))
    layers = [layer_of(weight) for _ in range(4)]
    for layer, rate in zip(layers, (0.0, 0.02, 0.1, 0.4), strict=True):
        fewbits.quantize(layer, k=32, method="entropy", rate=rate)
    entropies = [entropy(layer) for layer in layers]
    errors = [error(layer, weight) for layer in layers]
    assert sorted(entropies, reverse=True) == entropies
    assert sorted(errors) == errors
    means = layer_of(weight)
    fewbits.quantize(means, k=6)
    assert entropies[2] < entropy(means) and errors[2] < error(means, weight)


def test_a_rate_of_zero_is_kmeans():
    weight = torch.randn(40, 40)
    some, other = layer_of(weight), layer_of(weight)
    fewbits.quantize(some, k=5, method="entropy", rate=0.0)
    fewbits.quantize(other, k=5)
    assert torch.equal(some.weight, other.weight)


@pytest.mark.parametrize("method", ["kmeans", "uniform", "entropy"])
def test_the_plan_is_carried_out_and_returned(method):
    model = two_layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = fewbits.plan(model, k=3, granularity="channel", overrides={"2": {"k": 2}})
    assert fewbits.quantize(model, plan=plan, method=method) is plan
    assert max(distinct(row) for row in parameter(model, "0.weight")) == 3
    assert max(distinct(row) for row in parameter(model, "2.weight")) == 2
    assert distinct(parameter(model, "0.weight")) > 3
    assert torch.equal(model.state_dict()["0.bias"], before["0.bias"])
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("method", ["kmeans", "uniform", "entropy"])
def test_quantizing_is_deterministic_and_a_second_time_changes_nothing(method):
    some, other = two_layers(), two_layers()
    for model in (some, other):
        fewbits.quantize(model, k=4, method=method, rate=1e-6)
    assert torch.equal(parameter(some, "0.weight"), parameter(other, "0.weight"))
    once = parameter(some, "0.weight").detach().clone()
    fewbits.quantize(some, k=4, method=method, rate=1e-6)
    torch.testing.assert_close(parameter(some, "0.weight").detach(), once)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_type_keeps_its_type(dtype):
    layer = layer_of(torch.randn(30, 30)).to(dtype)
    fewbits.quantize(layer, k=7)
    assert layer.weight.dtype == dtype
    assert distinct(layer.weight) == 7


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "head": nn.Linear(4, 10)})
    model["head"].weight = parameter(model, "table.weight")
    fewbits.quantize(model, k=2)
    assert model["head"].weight is model["table"].weight
    assert distinct(parameter(model, "head.weight")) == 2


@pytest.mark.parametrize(("wish", "message"), [
    ({"k": 2, "method": "kmean"}, r"method is 'kmean'\. Did you mean 'kmeans'"),
    ({"k": 2, "method": "entropy", "rate": -1.0}, r"rate is -1\.0"),
    ({"k": 2, "method": "entropy", "rate": math.nan}, r"rate is nan"),
    ({"k": 0}, r"k is 0"),
])  # fmt: skip
def test_impossible_wishes_are_refused(wish: dict[str, Any], message):
    model = two_layers()
    before = parameter(model, "0.weight").detach().clone()
    with pytest.raises(fewbits.PlanError, match=message):
        fewbits.quantize(model, **wish)
    assert torch.equal(parameter(model, "0.weight"), before)


def test_a_clustered_model_cannot_be_quantized():
    model = two_layers()
    fewbits.Clustering(model, k=2)
    with pytest.raises(fewbits.PlanError, match=r"0\.weight is clustered already"):
        fewbits.quantize(model, k=2)


def unequal_layers(scale: float) -> nn.Sequential:
    """Two layers of normal weights, the second's `scale` times as large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50, bias=False), nn.Linear(50, 30, bias=False))
    with torch.no_grad():
        for layer, size in zip(model, (1.0, scale), strict=True):
            nn.init.normal_(layer.get_parameter("weight"), std=size)
    return model


def bits(model: nn.Module) -> list[float]:
    """Entropy of each weight's values in float64, bits."""
    found = []
    for weight in model.parameters():
        counts = weight.detach().unique(return_counts=True)[1].double()
        share = counts / counts.sum()
        found.append(float(-(share * share.log2()).sum()))
    return found


@pytest.mark.parametrize("trained", [False, True])
def test_a_bit_has_one_price_in_the_whole_network(trained: bool):
    model = unequal_layers(0.01)
    if trained:
        clustering = fewbits.Clustering(
            model, k=8, regularizer=fewbits.regularizers.RateAware(0.05)
        )
        with pytest.warns(UserWarning, match=r"1\.weight: all weights share one representative"):
            for _ in range(200):  # until the running usage is that of the assignment
                clustering.loss().backward()
                clustering.step()
        clustering.harden()
    else:
        fewbits.quantize(model, k=8, method="entropy", rate=0.05)
    large, small = bits(model)
    assert large > 1.5 and small == 0


def test_the_price_is_in_the_mean_variance_of_the_layers():
    alone, equal = unequal_layers(1.0), unequal_layers(1.0)
    fewbits.quantize(equal, k=8, method="entropy", rate=0.1)
    first, second = (w.detach().double() for w in alone.parameters())
    total = first.numel() * first.var(correction=0) + second.numel() * second.var(correction=0)
    mean = float(total / (first.numel() + second.numel()))
    only = nn.Sequential(alone[0])  # of another variance than both together
    fewbits.quantize(only, k=8, method="entropy", rate=0.1 * mean / float(first.var(correction=0)))
    assert torch.equal(only[0].get_parameter("weight"), equal[0].get_parameter("weight"))
