"""DKM through coremltools: weights clustered by differentiable k-means in every forward pass.

Cho et al., "DKM: Differentiable K-Means Clustering Layer for Neural Network Compression" (ICLR
2022). Time and memory of a step grow with weights times values: it is a table of attention.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..._errors import PlanError
from ..._plan import Plan
from . import Peer, check_rows, imported, quiet

_BITS = {2**bits: bits for bits in (1, 2, 3, 4, 6, 8)}
_TYPES = ("Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear")
_PACKAGE = "coremltools.optimize.torch.palettization"


def check(plan: Plan) -> None:
    """Refuse a plan that the package cannot carry out, or a machine without it.

    Raises:
        PlanError: for other numbers of values, several codebooks a weight, or a layer of a type
            that the package leaves alone.
        FewbitsError: if coremltools is not installed.
    """
    check_rows("dkm", plan, sorted(_BITS))
    for row in plan.selected:
        if row.module_type not in _TYPES or row.aliases:
            what = f"tied to {', '.join(row.aliases)}" if row.aliases else row.module_type
            raise PlanError(
                f"{row.name}: dkm clusters no weight that is {what}."
                " Leave the layer out with --exclude, or the method."
            )
    imported(_PACKAGE)


def temperature(weight: Tensor, k: int) -> float:
    """Return the temperature of a weight's attention: (std / K)^2, about the spacing squared.

    The package's default, 1e-4, is in squared weights, and so another softness in every layer and
    at every K. On layers of a standard deviation of 0.03 to 0.26 it is all but hard at K = 2, where
    it loses 4 points to this rule (digits, 3 seeds), and 1e-2 drives a layer to a single value.

    Args:
        weight: before the training.
        k: number of values.
    """
    variance = float(weight.detach().var(correction=0))
    return max(variance / k**2, 1e-12)  # a layer of equal weights still needs one


class Dkm(Peer):
    """In place: replace the planned layers by the package's, which cluster as they compute.

    The package's defaults: from the first step on, three rounds of k-means a step, a table of plain
    numbers (cluster_dim 1) for each weight; but for `weight_threshold`, so that small layers are
    clustered too, and for the temperature.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        """Let the package prepare the model; k-means itself runs in the first forward pass."""
        super().__init__(model, plan)
        package = imported(_PACKAGE)
        names = {row.name.rpartition(".")[0]: _BITS[row.k] for row in plan.selected}
        self._plain = {name: model.get_submodule(name) for name in names}
        with quiet():
            configs = {
                re.escape(name): package.ModuleDKMPalettizerConfig(
                    n_bits=bits,
                    cluster_dim=1,
                    weight_threshold=0,
                    palett_tau=temperature(self._plain[name].get_parameter("weight"), 2**bits),
                )
                for name, bits in names.items()
            }
            config = package.DKMPalettizerConfig(module_name_configs=configs)
            self._palettizer = package.DKMPalettizer(model, config)
            self._palettizer.prepare(inplace=True)
        for name, layer in self._layers().items():
            if not hasattr(layer, "weight_fake_quant"):
                raise PlanError(f"{name}: coremltools has left it alone. Exclude it.")

    def param_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return one group: tables are no parameters, but follow from the weights."""
        params = [p for p in self.model.parameters() if p.requires_grad]
        return [{"params": params, "lr": lr, "weight_decay": weight_decay}]

    def step(self) -> None:
        """In place: let the package count the step."""
        self._palettizer.step()

    @torch.no_grad()
    def harden(self) -> None:
        """In place: put the model's own layers back, with the weights that `finalize` makes."""
        training = self.model.training
        for layer in self._layers().values():
            if not layer.weight_fake_quant.partitions:  # no step was made, so no table either
                layer.weight_fake_quant.train()(layer.weight)
        with quiet():
            finalized = self._palettizer.finalize(inplace=False)
        for name, plain in self._plain.items():
            plain.get_parameter("weight").copy_(finalized.get_submodule(name).weight)
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, plain)
        for module in self.model.modules():
            vars(module).pop("qconfig", None)
        self.model.train(training)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """In place: make the tables that the model's own state is then loaded into."""
        super().load_state_dict(state)
        for layer in self._layers().values():
            # A state of the package lacks part of what it makes here, so it cannot do without.
            layer.weight_fake_quant.create_partitions(layer.weight.detach())

    def _layers(self) -> dict[str, Any]:
        return {name: self.model.get_submodule(name) for name in self._plain}
