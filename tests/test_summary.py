"""Summaries against numbers worked out by hand."""

import math

import pytest
import torch
from helpers import two_layers
from torch import nn

import fewbits


def layer_of(rows):
    weight = torch.tensor(rows)
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    return layer


def test_a_layer_is_that_of_a_worked_example():
    # 16 weights: eight 0, four 1, two 2, two 3: entropy 1/2 + 2/4 + 3/8 + 3/8 = 1.75 bits
    layer = layer_of([[0.0, 1.0, 0.0, 2.0, 0.0, 1.0, 0.0, 3.0]] * 2)
    summary = fewbits.summary(layer)
    (row,) = summary.layers
    assert (row.name, row.shape, row.weights) == ("weight", (2, 8), 16)
    assert (row.codebooks, row.distinct) == (1, 4)
    assert (row.bits_fixed, row.bits_entropy) == (2.0, pytest.approx(1.75))
    assert row.bytes_fixed == 16 * 2 / 8 + 4 * 4  # indices and four float32 values
    assert row.bytes_entropy == math.ceil(16 * 1.75 / 8) + 4 * 4
    assert row.distortion is None
    assert summary.other_bytes == 2 * 4  # the bias
    assert summary.float_bytes == (16 + 2) * 4
    assert (summary.bytes_fixed, summary.bytes_entropy) == (20 + 8, 20 + 8)
    assert summary.ratio == 72 / 28
    assert (summary.weights, summary.bits_fixed) == (16, 2.0)


def test_distortion_is_measured_against_the_reference():
    before, after = layer_of([[1.0, 3.0] * 8]), layer_of([[2.0, 2.0] * 8])
    (row,) = fewbits.summary(after, reference=before).layers
    assert row.distortion == pytest.approx(1 / 5)  # (1 + 1) / (1 + 9)
    assert (row.distinct, row.bits_fixed, row.bits_entropy) == (1, 0.0, 0.0)
    assert fewbits.summary(after, reference=before.state_dict()).layers == (row,)


def test_a_codebook_per_channel_is_found_by_the_values_alone():
    layer = nn.Linear(256, 8)
    plan = fewbits.plan(layer, k=4, granularity="channel")
    fewbits.quantize(layer, plan=plan)
    (row,) = fewbits.summary(layer).layers
    assert (row.codebooks, row.distinct, row.bits_fixed) == (8, 4, 2.0)
    assert row.bytes_fixed == 8 * 256 * 2 / 8 + 8 * 4 * 4


def test_a_codebook_per_group_is_that_of_the_plan():
    layer = nn.Linear(64, 8)
    plan = fewbits.plan(layer, k=4, granularity="group", channels_per_group=2)
    fewbits.quantize(layer, plan=plan)
    (row,) = fewbits.summary(layer, plan=plan).layers
    assert (row.codebooks, row.distinct) == (4, 4)


def test_float_weights_count_as_everything_else():
    model = two_layers()
    summary = fewbits.summary(model)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert summary.layers == ()
    assert summary.bytes_fixed == summary.other_bytes == summary.float_bytes == size
    assert summary.ratio == 1.0
    assert math.isnan(summary.bits_fixed)


def test_tied_weights_are_counted_once():
    model = nn.ModuleDict({"table": nn.Embedding(100, 16), "head": nn.Linear(16, 100, bias=False)})
    model["head"].weight = model["table"].weight
    fewbits.quantize(model, k=4)
    summary = fewbits.summary(model)
    assert [row.name for row in summary.layers] == ["table.weight"]
    assert summary.float_bytes == 1600 * 4
    assert summary.other_bytes == 0


def test_narrow_weights_are_compared_with_the_float32_state_dict():
    layer = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    fewbits.quantize(layer, k=4)
    summary = fewbits.summary(layer)
    assert summary.float_bytes == 64 * 64 * 4
    assert summary.bytes_fixed == 64 * 64 * 2 / 8 + 4 * 2


def test_buffers_and_unreadable_tensors_count_with_their_own_bytes():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(8, 8, device="meta", bias=False))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    summary = fewbits.summary(model)
    assert summary.layers == ()
    assert summary.other_bytes == 4 * 4 * 4 + 8 + 8 * 8 * 4 + 3 * 3 * 4


def test_the_table_and_the_rows_hold_every_layer():
    model = two_layers()
    fewbits.quantize(model, k=2)
    summary = fewbits.summary(model)
    lines = str(summary).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["0.weight", "2.weight"]
    assert f"whole model: {summary.bytes_fixed:,} bytes" in lines[-1]
    assert [row["name"] for row in summary.rows()] == ["0.weight", "2.weight"]
    assert set(summary.rows()[0]) >= {"shape", "distinct", "bits_entropy", "bytes_fixed"}


def test_a_summary_changes_nothing():
    model = two_layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fewbits.summary(model, reference=model)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
