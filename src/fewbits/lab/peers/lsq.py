"""LSQ: straight-through training with a learned step size, weights only. Our own small version.

Esser et al., "Learned Step Size Quantization" (ICLR 2020). There is no maintained package.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..._codebook import grouped, grouped_like, ungrouped
from ..._errors import PlanError
from ..._plan import Plan, PlannedWeight
from . import Peer


def check(plan: Plan) -> None:
    """Refuse a plan that LSQ has no levels for.

    Raises:
        PlanError: if a weight shall have a single value.
    """
    for row in plan.selected:
        if row.k < 2:
            raise PlanError(f"{row.name}: lsq with k = {row.k}. Give 2 or more.")


def ends(k: int) -> tuple[int, int]:
    """Return the ends of the range, in steps: -Q_N and Q_P of the paper.

    For b bits they are those for signed data, -2^(b-1) and 2^(b-1) - 1; any other K has as many
    levels as evenly about zero. One bit, which would have the levels -1 and 0, has the ends -1 and
    1 and the middles of its two halves for levels, -1/2 and 1/2.

    Args:
        k: number of levels, 2 or more.
    """
    return (-1, 1) if k == 2 else (-(k // 2), k - 1 - k // 2)


def first_step(weight: Tensor, k: int) -> Tensor:
    """Return the step to start from, 2 mean|w| / sqrt(Q_P).

    Args:
        weight: (G, n).
        k: number of levels.

    Returns:
        (G, 1).
    """
    step = weight.abs().mean(1, keepdim=True) * 2 / math.sqrt(ends(k)[1])
    return step.clamp(min=torch.finfo(step.dtype).tiny)


def snap(weight: Tensor, step: Tensor, k: int) -> Tensor:
    """Return each weight's level times the step.

    Args:
        weight: (G, n) floating point.
        step: (G, 1), above 0.
        k: number of levels.

    Returns:
        (G, n): at most k values a row.
    """
    return _level(weight / step, k) * step


def gradients(gradient: Tensor, weight: Tensor, step: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and step from that of the snapped weight.

    Inside the range rounding counts as the identity: a weight takes the gradient as it is, the
    step takes it times level - weight / step; outside a weight takes none, the step takes it times
    the last level. The step's is scaled by 1 / sqrt(n Q_P).

    Args:
        gradient: (G, n) of the loss to the snapped weight.
        weight: (G, n).
        step: (G, 1).
        k: number of levels.

    Returns:
        (G, n) and (G, 1).

    References:
        Esser et al. (ICLR 2020), section 2.
    """
    low, high = ends(k)
    ratio = weight / step
    inside = (ratio > low) & (ratio < high)
    level = _level(ratio, k)
    to_step = gradient * torch.where(inside, level - ratio, level)
    scale = 1 / math.sqrt(weight.shape[1] * high)
    return gradient * inside, to_step.sum(1, keepdim=True) * scale


def _level(ratio: Tensor, k: int) -> Tensor:
    if k == 2:
        return torch.where(ratio < 0, -0.5, 0.5).to(ratio.dtype)
    return ratio.clamp(*ends(k)).round() + 0.0  # no zero of a second sign


class _Layer:
    """A weight whose parameter holds the snapped values, except while the optimizer steps."""

    def __init__(self, weight: nn.Parameter, planned: PlannedWeight):
        self.weight, self.planned = weight, planned
        self.latent = weight.detach().clone()  # what is trained
        self.step = nn.Parameter(first_step(self._view(self.latent), planned.k))

    def write_snapped(self) -> None:
        """Compute with the levels of the latent weights."""
        values = snap(self._view(self.latent), self.step, self.planned.k)
        self.weight.copy_(ungrouped(values, self.weight, self.planned.groups, self.planned.axis))

    def before_step(self) -> None:
        """Turn the gradient of the snapped weight into those of latent weight and step."""
        gradient = self.weight.grad
        if gradient is not None:
            row = self.planned
            gradient = grouped_like(gradient, self.weight, row.groups, row.axis)
            latent = self._view(self.latent)
            to_weight, self.step.grad = gradients(gradient, latent, self.step.detach(), row.k)
            self.weight.grad = ungrouped(to_weight, self.weight, row.groups, row.axis)
        self.weight.copy_(self.latent)

    def after_step(self) -> None:
        """Take what the optimizer made of the latent weight, and snap it."""
        self.latent.copy_(self.weight)
        self.step.clamp_(min=torch.finfo(self.step.dtype).tiny)
        self.write_snapped()

    def _view(self, tensor: Tensor) -> Tensor:
        return grouped(tensor, self.planned.groups, self.planned.axis)


class Lsq(Peer):
    """In place: give each selected weight, or each group of its channels, a learned step.

    The first and the last layer are no exception. Steps have the learning rate of the weights and
    no weight decay.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        """Put every weight on the levels of its first step."""
        super().__init__(model, plan)
        weights = self.weights()
        self._layers = {row.name: _Layer(weights[row.name], row) for row in plan.selected}
        self._handles: list[Any] = []
        self._write()

    def param_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return two groups: the model's parameters, and the steps without weight decay."""
        steps = [layer.step for layer in self._layers.values()]
        rest = [p for p in self.model.parameters() if p.requires_grad]
        return [
            {"params": rest, "lr": lr, "weight_decay": weight_decay},
            {"params": steps, "lr": lr, "weight_decay": 0.0},
        ]

    def wrapped(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer, which from now on steps the latent weights."""
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        return optimizer

    def harden(self) -> None:
        """In place: leave the weights on their levels, where they are."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the latent weights and the steps."""
        layers = {
            name: {"latent": layer.latent, "step": layer.step.detach()}
            for name, layer in self._layers.items()
        }
        return super().state_dict() | {"layers": layers}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """In place: take the latent weights and the steps of a checkpoint."""
        super().load_state_dict(state)
        for name, layer in self._layers.items():
            layer.latent.copy_(state["layers"][name]["latent"])
            layer.step.copy_(state["layers"][name]["step"])
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        for layer in self._layers.values():
            layer.write_snapped()

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        for layer in self._layers.values():
            layer.before_step()

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for layer in self._layers.values():
            layer.after_step()
