"""Where the weights of a layer lie, against what was put into it."""

import torch
from torch import nn

import fewbits
from fewbits.lab._layers import histograms


def test_only_values_that_weights_share_count_as_representatives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 40))  # 24 and 240 different weights
    plan = fewbits.plan(model, k=3)
    assert [stage["representatives"] for stage in histograms(model, plan).values()] == [[], []]
    clustering = fewbits.Clustering(model, plan=plan)
    for stage in histograms(model, plan).values():
        assert len(stage["representatives"]) == 3 and sum(stage["counts"]) in (24, 240)
    clustering.harden()
    found = histograms(model, plan)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            continue
        assert found[name]["representatives"] == weight.detach().unique().tolist()
