"""The methods that a run compares, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from .. import schedules
from .._clustering import Clustering
from .._pull import Penalty, Proximal
from .._quantize import Method as PostTraining

Attach = Callable[[nn.Module, int, int, float], Clustering]


@dataclass(frozen=True)
class Method:
    """One way to get to few values.

    Attributes:
        about: one line for people.
        post_training: the method of `fewbits.quantize`, for those that do not train weights.
        finetune: whether the quantized network's codebooks are then fine-tuned.
        attach: (model, k, steps, strength multiplier) -> Clustering, for those that train.
        codebook_lr: learning rate of the representatives over that of the weights.
        scratch: whether training starts from random weights and takes all epochs.
    """

    about: str
    post_training: PostTraining | None = None
    finetune: bool = False
    attach: Attach | None = None
    codebook_lr: float = 1.0
    scratch: bool = False

    @property
    def start(self) -> Literal["scratch", "float", "continued"]:
        """What it starts from, so that every row has had the same number of epochs."""
        if self.scratch:
            return "scratch"
        return "continued" if self.post_training and not self.finetune else "float"


def _penalty(model: nn.Module, k: int, steps: int, strength: float) -> Clustering:
    ramp = schedules.cubic(0.0, 20.0 * strength, steps=int(0.9 * steps))
    return Clustering(model, k=k, pull=Penalty(ramp), snapped_forward=False)


def _penalty_scratch(model: nn.Module, k: int, steps: int, strength: float) -> Clustering:
    start = int(0.3 * steps)
    ramp = schedules.cubic(0.0, 20.0 * strength, start=start, steps=int(0.6 * steps))
    return Clustering(model, k=k, pull=Penalty(ramp), snapped_forward=False)


def _penalty_snapped(model: nn.Module, k: int, steps: int, strength: float) -> Clustering:
    return Clustering(model, k=k, pull=Penalty(0.1 * strength))


def _proximal(model: nn.Module, k: int, steps: int, strength: float) -> Clustering:
    ramp = schedules.cubic(0.0, 0.5 * strength, steps=int(0.9 * steps))
    return Clustering(model, k=k, pull=Proximal(ramp), snapped_forward=False)


def _proximal_snapped(model: nn.Module, k: int, steps: int, strength: float) -> Clustering:
    ramp = schedules.cubic(0.0, 0.01 * strength, steps=steps)
    return Clustering(model, k=k, pull=Proximal(ramp))


METHODS: dict[str, Method] = {
    "uniform": Method("post-training, even grid", post_training="uniform"),
    "kmeans": Method("post-training, k-means weight sharing", post_training="kmeans"),
    "entropy": Method("post-training, entropy-constrained", post_training="entropy"),
    "kmeans-finetuned": Method(
        "post-training k-means, then the codebooks are trained (Deep Compression)",
        post_training="kmeans",
        finetune=True,
    ),
    "penalty-scratch": Method(
        "penalty, from random weights", attach=_penalty_scratch, scratch=True
    ),
    "penalty": Method("penalty, from the float network", attach=_penalty),
    "penalty-snapped": Method("penalty with snapped forward", attach=_penalty_snapped),
    "proximal": Method("proximal, from the float network", attach=_proximal),
    "proximal-snapped": Method("proximal with snapped forward", attach=_proximal_snapped),
}
