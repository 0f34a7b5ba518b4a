"""PARQ through torchao: a proximal map in the optimizer, annealed to hard quantization.

Jin et al., "PARQ: Piecewise-Affine Regularized Quantization" (2025).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..._plan import Plan
from . import Peer, check_rows, imported, quiet

# Number of values to `quant_bits`, where 0 is the package's word for ternary.
_BITS = {3: 0} | {2**bits: bits for bits in range(1, 9)}

# From the authors' script for CIFAR-10: annealed from the first step on, to step 150 of 200, as
# steeply as this about the middle. (The package's own default, 10, lost 0.75 points to it on
# digits at K = 2; 3 seeds.)
ANNEALED = 0.75
STEEPNESS = 100


def check(plan: Plan) -> None:
    """Refuse a plan that PARQ cannot carry out, or a machine without it.

    Raises:
        PlanError: for other numbers of values, or several codebooks a weight.
        FewbitsError: if torchao is not installed.
    """
    check_rows("parq", plan, sorted(_BITS))
    imported("torchao.prototype.parq")


class Parq(Peer):
    """In place: train with PARQ's optimizer, values by least-squares binary quantization.

    One set of values a weight, found anew every 10 steps, as in the authors' CIFAR-10 script.

    Args:
        model: its weights are the latent ones' images under the proximal map between two steps.
        plan: which weights, how many values.
        steps: of the whole training.
    """

    def __init__(self, model: nn.Module, plan: Plan, steps: int):
        """Keep what `wrapped` makes the optimizer of."""
        super().__init__(model, plan)
        with quiet():
            self._parq = imported("torchao.prototype.parq")
        self._annealed = max(1, int(ANNEALED * steps))
        self._optimizer: torch.optim.Optimizer | None = None

    def param_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return a group for each number of values, and one for the rest."""
        weights = self.weights()
        settings = {"lr": lr, "weight_decay": weight_decay}
        groups: dict[int, list[nn.Parameter]] = {}
        for row in self.plan.selected:
            groups.setdefault(_BITS[row.k], []).append(weights[row.name])
        quantized = [settings | {"params": p, "quant_bits": bits} for bits, p in groups.items()]
        return [*quantized, settings | {"params": self.rest()}]

    def wrapped(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return PARQ's optimizer around that of the training."""
        prox = self._parq.ProxPARQ(anneal_start=0, anneal_end=self._annealed, steepness=STEEPNESS)
        optimizer = self._parq.QuantOptimizer(optimizer, self._parq.LSBQuantizer(), prox)
        self._optimizer = optimizer
        return optimizer

    @contextmanager
    def snapped(self) -> Iterator[None]:
        """Compute with hard quantized weights inside the `with`."""
        before = {name: weight.detach().clone() for name, weight in self.weights().items()}
        self._quantize()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self.weights().items():
                    weight.copy_(before[name])

    def harden(self) -> None:
        """In place: set the weights to their nearest values, where they are after the annealing."""
        self._quantize()

    @torch.no_grad()
    def _quantize(self) -> None:
        # Between two updates of the values the weights are on them exactly, after one up to the
        # rounding of a subtraction: hence always once more.
        hard, weights = self._parq.ProxHardQuant(), self.weights()
        for row in self.plan.selected:
            weight = weights[row.name]
            hard.apply_(weight, None, self._values(weight, row.k), 0)

    def _values(self, weight: nn.Parameter, k: int) -> Tensor:
        """Return the values in use; those to start from before the first step."""
        state = self._optimizer.state.get(weight, {}) if self._optimizer else {}
        if "quants" in state:
            return state["quants"]
        return self._parq.LSBQuantizer().quantize(weight.detach(), _BITS[k])[1]
