"""What a plan selects, skips and refuses, against what the layers and rules given say."""

import sys
import types

import pytest
import torch
from helpers import compiled, parameter, two_layers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits


def names(plan):
    return [row.name for row in plan.selected]


def reasons(plan):
    return {row.name: row.reason for row in plan.skipped}


def conv1d_of_transformers(monkeypatch):
    """A class by the name and place of transformers' Conv1D: y = x @ weight + bias."""

    class Conv1D(nn.Module):
        def __init__(self, outputs, inputs):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(inputs, outputs))
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x):
            return x @ self.weight + self.bias

    Conv1D.__module__ = "transformers.pytorch_utils"
    module = types.ModuleType("transformers.pytorch_utils")
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    return Conv1D


@pytest.mark.parametrize(("layer", "selected", "axis"), [
    (nn.Linear(4, 6), ["weight"], 0),
    (nn.Bilinear(3, 4, 5), ["weight"], 0),
    (nn.Conv1d(4, 6, 3), ["weight"], 0),
    (nn.Conv2d(4, 6, 3, groups=2), ["weight"], 0),
    (nn.Conv3d(4, 6, 3), ["weight"], 0),
    (nn.ConvTranspose1d(4, 6, 3), ["weight"], 1),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), ["weight"], 1),
    (nn.ConvTranspose3d(4, 6, 3), ["weight"], 1),
    (nn.Embedding(10, 4), ["weight"], 0),
    (nn.EmbeddingBag(10, 4), ["weight"], 0),
    (nn.MultiheadAttention(8, 2), ["in_proj_weight", "out_proj.weight"], 0),
    (
        nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        0,
    ),
], ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "")  # fmt: skip
def test_every_layer_type_is_clustered_along_its_output_channels(layer, selected, axis):
    plan = fewbits.plan(layer, k=2, granularity="channel")
    assert names(plan) == selected
    assert all(row.axis == axis for row in plan.selected)
    for row in plan.selected:
        assert row.groups == row.shape[axis]


def test_the_conv1d_of_transformers_is_clustered_along_its_columns(monkeypatch):
    layer = conv1d_of_transformers(monkeypatch)(6, 4)
    (row,) = fewbits.plan(layer, k=2, granularity="channel").selected
    assert (row.name, row.axis, row.groups) == ("weight", 1, 6)


def test_a_class_that_is_only_called_conv1d_is_left_alone():
    class Conv1D(nn.Linear):
        pass

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

    Own.__name__ = "Conv1D"
    plan = fewbits.plan(nn.Sequential(Conv1D(2, 2), Own()), k=2)
    assert names(plan) == ["0.weight"]
    assert "not a weight of a layer type" in reasons(plan)["1.weight"]


def test_norms_and_biases_and_frozen_weights_are_left_alone_and_listed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.LSTM(2, 2))
    parameter(model, "2.weight").requires_grad_(False)
    plan = fewbits.plan(model, k=2)
    assert names(plan) == ["0.weight"]
    why = reasons(plan)
    assert why["0.bias"] == "bias"
    assert why["1.weight"] == why["1.bias"] == "normalization (BatchNorm2d)"
    assert "frozen" in why["2.weight"]
    assert "LSTM" in why["3.weight_ih_l0"]
    assert set(names(plan)) | set(why) == {name for name, _ in model.named_parameters()}
    assert all(f"left alone: {name}: " in str(plan) for name in why)


def test_a_model_of_many_layers_is_clustered_from_first_to_last():
    assert names(fewbits.plan(two_layers(), bits=3)) == ["0.weight", "2.weight"]


@given(st.integers(1, 65_536))
def test_any_number_of_values_up_to_65536_is_planned(k):
    with torch.device("meta"):
        layer = nn.Linear(256, 257)
    layer.weight = nn.Parameter(torch.empty(257, 256))
    (row,) = fewbits.plan(layer, k=k).selected
    assert row.k == k
    assert 2**row.bits == pytest.approx(k)


def test_bits_are_a_power_of_two_of_values():
    layer = nn.Linear(256, 256)
    assert [fewbits.plan(layer, bits=b).selected[0].k for b in (0, 1, 4, 16)] == [1, 2, 16, 65_536]


def test_k_is_lowered_to_the_weights_of_a_codebook_and_noted():
    plan = fewbits.plan(nn.Linear(6, 4), k=20, granularity="channel")
    assert plan.selected[0].k == 6
    assert plan.notes == ("weight: k lowered from 20 to its 6 weights",)
    assert "note: weight: k lowered" in str(plan)
    assert fewbits.plan(nn.Linear(6, 4), k=20).notes == ()


@pytest.mark.parametrize("make", [
    lambda model: fewbits.Clustering(model, k=30),
    lambda model: fewbits.Clustering(model, plan=fewbits.plan(model, k=30)),
    lambda model: fewbits.quantize(model, k=30),
])  # fmt: skip
def test_whoever_carries_out_a_lowered_k_warns(make):
    with pytest.warns(UserWarning, match=r"weight: k lowered from 30 to its 24 weights") as seen:
        make(nn.Linear(6, 4))
    assert seen[0].filename.endswith(("test_plan.py", "_contextlib.py"))


def test_groups_of_channels_share_codebooks():
    model = nn.Linear(5, 12)
    plan = fewbits.plan(model, k=3, granularity="group", channels_per_group=4)
    assert plan.selected[0].groups == 3
    plan = fewbits.plan(
        nn.Sequential(model, nn.Linear(12, 5)), k=3, granularity="group", channels_per_group=4
    )
    assert reasons(plan)["1.weight"] == "5 channels do not divide into groups of 4"


def test_tied_weights_are_planned_once_under_their_first_name():
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "head": nn.Linear(4, 10)})
    model["head"].weight = parameter(model, "embedding.weight")
    plan = fewbits.plan(model, k=2)
    assert names(plan) == ["embedding.weight"]
    assert plan.selected[0].aliases == ("head.weight",)
    assert "embedding.weight = head.weight" in str(plan)


def test_a_layer_used_twice_follows_the_rules_for_either_name():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": layer, "second": layer, "third": nn.Linear(4, 4)})
    plan = fewbits.plan(model, k=2, overrides={"second": {"k": 3}})
    assert [(row.name, row.k) for row in plan.selected] == [
        ("first.weight", 3),
        ("third.weight", 2),
    ]


def test_later_rules_win_by_name_and_by_type():
    model = nn.ModuleDict({
        "stem": nn.Conv2d(3, 4, 3),
        "body": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        "table": nn.Embedding(9, 4),
    })  # fmt: skip
    rules = {
        "body.*": {"k": 3, "granularity": "channel"},
        nn.Embedding: {"bits": 3},
        "body.1": {"granularity": "group", "channels_per_group": 2},
        "type:Conv2d": None,
    }
    plan = fewbits.plan(model, k=2, overrides=rules)
    found = {row.name: (row.k, row.granularity, row.groups) for row in plan.selected}
    assert found == {
        "body.0.weight": (3, "channel", 4),
        "body.1.weight": (3, "group", 2),
        "table.weight": (8, "layer", 1),
    }
    assert reasons(plan)["stem.weight"] == "excluded by 'type:Conv2d'"


def test_an_exclusion_can_be_taken_back_by_a_later_rule():
    plan = fewbits.plan(two_layers(), k=2, overrides={"*": None, "2": {"k": 5}})
    assert [(row.name, row.k) for row in plan.selected] == [("2.weight", 5)]
    assert reasons(plan)["0.weight"] == "excluded by '*'"


def test_a_compiled_model_has_the_names_of_the_model_itself():
    model = two_layers()
    assert fewbits.plan(compiled(model), k=2) == fewbits.plan(model, k=2)


def test_planning_changes_nothing():
    model = two_layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fewbits.plan(model, k=2)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def linear_with(weight):
    layer = nn.Linear(2, 2, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def quantized():
    return torch.quantize_per_tensor(torch.randn(2, 2), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("make", "reason"), [
    (lambda: linear_with(torch.ones(2, 2, dtype=torch.int8)), "int8 is not a floating-point type"),
    (lambda: linear_with(torch.ones(2, 2, dtype=torch.complex64)), "complex64 is not a floating"),
    (lambda: linear_with(torch.eye(2).to_sparse()), "sparse"),
    (lambda: linear_with(quantized()), "already quantized"),
    (lambda: linear_with(torch.ones(2, 2).to(torch.float8_e4m3fn)), "narrower than 16 bits"),
    (lambda: nn.Linear(2, 2, device="meta"), "meta device"),
    (lambda: linear_with(torch.empty(0, 2)), "empty"),
    (lambda: nn.LazyLinear(2), "not initialized yet"),
    (lambda: nn.Embedding(4, 2, sparse=True), "gradients are sparse"),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "parametrization"),
])  # fmt: skip
def test_a_weight_that_cannot_be_clustered_is_skipped_with_its_reason(make, reason):
    layer = make()
    plan = fewbits.plan(nn.Sequential(layer, nn.Linear(2, 2)), k=2, overrides={"0*": {"k": 3}})
    assert names(plan) == ["1.weight"]
    assert any(reason in why for name, why in reasons(plan).items() if name[:2] == "0.")
    with pytest.raises(fewbits.PlanError, match=rf"has nothing to cluster \(.*{reason}"):
        fewbits.plan(layer, k=2)


@pytest.mark.parametrize(("settings", "message"), [
    ({"k": 0}, r"k is 0\. Give a whole number from 1 to 65,536"),
    ({"k": -3}, r"k is -3"),
    ({"k": 65_537}, r"k is 65537"),
    ({"k": 2.0}, r"k is 2\.0"),
    ({"k": True}, r"k is True"),
    ({"k": "4"}, r"k is '4'"),
    ({"bits": -1}, r"bits is -1\. Give a whole number from 0 to 16"),
    ({"bits": 17}, r"bits is 17"),
    ({"bits": 1.5}, r"bits is 1\.5.* k= for other counts"),
    ({"bits": 2, "k": 4}, r"both bits=2 and k=4 are given"),
    ({}, r"exactly one of bits and k; neither is given"),
    ({"k": 2, "granularity": "row"}, r"granularity is 'row'\. Use 'layer', 'channel' or 'group'"),
    ({"k": 2, "granularity": "group"}, r"channels_per_group is None"),
    ({"k": 2, "granularity": "group", "channels_per_group": 0}, r"channels_per_group is 0"),
    ({"k": 2, "overrides": {"0": {"k": 0}}}, r"k is 0 for 0"),
    ({"k": 2, "overrides": {"0": {"k": 2, "bits": 1}}}, r"both bits=1 and k=2 are given"),
    ({"k": 2, "overrides": {"0": {"kk": 2}}}, r"unknown key 'kk'\. Did you mean 'k'"),
    ({"k": 2, "overrides": {"0": 4}}, r"overrides\['0'\] is 4\. Give a mapping"),
    ({"k": 2, "overrides": {0: None}}, r"0 is no pattern"),
    ({"k": 2, "overrides": {"0": {"channels_per_group": -1}}}, r"channels_per_group is -1 for 0"),
    ({"k": 2, "overrides": {"*": None}}, r"has nothing to cluster \(0\.weight: excluded by '\*'"),
])  # fmt: skip
def test_bad_settings_are_refused_with_value_and_remedy(settings, message):
    with pytest.raises(fewbits.PlanError, match=message):
        fewbits.plan(two_layers(), **settings)


@pytest.mark.parametrize(("pattern", "message"), [
    ("clasifier.*", r"no layer with weights matches 'clasifier\.\*'\. Did you mean 'classifier"),
    ("classifier", r"contains 'classifier.0', 'classifier.2': write 'classifier\.\*'"),
    ("type:Linaer", r"Did you mean 'type:Linear'"),
    (nn.LSTM, r"no layer with weights is a LSTM\. Types here: Linear"),
    ("classifier.1", r"no layer with weights matches 'classifier\.1'"),  # a ReLU
])  # fmt: skip
def test_a_rule_without_effect_is_refused_with_the_nearest_names(pattern, message):
    model = nn.ModuleDict({"classifier": two_layers()})
    with pytest.raises(fewbits.PlanError, match=message):
        fewbits.plan(model, k=2, overrides={pattern: {"k": 3}})


def test_a_model_without_parameters_has_nothing_to_cluster():
    with pytest.raises(fewbits.PlanError, match=r"ReLU has nothing to cluster \(it has no param"):
        fewbits.plan(nn.ReLU(), k=2)


def test_a_clustered_model_cannot_be_planned_again():
    model = two_layers()
    fewbits.Clustering(model, k=2)
    with pytest.raises(fewbits.PlanError, match=r"0\.weight is clustered already\. Call harden"):
        fewbits.plan(model, k=2)


def test_a_users_own_parameter_called_codebook_is_no_clustering_of_ours():
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter("token_codebook", nn.Parameter(torch.randn(3)))
    assert names(fewbits.plan(model, k=2)) == ["0.weight"]


@pytest.mark.parametrize("carry_out", [fewbits.Clustering, fewbits.quantize])
def test_a_plan_of_another_model_is_refused(carry_out):
    plan = fewbits.plan(two_layers(), k=2)
    with pytest.raises(fewbits.PlanError, match=r"0\.weight: the plan says shape \(16, 12\)"):
        carry_out(nn.Sequential(nn.Linear(3, 3)), plan=plan)
    model = two_layers()
    parameter(model, "2.weight").requires_grad_(False)
    with pytest.raises(fewbits.PlanError, match=r"2\.weight: since the plan was made: frozen"):
        carry_out(model, plan=plan)


@pytest.mark.parametrize("carry_out", [fewbits.Clustering, fewbits.quantize])
def test_exactly_one_of_bits_and_k_and_plan_is_wanted(carry_out):
    model = two_layers()
    plan = fewbits.plan(model, k=2)
    for settings in ({}, {"bits": 2, "k": 4}, {"k": 4, "plan": plan}):
        with pytest.raises(fewbits.PlanError, match=r"exactly one of bits, k and plan; given: "):
            carry_out(model, **settings)
    with pytest.raises(fewbits.PlanError, match=r"plan is \{\}\. Pass what fewbits\.plan"):
        carry_out(model, plan={})
