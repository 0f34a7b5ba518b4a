"""Methods of others to compare with, each trained through its own package: one file a peer.

A peer stands where a `Clustering` stands in a training: it gives the optimizer its parameters, may
wrap the optimizer, and leaves a plain model whose weights hold few values. Start, data, epochs,
learning rate and weight decay are the training's, the same for every method.
"""

import importlib
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..._errors import FewbitsError, PlanError
from ..._plan import Plan
from ..._resolve import difference


class Peer(ABC):
    """What a training asks of somebody else's method.

    The weights that the model computes with in evaluation mode are already the snapped ones,
    unless `snapped` says otherwise.

    Args:
        model: changed in place.
        plan: which weights, how many values.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        """Keep both; a child attaches itself."""
        self.model: nn.Module = model
        self.plan: Plan = plan

    @abstractmethod
    def param_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return the parameter groups for the optimizer, the peer's own parameters among them."""

    def wrapped(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer to step with, made from that of the training."""
        return optimizer

    def loss(self) -> Tensor:
        """Return what the peer adds to the task's loss."""
        return torch.zeros(())

    def step(self) -> None:
        """In place: finish a training step; called after the optimizer's."""
        return

    @contextmanager
    def snapped(self) -> Iterator[None]:
        """Compute with snapped weights inside the `with`; nothing is changed."""
        yield

    @abstractmethod
    def harden(self) -> None:
        """In place: make the model plain again, its weights on at most K values per codebook."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs besides the states of model and optimizer."""
        return {"plan": self.plan.fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """In place: continue from a checkpoint; the model's own state is loaded afterwards.

        Raises:
            PlanError: if the checkpoint is from another plan.
        """
        ours, theirs = self.plan.fingerprint(), [list(row) for row in state["plan"]]
        if ours != theirs:
            raise PlanError("the checkpoint is from another plan: " + difference(theirs, ours))

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the plan selects, by name."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return {row.name: parameters[row.name] for row in self.plan.selected}

    def rest(self) -> list[nn.Parameter]:
        """Return the trainable parameters that the plan leaves alone."""
        selected = {id(weight) for weight in self.weights().values()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in selected]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and log lines of other packages from the user inside the `with`."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def imported(module: str) -> Any:
    """Return a module of an optional package.

    Raises:
        FewbitsError: if it is not installed.
    """
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise FewbitsError(
            f"{package} is not here ({error}): pip install 'fewbits[peers]'"
        ) from error


def check_rows(method: str, plan: Plan, ks: Collection[int]) -> None:
    """Refuse a plan that asks for other numbers of values, or for several codebooks a weight.

    Args:
        method: its name, for the message.
        plan: the plan.
        ks: the numbers of values that the method has.

    Raises:
        PlanError: with the weight's name.
    """
    for row in plan.selected:
        if row.k not in ks:
            raise PlanError(
                f"{row.name}: {method} with k = {row.k}. It has k = {', '.join(map(str, ks))};"
                " leave the layer out with --exclude, or the method."
            )
        if row.groups > 1:
            raise PlanError(
                f"{row.name}: {method} with {row.groups} codebooks. It has one a weight here:"
                " use granularity layer."
            )
