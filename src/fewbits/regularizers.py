"""The regularizers: what pulls a weight towards the representatives.

Everything here is in units of the layer's own standard deviation, so that one strength means the
same in every layer. docs/method.md, section 2, has the formulas.

A regularizer of your own is a subclass with one method:

    class Huber(Regularizer):
        def penalty(self, weight, nearest, layer):
            return torch.nn.functional.huber_loss(weight, nearest, reduction="none")
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._errors import PlanError
from .schedules import Schedule, as_schedule


@dataclass(frozen=True)
class LayerState:
    """What a penalty may look at besides the weights: one piece of one layer.

    Attributes:
        codebook: (g, K) ascending, in units of the layer's standard deviation.
        usage: (g, K) running share of each representative.
        parameters: the regularizer's own learnable tensors, (g, K) each, in codebook order.
        step: steps taken since attaching.
    """

    codebook: Tensor
    usage: Tensor
    parameters: Mapping[str, Tensor]
    step: int


class Regularizer(ABC):
    """What pulls weights together: a penalty per weight, zero on a representative.

    Only `penalty` must be written; gradients follow by autograd, piece by piece, so that no
    tensor of weights x representatives exists. The other methods have defaults.
    """

    #: True where `penalty` compares each weight with all K representatives at once; the pieces
    #: then shrink so that the comparison takes a few megabytes whatever K is.
    compares_all: ClassVar[bool] = False

    #: False where a representative without weights is meant to stay so, or may not be moved.
    revives: ClassVar[bool] = True

    @abstractmethod
    def penalty(self, weight: Tensor, nearest: Tensor, layer: LayerState) -> Tensor:
        """Return the penalty of each weight, differentiable in everything it is given.

        Args:
            weight: (g, n) in units of the layer's standard deviation; float32 or float64.
            nearest: (g, n) the representative each weight is assigned to, same units; its
                gradient flows to the codebook.
            layer: the codebook and the rest.

        Returns:
            (g, n).
        """

    @property
    def power(self) -> int | None:
        """1 or 2 where `penalty` is |weight - nearest| to that power, and `proximal` exact.

        Both are then computed in compiled passes over the weights instead of by autograd.
        """
        return None

    def cost(self, usage: Tensor) -> Tensor | None:
        """Return what assigning to each representative costs besides the squared distance.

        Args:
            usage: (G, K) running share of each representative.

        Returns:
            (G, K) in the mean variance of all clustered weights, each about the mean of its own
            layer; or None to assign to the nearest.
        """
        return None

    def members(self, counts: Tensor) -> Tensor:
        """Return how many weights the gradient of each representative sums over, (G, K).

        Args:
            counts: (G, K) weights assigned to each.
        """
        return counts

    def even_scale(self, codebook: Tensor) -> Tensor | float:
        """Return what `Penalty(even_rate=True)` multiplies the penalty by, a constant.

        Times it, the penalty next to a representative is the squared distance, whose gradient
        suits the learning rate of the weights.

        Args:
            codebook: (G, K) ascending, in units of the layer's standard deviation.

        Returns:
            0-d, or 1.
        """
        return 1.0

    def parameters(self, codebook: Tensor) -> dict[str, Tensor]:
        """Return the regularizer's own learnable tensors, each shaped like `codebook` (G, K)."""
        return {}

    def project(self, codebook: Tensor) -> Tensor:
        """Return the codebook nearest to `codebook` (G, K) that this regularizer allows."""
        return codebook

    def proximal(self, weight: Tensor, nearest: Tensor, amount: float, layer: LayerState) -> Tensor:
        """Return the weights after one decoupled pull, in units of the standard deviation.

        The default is one explicit gradient step of amount / 2 (equal to the proximal step of
        nearest-2 at first order), cut where it would pass the representative.

        Args:
            weight: (g, n).
            nearest: (g, n) the representative of each.
            amount: strength of the pull per step, at least 0.
            layer: the codebook and the rest.

        Returns:
            (g, n).
        """
        with torch.enable_grad():
            free = weight.detach().requires_grad_()
            total = self.penalty(free, nearest, layer).sum()
        (gradient,) = torch.autograd.grad(total, free)
        moved = weight - amount / 2 * gradient
        passed = (weight - nearest) * (moved - nearest) < 0
        return torch.where(passed, nearest, moved)


@dataclass(frozen=True)
class Nearest(Regularizer):
    """The distance to the nearest representative to the power p: docs/method.md, eq. 1.

    Attributes:
        p: 1 or 2. With 2 a representative rests at its cluster's mean, with 1 at its median.
    """

    p: int = 2

    def __post_init__(self) -> None:
        """Refuse other powers."""
        if self.p not in (1, 2):
            raise PlanError(f"Nearest: p is {self.p!r}. Use 1 or 2.")

    @property
    def power(self) -> int | None:
        """The power p; none in a subclass, which may compute something else."""
        return self.p if type(self) is Nearest else None

    def penalty(self, weight: Tensor, nearest: Tensor, layer: LayerState) -> Tensor:
        """Return |w - c|^p for each weight, (g, n)."""
        distance = weight - nearest
        return distance.square() if self.p == 2 else distance.abs()

    def proximal(self, weight: Tensor, nearest: Tensor, amount: float, layer: LayerState) -> Tensor:
        """Return the exact proximal step, eqs. 9 and 10; for p = 1 weights arrive exactly."""
        if self.p == 2:
            return torch.lerp(weight, nearest, amount / (1 + amount))
        return nearest + torch.nn.functional.softshrink(weight - nearest, amount)


@dataclass(frozen=True)
class SoftMin(Regularizer):
    """A soft minimum over all representatives with mixing weights: docs/method.md, eq. 2.

    As the temperature goes to 0 it becomes nearest-2. This is soft weight sharing (Nowlan &
    Hinton 1992; Ullrich, Meeds & Welling 2017) read as a regularizer.

    Attributes:
        temperature: in squared standard deviations, above 0; a number or a schedule.
    """

    temperature: float | Schedule = 0.05
    compares_all: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse temperatures that reach 0."""
        schedule = as_schedule(self.temperature)
        if min(schedule.begin, schedule.end) <= 0:
            raise PlanError(f"SoftMin: temperature is {self.temperature!r}. Keep it above 0.")

    def parameters(self, codebook: Tensor) -> dict[str, Tensor]:
        """Return the mixing logits, equal at first."""
        return {"mixing": torch.zeros_like(codebook)}

    def penalty(self, weight: Tensor, nearest: Tensor, layer: LayerState) -> Tensor:
        """Return -temperature x log sum_j mixing_j exp(-(w - c_j)^2 / temperature), (g, n)."""
        temperature = as_schedule(self.temperature)(layer.step)
        mixing = layer.parameters["mixing"].log_softmax(dim=1)
        squares = (weight[:, :, None] - layer.codebook[:, None, :]).square()
        return -temperature * (mixing[:, None, :] - squares / temperature).logsumexp(dim=2)


@dataclass(frozen=True)
class Periodic(Regularizer):
    """A sine that is zero on an even grid, for targets with affine integers only: eq. 3.

    Step and offset are learned: they are the codebook's range and first value, and after every
    step the codebook is the even grid nearest to what the optimizer made of it. Beyond the ends
    of the grid the penalty goes on as the parabola that the sine begins with, so that no weight
    settles on a value the codebook lacks.
    """

    revives: ClassVar[bool] = False

    def penalty(self, weight: Tensor, nearest: Tensor, layer: LayerState) -> Tensor:
        """Return sin^2(pi (w - b) / step) for each weight, (g, n)."""
        first, last = layer.codebook[:, :1], layer.codebook[:, -1:]
        k = layer.codebook.shape[1]
        if k == 1:
            return (weight - first).square()
        step = ((last - first) / (k - 1)).clamp(min=torch.finfo(weight.dtype).tiny)
        inside = torch.sin(torch.pi * (weight - first) / step).square()
        below = (torch.pi * (weight - first) / step).square()
        above = (torch.pi * (weight - last) / step).square()
        return torch.where(weight < first, below, torch.where(weight > last, above, inside))

    def even_scale(self, codebook: Tensor) -> Tensor | float:
        """Return (step / pi)^2 of the finest grid: the sine is steep where steps are short."""
        k = codebook.shape[1]
        if k == 1:
            return 1.0
        step = (codebook[:, -1] - codebook[:, 0]).min() / (k - 1)
        return (step / torch.pi).square()

    def members(self, counts: Tensor) -> Tensor:
        """Return all weights of the group: each of them pulls at both ends of the grid."""
        return counts.sum(1, keepdim=True).expand_as(counts)

    def project(self, codebook: Tensor) -> Tensor:
        """Return the even grid of least squares for each row of (G, K)."""
        k = codebook.shape[1]
        if k == 1:
            return codebook
        position = torch.arange(k, device=codebook.device, dtype=codebook.dtype) - (k - 1) / 2
        mean = codebook.mean(1, keepdim=True)
        step = (codebook * position).sum(1, keepdim=True) / position.square().sum()
        return mean + step * position


# No layer may end on one value, which would cut the network. So a share counts as 1/(4K) at least,
# and the price fades where less than a hundredth of the weights is away from the most used value.
_RAREST, _EMPTYING = 0.25, 0.01


@dataclass(frozen=True)
class RateAware(Regularizer):
    """Nearest-2 with assignment that also counts the bits of the entropy-coded index: eq. 6.

    Attributes:
        rate: bits against squared error, beta >= 0: a bit saved is worth a squared distance of
            `rate` times the mean variance of all clustered weights. One price for the whole
            network: a layer of small weights gets few bits. 0 is nearest-2.
        pin_zero: hold the representative nearest to zero at exactly zero, so that weights
            become sparse.
    """

    rate: float = 0.02
    pin_zero: bool = False
    revives: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a negative or infinite rate."""
        if not (math.isfinite(self.rate) and self.rate >= 0):
            raise PlanError(f"RateAware: rate is {self.rate!r}. Give a finite number, 0 or more.")

    @property
    def power(self) -> int | None:
        """2; none in a subclass, which may compute something else."""
        return 2 if type(self) is RateAware else None

    def penalty(self, weight: Tensor, nearest: Tensor, layer: LayerState) -> Tensor:
        """Return the squared distance to the assigned representative, (g, n)."""
        return (weight - nearest).square()

    def cost(self, usage: Tensor) -> Tensor | None:
        """Return rate x bits of each representative's index, bits = -log2(usage).

        Nothing costs more than log2 K + 2 bits, and where nearly all weights of a codebook share
        one representative the price falls to 0: docs/method.md, eq. 6.
        """
        if not self.rate:
            return None
        bits = -usage.clamp(min=_RAREST / usage.shape[1]).log2()
        away = 1 - usage.amax(1, keepdim=True)
        return self.rate * bits * (away / _EMPTYING).clamp(max=1)

    def proximal(self, weight: Tensor, nearest: Tensor, amount: float, layer: LayerState) -> Tensor:
        """Return the exact proximal step towards the assigned representative."""
        return torch.lerp(weight, nearest, amount / (1 + amount))

    def project(self, codebook: Tensor) -> Tensor:
        """Return (G, K) with the value nearest to zero set to zero, where asked."""
        if not self.pin_zero:
            return codebook
        nearest = codebook.abs().argmin(1, keepdim=True)
        return codebook.scatter(1, nearest, 0.0)
