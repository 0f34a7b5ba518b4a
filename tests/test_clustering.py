"""Attach, train, harden: what is promised of the model and the optimizer at each point."""

import copy
from typing import Any

import pytest
import torch
from helpers import (
    batch,
    compiled,
    distinct,
    gradient,
    parameter,
    same_state,
    sgd,
    train,
    two_layers,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute
from strategies import weights
from torch import nn

import fewbits
from fewbits.regularizers import Nearest, Periodic, RateAware, SoftMin

REGULARIZERS = [Nearest(1), Nearest(2), SoftMin(0.1), Periodic(), RateAware(0.05)]
PULLS = [fewbits.Penalty(0.5), fewbits.Proximal(0.02)]


def remnants(model):
    """Everything on a model that a plain module of its class does not have."""
    found = []
    for name, module in model.named_modules():
        found += [f"{name}.{key}" for key in vars(module) if "fewbits" in key]
        found += [
            f"{name}: {type(module)}" for cls in type(module).__mro__ if "fewbits" in str(cls)
        ]
        found += [
            f"{name}: {hooks}" for hooks in (module._forward_hooks, module._backward_hooks) if hooks
        ]
    for name, weight in model.named_parameters():
        hooks = (weight._backward_hooks, weight._post_accumulate_grad_hooks)
        found += [f"{name}: {hook}" for hook in hooks if hook is not None]
        found += [name for word in ("codebook", "mixing") if word in name]
    return found


LAYERS = {
    "Linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "Conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "ConvTranspose2d, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 4, 2), (2, 2, 3, 3, 3)),
    "Embedding": (lambda: nn.Embedding(12, 6), None),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(12, 6), None),
}  # fmt: skip


@pytest.mark.parametrize("granularity", ["layer", "channel", "group"])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_codebook_of_each_layer_type_keeps_at_most_k_values(kind, granularity):
    make, shape = LAYERS[kind]
    layer = make()
    inputs = torch.randn(shape) if shape else torch.randint(0, 12, (4, 3))
    size = 1 if granularity == "group" else None
    plan = fewbits.plan(layer, k=3, granularity=granularity, channels_per_group=size)
    clustering = fewbits.Clustering(layer, plan=plan)
    optimizer = torch.optim.AdamW(clustering.param_groups(lr=0.01))
    for _ in range(3):
        (layer(inputs).square().mean() + clustering.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        clustering.step()
    with clustering.snapped():
        expected = layer(inputs)
    clustering.harden()
    assert not remnants(layer)
    torch.testing.assert_close(layer(inputs), expected, rtol=0, atol=0)
    axis = plan.selected[0].axis
    rows = [layer.weight] if granularity == "layer" else layer.weight.unbind(axis)
    assert all(distinct(row) <= 3 for row in rows)
    if granularity != "layer":
        assert distinct(layer.weight) > 3  # one codebook per channel, not one for all


@pytest.mark.parametrize("sizes", [{}, {"kdim": 4, "vdim": 6}])
def test_the_projections_of_attention_are_clustered(sizes):
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
    query = torch.randn(2, 3, 8)
    key, value = (torch.randn(2, 3, sizes.get(name, 8)) for name in ("kdim", "vdim"))
    plain = layer(query, key, value)[0]
    clustering = fewbits.Clustering(layer, k=3)
    (layer(query, key, value)[0].square().mean() + clustering.loss()).backward()
    clustering.step()
    clustering.harden()
    assert not remnants(layer)
    hardened = [n for n, p in layer.named_parameters() if p.dim() == 2 and distinct(p) <= 3]
    assert len(hardened) == (4 if sizes else 2)
    layer.eval()  # its fast path in C++ reads the same weights
    with torch.no_grad():
        fast = layer(query, key, value)[0]
    assert not torch.allclose(fast, plain)


@pytest.mark.parametrize("pull", PULLS, ids=lambda pull: type(pull).__name__)
@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=repr)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_learns_and_leaves_a_plain_model_on_k_values(optimizer, regularizer, pull):
    model = two_layers()
    clustering = fewbits.Clustering(model, k=5, regularizer=regularizer, pull=pull)
    step = optimizer(clustering.param_groups(lr=0.02))
    inputs, target = batch(999, size=256)
    before = nn.functional.mse_loss(model(inputs), target)
    train(model, clustering, step, range(60))
    assert nn.functional.mse_loss(model(inputs), target) < before
    with clustering.snapped():
        snapped = model(inputs)
    clustering.harden()
    assert not remnants(model)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert list(model.state_dict()) == list(two_layers().state_dict())
    assert distinct(parameter(model, "0.weight")) <= 5
    assert distinct(parameter(model, "2.weight")) <= 5
    assert torch.equal(model(inputs), snapped), "hardening is what snapped() showed"


@settings(max_examples=40)
@given(weights(groups=2), st.integers(1, 40), st.sampled_from(["kmeans", "quantile", "uniform"]))
@pytest.mark.filterwarnings("ignore:weight. k lowered")
def test_hardening_moves_each_weight_to_its_nearest_representative(weight, k, init):
    layer = nn.Linear(weight.shape[1], 2, bias=False)
    layer.weight.data.copy_(weight)
    clustering = fewbits.Clustering(layer, k=k, init=init)
    codebook = parameter(layer, "weight_codebook").detach().clone().sort().values
    clustering.harden()
    distance = (weight - layer.weight.detach()).abs().double()
    best = codebook[brute.nearest(weight.view(1, -1), codebook[None])].view_as(weight)
    torch.testing.assert_close(distance, (weight - best).abs().double(), rtol=0, atol=0)
    assert distinct(layer.weight) <= k
    assert set(layer.weight.flatten().tolist()) <= set(codebook.tolist())


@pytest.mark.parametrize("k", [1, 2, 3, 5, 256, 257])
def test_any_number_of_representatives_is_kept(k):
    layer = nn.Linear(32, 32, bias=False)
    clustering = fewbits.Clustering(layer, k=k)
    assert parameter(layer, "weight_codebook").shape == (k,)
    (layer(torch.randn(4, 32)).square().mean() + clustering.loss()).backward()
    clustering.step()
    clustering.harden()
    assert distinct(layer.weight) == k


def test_as_many_representatives_as_there_can_be():
    layer = nn.Linear(256, 300, bias=False)
    clustering = fewbits.Clustering(layer, k=65_536)
    (layer(torch.randn(2, 256)).square().mean() + clustering.loss()).backward()
    clustering.step()
    clustering.harden()
    assert 2**15 < distinct(layer.weight) <= 2**16, "an index takes 16 bits"


def test_a_codebook_is_a_parameter_on_its_own_layer():
    model = two_layers()
    fewbits.Clustering(model, k=3)
    codebook = parameter(model, "0.weight_codebook")
    assert isinstance(codebook, nn.Parameter) and codebook.requires_grad
    assert model.state_dict()["0.weight_codebook"].shape == (3,)
    model.to(torch.float64)
    assert parameter(model, "0.weight_codebook").dtype == torch.float64
    other = two_layers(seed=1)
    fewbits.Clustering(other, k=3)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        parameter(other, "2.weight_codebook"), parameter(model, "2.weight_codebook").float()
    )


def test_the_layers_keep_their_type_and_name_while_attached():
    model = two_layers()
    text = repr(model)
    fewbits.Clustering(model, k=3)
    assert isinstance(model[0], nn.Linear)
    assert type(model[0]).__name__ == "Linear"
    assert repr(model) == text


def test_tied_weights_have_one_codebook_and_stay_tied():
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = parameter(model, "table.weight")
    clustering = fewbits.Clustering(model, k=3)
    table = parameter(model, "table.weight_codebook")
    assert parameter(model, "head.weight_codebook") is table
    assert {"table.weight_codebook", "head.weight_codebook"} <= set(model.state_dict())
    assert [p is table for p in model.parameters()].count(True) == 1
    scores = model["head"](model["table"](torch.arange(10)))
    (scores.square().mean() + clustering.loss()).backward()
    torch.optim.SGD(clustering.param_groups(lr=0.1)).step()
    clustering.step()
    clustering.harden()
    assert not remnants(model)
    assert model["head"].weight is model["table"].weight
    assert distinct(parameter(model, "table.weight")) <= 3


def test_param_groups_hold_every_trainable_parameter_once():
    model = two_layers()
    parameter(model, "0.bias").requires_grad_(False)
    clustering = fewbits.Clustering(model, k=3, regularizer=SoftMin())
    weights, codebooks = clustering.param_groups(lr=0.1, weight_decay=0.01, codebook_lr=0.02)
    found = [id(p) for p in weights["params"] + codebooks["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    ours = {id(p) for n, p in model.named_parameters() if n.endswith(("_codebook", "_mixing"))}
    assert {id(p) for p in codebooks["params"]} == ours
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 0.01)
    assert (codebooks["lr"], codebooks["weight_decay"]) == (0.02, 0.0)
    assert clustering.param_groups(lr=0.001)[1]["lr"] == 0.001
    assert clustering.param_groups(lr=0.1)[1]["lr"] == 0.002


@settings(max_examples=10, deadline=None)
@given(lr=st.floats(0.02, 0.3), bits=st.integers(1, 3))
def test_a_network_without_batch_norm_learns_at_rates_that_suit_it(lr, bits):
    torch.manual_seed(0)
    x = torch.rand(256, 64)
    target = (x @ torch.randn(64, 10)).argmax(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    clustering = fewbits.Clustering(model, bits=bits)
    optimizer = torch.optim.SGD(clustering.param_groups(lr=lr), momentum=0.9)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), target)
        (loss + clustering.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        clustering.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.65  # 0.71 where representatives learn as fast as weights


def test_weight_decay_leaves_codebooks_where_they_are():
    model = two_layers()
    clustering = fewbits.Clustering(model, k=3, pull=None)
    before = parameter(model, "0.weight_codebook").detach().clone()
    optimizer = torch.optim.AdamW(clustering.param_groups(lr=0.1, weight_decay=0.5))
    (0 * model(batch(0)[0]).sum() + clustering.loss()).backward()
    optimizer.step()
    assert torch.equal(parameter(model, "0.weight_codebook"), before)


def test_snapped_changes_nothing():
    model = two_layers()
    clustering = fewbits.Clustering(model, k=2, snapped_forward=False)
    inputs, state = batch(0)[0], copy.deepcopy(model.state_dict())
    plain = model(inputs)
    with clustering.snapped():
        assert not torch.allclose(model(inputs), plain)
    assert torch.equal(model(inputs), plain)
    with pytest.raises(ZeroDivisionError), clustering.snapped():
        raise ZeroDivisionError
    assert torch.equal(model(inputs), plain)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


def test_asking_for_loss_and_gap_changes_nothing():
    def run(*, ask):
        model = two_layers()
        clustering = fewbits.Clustering(model, k=3, regularizer=RateAware(0.2))
        optimizer = sgd(clustering)
        for step in range(5):
            train(model, clustering, optimizer, range(step, step + 1))
            if ask:
                with torch.no_grad():
                    clustering.loss()
                    clustering.gap()
        return model, clustering.state_dict()["layers"]["0.weight"]["usage"]

    (asked, usage), (unasked, expected) = run(ask=True), run(ask=False)
    assert same_state(asked, unasked)
    assert torch.equal(usage, expected)


@pytest.mark.parametrize("what", ["harden", "loss", "step", "gap"])
def test_nothing_works_on_a_hardened_model(what):
    clustering = fewbits.Clustering(two_layers(), k=2)
    clustering.harden()
    with pytest.raises(fewbits.PlanError, match=rf"{what}\(\) after harden\(\)"):
        getattr(clustering, what)()


def test_a_hardened_model_can_be_clustered_again():
    model = two_layers()
    fewbits.Clustering(model, k=4).harden()
    fewbits.Clustering(model, k=2).harden()
    assert distinct(parameter(model, "0.weight")) == 2


def test_attaching_twice_is_refused_and_changes_nothing():
    model = two_layers()
    plan = fewbits.plan(model, k=2)
    clustering = fewbits.Clustering(model, k=2)
    wishes: list[dict[str, Any]] = [{"k": 3}, {"plan": plan}]
    for again in wishes:
        with pytest.raises(fewbits.PlanError, match=r"0\.weight is clustered already\. Call hard"):
            fewbits.Clustering(model, **again)
    clustering.harden()
    assert not remnants(model)


def test_a_weight_replaced_after_attaching_is_named():
    model = two_layers()
    clustering = fewbits.Clustering(model, k=2)
    model[0].weight = nn.Parameter(torch.randn(16, 12))
    with pytest.raises(fewbits.PlanError, match=r"0\.weight was replaced after attaching"):
        clustering.loss()


@pytest.mark.parametrize(("settings_", "message"), [
    ({"init": "kmean"}, r"init is 'kmean'\. Did you mean 'kmeans'"),
    ({"regularizer": Nearest}, r"regularizer is <class .*Pass an object"),
    ({"pull": 0.5}, r"pull is 0\.5\. Pass fewbits\.Penalty"),
    ({"pull": fewbits.Penalty({"3": 1.0})}, r"strength: no clustered weight matches '3'"),
])  # fmt: skip
def test_bad_choices_are_refused_before_the_model_is_touched(settings_, message):
    model = two_layers()
    with pytest.raises(fewbits.PlanError, match=message):
        fewbits.Clustering(model, k=2, **settings_)
    assert not remnants(model)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("carry_out", [fewbits.Clustering, fewbits.quantize])
def test_weights_that_are_not_finite_are_named_before_any_work(carry_out, bad):
    model = two_layers()
    parameter(model, "2.weight").data[1, :3] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fewbits.CodebookError, match=r"2\.weight: 3 of 64 values are NaN or infin"):
        carry_out(model, k=2)
    torch.testing.assert_close(
        dict(model.state_dict()), dict(before), rtol=0, atol=0, equal_nan=True
    )
    assert not remnants(model)


@pytest.mark.parametrize("snapped_forward", [False, True])
def test_a_copy_of_model_and_clustering_trains_on_its_own_and_alike(snapped_forward):
    model = two_layers()
    clustering = fewbits.Clustering(model, k=3, snapped_forward=snapped_forward)
    optimizer = sgd(clustering)
    train(model, clustering, optimizer, range(3))
    alone = copy.deepcopy(model)
    assert torch.equal(alone(batch(0)[0]), model(batch(0)[0]))
    twin, twins = copy.deepcopy((model, clustering))
    for some, its in ((model, clustering), (twin, twins)):
        (some(batch(3)[0]).square().mean() + its.loss()).backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine is not theirs
        torch.testing.assert_close(gradient(mine), gradient(theirs), rtol=0, atol=0)
    twins.harden()
    assert not remnants(twin)
    assert not torch.equal(parameter(twin, "0.weight"), parameter(model, "0.weight"))


@pytest.mark.parametrize("snapped_forward", [False, True])
def test_a_compiled_model_trains_as_the_model_itself(snapped_forward):
    plain, inside, outside = two_layers(), two_layers(), two_layers()
    settings_: dict[str, Any] = {"k": 3, "snapped_forward": snapped_forward}
    before = compiled(outside)
    before(batch(0)[0])  # compiled before it is attached to
    runs: list[tuple[nn.Module, fewbits.Clustering]] = []
    runs.append((plain, fewbits.Clustering(plain, **settings_)))
    runs.append((before, fewbits.Clustering(before, **settings_)))
    attached = fewbits.Clustering(inside, **settings_)
    runs.append((compiled(inside), attached))
    for model, clustering in runs:
        train(model, clustering, sgd(clustering), range(4))
        with clustering.snapped():
            seen = model(batch(9)[0])
        clustering.harden()
        torch.testing.assert_close(model(batch(9)[0]), seen)
    for other in (inside, outside):
        # float32 sums in another order
        torch.testing.assert_close(dict(other.state_dict()), dict(plain.state_dict()))


def test_a_model_wrapped_for_data_parallel_training_is_refused_with_the_remedy():
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    with pytest.raises(fewbits.PlanError, match=r"Attach Clustering first, then wrap"):
        fewbits.Clustering(Wrapped(two_layers()), k=2)
