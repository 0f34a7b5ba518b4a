"""What the report shows of each layer: histograms with representatives, usage, distortion."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._codebook import distortion_of, grouped
from .._plan import CODEBOOK_SUFFIX, Plan

BINS = 80
# Values drawn or counted per layer at the most: with codebooks per channel there can be thousands.
MOST_VALUES = 256

Stage = dict[str, Any]


@torch.no_grad()
def histograms(model: nn.Module, plan: Plan) -> dict[str, Stage]:
    """Return a histogram of every clustered weight, with the codebook if one is attached.

    Args:
        model: float, clustered or hardened.
        plan: which weights.

    Returns:
        By weight name: low, high, counts in equal bins, and the representatives: those of its
        codebook, else its distinct values where each is taken twice on average, at most 256.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    result = {}
    for planned in plan.selected:
        weight = parameters[planned.name].detach().float().cpu().flatten()
        low, high = float(weight.min()), float(weight.max())
        if low == high:
            low, high = low - 0.5, high + 0.5
        counts = torch.histc(weight, BINS, low, high)
        codebook = parameters.get(planned.name + CODEBOOK_SUFFIX)
        values = (
            torch.unique(weight) if codebook is None else codebook.detach().flatten().sort().values
        )
        # A small float weight has few values too, but nobody shares them.
        shared = codebook is not None or 2 * len(values) <= len(weight)
        few = shared and len(values) <= MOST_VALUES
        result[planned.name] = {
            "low": low,
            "high": high,
            "counts": counts.int().tolist(),
            "representatives": values.tolist() if few else [],
        }
    return result


@torch.no_grad()
def describe(
    model: nn.Module,
    plan: Plan,
    stages: Mapping[str, Mapping[str, Stage]],
    unsnapped: Mapping[str, Tensor],
    bits_entropy: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Return one dict per clustered weight of a hardened model.

    Args:
        model: hardened.
        plan: which weights.
        stages: stage name ("before", "during", "after") to `histograms`.
        unsnapped: state dict from before the weights were snapped, for the distortion.
        bits_entropy: by weight name.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows = []
    for planned in plan.selected:
        weight = parameters[planned.name].detach()
        view = grouped(weight, planned.groups, planned.axis)
        values, counts = torch.unique(view[0] if planned.groups > 1 else view, return_counts=True)
        spread = float(weight.float().std(correction=0)) if weight.numel() > 1 else 0.0
        rows.append(
            {
                "name": planned.name,
                "shape": list(planned.shape),
                "weights": planned.weights,
                "stages": [{"stage": s} | h[planned.name] for s, h in stages.items()],
                "usage": (counts / counts.sum()).tolist(),
                "distortion": distortion_of(unsnapped[planned.name].to(weight), weight),
                "bits_entropy": bits_entropy.get(planned.name, 0.0),
                "dead": planned.k - len(values),
                "merged": int((values.diff() <= 1e-3 * spread).sum()),
            }
        )
    return rows
