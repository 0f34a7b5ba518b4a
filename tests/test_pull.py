"""Penalty, proximal step and snapped forward against float64 formulas written out in full."""

from typing import Any

import pytest
import torch
from helpers import batch, gradient, parameter, sgd, train, two_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute
from torch import nn

import fewbits
from fewbits.regularizers import Nearest, Periodic, RateAware


def attached(weight, codebook, granularity: Any = "layer", **settings_):
    """A float64 Linear of that weight, clustered on that codebook (in any order)."""
    layer = nn.Linear(*reversed(weight.shape), bias=False).double()
    layer.weight.data.copy_(weight)
    plan = fewbits.plan(layer, k=codebook.shape[-1], granularity=granularity)
    clustering = fewbits.Clustering(layer, plan=plan, **settings_)
    parameter(layer, "weight_codebook").data.copy_(codebook)
    return layer, clustering


@st.composite
def cases(draw):
    """(rows, columns) weights, and one codebook or one per row, in any order; no equal values."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(4, 40))
    granularity = draw(st.sampled_from(["layer", "channel"]))
    weight = torch.randn(rows, columns).double()
    k = draw(st.integers(1, 4))
    codebook = torch.randn(k if granularity == "layer" else (rows, k)).double()
    return weight, codebook, granularity


def members_of(weight, codebook):
    """(G, n, K) one-hot membership, by brute force, in the codebook's own order."""
    view, rows = weight.reshape(1 if codebook.dim() == 1 else len(codebook), -1), codebook
    rows = rows if rows.dim() == 2 else rows[None]
    distance = (view[:, :, None] - rows[:, None, :]).abs()
    return nn.functional.one_hot(distance.argmin(2), rows.shape[1]).double(), view


@settings(max_examples=60)
@given(cases(), st.booleans())
def test_the_penaltys_gradient_of_a_representative_is_exact_or_the_mean_of_members(case, even):
    weight, codebook, granularity = case
    pull = fewbits.Penalty(0.7, even_rate=even)
    layer, clustering = attached(weight, codebook, granularity, pull=pull, snapped_forward=False)
    clustering.loss().backward()
    free = codebook.clone().requires_grad_()
    member, view = members_of(weight, codebook)
    chosen = (member * (free if free.dim() == 2 else free[None])[:, None, :]).sum(2)
    (0.7 * ((view - chosen) / weight.std(correction=0)).square().mean()).backward()
    counts = member.sum(1).clamp(min=1).view_as(codebook)
    expected = gradient(free)
    if even:
        expected = expected * weight.numel() * weight.var(correction=0) / counts
    found = gradient(parameter(layer, "weight_codebook"))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)  # float64 sums of 200


@settings(max_examples=60)
@given(cases())
def test_the_snapped_forwards_gradients_are_straight_through_and_summed_over_members(case):
    weight, codebook, granularity = case
    layer, _ = attached(weight, codebook, granularity, pull=None)
    inputs = torch.randn(7, weight.shape[1]).double()
    output = layer(inputs)
    output.square().sum().backward()

    member, _ = members_of(weight, codebook)
    rows = codebook if codebook.dim() == 2 else codebook[None]
    snapped = (member @ rows[:, :, None]).view_as(weight).requires_grad_()
    expected = inputs @ snapped.T
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradient(parameter(layer, "weight")), gradient(snapped))
    total = (member * gradient(snapped).reshape(member.shape[:2])[:, :, None]).sum(1)
    expected = (total / member.sum(1).clamp(min=1).sqrt()).view_as(codebook)
    found = gradient(parameter(layer, "weight_codebook"))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # gradients of size 10^2


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_the_snapped_read_keeps_every_weight_of_a_transposed_convolution_in_place(granularity):
    layer = nn.ConvTranspose2d(3, 4, 2)
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    plan = fewbits.plan(layer, k=2, granularity=granularity)
    clustering = fewbits.Clustering(layer, plan=plan)
    codebook = parameter(layer, "weight_codebook").detach().view(-1, 2)
    weight = parameter(layer, "weight").detach()
    view = weight.transpose(0, 1).reshape(len(codebook), -1)
    best = codebook.gather(1, brute.nearest(view, codebook))
    expected = best.view(4, 3, 2, 2).transpose(0, 1)
    with clustering.snapped():
        assert torch.equal(layer.weight, expected)
    layer.weight.sum().backward()
    assert torch.equal(gradient(parameter(layer, "weight")), torch.ones_like(weight))
    assert gradient(parameter(layer, "weight")).stride() == weight.stride()


@settings(max_examples=60)
@given(cases(), st.sampled_from([1, 2]), st.floats(0, 3))
def test_the_proximal_step_minimizes_its_definition(case, p, amount):
    weight, codebook, granularity = case
    layer, clustering = attached(
        weight, codebook, granularity, regularizer=Nearest(p), pull=fewbits.Proximal(amount)
    )
    clustering.step()
    moved = parameter(layer, "weight").detach()
    member, view = members_of(weight, codebook)
    rows = codebook if codebook.dim() == 2 else codebook[None]
    center = (member @ rows[:, :, None]).view_as(weight)
    std = weight.std(correction=0)

    def objective(w):
        """(w - w_i)^2 / 2 + amount x |w - c|^p, in units of std and with p = 2 halved."""
        distance = ((w - center) / std).abs()
        pull = distance if p == 1 else distance.square() / 2
        return ((w - weight) / std).square() / 2 + amount * pull

    best = objective(moved)
    for nudge in (1e-4, -1e-4, 1e-2, -1e-2):
        # 1e-12: rounding of numbers of size 10 squared
        assert (best <= objective(moved + nudge * std) + 1e-12).all()
    if p == 1:
        arrived = (weight - center).abs() <= 0.999 * amount * std
        assert torch.equal(moved[arrived], center[arrived]), "arrived exactly"


# From torch 2.14 on opcheck asks a copy for its gradient, and hides its own warning too late.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_compiler_is_told_the_truth_about_the_snapped_read(axis, layout):
    weight = torch.randn(4, 3, 2, 2).contiguous(memory_format=layout).requires_grad_()
    codebook = torch.randn(weight.shape[axis], 2, requires_grad=True)
    # Shapes, strides and aliasing of the operators against those they promise, and both in a graph.
    torch.library.opcheck(torch.ops.fewbits.snap, (weight, codebook, None, axis))
    gradient = torch.randn_like(weight)
    given = gradient, weight.detach(), codebook.detach(), None, axis
    torch.library.opcheck(torch.ops.fewbits.snap_codebook_gradient, given)


def test_weights_reach_their_representatives_and_stay():
    model = two_layers()
    pull = fewbits.Proximal(fewbits.schedules.cubic(0.0, 1.0, steps=100))
    clustering = fewbits.Clustering(
        model, k=3, regularizer=Nearest(1), pull=pull, snapped_forward=False
    )
    train(model, clustering, sgd(clustering, lr=0.01), range(110))
    gap = clustering.gap()
    assert gap.moving == 0 and gap.distortion == 0
    before = parameter(model, "0.weight").detach().clone()
    clustering.harden()
    assert torch.equal(parameter(model, "0.weight"), before)


@pytest.mark.parametrize("regularizer", [Nearest(1), Nearest(2), Periodic(), RateAware(0.1)])
def test_no_proximal_step_goes_past_a_representative(regularizer):
    torch.manual_seed(0)
    layer = nn.Linear(40, 40, bias=False).double()
    clustering = fewbits.Clustering(
        layer, k=4, regularizer=regularizer, pull=fewbits.Proximal(5.0, average=0.0)
    )
    before, codebook = layer.weight.detach(), parameter(layer, "weight_codebook").detach().clone()
    clustering.step()
    after = parameter(layer, "weight").detach()
    for value in codebook:
        # 1e-12: rounding
        assert not ((before - value) * (after - value) < -1e-12).any()


@pytest.mark.parametrize("regularizer", [Nearest(1), Nearest(2), RateAware(0.1)])
def test_a_pull_at_every_fourth_step_moves_as_far_as_four_pulls(regularizer):
    moved = []
    for every in (1, 4):
        torch.manual_seed(0)
        layer = nn.Linear(40, 40, bias=False).double()
        pull = fewbits.Proximal(0.02, average=0.0, every=every)
        clustering = fewbits.Clustering(
            layer, k=4, regularizer=regularizer, pull=pull, snapped_forward=False
        )
        before = layer.weight.detach().clone()
        for step in range(1, 9):
            clustering.step()
            still = torch.equal(parameter(layer, "weight").detach(), before)
            assert still == (step < every)
        moved.append(parameter(layer, "weight").detach())
    # nearest-1 moves in standard deviations, which shrink a little on the way
    torch.testing.assert_close(*moved, rtol=0.01 if regularizer != Nearest(2) else 1e-9, atol=1e-3)


def test_without_gradients_representatives_move_to_their_clusters_means():
    weight = torch.tensor([[0.0, 1.0, 9.0, 10.0, 11.0]]).double()
    pull = fewbits.Proximal(1e-9, average=0.25)
    layer, clustering = attached(weight, torch.tensor([8.0, 1.5]), pull=pull, snapped_forward=False)
    clustering.step()
    codebook = parameter(layer, "weight_codebook").detach()
    expected = torch.tensor([8.0 + 0.25 * (10 - 8), 1.5 + 0.25 * (0.5 - 1.5)]).double()
    torch.testing.assert_close(codebook, expected, rtol=0, atol=1e-6)  # the pull of 1e-9


def test_even_rate_moves_small_and_large_layers_by_the_same_share():
    torch.manual_seed(0)
    small, large = nn.Linear(4, 4), nn.Linear(200, 100)
    large.weight.data.mul_(7)
    model = nn.Sequential(small, large).double()
    pull = fewbits.Penalty(0.05)
    clustering = fewbits.Clustering(model, k=2, pull=pull, snapped_forward=False)
    clustering.loss().backward()
    for layer in (small, large):
        weight = layer.weight.detach()
        codebook = parameter(layer, "weight_codebook").detach()
        nearest = codebook[brute.nearest(weight.view(1, -1), codebook[None])]
        expected = 2 * 0.05 * (weight - nearest.view_as(weight))
        torch.testing.assert_close(gradient(layer.weight), expected)


def test_a_penalty_without_even_rate_is_the_mean_of_the_formula():
    model, pull = two_layers().double(), fewbits.Penalty(2.0, even_rate=False)
    clustering = fewbits.Clustering(model, k=3, pull=pull, snapped_forward=False)
    state = {name: p.detach() for name, p in model.named_parameters()}
    pairs = [
        (state[f"{i}.weight"].view(1, -1), state[f"{i}.weight_codebook"][None]) for i in (0, 2)
    ]
    expected = sum(2.0 * float(brute.nearest_penalty(w, c, 2)) for w, c in pairs)
    assert float(clustering.loss().detach()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("regularizer", [Nearest(1), Nearest(2), RateAware(0.1)], ids=repr)
@pytest.mark.parametrize("change", ["weight", "codebook"])
def test_the_penalty_is_that_of_weights_and_codebook_as_they_are_now(regularizer, change):
    # step() takes the sums of the next penalty ahead; what changes after it must not be missed.
    models = [two_layers(), two_layers()]
    stepped, fresh = (
        fewbits.Clustering(model, k=3, regularizer=regularizer, snapped_forward=False)
        for model in models
    )
    stepped.step()
    for model in models:
        if change == "weight":
            with torch.no_grad():
                parameter(model, "0.weight").mul_(3)
        else:
            parameter(model, "0.weight_codebook").data.add_(0.05)
    assert torch.equal(stepped.loss(), fresh.loss())


def penalties(clustering, steps):
    values = []
    for _ in range(steps):
        values.append(float(clustering.loss().detach()))
        clustering.step()
    return values


def test_the_penalty_follows_its_schedule():
    ramp = fewbits.schedules.linear(0.0, 1.0, steps=4, start=2)
    clustering = fewbits.Clustering(two_layers(), k=2, pull=fewbits.Penalty(ramp))
    values = penalties(clustering, 8)
    shares = [value / values[-1] for value in values]
    assert shares == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1])


def test_each_layer_has_its_own_strength_and_the_last_match_wins():
    def penalty(strength):
        clustering = fewbits.Clustering(two_layers(), k=2, pull=fewbits.Penalty(strength))
        return float(clustering.loss().detach())

    first, second = penalty({"0": 1.0}), penalty({"2.weight": 1.0})
    assert first > 0 and second > 0
    assert penalty(1.0) == pytest.approx(first + second)
    assert penalty({"*": 3.0, "2": 0.5}) == pytest.approx(3 * first + 0.5 * second)
    assert penalty({"2": 0.5, "*": 3.0}) == pytest.approx(3 * (first + second))


def test_a_pull_under_way_from_the_first_step_is_not_started_again():
    model = two_layers()
    ramp = fewbits.schedules.linear(0.5, 1.0, steps=4, start=3)
    clustering = fewbits.Clustering(model, k=2, pull=fewbits.Penalty(ramp), init="uniform")
    assert clustering.loss() > 0
    codebook = parameter(model, "0.weight_codebook")
    codebook.data += 0.01
    before = codebook.detach().clone()
    for _ in range(5):
        clustering.step()
    assert torch.equal(codebook, before)


@pytest.mark.parametrize("regularizer", [Nearest(), RateAware(0.2)], ids=repr)
@pytest.mark.parametrize("snapped_forward", [False, True])
def test_two_half_batches_are_one_batch(regularizer, snapped_forward):
    def gradients(parts):
        model = two_layers().double()
        clustering = fewbits.Clustering(
            model, k=3, regularizer=regularizer, snapped_forward=snapped_forward
        )
        inputs, target = (t.double() for t in batch(0))
        for some, wanted in zip(inputs.chunk(parts), target.chunk(parts), strict=True):
            loss = nn.functional.mse_loss(model(some), wanted) + clustering.loss()
            (loss / parts).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        return norm, [gradient(p) for p in model.parameters()]

    (norm, found), (norm_of_halves, halves) = gradients(1), gradients(2)
    torch.testing.assert_close(norm_of_halves, norm)
    torch.testing.assert_close(halves, found)


def test_clipping_sees_the_gradient_of_task_and_penalty_together():
    model = two_layers().double()
    clustering = fewbits.Clustering(model, k=3, pull=fewbits.Penalty(4.0), snapped_forward=False)
    clustering.loss().backward()
    pulls = [gradient(p).clone() if p.grad is not None else 0 for p in model.parameters()]
    model.zero_grad()
    inputs = batch(0)[0].double()
    model(inputs).square().mean().backward()
    tasks = [gradient(p).clone() if p.grad is not None else 0 for p in model.parameters()]
    model.zero_grad()
    (model(inputs).square().mean() + clustering.loss()).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    together = [torch.as_tensor(a + b) for a, b in zip(tasks, pulls, strict=True)]
    expected = torch.stack([t.square().sum() for t in together]).sum().sqrt()
    torch.testing.assert_close(norm, expected)
    clipped = torch.stack([gradient(p).square().sum() for p in model.parameters()]).sum().sqrt()
    assert float(clipped) == pytest.approx(1e-3, rel=1e-2)  # clip_grad_norm_ adds 1e-6 to the norm


def test_a_scaled_loss_scales_its_gradients():
    def gradients(factor):
        model = two_layers()
        clustering = fewbits.Clustering(model, k=3, snapped_forward=False)
        (factor * clustering.loss()).backward()
        return [gradient(parameter(model, f"0.{n}")) for n in ("weight", "weight_codebook")]

    for some, many in zip(gradients(1.0), gradients(1024.0), strict=True):
        assert torch.equal(1024 * some, many)  # a power of two: no rounding


def test_gradients_asked_for_by_name_are_returned_and_not_stored():
    model = two_layers()
    clustering = fewbits.Clustering(model, k=3, snapped_forward=False)
    weight, codebook = (parameter(model, f"0.{n}") for n in ("weight", "weight_codebook"))
    wanted = torch.autograd.grad(clustering.loss(), (weight, codebook))
    assert weight.grad is None and codebook.grad is None
    clustering.loss().backward(inputs=[weight])
    assert torch.equal(gradient(weight), wanted[0]) and codebook.grad is None
    clustering.loss().backward(inputs=[codebook])
    assert torch.equal(gradient(weight), wanted[0]) and torch.equal(gradient(codebook), wanted[1])


def test_weights_changed_between_loss_and_backward_are_an_error_not_a_wrong_gradient():
    model = two_layers()
    clustering = fewbits.Clustering(model, k=3, snapped_forward=False)
    loss = clustering.loss()
    with torch.no_grad():
        parameter(model, "0.weight").mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_frozen_after_attaching_stay_where_they_are():
    for pull in (fewbits.Penalty(), fewbits.Proximal(0.5)):
        model = two_layers()
        clustering = fewbits.Clustering(model, k=3, pull=pull)
        weight = parameter(model, "0.weight").requires_grad_(False)
        before = weight.detach().clone()
        train(model, clustering, sgd(clustering), range(3))
        assert torch.equal(weight, before)


def wrong(value) -> Any:
    """A value that a type checker would not let through."""
    return value


@pytest.mark.parametrize(("make", "message"), [
    (lambda: fewbits.Penalty(-1.0), r"strength is -1\.0\. Give a finite number, 0 or more"),
    (lambda: fewbits.Penalty(float("nan")), r"nan"),
    (lambda: fewbits.Penalty({"0": -2.0}), r"strength is -2\.0"),
    (lambda: fewbits.Proximal(wrong("strong")), r"'strong' is neither a number nor a schedule"),
    (lambda: fewbits.Proximal(every=0), r"every is 0\. Give a number of steps from 1"),
    (lambda: fewbits.Proximal(average=1.5), r"average is 1\.5\. Give a share from 0 to 1"),
])  # fmt: skip
def test_impossible_pulls_are_refused(make, message):
    with pytest.raises(fewbits.PlanError, match=message):
        make()
