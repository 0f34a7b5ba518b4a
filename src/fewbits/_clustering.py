"""`Clustering`: the codebooks of a model, and everything that happens to them in training."""

import fnmatch
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._attach import Attached, check_finite
from ._codebook import INITS, Init, grouped, initial_codebook, split_largest
from ._errors import CodebookError, PlanError, did_you_mean
from ._gap import Gap, LayerGap, layer_gap
from ._kernels import assign, cluster_sums, count
from ._penalty import PenaltyFunction, Terms, WeightHook
from ._plan import Plan, PlannedWeight
from ._plan import plan as make_plan
from ._pull import Penalty, Proximal, proximal_step
from ._snapped import Switch
from .regularizers import Nearest, Regularizer
from .schedules import Schedule, as_schedule, constant

log = logging.getLogger("fewbits")

# Steps between two looks at the health of the codebooks: a full assignment costs about 5 ns a
# weight, so every 50 steps it is lost in the noise of a step.
CARE_EVERY = 50
# Representatives revived in one layer at one look; each costs a pass over the layer.
MOST_REVIVED = 16
# Weight of the past in the running usage: about the last ten steps count.
USAGE_MOMENTUM = 0.9


class Clustering:
    """In place: give each selected weight of a model a codebook, and pull the weights to it.

    Three lines go into a training loop: add `loss()` to the task's loss, call `step()` after the
    optimizer's step, and `harden()` at the end. The model stays the user's own module throughout;
    after `harden()` nothing of ours is left in it.

    Args:
        model: any module; its selected weights get a parameter `<weight>_codebook` on their own
            layer, in its state dict.
        bits: log2 of the number of representatives per codebook, 0 … 16.
        k: the number of representatives instead, 1 … 65,536.
        plan: what `fewbits.plan` returned for this model instead. Exactly one of the three.
        regularizer: what pulls; `fewbits.regularizers` has them all.
        pull: how the pull is applied, `Penalty` or `Proximal`; None for no pull at all, only the
            snapped forward.
        init: where codebooks start: "kmeans", "quantile" or "uniform". A pull with a delayed
            start initializes them anew from the weights at that step.
        snapped_forward: whether layers compute with snapped weights (with a straight-through
            gradient) from the step at which their pull starts.

    Raises:
        PlanError: if the model, the numbers or the rules do not allow it.
        CodebookError: if a selected weight is not finite.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> clustering = fewbits.Clustering(model, bits=1)
        >>> optimizer = torch.optim.SGD(clustering.param_groups(lr=0.1))
        >>> for _ in range(3):
        ...     loss = model(torch.randn(16, 8)).square().mean() + clustering.loss()
        ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
        ...     clustering.step()
        >>> clustering.harden()
        >>> len(model.weight.unique())
        2
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        bits: int | None = None,
        k: int | None = None,
        plan: Plan | None = None,
        regularizer: Regularizer | None = None,
        pull: Penalty | Proximal | None = Penalty(),  # noqa: B008 (frozen)
        init: Init = "kmeans",
        snapped_forward: bool = True,
    ):
        self.model = model
        self.plan = _the_plan(model, bits, k, plan)
        self.regularizer = Nearest() if regularizer is None else regularizer
        self.pull, self.init, self.snapped_forward = pull, init, snapped_forward
        if init not in INITS:
            raise PlanError(f"init is {init!r}.{did_you_mean(init, INITS)} Use one of {INITS}.")
        self.steps = 0
        self._hardened = False
        self._last: list[tuple[str, Tensor]] = []
        self._collapsed: set[str] = set()
        strengths = _strengths(self.plan, pull)
        weights = dict(model.named_parameters(remove_duplicate=False))
        for planned in self.plan.selected:
            check_finite(planned.name, weights[planned.name])
        how = pull.codebook_gradient if pull else "mean"
        self._layers: list[Attached] = []
        for planned in self.plan.selected:
            view = grouped(weights[planned.name].detach(), planned.groups, planned.axis)
            codebook = self.regularizer.project(initial_codebook(view, planned.k, init))
            strength = strengths[planned.name]
            switch = Switch(snapped_forward and strength.start <= 0, planned.axis, how)
            self._layers.append(
                Attached(model, planned, codebook, self.regularizer, strength, switch)
            )
        self._hooks = [WeightHook(layer, self.regularizer) for layer in self._layers]
        self._update_costs()

    # -- the three lines ------------------------------------------------------------------------

    def loss(self) -> Tensor:
        """Return the penalty to add to the task's loss: the sum over layers of strength x R.

        Its gradient reaches the weights and the codebooks. Under `Proximal`, or before the pull
        starts, it is zero, but still connected to every codebook, as DDP requires.

        Returns:
            0-d float32 (float64 for float64 weights), on the first weight's device.

        Raises:
            PlanError: after `harden()`, or if a weight was replaced by another parameter.
        """
        self._check_active("loss")
        pull = self.pull if isinstance(self.pull, Penalty) else None
        device = self._layers[0].weight.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            terms = Terms(self._hooks, self.steps, pull, USAGE_MOMENTUM)
        self._last = terms.values
        tensors = [t for layer in self._layers for t in (layer.weight, *layer.own_parameters())]
        return PenaltyFunction.apply(self._hooks, terms, *tensors)

    @torch.no_grad()
    def step(self) -> None:
        """In place: finish a training step; call it after the optimizer's.

        Applies the proximal pull, moves schedules on, starts pulls that are due, keeps codebooks
        in the form the regularizer allows, and revives dead representatives from time to time.

        Raises:
            CodebookError: if the last penalty or a codebook became NaN or infinite.
        """
        self._check_active("step")
        self._check_last()
        for layer in self._layers:
            if isinstance(self.pull, Proximal) and self.steps >= layer.strength.start:
                self._apply_proximal(layer, self.pull)
        self.steps += 1
        for layer in self._layers:
            if layer.strength.start == self.steps:
                self._start(layer)
            self._project(layer)
        if self.steps % CARE_EVERY == 0:
            self._care()
        self._update_costs()

    @torch.no_grad()
    def harden(self) -> None:
        """In place: set every clustered weight to its representative and remove what is ours.

        Afterwards the model is a plain module of its own class: each weight holds at most K
        distinct values per codebook, and no parameter, property or hook of fewbits is left.

        Raises:
            CodebookError: if a weight or codebook is not finite; the model is then unchanged.
            PlanError: if it was hardened before.
        """
        self._check_active("harden")
        for layer in self._layers:
            check_finite(layer.name, layer.weight)
            check_finite(layer.name + " codebook", layer.codebook)
        for layer in self._layers:
            layer.weight.copy_(layer.snap())
        for hook in self._hooks:
            hook.handle.remove()
        for layer in self._layers:
            layer.detach()
        self._hardened = True

    # -- the optimizer --------------------------------------------------------------------------

    def param_groups(
        self, *, lr: float, weight_decay: float = 0.0, codebook_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Return two parameter groups for any torch optimizer: the model's and the codebooks.

        Args:
            lr: learning rate of the model's parameters.
            weight_decay: weight decay of the model's parameters; representatives get none.
            codebook_lr: learning rate of the representatives; `lr` if not given.

        Returns:
            [{"params": …, "lr": …, "weight_decay": …}, the same for the codebooks].
        """
        self._check_active("param_groups")
        own = [p for layer in self._layers for p in layer.own_parameters()]
        ours = {id(p) for p in own}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ours]
        codebook_lr = lr if codebook_lr is None else codebook_lr
        return [
            {"params": rest, "lr": lr, "weight_decay": weight_decay},
            {"params": own, "lr": codebook_lr, "weight_decay": 0.0},
        ]

    # -- looking --------------------------------------------------------------------------------

    @torch.no_grad()
    def gap(self) -> Gap:
        """Return what hardening now would move, and the health of every codebook."""
        self._check_active("gap")
        return Gap(tuple(self._layer_gap(layer) for layer in self._layers), self.steps)

    def _layer_gap(self, layer: Attached) -> LayerGap:
        codebook, _ = layer.rows()
        indices = assign(layer.view(), layer.boundaries())
        return layer_gap(
            layer.name,
            layer.weight.detach(),
            layer.snap(),
            codebook=codebook,
            counts=count(indices, codebook.shape[1]),
            unmoved=layer.unmoved,
        )

    @contextmanager
    def snapped(self) -> Iterator[None]:
        """Compute with snapped weights inside the `with`, as if hardened; nothing is changed."""
        self._check_active("snapped")
        before = [layer.switch.active for layer in self._layers]
        try:
            for layer in self._layers:
                layer.switch.active = True
            yield
        finally:
            for layer, active in zip(self._layers, before, strict=True):
                layer.switch.active = active

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs besides the model's own state dict.

        Returns:
            Plain numbers, lists and tensors: safe for `torch.load(weights_only=True)`.
        """
        return {
            "plan": self.plan.fingerprint(),
            "steps": self.steps,
            "usage": {layer.name: layer.usage.clone() for layer in self._layers},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """In place: continue from a checkpoint; load the model's own state dict first.

        Args:
            state: what `state_dict` returned under the same plan.

        Raises:
            PlanError: if the checkpoint is from another plan; nothing is then changed.
        """
        self._check_active("load_state_dict")
        missing = {"plan", "steps", "usage"} - set(state)
        if missing:
            raise PlanError(
                f"not a state of Clustering: {', '.join(sorted(missing))} missing."
                " Pass what clustering.state_dict() returned."
            )
        ours, theirs = self.plan.fingerprint(), [list(row) for row in state["plan"]]
        if ours != theirs:
            raise PlanError(
                "the checkpoint is from another plan: "
                + _difference(theirs, ours)
                + " Attach with the plan it was made with."
            )
        self.steps = int(state["steps"])
        for layer in self._layers:
            layer.usage = state["usage"][layer.name].to(layer.usage).clone()
            layer.switch.active = self.snapped_forward and self.steps >= layer.strength.start
        self._update_costs()

    # -- care -----------------------------------------------------------------------------------

    def _apply_proximal(self, layer: Attached, pull: Proximal) -> None:
        amount = layer.strength(self.steps)
        if amount <= 0:
            return
        weight = layer.weight.detach()
        view = layer.view()
        proximal_step(self.regularizer, layer.pieces(self.steps), amount, view)
        layer.write_view(weight, view)
        codebook, order = layer.rows()
        counts, sums = cluster_sums(layer.view(), layer.view(), layer.boundaries())
        layer.note_usage(counts, USAGE_MOMENTUM)
        if not self.snapped_forward:
            means = torch.where(counts > 0, sums / counts.clamp(min=1), codebook.double())
            moved = codebook.double().lerp(means, pull.average).to(codebook.dtype)
            layer.write_codebook(moved, order)

    def _start(self, layer: Attached) -> None:
        """The pull switches on: begin from the weights as they are now."""
        check_finite(layer.name, layer.weight)
        codebook, order = layer.rows()
        fresh = initial_codebook(layer.view(), codebook.shape[1], self.init)
        layer.write_codebook(fresh.to(codebook.dtype), order)
        layer.reset_usage()
        layer.switch.active = self.snapped_forward

    def _project(self, layer: Attached) -> None:
        codebook, order = layer.rows()
        allowed = self.regularizer.project(codebook)
        if allowed is not codebook:
            layer.write_codebook(allowed, order)

    def _care(self) -> None:
        for layer in self._layers:
            check_finite(layer.name + " codebook", layer.codebook)
            layer.note_movement()
            codebook, order = layer.rows()
            k = codebook.shape[1]
            view = layer.view()
            counts = count(assign(view, layer.boundaries()), k)
            if not isinstance(self.pull, (Penalty, Proximal)):
                layer.note_usage(counts, USAGE_MOMENTUM)
            if k > 1 and bool((counts > 0).sum(1).eq(1).all()):
                self._report_collapse(layer)
            dead = counts == 0
            if self.regularizer.revives and bool(dead.any()):
                self._revive(layer, view, codebook, order, dead)

    def _report_collapse(self, layer: Attached) -> None:
        if layer.name not in self._collapsed:
            self._collapsed.add(layer.name)
            warnings.warn(
                f"{layer.name}: all weights share one representative at step {self.steps}."
                " Lower the strength, or start the pull later.",
                stacklevel=3,
            )

    def _revive(
        self, layer: Attached, view: Tensor, codebook: Tensor, order: Tensor, dead: Tensor
    ) -> None:
        fresh = codebook.clone()
        for group in dead.any(1).nonzero().flatten().tolist():
            first = dead[group] & (dead[group].cumsum(0) <= MOST_REVIVED)
            row = slice(group, group + 1)
            indices = assign(view[row], layer.boundaries()[row])
            fresh[row] = split_largest(view[row], codebook[row], first, indices)
        revived = int((fresh != codebook).logical_and(dead).sum())
        if revived:
            layer.write_codebook(fresh, order)
            log.info(
                "%s: revived %d of %d dead representatives at step %d",
                layer.name,
                revived,
                int(dead.sum()),
                self.steps,
            )

    def _update_costs(self) -> None:
        """In place: give the snapped read the same assignment as the regularizer's."""
        for layer in self._layers:
            cost = self.regularizer.cost(layer.usage)
            layer.switch.cost = None if cost is None else cost * layer.std().square()

    # -- checks ---------------------------------------------------------------------------------

    def _check_active(self, what: str) -> None:
        if self._hardened:
            raise PlanError(f"{what}() after harden(): nothing is attached any more.")

    def _check_last(self) -> None:
        last, self._last = self._last, []
        if last and not bool(torch.stack([v.cpu() for _, v in last]).isfinite().all()):
            name = next(n for n, v in last if not bool(v.isfinite()))
            raise CodebookError(
                f"{name}: the penalty is NaN or infinite at step {self.steps}."
                " Its weights have diverged: lower the learning rate or the strength."
            )


def _the_plan(model: nn.Module, bits: int | None, k: int | None, plan: Plan | None) -> Plan:
    given = [n for n, v in (("bits", bits), ("k", k), ("plan", plan)) if v is not None]
    if len(given) != 1:
        raise PlanError(
            f"give exactly one of bits, k and plan; given: {', '.join(given) or 'none'}."
        )
    if plan is None:
        plan = make_plan(model, bits=bits, k=k)
        for note in plan.notes:
            warnings.warn(note, stacklevel=3)
        return plan
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    for planned in plan.selected:
        if planned.name + "_codebook" in shapes:
            make_plan(model, k=1)  # raises: attached twice
        if shapes.get(planned.name) != planned.shape:
            raise PlanError(
                f"{planned.name}: the plan says shape {planned.shape}, the model has"
                f" {shapes.get(planned.name, 'no such weight')}. Make the plan from this model."
            )
    return plan


def _strengths(plan: Plan, pull: Penalty | Proximal | None) -> dict[str, Schedule]:
    if pull is None:
        return {planned.name: constant(0.0) for planned in plan.selected}
    if not isinstance(pull.strength, Mapping):
        return {planned.name: as_schedule(pull.strength) for planned in plan.selected}
    result = {planned.name: constant(0.0) for planned in plan.selected}
    for pattern, value in pull.strength.items():
        hits = [p for p in plan.selected if _strength_matches(p, pattern)]
        if not hits:
            near = did_you_mean(pattern, (p.name for p in plan.selected))
            raise PlanError(f"strength: no clustered weight matches {pattern!r}.{near}")
        result |= {planned.name: as_schedule(value) for planned in hits}
    return result


def _strength_matches(planned: PlannedWeight, pattern: str) -> bool:
    layer = planned.name.rpartition(".")[0]
    return any(fnmatch.fnmatchcase(name, pattern) for name in (planned.name, layer))


def _difference(theirs: Iterable[list], ours: Iterable[list]) -> str:
    before, now = ({row[0]: row[1:] for row in rows} for rows in (theirs, ours))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            keys = ("shape", "k", "groups", "axis")
            parts = [
                "absent" if row is None else ", ".join(f"{a} {b}" for a, b in zip(keys, row))
                for row in (before.get(name), now.get(name))
            ]
            return f"{name} was {parts[0]}, is {parts[1]}."
    return "the order of the weights differs."
