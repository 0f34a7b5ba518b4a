"""One weight with its codebook registered on the layers that own it."""

import torch
from torch import Tensor, nn

from ._codebook import boundaries_of, grouped, grouped_like, shares_memory, ungrouped
from ._errors import CodebookError, PlanError
from ._kernels import compute_dtype, snap
from ._plan import CODEBOOK_SUFFIX, PlannedWeight
from ._pull import Pieces
from ._snapped import Switch, install, uninstall
from .regularizers import Regularizer
from .schedules import Schedule


class Attached:
    """A weight of the model, its codebook and what has been noticed about it.

    Attributes:
        planned: the plan's row.
        owners: the (module, attribute) pairs that hold the weight; more than one where it is tied.
        strength: the schedule of its pull.
        usage: (G, K) running share of each representative, by rising value.
        unmoved: whether the codebook was the same at the last two looks.
        switch: the snapped forward's switch.
    """

    def __init__(
        self,
        model: nn.Module,
        planned: PlannedWeight,
        codebook: Tensor,
        regularizer: Regularizer,
        strength: Schedule,
        switch: Switch,
    ):
        self.planned, self.strength, self.switch = planned, strength, switch
        self.owners: list[tuple[nn.Module, str]] = []
        for name in (planned.name, *planned.aliases):
            prefix, _, attribute = name.rpartition(".")
            owner = (model.get_submodule(prefix), attribute)
            if owner not in self.owners:
                self.owners.append(owner)
        self._expected = self.weight
        own = {CODEBOOK_SUFFIX: codebook}
        own |= {"_" + name: value for name, value in regularizer.parameters(codebook).items()}
        flat = planned.granularity == "layer"  # (K,) instead of (1, K)
        self.parameters = {
            suffix: nn.Parameter((value[0] if flat else value).clone())
            for suffix, value in own.items()
        }
        for module, attribute in self.owners:
            for suffix, parameter in self.parameters.items():
                module.register_parameter(attribute + suffix, parameter)
            install(module, attribute, switch)
        self.unmoved = False
        self._last_codebook = self.codebook.detach().clone()
        self.reset_usage()

    @property
    def name(self) -> str:
        """The weight's name in the model."""
        return self.planned.name

    @property
    def weight(self) -> nn.Parameter:
        """The weight itself, never a snapped read of it."""
        module, attribute = self.owners[0]
        weight = module._parameters.get(attribute)
        if weight is None or (self.__dict__.get("_expected", weight) is not weight):
            raise PlanError(
                f"{self.planned.name} was replaced after attaching, so nothing would pull it."
                " Attach Clustering after the model has its final parameters."
            )
        return weight

    @property
    def codebook(self) -> nn.Parameter:
        """The codebook parameter, (K,) or (G, K), in any order."""
        module, attribute = self.owners[0]
        parameter = module._parameters[attribute + CODEBOOK_SUFFIX]
        assert parameter is not None  # ours: registered by __init__
        return parameter

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the parameters we registered: the codebook first."""
        module, attribute = self.owners[0]
        found = [module._parameters[attribute + suffix] for suffix in self.parameters]
        return [parameter for parameter in found if parameter is not None]

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the codebook as (G, K) ascending, detached, and the order that sorts it."""
        codebook = self.codebook.detach()
        return (codebook if codebook.dim() == 2 else codebook[None]).sort(dim=1)

    def write_codebook(self, ordered: Tensor, order: Tensor) -> None:
        """In place: write an ascending (G, K) codebook back into the parameter's own order."""
        unordered = torch.empty_like(ordered).scatter_(1, order, ordered)
        with torch.no_grad():
            self.codebook.copy_(unordered.view_as(self.codebook))

    def view(self, weight: Tensor | None = None) -> Tensor:
        """Return the weight, or what is shaped like it, as (G, n); a view where strides allow."""
        own = self.weight.detach()
        if weight is None:
            return grouped(own, self.planned.groups, self.planned.axis)
        return grouped_like(weight, own, self.planned.groups, self.planned.axis)

    def write_view(self, target: Tensor, values: Tensor) -> None:
        """In place: where `values` is a copy and not a view of `target`, copy it back."""
        if not shares_memory(target, values):
            own = self.weight.detach()
            target.copy_(ungrouped(values, own, self.planned.groups, self.planned.axis))

    def pieces(self, step: int) -> Pieces:
        """Return the layer as the regularizer's loop takes it."""
        codebook, order = self.rows()
        weight = self.view()
        extra = self.own_parameters()[1:]
        names = [suffix.removeprefix("_") for suffix in list(self.parameters)[1:]]
        own = {
            n: p.detach().view_as(order).gather(1, order) for n, p in zip(names, extra, strict=True)
        }
        return Pieces(weight, codebook, self.std(), self.usage, own, step)

    def std(self) -> Tensor:
        """Return the standard deviation of the weights, 0-d; 1 where all are equal."""
        weight = self.weight.detach()
        std = weight.to(compute_dtype(weight)).std(correction=0) if weight.numel() > 1 else None
        one = torch.ones((), dtype=compute_dtype(weight), device=weight.device)
        return one if std is None else torch.where(std > 0, std, one)

    def boundaries(self) -> Tensor:
        """Return where assignment changes, (G, K - 1) ascending."""
        return boundaries_of(self.rows()[0], self.switch.cost)

    def snap(self) -> Tensor:
        """Return the snapped weights, shaped like the weight."""
        weight = self.weight.detach()
        values = snap(self.view(), self.rows()[0], self.boundaries())
        return ungrouped(values, weight, self.planned.groups, self.planned.axis)

    def reset_usage(self) -> None:
        """In place: forget the usage: every representative counts as equally and just used."""
        codebook, _ = self.rows()
        self.usage = torch.full_like(codebook, 1 / codebook.shape[1])

    def note_usage(self, counts: Tensor, momentum: float) -> None:
        """In place: take this step's members of each representative into the running usage."""
        share = (counts / counts.sum(1, keepdim=True).clamp(min=1)).to(self.usage)
        self.usage = self.usage.to(share.device).lerp(share, 1 - momentum)

    def note_movement(self) -> None:
        """In place: note whether the codebook changed since the last call."""
        now = self.codebook.detach().clone()
        self.unmoved = torch.equal(now, self._last_codebook.to(now.device))
        self._last_codebook = now

    def detach(self) -> None:
        """In place: remove everything we registered on the owners."""
        for module, attribute in self.owners:
            uninstall(module)
            for suffix in self.parameters:
                module._parameters.pop(attribute + suffix, None)


def check_finite(name: str, weight: Tensor) -> None:
    """Raise a `CodebookError` if a weight holds NaN or infinity."""
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise CodebookError(
            f"{name}: {bad:,} of {weight.numel():,} weights are NaN or infinite."
            " Load a good checkpoint, or lower the learning rate that led here."
        )
