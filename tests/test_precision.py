"""Mixed precision and narrow weights against the same in float32 and float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import batch, distinct, gradient, parameter, sgd, two_layers
from reference import brute
from torch import nn

import fewbits
from fewbits.regularizers import Nearest, Periodic, RateAware, SoftMin

NARROW = [torch.float16, torch.bfloat16]
SETTINGS: dict[str, dict[str, Any]] = {
    "penalty": {"pull": fewbits.Penalty(0.5), "snapped_forward": False},
    "penalty, snapped": {"pull": fewbits.Penalty(0.5)},
    "proximal": {"pull": fewbits.Proximal(0.05), "snapped_forward": False},
    "rate-aware": {"regularizer": RateAware(0.1)},
}


def train(model, clustering, dtype, scaler):
    optimizer = sgd(clustering)
    for step in range(8):
        inputs, target = batch(step)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = nn.functional.mse_loss(model(inputs).float(), target) + clustering.loss()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        clustering.step()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", NARROW)
def test_mixed_precision_trains_as_float32_does(dtype, settings):
    def outcome(dtype, scaler):
        model = two_layers()
        clustering = fewbits.Clustering(model, k=4, **settings)
        train(model, clustering, dtype, scaler)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        inputs, target = batch(99, size=128)
        return clustering, model, float(nn.functional.mse_loss(model(inputs), target).detach())

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)
    clustering, model, loss = outcome(dtype, scaler)
    plain = outcome(torch.float32, torch.amp.GradScaler("cpu", enabled=False))[2]
    assert loss == pytest.approx(plain, rel=0.05)  # eight steps with activations of 8 bits
    clustering.harden()
    assert distinct(parameter(model, "0.weight")) <= 4


def test_the_penalty_is_as_exact_under_autocast_as_without():
    plain, mixed = two_layers(), two_layers()
    first, second = (fewbits.Clustering(model, k=4) for model in (plain, mixed))
    first.loss().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = second.loss()
    assert loss.dtype == torch.float32
    loss.backward()
    for name in ("0.weight", "0.weight_codebook"):
        assert torch.equal(gradient(parameter(mixed, name)), gradient(parameter(plain, name)))


def test_a_step_that_the_scaler_skips_leaves_no_trace():
    model = two_layers()
    clustering = fewbits.Clustering(model, k=4, snapped_forward=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = sgd(clustering)
    before = [p.detach().clone() for p in model.parameters()]
    loss = model(batch(0)[0]).square().mean() * torch.inf + clustering.loss()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    clustering.step()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def narrow_layer(dtype):
    torch.manual_seed(0)
    return nn.Linear(64, 64, bias=False).to(dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_codebooks_of_narrow_weights_are_float32(dtype):
    layer = narrow_layer(dtype)
    clustering = fewbits.Clustering(layer, k=5)
    assert parameter(layer, "weight_codebook").dtype == torch.float32
    clustering.harden()
    assert layer.weight.dtype == dtype
    assert distinct(layer.weight) == 5


@pytest.mark.parametrize("narrowed_first", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
def test_the_gradient_of_narrow_weights_is_the_rounded_exact_one(dtype, narrowed_first):
    layer = narrow_layer(dtype if narrowed_first else torch.float32)
    pull = fewbits.Penalty(1.0, even_rate=False)
    clustering = fewbits.Clustering(layer, k=4, pull=pull, snapped_forward=False)
    if not narrowed_first:
        layer.to(dtype)  # and the codebook with it
    with torch.no_grad():  # off the means, where the sum over members cancels
        parameter(layer, "weight_codebook").add_(0.01)
    (1024 * clustering.loss()).backward()  # as a GradScaler would, to stay clear of underflow
    weight = layer.weight.detach().double().view(1, -1).requires_grad_()
    codebook = parameter(layer, "weight_codebook").detach().double()[None].requires_grad_()
    (1024 * brute.nearest_penalty(weight, codebook, 2)).backward()
    found = gradient(layer.weight).double().view(1, -1)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(found, gradient(weight), rtol=epsilon, atol=epsilon * 1e-2)
    found = gradient(parameter(layer, "weight_codebook")).double()
    # float32 terms, 10^3 of them
    rtol = 1e-5 if narrowed_first else epsilon
    torch.testing.assert_close(found, gradient(codebook)[0], rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("pull", [fewbits.Penalty(0.5), fewbits.Proximal(0.3)], ids=str)
@pytest.mark.parametrize(
    "regularizer", [Nearest(1), Nearest(2), SoftMin(), Periodic(), RateAware()]
)
def test_narrow_weights_are_pulled_together(dtype, pull, regularizer):
    layer = narrow_layer(dtype)
    clustering = fewbits.Clustering(layer, k=4, regularizer=regularizer, pull=pull)
    # The sine is (pi / step)^2 as steep as the square.
    lr = 0.02 if isinstance(regularizer, Periodic) else 0.2
    optimizer = torch.optim.SGD(clustering.param_groups(lr=lr))
    before = clustering.gap().distortion
    for _ in range(10):
        clustering.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        clustering.step()
    assert clustering.gap().distortion < before
    clustering.harden()
    assert distinct(layer.weight) <= 4


@pytest.mark.parametrize("dtype", NARROW)
def test_a_model_made_narrow_after_attaching_still_works(dtype):
    model = two_layers()
    clustering = fewbits.Clustering(model, k=4, regularizer=RateAware())
    model.to(dtype)
    (model(batch(0)[0].to(dtype)).float().square().mean() + clustering.loss()).backward()
    assert gradient(parameter(model, "0.weight_codebook")).dtype == dtype
    clustering.step()
    assert clustering.gap().distortion > 0
    clustering.harden()
    assert distinct(parameter(model, "0.weight")) <= 4


@pytest.mark.parametrize("make", [
    lambda dtype: torch.ones(300, dtype=dtype) * 0.1,
    lambda dtype: torch.linspace(-1, 1, 200_000).to(dtype),
    lambda dtype: (1000 + torch.randn(70_000)).to(dtype),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
def test_the_divisor_is_the_standard_deviation_of_the_weights(dtype, make: Callable):
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(make(dtype)[None])
    pull = fewbits.Penalty(1.0, even_rate=False)
    clustering = fewbits.Clustering(layer, k=1, pull=pull, snapped_forward=False)
    weight = layer.weight.detach().double()
    codebook = parameter(layer, "weight_codebook").detach().double()[None]
    expected = float(brute.nearest_penalty(weight, codebook, 2))
    # float32 sums of 10^5 terms; equal weights are divided by 1, not by rounding
    assert float(clustering.loss().detach()) == pytest.approx(expected, rel=1e-4, abs=1e-12)
