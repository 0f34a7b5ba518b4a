"""One weight with its codebook registered on the layers that own it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._codebook import (
    boundaries_of,
    grouped,
    grouped_like,
    refuse_bad,
    shares_memory,
    std_of,
    ungrouped,
)
from ._errors import PlanError
from ._kernels import assign, cluster_sums, compute_dtype, count, snap
from ._plan import CODEBOOK_SUFFIX, PlannedWeight
from ._pull import Pieces, proximal_step
from ._sharded import Sharding, add_up, check_sharding, is_sharded, parts, process_group
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
        collapse_reported: whether its collapse was warned of.
        switch: the snapped forward's switch, with the cost of assigning to each representative.
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
        self.unmoved = self.collapse_reported = False
        self._std: tuple[tuple[int, int], Tensor] | None = None
        self._sorted: tuple[Tensor, Tensor, Tensor] | None = None
        self.look()
        ordered, _ = self.rows()
        self.usage = torch.full_like(ordered, 1 / ordered.shape[1])

    @property
    def name(self) -> str:
        """The weight's name in the model."""
        return self.planned.name

    @property
    def weight(self) -> nn.Parameter:
        """The weight itself, never a snapped read of it."""
        module, attribute = self.owners[0]
        weight, known = module._parameters.get(attribute), self.__dict__.get("_expected")
        if weight is known and weight is not None:
            return weight
        if known is not None and is_sharded(known):
            return known  # FSDP2 shows the whole weight while it computes
        if weight is None or (known is not None and not self._became_sharded(weight)):
            raise PlanError(
                f"{self.planned.name} was replaced after attaching, so nothing would pull it."
                " Attach Clustering after the model has its final parameters."
            )
        return weight

    def _became_sharded(self, weight: nn.Parameter) -> bool:
        """Take a weight that FSDP2 has sharded for the one that was attached."""
        if not is_sharded(weight) or weight.shape != self._expected.shape:
            return False
        check_sharding(self.name, weight, self.planned.groups, self.planned.axis)
        if is_sharded(self.codebook):
            raise PlanError(
                f"{self.name}: its codebook was sharded too. Keep codebooks whole:"
                " fully_shard(…, ignored_params=clustering.codebooks())."
            )
        self._expected = weight
        return True

    @property
    def codebook(self) -> nn.Parameter:
        """The codebook parameter, (K,) or (G, K), in any order."""
        module, attribute = self.owners[0]
        parameter = module._parameters[attribute + CODEBOOK_SUFFIX]
        assert parameter is not None  # ours: registered by __init__
        return parameter

    @property
    def start(self) -> int:
        """The first step at which the pull is on: 0 where its schedule begins above zero."""
        return 0 if self.strength.begin > 0 else self.strength.start

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the parameters we registered: the codebook first."""
        module, attribute = self.owners[0]
        found = [module._parameters[attribute + suffix] for suffix in self.parameters]
        return [parameter for parameter in found if parameter is not None]

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the codebook as (G, K) ascending, detached, and the order that sorts it.

        At least float32, though `model.half()` makes the parameter itself narrower.
        """
        now = self.codebook.detach()
        if self._sorted is None or not _same(self._sorted[0], now):
            wide = now.to(compute_dtype(now))
            ordered = (wide if wide.dim() == 2 else wide[None]).sort(dim=1)
            # Kept with what it was sorted from: a codebook may be written to through `.data`.
            self._sorted = (now.clone(), ordered.values, ordered.indices)
        return self._sorted[1], self._sorted[2]

    def write_codebook(self, ordered: Tensor, order: Tensor) -> None:
        """In place: write an ascending (G, K) codebook back into the parameter's own order."""
        unordered = torch.empty_like(ordered).scatter_(1, order, ordered)
        with torch.no_grad():
            self.codebook.copy_(unordered.view_as(self.codebook))

    def hidden(self) -> bool:
        """Whether the module holds something else than the weight that is known, not a shard."""
        module, attribute = self.owners[0]
        weight = module._parameters.get(attribute)
        if weight is None or weight is self._expected or is_sharded(self._expected):
            return False
        return not is_sharded(weight)

    def whole(self) -> Tensor:
        """Return the whole weight as (G, n), gathered from all processes where it is sharded."""
        weight: Any = self.weight
        whole = weight.detach().full_tensor() if is_sharded(weight) else weight.detach()
        return grouped(whole, self.planned.groups, self.planned.axis)

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
        usage, cost = self.usage.to(codebook.device), self.switch.cost
        return Pieces(weight, codebook, self.std(), usage, own, step, cost)

    def _version(self) -> tuple[int, int]:
        weight = self.weight
        return weight._version, 0 if is_sharded(weight) else weight.data_ptr()

    def std(self) -> Tensor:
        """Return the standard deviation of the weights, 0-d; 1 where all are equal.

        NaN or infinite where a weight is. Kept until the weight is written to.
        """
        spread = self.spread()
        return torch.where(spread == 0, torch.ones_like(spread), spread)

    def spread(self) -> Tensor:
        """Return the standard deviation as it is: 0 where all weights are equal."""
        key = self._version()
        if is_sharded(self.weight):
            found = Sharding([self.weight], [self.planned.groups]).measure(self.rows()[0], 2)
            return (found[1][0] / self.weight.numel()).sqrt().to(compute_dtype(self.weight))
        if self._std is None or self._std[0] != key:
            self._std = (key, std_of(self.weight.detach()))
        return self._std[1]

    def forget(self) -> None:
        """In place: measure anew, for weights that were written through `.data`."""
        self._std = None

    def update_cost(self, cost: Tensor) -> None:
        """In place: assign at a price from now on: (G, K), in squared units of the weights."""
        self.switch.cost = cost.to(compute_dtype(self.weight))

    def boundaries(self) -> Tensor:
        """Return where assignment changes, (G, K - 1) ascending."""
        return boundaries_of(self.rows()[0], self.switch.cost)

    def snap(self) -> Tensor:
        """Return the snapped weights, shaped like the weight."""
        weight = self.weight.detach()
        values = snap(self.view(), self.rows()[0], self.boundaries())
        return ungrouped(values, weight, self.planned.groups, self.planned.axis)

    def move(
        self, regularizer: Regularizer, step: int, strength: float, share: float
    ) -> Tensor | None:
        """In place: give the weight one proximal step.

        Args:
            regularizer: the formula.
            step: for the regularizer's own schedules.
            strength: see `Proximal`; none where it is 0.
            share: of the way that representatives then move to their clusters' means.

        Returns:
            (G, K) members of each representative; None where there is no pull.
        """
        if strength <= 0 or not self.weight.requires_grad:
            return None
        pieces = self.pieces(step)
        proximal_step(regularizer, pieces, strength)
        self.write_view(self.weight.detach(), pieces.weight)
        codebook, order = self.rows()
        counts, sums = cluster_sums(self.view(), self.view(), self.boundaries())
        if share:
            means = torch.where(counts > 0, sums / counts.clamp(min=1), codebook.double())
            self.write_codebook(codebook.double().lerp(means, share).to(codebook.dtype), order)
        return counts

    def parts(self) -> list[tuple[Tensor, slice]]:
        """Return what this process holds, (g, n) each, with the groups that it belongs to."""
        groups = self.planned.groups
        weight = self.weight
        return parts(weight, groups) if is_sharded(weight) else [(self.view(), slice(0, groups))]

    def add_up(self, values: Tensor) -> Tensor:
        """Return what all processes that hold a part of the weight have, added up."""
        weight = self.weight
        return add_up([values], process_group(weight))[0] if is_sharded(weight) else values

    def largest(self, values: Tensor) -> Tensor:
        """Return the largest of what those processes have."""
        weight = self.weight
        group = process_group(weight) if is_sharded(weight) else None
        return add_up([values], group, "max")[0]

    def counts(self) -> Tensor:
        """Return the members of each representative, (G, K) float64."""
        codebook, boundaries = self.rows()[0], self.boundaries()
        counts = torch.zeros_like(codebook, dtype=torch.float64)
        for view, rows in self.parts():
            counts[rows] += count(assign(view, boundaries[rows]), codebook.shape[1])
        return self.add_up(counts)

    def check_finite(self, when: str = "") -> None:
        """Raise a `CodebookError` if a weight or a representative is NaN or infinite."""
        bad = sum(int((~view.isfinite()).sum()) for view, _ in self.parts())
        bad = int(self.add_up(torch.tensor(float(bad), device=self.weight.device)))
        refuse_bad(self.name, bad, self.weight.numel(), when)
        own = self.codebook.detach()
        refuse_bad(self.name + " codebook", int((~own.isfinite()).sum()), own.numel(), when)

    def harden(self) -> None:
        """In place: set every weight to its representative."""
        if not is_sharded(self.weight):
            self.weight.copy_(self.snap())
            return
        codebook, boundaries = self.rows()[0], self.boundaries()
        for view, rows in self.parts():
            view.copy_(snap(view, codebook[rows], boundaries[rows]))

    def reset_usage(self) -> None:
        """In place: forget the usage: every representative counts as equally and just used."""
        self.usage.fill_(1 / self.usage.shape[1])

    def note_usage(self, counts: Tensor, momentum: float) -> None:
        """In place: take this step's members of each representative into the running usage."""
        self.usage = self.usage.to(counts.device)
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        self.usage.lerp_(share.to(self.usage), 1 - momentum)

    def note_movement(self) -> None:
        """In place: note whether the codebook changed since the last look."""
        now = self.codebook.detach()
        self.unmoved = torch.equal(now, self._seen.to(now))

    def look(self) -> None:
        """In place: remember the codebook as it is, for the next `note_movement`."""
        self._seen = self.codebook.detach().clone()

    def state(self) -> dict[str, Tensor | bool | None]:
        """Return what a checkpoint needs besides the parameters."""
        cost = self.switch.cost
        return {
            "usage": self.usage.clone(),
            # Kept and not computed anew: it is of the weights at the end of the last step.
            "cost": None if cost is None else cost.clone(),
            "seen": self._seen.clone(),
            "unmoved": self.unmoved,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """In place: take what `state` returned."""
        self.usage.copy_(state["usage"])
        cost = state["cost"]
        self.switch.cost = None if cost is None else cost.to(self.usage).clone()
        self._seen = state["seen"].to(self._seen).clone()
        self.unmoved = bool(state["unmoved"])

    def detach(self) -> None:
        """In place: remove everything we registered on the owners."""
        for module, attribute in self.owners:
            uninstall(module)
            for suffix in self.parameters:
                module._parameters.pop(attribute + suffix, None)


def _same(kept: Tensor, now: Tensor) -> bool:
    return kept.device == now.device and kept.dtype == now.dtype and torch.equal(kept, now)
