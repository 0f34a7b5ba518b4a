"""The methods that a run compares, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from .. import regularizers, schedules
from .._clustering import Clustering
from .._plan import Plan
from .._pull import Penalty, Proximal
from .._quantize import Method as PostTraining
from .peers import Peer, dkm, lsq, parq

# By name, given how much a bit is worth, which only the rate-aware ones use.
REGULARIZERS: dict[str, Callable[[float], regularizers.Regularizer]] = {
    "nearest-2": lambda rate: regularizers.Nearest(p=2),
    "nearest-1": lambda rate: regularizers.Nearest(p=1),
    "soft-min": lambda rate: regularizers.SoftMin(),
    "periodic": lambda rate: regularizers.Periodic(),
    "rate-aware": lambda rate: regularizers.RateAware(rate),
    "rate-aware-sparse": lambda rate: regularizers.RateAware(rate, pin_zero=True),
}


@dataclass(frozen=True)
class Recipe:
    """What a method that trains is applied to.

    Attributes:
        plan: which weights, how many values.
        steps: optimizer steps in the whole training.
        regularizer: a name in `REGULARIZERS`.
        strength: multiplies the method's own strength.
        rate: what a bit is worth to a rate-aware regularizer.
    """

    plan: Plan
    steps: int
    regularizer: str = "nearest-2"
    strength: float = 1.0
    rate: float = 0.02


@dataclass(frozen=True)
class Method:
    """One way to get to few values.

    Attributes:
        about: one line for people.
        post_training: the method of `fewbits.quantize`, for those that do not train weights.
        finetune: whether the quantized network's codebooks are then fine-tuned.
        attach: (model, recipe) -> Clustering or Peer, for those that train.
        scratch: whether training starts from random weights and takes all epochs.
        peer: whether it is somebody else's: `attach` returns a Peer.
        check: raises a `FewbitsError` for a plan that the method cannot carry out here.
    """

    about: str
    post_training: PostTraining | None = None
    finetune: bool = False
    attach: Callable[[nn.Module, Recipe], Clustering | Peer] | None = None
    scratch: bool = False
    peer: bool = False
    check: Callable[[Plan], None] = lambda plan: None

    @property
    def start(self) -> Literal["scratch", "float", "continued"]:
        """What it starts from, so that every row has had the same number of epochs."""
        if self.scratch:
            return "scratch"
        return "continued" if self.post_training and not self.finetune else "float"


def _attach(
    model: nn.Module, recipe: Recipe, pull: Penalty | Proximal | None, *, snapped_forward: bool
) -> Clustering:
    return Clustering(
        model,
        plan=recipe.plan,
        regularizer=REGULARIZERS[recipe.regularizer](recipe.rate),
        pull=pull,
        snapped_forward=snapped_forward,
    )


def _penalty(model: nn.Module, recipe: Recipe) -> Clustering:
    ramp = schedules.cubic(0.0, 30.0 * recipe.strength, steps=int(0.8 * recipe.steps))
    return _attach(model, recipe, Penalty(ramp), snapped_forward=False)


def _penalty_scratch(model: nn.Module, recipe: Recipe) -> Clustering:
    start = int(0.3 * recipe.steps)
    ramp = schedules.cubic(0.0, 30.0 * recipe.strength, start=start, steps=recipe.steps // 2)
    return _attach(model, recipe, Penalty(ramp), snapped_forward=False)


def _penalty_snapped(model: nn.Module, recipe: Recipe) -> Clustering:
    ramp = schedules.cubic(0.0, 0.05 * recipe.strength, steps=recipe.steps)
    return _attach(model, recipe, Penalty(ramp), snapped_forward=True)


def _penalty_late(model: nn.Module, recipe: Recipe) -> Clustering:
    start = recipe.steps // 2
    ramp = schedules.cubic(0.0, 0.05 * recipe.strength, start=start, steps=recipe.steps - start)
    return _attach(model, recipe, Penalty(ramp), snapped_forward=True)


def _proximal(model: nn.Module, recipe: Recipe) -> Clustering:
    ramp = schedules.cubic(0.0, 0.1 * recipe.strength, steps=int(0.9 * recipe.steps))
    return _attach(model, recipe, Proximal(ramp), snapped_forward=False)


def _proximal_snapped(model: nn.Module, recipe: Recipe) -> Clustering:
    ramp = schedules.cubic(0.0, 0.03 * recipe.strength, steps=recipe.steps)
    return _attach(model, recipe, Proximal(ramp), snapped_forward=True)


_POST_TRAINING: dict[PostTraining, str] = {
    "uniform": "even grid",
    "kmeans": "k-means weight sharing",
    "entropy": "entropy-constrained",
}
assert set(_POST_TRAINING) == set(get_args(PostTraining))

METHODS: dict[str, Method] = {
    **{name: Method(f"post-training: {what}", name) for name, what in _POST_TRAINING.items()},
    **{
        f"{name}-finetuned": Method(f"{name}, then its codebooks are trained", name, finetune=True)
        for name in _POST_TRAINING
    },
    "penalty": Method("penalty, from the float network", attach=_penalty),
    "penalty-scratch": Method(
        "penalty, from random weights", attach=_penalty_scratch, scratch=True
    ),
    "penalty-snapped": Method("penalty and snapped forward", attach=_penalty_snapped),
    "penalty-late": Method("penalty and snapped forward from half-way on", attach=_penalty_late),
    "proximal": Method("proximal, from the float network", attach=_proximal),
    "proximal-snapped": Method("proximal and snapped forward", attach=_proximal_snapped),
    "lsq": Method(
        "LSQ: straight-through with a learned step",
        attach=lambda model, recipe: lsq.Lsq(model, recipe.plan),
        peer=True,
        check=lsq.check,
    ),
    "dkm": Method(
        "DKM: differentiable k-means, by coremltools",
        attach=lambda model, recipe: dkm.Dkm(model, recipe.plan),
        peer=True,
        check=dkm.check,
    ),
    "parq": Method(
        "PARQ: piecewise-affine regularized quantization, by torchao",
        attach=lambda model, recipe: parq.Parq(model, recipe.plan, recipe.steps),
        peer=True,
        check=parq.check,
    ),
}
