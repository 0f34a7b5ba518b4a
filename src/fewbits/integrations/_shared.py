"""What every training loop needs that is not written around `Clustering`."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .. import _processes
from .._clustering import HIGHEST_CODEBOOK_LR, Clustering
from .._errors import PlanError
from .._plan import unwrapped


def attach(model: nn.Module, arguments: dict[str, Any]) -> Clustering:
    """Return a clustering of a model, planned alike in every process of the training.

    Args:
        model: perhaps compiled.
        arguments: of `Clustering`, but for the model.

    Raises:
        PlanError: if the model cannot be clustered so, is clustered already, or is planned
            otherwise in another process.
    """
    clustering = Clustering(unwrapped(model), **arguments)
    _processes.check_same_plan(clustering.plan.fingerprint())
    return clustering


def separate_codebooks(
    optimizers: Iterable[torch.optim.Optimizer],
    clustering: Clustering,
    *,
    codebook_lr: float | None = None,
    schedulers: Iterable[Any] = (),
) -> None:
    """In place: give representatives a parameter group of their own, without weight decay.

    Args:
        optimizers: those of the loop, before they have a state.
        clustering: attached to the model they train.
        codebook_lr: learning rate of the representatives; if not given, as the group they were in,
            but 0.002 at most.
        schedulers: learning-rate schedulers that were made for the optimizers already.

    Raises:
        PlanError: if a codebook is in no optimizer, where it would never move.
    """
    codebooks, schedulers = clustering.codebooks(), list(schedulers)
    ours = {id(p): name for name, p in clustering.model.named_parameters() if p in codebooks}
    for optimizer in optimizers:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside a loop's wrapper
        for number, group in enumerate(list(optimizer.param_groups)):
            moved = [p for p in group["params"] if id(p) in ours]
            if not moved:
                continue
            for parameter in moved:
                ours.pop(id(parameter), None)
            if len(moved) < len(group["params"]):
                group["params"] = [p for p in group["params"] if not any(p is m for m in moved)]
                own = {k: v for k, v in group.items() if k != "params"} | {"params": moved}
                optimizer.add_param_group(own)
                for scheduler in _schedulers_of(optimizer, schedulers):
                    _follow(scheduler, number, len(optimizer.param_groups) - 1)
                group = optimizer.param_groups[-1]
            group["weight_decay"] = 0.0
            rate = group.get("initial_lr", group["lr"])
            rate = min(rate, HIGHEST_CODEBOOK_LR) if codebook_lr is None else codebook_lr
            _set_rate(optimizer, group, rate, schedulers)
    if ours:
        raise PlanError(
            f"{len(ours)} of the codebooks are in no optimizer ({next(iter(ours.values()))} first),"
            " so their representatives would never move. Make the optimizer from all of the model's"
            " parameters after attaching."
        )


def _set_rate(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], lr: float, schedulers: Iterable[Any]
) -> None:
    """In place: give a group a learning rate that its schedulers start from, wherever they are."""
    initial = group.get("initial_lr", group["lr"])
    group["lr"] = lr * group["lr"] / initial if initial else lr
    if "initial_lr" in group:
        group["initial_lr"] = lr
    number = next(i for i, other in enumerate(optimizer.param_groups) if other is group)
    for scheduler in _schedulers_of(optimizer, schedulers):
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs[number] = lr


def _schedulers_of(optimizer: torch.optim.Optimizer, schedulers: Iterable[Any]) -> Iterator[Any]:
    """Yield the schedulers of an optimizer, and those that they hold."""
    for scheduler in schedulers:
        if getattr(scheduler, "optimizer", None) is optimizer:
            yield scheduler
            for value in vars(scheduler).values():
                if _are_schedulers(value):
                    yield from _schedulers_of(optimizer, value)


def _are_schedulers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and hasattr(value[0], "optimizer")


def _follow(scheduler: Any, number: int, before: int) -> None:
    """In place: make a scheduler treat the optimizer's new last group as it does group `number`.

    Schedulers keep one item for each of the `before` groups in lists (base_lrs, lr_lambdas, …).
    """
    for value in vars(scheduler).values():
        if isinstance(value, list) and len(value) == before and not _are_schedulers(value):
            value.append(value[number])


def add_pull(clustering: Clustering) -> float:
    """In place: add the penalty's gradient to what a backward pass has left, and return it.

    To be called once per step of the optimizer, just before it: then neither accumulation over
    batches, nor the scaling of a loss, nor clipping changes how strong the pull is.

    Raises:
        PlanError: at the first step, if no gradient has reached any clustered weight.
    """
    if clustering.steps == 0 and not any(_has_gradient(clustering)):
        raise PlanError(
            "no gradient has reached a clustered weight: the loop trains another copy of the model"
            f" ({type(clustering.model).__name__}) than the one that was clustered. Attach after"
            " the model has been copied or re-created."
        )
    penalty = clustering.loss()
    penalty.backward()
    return float(penalty.detach())


def _has_gradient(clustering: Clustering) -> Iterator[bool]:
    weights = dict(clustering.model.named_parameters(remove_duplicate=False))
    for planned in clustering.plan.selected:
        yield weights[planned.name].grad is not None


def measures(clustering: Clustering) -> dict[str, float]:
    """Return what a tracker wants to see of the codebooks now: plain numbers by name."""
    gap = clustering.gap()
    return {
        "fewbits/moving": gap.moving,
        "fewbits/distortion": gap.distortion,
        "fewbits/dead": float(sum(layer.dead for layer in gap.layers)),
    }
