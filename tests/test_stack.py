"""Many layers taken together against the same layers, each clustered alone."""

import copy

import pytest
import torch
from helpers import parameter
from torch import nn

import fewbits
from fewbits.regularizers import Nearest

PULLS = [
    fewbits.Penalty(0.3, even_rate=False),
    fewbits.Penalty(0.01),
    fewbits.Proximal(0.1),
]
OVERRIDES = {
    "1": {"granularity": "channel"},
    "2": {"k": 3},
    "5": {"granularity": "channel"},
    "6": {"granularity": "group", "channels_per_group": 2},
}


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    found = nn.ModuleList(
        [
            nn.Linear(12, 16),
            nn.Linear(16, 8),
            nn.Linear(8, 30),
            nn.Linear(300, 300),  # too large for the common buffer
            nn.Conv2d(8, 12, 3).to(memory_format=torch.channels_last),  # pyright: ignore
            nn.ConvTranspose2d(6, 10, 3),  # by channel its rows are no view of the weight
            nn.Linear(7, 6),
            nn.Linear(9, 9).double(),
            nn.Linear(9, 9).bfloat16(),
            nn.Linear(5, 5),
        ]
    )
    return found


def attach(model, pull, p):
    plan = fewbits.plan(
        model,
        k=5,
        granularity="layer",
        overrides={n: v for n, v in OVERRIDES.items() if n in dict(model.named_children())},
    )
    return fewbits.Clustering(
        model, plan=plan, regularizer=Nearest(p), pull=pull, snapped_forward=False
    )


def train(model, clustering):
    """Two steps in which the task pulls at every second layer only."""
    for name, layer in model.named_children():
        layer.weight.requires_grad_(name != "9")
    optimizer = torch.optim.SGD(clustering.param_groups(lr=0.1), momentum=0.9)
    gradients = []
    for _ in range(2):
        task = sum(
            (layer.weight.double() ** 3).sum()
            for name, layer in model.named_children()
            if int(name) % 2 == 0
        )
        (task + clustering.loss().double()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
        clustering.step()
    return gradients


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("pull", PULLS, ids=["penalty", "exact and even", "proximal"])
def test_layers_together_train_as_each_alone(pull, p):
    model = layers()
    clustering = attach(model, pull, p)
    pristine = layers()
    gradients = train(model, clustering)
    gap = {row.name: row for row in clustering.gap().layers}
    for name, layer in pristine.named_children():
        alone = nn.ModuleDict({name: copy.deepcopy(layer)})
        single = attach(alone, pull, p)
        for together, apart in zip(gradients, train(alone, single), strict=True):
            for key, expected in apart.items():
                found = together[key]
                assert (found is None) == (expected is None), key
                if found is not None:
                    torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=key)
        for key, value in alone.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key
        assert single.gap().layers[0] == gap[f"{name}.weight"]


def test_layers_may_move_to_another_type_or_start_later():
    model = layers()[:3]
    strengths = {"0": 0.1, "1": fewbits.schedules.linear(0.0, 0.1, steps=2, start=2)}
    clustering = fewbits.Clustering(model, k=2, pull=fewbits.Penalty(strengths))
    usage = []
    for step in range(5):
        if step == 3:
            model.get_submodule("0").double()
        clustering.loss().backward()
        clustering.step()
        usage.append([layer.usage.clone() for layer in clustering._layers])
    first, second, third = zip(*usage, strict=True)
    assert all(not torch.equal(a, b) for a, b in zip(first, first[1:], strict=False))
    assert torch.equal(second[1], torch.full((1, 2), 0.5)) and not torch.equal(second[4], second[1])
    assert torch.equal(third[4], third[0])


def test_a_weight_changed_before_backward_is_noticed():
    model = layers()[:3]
    loss = fewbits.Clustering(model, k=2).loss()
    with torch.no_grad():
        parameter(model, "1.weight").add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
