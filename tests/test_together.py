"""Small layers snapped in one call against the same layers, each snapped alone."""

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import gradient, parameter
from torch import nn

import fewbits
from fewbits import _stack


def network() -> nn.Sequential:
    torch.manual_seed(0)
    shared = nn.Linear(10, 10)
    return nn.Sequential(
        nn.Linear(6, 10), shared, nn.ReLU(), nn.Linear(10, 10), shared, nn.Linear(10, 3)
    )


def attach(model, monkeypatch, alone, granularity: Any):
    with monkeypatch.context() as patch:
        if alone:
            patch.setattr(_stack, "_is_small", lambda layer: False)
        plan = fewbits.plan(model, k=3, granularity=granularity)
        clustering = fewbits.Clustering(model, plan=plan)
    return clustering


def both(monkeypatch, granularity: Any = "layer"):
    """The network with its clustering, snapped in one call and layer by layer."""
    pairs = []
    for alone in (False, True):
        model = network()
        clustering = attach(model, monkeypatch, alone, granularity)
        assert bool(clustering._snapping) != alone
        pairs.append((model, clustering))
    return pairs


def assert_alike(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    for name, found in mine.items():
        assert torch.equal(found, theirs[name]), name
        assert (found.grad is None) == (theirs[name].grad is None), name
        if found.grad is not None:  # the same sums in the same order
            assert torch.equal(found.grad, gradient(theirs[name])), name


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_training_is_bit_for_bit_what_it_is_layer_by_layer(granularity, monkeypatch):
    pairs = both(monkeypatch, granularity)
    optimizers = [torch.optim.SGD(c.param_groups(lr=0.05), momentum=0.9) for _, c in pairs]
    for step in range(4):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        for (model, clustering), optimizer in zip(pairs, optimizers, strict=True):
            optimizer.zero_grad()
            (model(inputs).square().mean() + clustering.loss()).backward()
        assert_alike(pairs[0][0], pairs[1][0])
        for (_, clustering), optimizer in zip(pairs, optimizers, strict=True):
            optimizer.step()
            clustering.step()


def write_in_place(weight, codebook):
    with torch.no_grad():
        weight.mul_(-1)


def write_the_codebook(weight, codebook):
    with torch.no_grad():
        codebook.add_(1)


def replace_data(weight, codebook):
    weight.data = weight.data.flip(0).clone()


@pytest.mark.parametrize("change", [write_in_place, write_the_codebook, replace_data])
def test_a_weight_that_changes_in_the_middle_of_a_forward_pass_is_snapped_anew(change, monkeypatch):
    (model, _), (other, _) = both(monkeypatch)
    for some in (model, other):
        some[0](torch.ones(2, 6))  # the others are made ready here
        change(parameter(some, "3.weight"), parameter(some, "3.weight_codebook"))
    assert torch.equal(model[3].weight, other[3].weight)


def test_weights_written_through_data_are_snapped_anew_after_each_step(monkeypatch):
    (model, clustering), (other, others) = both(monkeypatch)
    for some, its in ((model, clustering), (other, others)):
        some[0](torch.ones(2, 6))
        parameter(some, "3.weight").data.mul_(-1)
        its.step()
    assert torch.equal(model[3].weight, other[3].weight)


def test_a_weight_that_changes_before_the_backward_pass_is_an_error(monkeypatch):
    (model, _), _ = both(monkeypatch)
    output = model(torch.ones(2, 6)).sum()
    write_in_place(parameter(model, "3.weight"), None)
    with pytest.raises(RuntimeError, match="inplace operation"):
        output.backward()


def test_layers_that_were_not_read_get_no_gradient(monkeypatch):
    (model, _), (other, _) = both(monkeypatch)
    for some in (model, other):
        some[0](torch.ones(2, 6)).square().sum().backward()
        assert parameter(some, "3.weight").grad is None
    assert_alike(model, other)


def test_parts_of_a_network_are_passed_backwards_one_by_one(monkeypatch):
    (model, _), (other, _) = both(monkeypatch)
    for some in (model, other):
        for layer, width in ((some[0], 6), (some[3], 10), (some[5], 10)):
            layer(torch.ones(2, width)).square().sum().backward()
    assert_alike(model, other)


def test_what_was_read_without_gradients_has_none_and_what_is_read_next_has(monkeypatch):
    (model, _), _ = both(monkeypatch)
    with torch.no_grad():
        assert not model[0].weight.requires_grad
    assert model[3].weight.requires_grad
    for some in (parameter(model, "5.weight"), parameter(model, "5.weight_codebook")):
        some.requires_grad_(False)
    model(torch.ones(2, 6)).sum().backward()
    assert parameter(model, "5.weight").grad is None
    assert parameter(model, "3.weight").grad is not None


def test_a_copy_of_one_layer_takes_no_others_along(monkeypatch):
    (model, clustering), _ = both(monkeypatch)
    for twin in (copy.deepcopy(model[0]), copy.deepcopy(model)[0]):
        assert len(pickle.dumps(twin.__dict__["_fewbits_switches"])) < 500
        assert torch.equal(twin.weight, model[0].weight)
    twin, twins = copy.deepcopy((model, clustering))
    twins.step()
    inputs = torch.ones(2, 6)
    twin(inputs).sum().backward()
    model(inputs).sum().backward()
    assert_alike(twin, model)
    assert twins._snapping and twins._snapping[0].layers[0][0] is twin[0]
