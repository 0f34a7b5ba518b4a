"""float64 brute force over all weights x representatives; imports nothing of fewbits."""

import itertools
import math

import torch
from torch import Tensor


def nearest(weight: Tensor, codebook: Tensor) -> Tensor:
    """(G, n) indices of the nearest of (G, K); the lower one on a tie."""
    distance = (weight.double()[:, :, None] - codebook.double()[:, None, :]).abs()
    return distance.argmin(dim=2)  # argmin takes the first of equals; codebooks ascend


def nearest_penalty(weight: Tensor, codebook: Tensor, p: int) -> Tensor:
    """METHOD's nearest-p over (G, n) and (G, K), differentiable, one std for the layer."""
    # Less one of the weights: torch's deviation of equal numbers is not always 0.
    shifted = weight.detach() - weight.detach().flatten()[0]
    std = shifted.std(correction=0) if weight.numel() > 1 else torch.tensor(0.0)
    std = std if std > 0 else torch.ones(())
    distance = ((weight[:, :, None] - codebook[:, None, :]) / std).abs()
    return distance.min(dim=2).values.pow(p).mean()


def soft_min(weight: Tensor, codebook: Tensor, mixing: Tensor, temperature: float) -> Tensor:
    std = weight.detach().std(correction=0)
    squares = ((weight[:, :, None] - codebook[:, None, :]) / std) ** 2
    inner = (mixing[:, None, :] * torch.exp(-squares / temperature)).sum(dim=2)
    return -temperature * inner.log().mean()


def periodic(weight: Tensor, first: Tensor, step: Tensor) -> Tensor:
    return torch.sin(math.pi * (weight - first) / step).square().mean()


def rate_aware_indices(weight: Tensor, codebook: Tensor, cost: Tensor) -> Tensor:
    squares = (weight.double()[:, :, None] - codebook.double()[:, None, :]) ** 2
    return (squares + cost.double()[:, None, :]).argmin(dim=2)


def kmeans_error(values: list[float], k: int) -> float:
    """Least squared error of splitting sorted values into at most k runs, by trying them all."""
    ordered = sorted(values)
    best = math.inf
    for cuts in itertools.combinations_with_replacement(range(len(ordered) + 1), k - 1):
        bounds = [0, *cuts, len(ordered)]
        error = 0.0
        for low, high in itertools.pairwise(bounds):
            run = ordered[low:high]
            if run:
                mean = math.fsum(run) / len(run)
                error += math.fsum((x - mean) ** 2 for x in run)
        best = min(best, error)
    return best
