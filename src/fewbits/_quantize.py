"""After training: uniform, k-means and entropy-constrained quantization."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from ._codebook import (
    check_finite,
    grouped,
    initial_codebook,
    pooled_variance,
    rate_aware_boundaries,
    std_of,
    ungrouped,
)
from ._errors import PlanError, did_you_mean
from ._kernels import cluster_sums, midpoints, snap
from ._plan import Plan, carried_out, unwrapped

Method = Literal["kmeans", "uniform", "entropy"]
_METHODS: tuple[Method, ...] = ("kmeans", "uniform", "entropy")

# Rounds of assign and re-estimate; the Lagrangian changes by under 0.1% after 15 on Laplacian
# and normal weights at K = 4 … 64.
_ROUNDS = 30
DEFAULT_RATE = 0.02


@torch.no_grad()
def quantize(
    model: nn.Module,
    *,
    bits: int | None = None,
    k: int | None = None,
    plan: Plan | None = None,
    method: Method = "kmeans",
    rate: float = DEFAULT_RATE,
) -> Plan:
    """In place: set each selected weight to the nearest of few values, without training.

    Args:
        model: a trained module.
        bits: log2 of the number of values per codebook.
        k: the number of values instead.
        plan: a plan for this model instead. Exactly one of the three.
        method: "kmeans", least squared error; "uniform", an even grid from the smallest to the
            largest weight; "entropy", least squared error plus `rate` x bits of the index.
        rate: for "entropy": what a bit is worth, in the mean variance of the layers' weights.

    Returns:
        The plan that was carried out.

    Raises:
        PlanError: if the model, the numbers or the rules do not allow it.
        CodebookError: if a selected weight is not finite. The model is unchanged in both cases.

    References:
        docs/method.md, eq. 7 for "entropy" (Chou, Lookabaugh & Gray 1989).
    """
    if method not in _METHODS:
        raise PlanError(f"method is {method!r}.{did_you_mean(method, _METHODS)} Use {_METHODS}.")
    if not (math.isfinite(rate) and rate >= 0):
        raise PlanError(f"rate is {rate!r}. Give a finite number, 0 or more.")
    model = unwrapped(model)
    plan = carried_out(model, bits, k, plan)
    weights = dict(model.named_parameters(remove_duplicate=False))
    for planned in plan.selected:
        check_finite(planned.name, weights[planned.name])
    worth = 0.0
    if method == "entropy":
        worth = rate * mean_variance([weights[p.name].detach() for p in plan.selected])
    for planned in plan.selected:
        weight = weights[planned.name].detach()
        view = grouped(weight, planned.groups, planned.axis)
        values = quantized_values(view, planned.k, method, worth)
        weight.copy_(ungrouped(values, weight, planned.groups, planned.axis))
    return plan


def mean_variance(weights: Iterable[Tensor]) -> float:
    """Return the mean squared deviation of all weights from the mean of their own tensor.

    Args:
        weights: floating point; looked at one by one.
    """
    sizes, stds = [], []
    for weight in weights:
        sizes.append(weight.numel())
        stds.append(std_of(weight))
    return pooled_variance(sizes, stds)


def quantized_values(
    weight: Tensor, k: int, method: Method = "kmeans", worth: float = 0.0
) -> Tensor:
    """Return weights on k values per row; see `quantize`.

    Args:
        weight: (G, n) floating point, finite.
        k: number of values per row.
        method: as in `quantize`.
        worth: for "entropy": what a bit is worth, in squared units of the weights.

    Returns:
        (G, n), dtype of `weight`.
    """
    codebook = initial_codebook(weight, k, "uniform" if method == "uniform" else "kmeans")
    if method != "entropy" or worth == 0:
        return snap(weight, codebook, midpoints(codebook))
    codebook = codebook.double()
    boundaries = midpoints(codebook)
    for _ in range(_ROUNDS):
        counts, sums = cluster_sums(weight, weight, boundaries)
        codebook = torch.where(counts > 0, sums / counts.clamp(min=1), codebook)
        share = counts / weight.shape[1]
        # A value without weights keeps a price at which nothing chooses it.
        cost = worth * -share.clamp(min=1e-12).log2()
        codebook, order = codebook.sort(dim=1)
        boundaries = rate_aware_boundaries(codebook, cost.gather(1, order))
    return snap(weight, codebook, boundaries)
