"""Health of codebooks: what gap() says of made-up cases, and what is done about bad ones."""

import logging
import math
import warnings
from typing import Any

import pytest
import torch
from helpers import batch, distinct, parameter, sgd, train, two_layers
from torch import nn

import fewbits
from fewbits.regularizers import RateAware

STEPS_BETWEEN_LOOKS = 50


def layer_with(weight, codebook, **settings_: Any):
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight.data.copy_(weight)
    clustering = fewbits.Clustering(layer, k=len(codebook), snapped_forward=False, **settings_)
    parameter(layer, "weight_codebook").data.copy_(codebook)
    return layer, clustering


def steps(clustering, count):
    for _ in range(count):
        clustering.step()


def test_the_gap_is_that_of_a_worked_example():
    weight = torch.tensor([[0.0, 1.0, 3.0, 4.0]])
    _, clustering = layer_with(weight, torch.tensor([4.0, 90.0, 0.0, 90.0]))
    (row,) = clustering.gap().layers
    assert (row.name, row.weights, row.moving) == ("weight", 4, 2)
    assert row.distortion == pytest.approx((1 + 1) / (0 + 1 + 9 + 16))
    assert row.usage == (0.5, 0.5, 0.0, 0.0)  # by rising value: 0, 4, 90, 90
    assert (row.dead, row.merged, row.unmoved) == (2, 1, False)
    assert clustering.gap().moving == 0.5


def test_the_gap_weighs_layers_by_their_weights():
    model = two_layers()
    gap = fewbits.Clustering(model, k=2).gap()
    first, second = gap.layers
    assert gap.moving == pytest.approx((first.moving + second.moving) / (192 + 64))
    mean = (192 * first.distortion + 64 * second.distortion) / 256
    assert gap.distortion == pytest.approx(mean)
    assert [line.split()[0] for line in str(gap).splitlines()] == [
        "weight", "0.weight", "2.weight", "all",
    ]  # fmt: skip


def test_nothing_moves_once_weights_are_on_their_representatives():
    model = two_layers()
    fewbits.quantize(model, k=4)
    gap = fewbits.Clustering(model, k=4).gap()
    assert gap.moving == 0
    assert gap.distortion < 1e-12  # float32 rounding of the means


def test_a_codebook_that_the_optimizer_does_not_have_is_called_unmoved():
    model = two_layers()
    clustering = fewbits.Clustering(model, k=2)
    without = [p for n, p in model.named_parameters() if n != "2.weight_codebook"]
    with pytest.warns(UserWarning, match="2.weight: the optimizer has moved the weights but not"):
        train(model, clustering, torch.optim.SGD(without, lr=0.05), range(STEPS_BETWEEN_LOOKS))
    assert [row.unmoved for row in clustering.gap().layers] == [False, True]
    assert "unmoved" in str(clustering.gap()).splitlines()[2]
    steps(clustering, STEPS_BETWEEN_LOOKS)  # without gradients
    assert [row.unmoved for row in clustering.gap().layers] == [True, True]


def test_a_dead_representative_takes_half_of_the_worst_cluster_and_that_is_logged(caplog):
    weight = torch.tensor([[0.0, 0.1, 5.0, 7.0, 5.0, 7.0]])
    layer, clustering = layer_with(weight, torch.tensor([100.0, 0.0, 6.0]))
    steps(clustering, STEPS_BETWEEN_LOOKS - 1)
    assert clustering.gap().layers[0].dead == 1
    with caplog.at_level(logging.INFO, logger="fewbits"):
        steps(clustering, 1)
    assert sorted(parameter(layer, "weight_codebook").tolist()) == [0.0, 5.0, 7.0]
    assert clustering.gap().layers[0].dead == 0
    assert caplog.messages == ["weight: revived 1 of 1 dead representatives at step 50"]


def test_dead_representatives_are_revived_in_each_group_apart():
    weight = torch.tensor([[0.0, 4.0, 5.0, 5.0], [0.0, 1.0, 8.0, 9.0]])
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data.copy_(weight)
    plan = fewbits.plan(layer, k=2, granularity="channel")
    clustering = fewbits.Clustering(layer, plan=plan, snapped_forward=False)
    codebook = parameter(layer, "weight_codebook")
    codebook.data.copy_(torch.tensor([[5.0, 0.0], [4.0, 99.0]]))
    steps(clustering, STEPS_BETWEEN_LOOKS)
    assert codebook[0].tolist() == [5.0, 0.0]
    assert sorted(codebook[1].tolist()) == [0.5, 8.5]


def test_representatives_that_entropy_priced_out_stay_dead():
    weight = torch.tensor([[0.0, 0.1, 5.0, 7.0, 5.0, 7.0]])
    codebook = torch.tensor([100.0, 0.0, 6.0])
    layer, clustering = layer_with(weight, codebook, regularizer=RateAware())
    steps(clustering, STEPS_BETWEEN_LOOKS)
    assert torch.equal(parameter(layer, "weight_codebook").detach(), codebook)


def test_a_collapse_is_warned_of_once():
    layer, clustering = layer_with(torch.ones(4, 4), torch.tensor([1.0, 2.0]))
    with pytest.warns(UserWarning, match=r"weight: all weights share one .* at step 50") as seen:
        steps(clustering, 3 * STEPS_BETWEEN_LOOKS)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert layer.weight.unique().tolist() == [1.0]


def test_one_representative_is_no_collapse():
    _, clustering = layer_with(torch.randn(4, 4), torch.tensor([1.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(clustering, STEPS_BETWEEN_LOOKS)


@pytest.mark.parametrize("pull", [
    fewbits.Penalty(fewbits.schedules.constant(1.0, start=5)),
    fewbits.Proximal(fewbits.schedules.constant(0.5, start=5)),
], ids=lambda pull: type(pull).__name__)  # fmt: skip
@pytest.mark.parametrize("init", ["kmeans", "quantile", "uniform"])
def test_codebooks_begin_anew_from_the_weights_at_a_delayed_start(pull, init):
    model, inputs = two_layers(), batch(0)[0]
    clustering = fewbits.Clustering(model, k=3, pull=pull, init=init)
    optimizer = sgd(clustering)
    for step in range(5):
        assert clustering.loss() == 0
        weight, bias = parameter(model, "0.weight"), parameter(model, "0.bias")
        plain = nn.functional.linear(inputs, weight, bias)
        torch.testing.assert_close(model[0](inputs), plain)
        assert isinstance(model[0].weight, nn.Parameter), "not snapped before the start"
        if step < 4:
            train(model, clustering, optimizer, range(step, step + 1))
    early = parameter(model, "0.weight_codebook").detach().clone()
    train(model, clustering, optimizer, range(4, 5))
    fresh = nn.Linear(12, 16)
    fresh.weight.data.copy_(parameter(model, "0.weight"))
    fewbits.Clustering(fresh, k=3, init=init)
    codebook = parameter(model, "0.weight_codebook").detach()
    assert torch.equal(codebook, parameter(fresh, "weight_codebook").detach())
    assert not torch.equal(codebook, early)
    assert not isinstance(model[0].weight, nn.Parameter), "snapped from the start on"


def test_codebooks_rest_untouched_before_a_delayed_start():
    weight = torch.tensor([[0.0, 0.1, 5.0, 7.0, 5.0, 7.0]])
    codebook = torch.tensor([100.0, 0.0, 6.0])
    pull = fewbits.Penalty(fewbits.schedules.constant(1.0, start=500))
    layer, clustering = layer_with(weight, codebook, pull=pull)
    steps(clustering, 2 * STEPS_BETWEEN_LOOKS)
    assert torch.equal(parameter(layer, "weight_codebook").detach(), codebook)
    assert not clustering.gap().layers[0].unmoved


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("pull", [fewbits.Penalty(), fewbits.Proximal(), None], ids=str)
def test_weights_gone_bad_in_training_are_named_with_the_step(pull, bad):
    # 128 x 128 weights: enough for the search by table, which casts to integers
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 2000))
    clustering = fewbits.Clustering(model, k=4, pull=pull)
    steps(clustering, 3)
    clustering.loss()
    with torch.no_grad():
        parameter(model, "1.weight")[5, 5] = bad
    model(torch.randn(2, 12))  # does not crash
    with pytest.raises(fewbits.CodebookError, match=r"1\.weight: 1 of 24,000 .* at step 3\. Load"):
        clustering.step()


def test_a_codebook_gone_bad_is_named_with_the_step():
    model = two_layers()
    clustering = fewbits.Clustering(model, k=4)
    parameter(model, "0.weight_codebook").data[1] = torch.nan
    with pytest.raises(fewbits.CodebookError, match=r"0\.weight codebook: 1 of 4 .* at step 0"):
        clustering.step()


class Overflow(fewbits.regularizers.Regularizer):
    def penalty(self, weight, nearest, layer):
        return (weight - nearest).exp().exp().exp()


def test_a_penalty_gone_bad_is_named_with_the_step():
    model = two_layers()
    pull = fewbits.Penalty({"2": 1.0})
    clustering = fewbits.Clustering(model, k=1, regularizer=Overflow(), pull=pull)
    parameter(model, "2.weight_codebook").data.fill_(-5.0)
    clustering.loss()
    with pytest.raises(fewbits.CodebookError, match=r"2\.weight: the penalty is inf at step 0"):
        clustering.step()


def test_hardening_a_model_with_bad_weights_changes_nothing():
    model = two_layers()
    clustering = fewbits.Clustering(model, k=2)
    parameter(model, "2.weight").data[0, 0] = torch.nan
    before = parameter(model, "0.weight").detach().clone()
    with pytest.raises(fewbits.CodebookError, match=r"2\.weight: 1 of 64 values are NaN"):
        clustering.harden()
    assert torch.equal(parameter(model, "0.weight"), before)
    parameter(model, "2.weight").data[0, 0] = 0.0
    clustering.harden()
    assert distinct(parameter(model, "0.weight")) == 2


@pytest.mark.parametrize("foreach", [False, True])
def test_an_optimizer_without_the_codebooks_is_noticed_at_the_first_step(foreach):
    model = two_layers()
    clustering = fewbits.Clustering(model, bits=1)
    train(model, clustering, sgd(clustering), range(1))  # says nothing
    model = two_layers()
    own = list(model.parameters())
    clustering = fewbits.Clustering(model, bits=1)
    optimizer = torch.optim.SGD(own, lr=0.1, foreach=foreach)
    with pytest.warns(UserWarning, match="0.weight: the optimizer .* and of 1 more"):
        train(model, clustering, optimizer, range(1))
    train(model, clustering, optimizer, range(1, 3))  # once


def test_a_step_that_is_skipped_is_no_sign_of_a_missing_codebook():
    model = two_layers()
    clustering = fewbits.Clustering(model, bits=1)
    optimizer = sgd(clustering)
    inputs, target = batch(0)
    (torch.nn.functional.mse_loss(model(inputs), target) + clustering.loss()).backward()
    clustering.step()  # as where a gradient scaler has skipped the optimizer's
    train(model, clustering, optimizer, range(2))


def test_representatives_that_are_frozen_on_purpose_are_left_in_peace():
    model = two_layers()
    clustering = fewbits.Clustering(model, bits=1)
    for codebook in clustering.codebooks():
        codebook.requires_grad_(False)
    train(model, clustering, sgd(clustering), range(2))
