"""Codebook fine-tuning and batch-norm re-estimation against autograd and plain averages."""

import copy
from typing import Any

import pytest
import torch
from helpers import batch, compiled, distinct, parameter, two_layers
from torch import nn

import fewbits


def task(output, target):
    return nn.functional.mse_loss(output, target)


def hardened(k=3, granularity: Any = "layer"):
    model = two_layers()
    plan = fewbits.plan(model, k=k, granularity=granularity)
    fewbits.quantize(model, plan=plan)
    return model, plan


def clusters(weight):
    """Which weights are equal, as indices of their value by first appearance."""
    _, inverse = weight.detach().flatten().unique(return_inverse=True)
    first: dict[int, int] = {}
    return [first.setdefault(int(i), len(first)) for i in inverse]


@pytest.mark.parametrize("given_plan", [False, True])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_finetuning_lowers_the_loss_and_moves_no_weight_to_another_cluster(granularity, given_plan):
    model, plan = hardened(granularity=granularity)
    before, inputs = copy.deepcopy(model), batch(99, size=128)
    batches = [batch(step) for step in range(60)]
    fewbits.finetune_codebooks(
        model, batches, task, lr=0.02, plan=plan if given_plan else None
    )  # fmt: skip
    assert task(model(inputs[0]), inputs[1]) < 0.8 * task(before(inputs[0]), inputs[1])
    for name in ("0.weight", "2.weight"):
        now, then = parameter(model, name), parameter(before, name)
        rows = zip(now, then, strict=True) if granularity == "channel" else [(now, then)]
        for row, old in rows:
            assert clusters(row) == clusters(old)
            assert not torch.equal(row, old)
    assert not torch.equal(parameter(model, "0.bias"), parameter(before, "0.bias"))
    assert list(model.state_dict()) == list(before.state_dict())


def test_a_representative_follows_the_sum_of_its_members_gradients():
    model, _ = hardened(k=2)
    weight = parameter(model, "0.weight")
    inputs, target = batch(0)
    task(model(inputs), target).backward()
    assert weight.grad is not None
    values, inverse = weight.detach().unique(return_inverse=True)
    sums = torch.zeros(2).index_add(0, inverse.flatten(), weight.grad.flatten())
    std = float(weight.detach().std(correction=0))
    fewbits.finetune_codebooks(model, [(inputs, target)], task, lr=0.01)
    # The first step of Adam is its rate against the sign of the gradient.
    expected = values - 0.01 * std * sums.sign()
    torch.testing.assert_close(parameter(model, "0.weight").detach().unique(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_finetuning_keeps_the_type_of_the_weights(dtype):
    model = two_layers().to(dtype)
    fewbits.quantize(model, k=3)
    batches = [tuple(t.to(dtype) for t in batch(step)) for step in range(5)]
    before = parameter(model, "0.weight").detach().clone()
    pairs = [(inputs, target) for inputs, target in batches]
    fewbits.finetune_codebooks(model, pairs, task, lr=0.05)
    after = parameter(model, "0.weight")
    assert after.dtype == dtype
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert distinct(after) == 3
    assert not torch.equal(after, before)


def test_a_compiled_model_and_tied_weights_are_finetuned():
    model = two_layers()
    fewbits.quantize(model, k=3)
    before = parameter(model, "0.weight").detach().clone()
    fewbits.finetune_codebooks(compiled(model), [batch(0)], task, lr=0.1)
    assert not torch.equal(parameter(model, "0.weight"), before)

    tied = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False))
    tied[1].weight = parameter(tied, "0.weight")
    fewbits.quantize(tied, k=3)
    inputs = batch(0)[0]
    fewbits.finetune_codebooks(tied, [(inputs, inputs)], task, lr=0.1)
    assert tied[1].weight is tied[0].weight
    assert distinct(parameter(tied, "0.weight")) == 3


def test_a_float_model_has_no_codebooks_to_tune():
    with pytest.raises(
        fewbits.PlanError, match=r"no weight with few distinct values\. Call harden"
    ):
        fewbits.finetune_codebooks(nn.Linear(64, 64), [], task)


def test_a_loss_gone_bad_is_named_and_the_weights_are_kept():
    model, _ = hardened()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs, target = batch(0)
    batches = [(inputs, target), (inputs * torch.inf, target)]
    with pytest.raises(fewbits.CodebookError, match=r"the loss is nan at step 1\. Lower lr"):
        fewbits.finetune_codebooks(model, batches, task)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


@pytest.mark.parametrize("axis", [0, 1])
def test_values_per_channel_along_either_axis_stay_shared(axis):
    layer = nn.Linear(12, 40, bias=False)
    rows = torch.randn(layer.weight.shape[axis], 2)
    signs = torch.randint(0, 2, layer.weight.movedim(axis, 0).shape)
    layer.weight.data.copy_(rows.gather(1, signs).movedim(0, axis))
    inputs, _ = batch(0)
    fewbits.finetune_codebooks(layer, [(inputs, torch.ones(16, 40))], task, lr=0.1)
    now = layer.weight.movedim(axis, 0)
    assert all(clusters(row) == clusters(sign) for row, sign in zip(now, signs, strict=True))
    assert distinct(now) > 20


def test_half_precision_biases_without_gradient_stay_finite():
    model = two_layers().half()
    parameter(model, "0.bias").data.fill_(-1000.0)  # no ReLU ever opens
    fewbits.quantize(model, k=3)
    pairs = [tuple(t.half() for t in batch(step)) for step in range(3)]
    fewbits.finetune_codebooks(model, [(i, t) for i, t in pairs], task)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def normed():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 4, 3),
        nn.BatchNorm1d(4),
        nn.Dropout(0.5),
        nn.Conv1d(4, 2, 3),
        nn.BatchNorm1d(2),
    )


def test_batch_norm_statistics_become_the_average_over_the_batches():
    model = normed()
    batches = [2 + torch.randn(8, 3, 10) for _ in range(5)]
    model(batches[0])  # something to forget
    parts = [model[0](inputs) for inputs in batches]
    assert fewbits.reestimate_batch_norm(model, [(inputs, "a label") for inputs in batches]) == 2
    means = torch.stack([part.mean((0, 2)) for part in parts]).mean(0)
    variances = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in parts]).mean(0)
    state = model.state_dict()
    torch.testing.assert_close(state["1.running_mean"], means)
    torch.testing.assert_close(state["1.running_var"], variances)
    assert state["1.num_batches_tracked"] == 5


def test_reestimating_keeps_modes_momentums_and_parameters():
    model = normed()
    model[1].eval()
    norm = model[4]
    assert isinstance(norm, nn.BatchNorm1d)
    norm.momentum = 0.3
    before = [p.detach().clone() for p in model.parameters()]
    fewbits.reestimate_batch_norm(model, [torch.randn(4, 3, 10)])
    assert [m.training for m in model] == [True, False, True, True, True]
    assert (model[1].momentum, model[4].momentum) == (0.1, 0.3)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_dropout_stays_off_while_statistics_are_taken():
    some, other = normed(), normed()
    inputs = torch.randn(64, 3, 10)
    for seed, model in enumerate((some, other)):
        torch.manual_seed(seed)
        fewbits.reestimate_batch_norm(model, [inputs])
    assert torch.equal(some.state_dict()["4.running_mean"], other.state_dict()["4.running_mean"])


def test_no_batches_are_refused_and_the_statistics_kept():
    model = normed()
    model(torch.randn(8, 3, 10))
    before = model.state_dict()["1.running_mean"].clone()
    with pytest.raises(fewbits.PlanError, match=r"there is no batch\. Pass a few"):
        fewbits.reestimate_batch_norm(model, [])
    assert torch.equal(model.state_dict()["1.running_mean"], before)


def test_a_model_without_batch_norm_is_left_alone_and_reads_nothing():
    def never():
        raise AssertionError("read")
        yield

    assert fewbits.reestimate_batch_norm(two_layers(), never()) == 0
