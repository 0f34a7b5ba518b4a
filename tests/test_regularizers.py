"""Values and gradients of every regularizer against float64 autograd of the formula as written."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import gradient, parameter
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute
from strategies import weights_and_codebooks
from torch import nn

import fewbits
from fewbits.regularizers import Nearest, Periodic, RateAware, Regularizer, SoftMin

EXACT = fewbits.Penalty(1.0, even_rate=False)


class Holder(nn.Module):
    """One weight of the shape wanted, as a Linear layer."""

    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
        self.layer.weight.data.copy_(weight)


def attach(weight, codebook, regularizer, **settings):
    """Clustering of one float64 weight whose codebook is set to the one given."""
    holder = Holder(weight)
    plan = fewbits.plan(
        holder, k=codebook.shape[1], granularity="channel" if len(codebook) > 1 else "layer"
    )
    settings = {"pull": EXACT, "snapped_forward": False} | settings
    clustering = fewbits.Clustering(holder, plan=plan, regularizer=regularizer, **settings)
    with torch.no_grad():
        own = parameter(holder.layer, "weight_codebook")
        own.copy_(codebook.view_as(own))
    return holder.layer, clustering


def gradients(layer, clustering):
    value = clustering.loss()
    value.backward()
    codebook = parameter(layer, "weight_codebook")
    return value.detach(), gradient(layer.weight), gradient(codebook)


@st.composite
def distinct_pairs(draw):
    """float64 (G, n) weights, some equal, and (G, K) codebooks without equal values."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    groups, k = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    members = draw(st.integers(k, 30))
    scale = draw(st.sampled_from([1e-4, 1.0, 50.0]))
    weight = torch.randn(groups, members).double() * scale
    weight[:, : draw(st.integers(0, members))] = weight[:, :1]
    return weight, (torch.randn(groups, k).double() * scale).sort(1).values


@settings(max_examples=80)
@given(distinct_pairs(), st.sampled_from([1, 2]))
def test_nearest_equals_autograd_of_the_brute_force_formula(pair, p):
    weight, codebook = pair
    free_weight, free_codebook = weight.clone().requires_grad_(), codebook.clone().requires_grad_()
    expected = brute.nearest_penalty(free_weight, free_codebook, p)
    expected.backward()
    value, to_weight, to_codebook = gradients(*attach(weight, codebook, Nearest(p)))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    size = float(free_weight.grad.abs().max())
    torch.testing.assert_close(to_weight, free_weight.grad, rtol=1e-9, atol=1e-9 * size)
    torch.testing.assert_close(
        to_codebook.view_as(codebook), free_codebook.grad, rtol=1e-9, atol=1e-9 * size
    )


@settings(max_examples=80)
@given(weights_and_codebooks(), st.sampled_from([1, 2]))
def test_ties_and_equal_representatives_share_the_exact_gradient(pair, p):
    weight, codebook = (tensor.double() for tensor in pair)
    codebook = codebook[:, : weight.shape[1]]  # more representatives than weights are capped
    if weight.std(correction=0) < 1e-30:  # squares of denormals: nothing to compare in
        weight = weight.zero_()
    w = weight.clone().requires_grad_()
    expected = brute.nearest_penalty(w, codebook, p)
    expected.backward()
    layer, clustering = attach(weight, codebook, Nearest(p))
    value, to_weight, to_codebook = gradients(layer, clustering)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    size = float(gradient(w).abs().max()) + 1e-12
    # A weight between two representatives may go to either: the sizes are equal, not the signs.
    torch.testing.assert_close(to_weight.abs(), gradient(w).abs(), rtol=1e-9, atol=1e-9 * size)
    # Moving weights and representatives together changes nothing.
    total = to_weight.sum(1) + to_codebook.view_as(codebook).sum(1)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-9 * size * 40)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
def test_soft_min_equals_autograd_of_the_formula(temperature):
    weight, codebook = torch.randn(6, 10).double(), torch.randn(1, 5).double().sort(1).values
    layer, clustering = attach(weight, codebook, SoftMin(temperature))
    logits = torch.randn(5).double()
    parameter(layer, "weight_mixing").data.copy_(logits)
    free = [weight.view(1, -1).clone(), codebook.clone(), logits[None].clone()]
    w, c, m = (t.requires_grad_() for t in free)
    expected = brute.soft_min(w, c, m.softmax(1), temperature)
    expected.backward()
    value, to_weight, to_codebook = gradients(layer, clustering)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(to_weight, gradient(w).view(6, 10))
    torch.testing.assert_close(to_codebook, gradient(c)[0])
    torch.testing.assert_close(gradient(parameter(layer, "weight_mixing")), gradient(m)[0])


def test_soft_min_becomes_nearest_as_the_temperature_goes_to_zero():
    weight, codebook = torch.randn(6, 10).double(), torch.randn(1, 5).double().sort(1).values
    soft = attach(weight, codebook, SoftMin(1e-6))[1].loss()
    hard = attach(weight, codebook, Nearest())[1].loss()
    # -t log(1/K) of equal mixing weights is what remains: 1e-6 x log 5
    torch.testing.assert_close(soft, hard, rtol=0, atol=2e-6)


def test_periodic_equals_autograd_of_the_sine_inside_its_grid():
    weight = torch.empty(6, 10).double().uniform_(-1, 1)
    codebook = torch.linspace(-1, 1, 6)[None].double()
    w = weight.clone().requires_grad_()
    ends = torch.tensor([-1.0, 1.0]).double().requires_grad_()
    std = weight.std(correction=0)
    expected = brute.periodic(w / std, ends[0] / std, (ends[1] - ends[0]) / 5 / std)
    expected.backward()
    value, to_weight, to_codebook = gradients(*attach(weight, codebook, Periodic()))
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(to_weight, w.grad)
    torch.testing.assert_close(to_codebook[[0, -1]], ends.grad)
    assert not to_codebook[1:-1].any()


def test_the_mean_gradient_of_a_grid_is_over_all_weights_not_those_at_its_ends():
    weight = torch.empty(6, 10).double().uniform_(-1, 1)
    codebook = torch.linspace(-1, 1, 6)[None].double()
    exact = gradients(*attach(weight, codebook, Periodic()))[2]
    mean = gradients(*attach(weight, codebook, Periodic(), pull=fewbits.Penalty(1.0)))[2]
    even_rate = 60 * weight.var(correction=0)
    # Steps of 2/5: the sine's curvature is 2 x (pi / step)^2, that of a squared distance is 2.
    step = 0.4 / weight.std(correction=0)
    torch.testing.assert_close(mean, exact * even_rate / 60 * (step / torch.pi) ** 2)


@pytest.mark.parametrize("k", [2, 4, 16, 256])
def test_one_step_on_a_grid_moves_weights_the_share_that_nearest_moves_them(k):
    codebook = torch.linspace(-1, 1, k)[None].double()
    offsets = 0.02 / k * torch.tensor([-1.0, 1.0]).double().repeat(k)
    weight = (codebook[0].repeat_interleave(2) + offsets)[None]
    for regularizer in (Nearest(), Periodic()):
        layer, clustering = attach(weight.clone(), codebook, regularizer, pull=fewbits.Penalty(3.0))
        clustering.loss().backward()
        assert layer.weight.grad is not None
        with torch.no_grad():
            layer.weight -= 0.05 * gradient(layer.weight)
        # 2 x 3 x 0.05 of the way; the sine is a parabola up to a share of (pi x 0.01)^2.
        expected = codebook[0].repeat_interleave(2) + 0.7 * offsets
        torch.testing.assert_close(layer.weight[0], expected, rtol=0, atol=0.02 / k * 1e-3)


def test_periodic_keeps_the_codebook_an_even_grid():
    layer, clustering = attach(
        torch.randn(8, 8), torch.tensor([[-1.0, -0.2, 0.1, 2.0]]), Periodic()
    )
    clustering.loss()
    clustering.step()
    steps = parameter(layer, "weight_codebook").detach().diff()
    torch.testing.assert_close(steps, steps[:1].expand(3))


def test_a_rate_of_zero_is_nearest():
    weight, codebook = torch.randn(6, 10).double(), torch.randn(1, 5).double().sort(1).values
    plain = gradients(*attach(weight, codebook, Nearest()))
    aware = gradients(*attach(weight, codebook, RateAware(rate=0.0)))
    torch.testing.assert_close(aware, plain, rtol=0, atol=0)


def harden_after(clustering: fewbits.Clustering, *, lr: float, steps: int) -> None:
    """In place: train on the penalty alone, then harden."""
    optimizer = torch.optim.SGD(clustering.param_groups(lr=lr))
    for _ in range(steps):
        clustering.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        clustering.step()
    clustering.harden()


def test_a_higher_rate_needs_fewer_bits():
    entropies = []
    for rate in (0.0, 0.05, 0.2):
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        nn.init.normal_(model.weight)  # equal usage, as of even weights, is a fixed point
        clustering = fewbits.Clustering(model, k=16, regularizer=RateAware(rate))
        harden_after(clustering, lr=1.0, steps=60)
        entropies.append(fewbits.summary(model).bits_entropy)
    assert entropies[0] > entropies[1] > entropies[2], entropies


def test_the_price_of_a_value_is_bounded_and_fades_in_a_layer_that_empties():
    def bits(*usage: float) -> list[float]:
        cost = RateAware(1.0).cost(torch.tensor([usage]))
        assert cost is not None
        return cost[0].tolist()

    assert bits(0.5, 0.25, 0.125, 0.125) == [1, 2, 3, 3]
    assert bits(0.5, 0.5, 0, 0) == [1, 1, 4, 4]
    assert bits(0.995, 0.005) == pytest.approx([0.5 * -math.log2(0.995), 0.5 * 3], rel=1e-4)
    assert bits(0, 1, 0) == bits(1) * 3 == [0, 0, 0]


def test_no_price_empties_a_layer_of_small_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nn.init.normal_(parameter(model, "0.weight"))
    nn.init.normal_(parameter(model, "1.weight"), std=0.5)
    clustering = fewbits.Clustering(model, k=16, regularizer=RateAware(0.4))
    harden_after(clustering, lr=0.1, steps=150)
    small = parameter(model, "1.weight")
    most = small.unique(return_counts=True)[1].max()
    assert 0.9 < int(most) / small.numel() < 0.99


def test_a_pinned_zero_stays_zero_and_becomes_sparsity():
    model = nn.Linear(32, 32)
    teacher = copy.deepcopy(model).requires_grad_(False)
    clustering = fewbits.Clustering(model, k=4, regularizer=RateAware(0.1, pin_zero=True))
    optimizer = torch.optim.SGD(clustering.param_groups(lr=0.1))
    for _ in range(30):
        x = torch.randn(16, 32)
        loss = (model(x) - teacher(x)).square().mean() + clustering.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clustering.step()
        assert parameter(model, "weight_codebook").tolist().count(0.0) == 1
    clustering.harden()
    assert model.weight.flatten().tolist().count(0.0) > 100


@pytest.mark.parametrize(
    "regularizer", [Nearest(1), Nearest(2), SoftMin(0.3), Periodic(), RateAware(0.1)]
)
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_gradcheck_passes(regularizer, granularity):
    layer = nn.Linear(7, 4, bias=False).double()
    plan = fewbits.plan(layer, k=3, granularity=granularity)
    clustering = fewbits.Clustering(
        layer, plan=plan, regularizer=regularizer, pull=EXACT, snapped_forward=False
    )
    # The divisor is a constant of the formula: hold it as a number.
    std = clustering._layers[0].std()
    clustering._layers[0].std = lambda: std
    if clustering._stacks is not None:
        ((stack, _),) = clustering._stacks.current(0)
        measure = stack.measure
        stack.measure = lambda power: replace(measure(power), std=std.view(1))

    def penalty(weight, codebook):
        with torch.no_grad():
            layer.weight.copy_(weight)
            parameter(layer, "weight_codebook").copy_(codebook)
        return _Route.apply(clustering, layer, weight, codebook)

    weight = layer.weight.detach().clone().requires_grad_()
    codebook = parameter(layer, "weight_codebook").detach().clone().requires_grad_()
    codebook.data += 0.003  # off the weights: |w - c| has no derivative at 0
    if isinstance(regularizer, Periodic):
        weight.data.clamp_(codebook.min() * 0.9, codebook.max() * 0.9)
    assert torch.autograd.gradcheck(penalty, (weight, codebook))


class _Route(torch.autograd.Function):
    """Leads gradcheck's inputs to the layer's own parameters and their gradients back."""

    @staticmethod
    def forward(ctx, clustering, layer, weight, codebook):
        with torch.enable_grad():
            value = clustering.loss()
            parameters = (layer.weight, parameter(layer, "weight_codebook"))
            ctx.gradients = torch.autograd.grad(value, parameters)
        return value.detach()

    @staticmethod
    def backward(ctx, *grad_outputs):
        return None, None, *(g * grad_outputs[0] for g in ctx.gradients)


@pytest.mark.parametrize(("p", "settled"), [(2, "mean"), (1, "median")])
def test_a_representative_settles_at_its_clusters_mean_or_median(p, settled):
    weight = torch.tensor([[0.0, 1.0, 5.0]]).double()
    layer, clustering = attach(weight, torch.tensor([[1.5]]).double(), Nearest(p))
    codebook = parameter(layer, "weight_codebook")
    for step in range(4000):
        clustering.loss().backward()
        codebook.data -= 0.5 / (1 + step / 20) * gradient(codebook)
        codebook.grad = None
    target = weight.mean() if settled == "mean" else weight.median()
    torch.testing.assert_close(codebook[0].detach(), target, rtol=0, atol=0.02)


def test_the_penalty_is_that_of_a_worked_example():
    # weights 0, 2, 10 on representatives 1, 10: distances 1, 1, 0; variance of (0, 2, 10) = 56/3
    weight = torch.tensor([[0.0, 2.0, 10.0]]).double()
    value = attach(weight, torch.tensor([[1.0, 10.0]]).double(), Nearest(2))[1].loss()
    assert float(value.detach()) == pytest.approx((2 / 3) / (56 / 3), rel=1e-12)


class Huber(Regularizer):
    """A user's own: one class, one method."""

    def penalty(self, weight, nearest, layer):
        return nn.functional.huber_loss(weight, nearest, reduction="none", delta=0.1)


def test_a_regularizer_of_the_users_own_trains_and_pulls():
    for pull in (fewbits.Penalty(10.0), fewbits.Proximal(0.5)):
        model = nn.Linear(16, 16)
        clustering = fewbits.Clustering(
            model, bits=1, regularizer=Huber(), pull=pull, snapped_forward=False
        )
        optimizer = torch.optim.SGD(clustering.param_groups(lr=0.5))
        before = clustering.gap().distortion
        for _ in range(50):
            clustering.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            clustering.step()
        assert clustering.gap().distortion < before / 4


@pytest.mark.parametrize("make", [
    lambda: Nearest(p=3), lambda: SoftMin(0.0), lambda: RateAware(-1.0),
    lambda: RateAware(math.nan), lambda: SoftMin(fewbits.schedules.linear(1, 0, steps=5)),
])  # fmt: skip
def test_impossible_numbers_are_refused(make):
    with pytest.raises(fewbits.PlanError, match=r"0|1 or 2"):
        make()
