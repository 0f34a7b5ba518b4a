"""`Clustering`: the codebooks of a model, and everything that happens to them in training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._attach import Attached
from ._care import Watch, check_numbers, look_after
from ._codebook import Init, check_finite, grouped, initial_codebook, pooled_variance
from ._errors import PlanError
from ._gap import Gap, layer_gap
from ._penalty import LayerTerm, PenaltyFunction, StackTerm, Term, WeightHook
from ._plan import Plan, carried_out, unwrapped
from ._pull import Penalty, Proximal
from ._resolve import check_choices, difference, strengths_of
from ._sharded import is_sharded, show_shards
from ._snapped import Switch
from ._stack import Stack, Stacks, stackable, together
from ._together import Together
from .regularizers import Nearest, Regularizer

# Steps between two looks at the health of the codebooks: a full assignment costs about 5 ns a
# weight, so every 50 steps it is lost in the noise of a step.
CARE_EVERY = 50
# Weight of the past in the running usage: about the last ten steps count.
USAGE_MOMENTUM = 0.9
# Of representatives, unless asked for: under SGD with momentum 0.9 a small network without batch
# norm diverged at 1 bit above 0.05, and one with it lost a point more at 0.01 than at 0.001.
HIGHEST_CODEBOOK_LR = 0.002


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

    Examples:
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
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise PlanError(
                "the model is wrapped in DistributedDataParallel, which would not synchronize"
                " codebooks that come later. Attach Clustering first, then wrap the model."
            )
        self.model: nn.Module = unwrapped(model)
        self.regularizer: Regularizer = Nearest() if regularizer is None else regularizer
        self.pull: Penalty | Proximal | None = pull
        self.snapped_forward: bool = snapped_forward
        self.init: Init = init
        check_choices(self.regularizer, pull, init)
        self.plan: Plan = carried_out(self.model, bits, k, plan)
        self.steps: int = 0
        self._hardened = False
        self._last_terms: list[Term] = []
        strengths = strengths_of(self.plan, pull)
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        for planned in self.plan.selected:
            if is_sharded(weights[planned.name]):
                raise PlanError(
                    f"{planned.name} is sharded. Attach Clustering first, then call"
                    " fully_shard(…, ignored_params=clustering.codebooks())."
                )
            check_finite(planned.name, weights[planned.name].detach())
        codebooks = []  # all of them before the model is touched
        for planned in self.plan.selected:
            view = grouped(weights[planned.name].detach(), planned.groups, planned.axis)
            codebooks.append(self.regularizer.project(initial_codebook(view, planned.k, init)))
        self._layers: list[Attached] = []
        for planned, codebook in zip(self.plan.selected, codebooks, strict=True):
            switch = Switch(False, planned.axis)
            strength = strengths[planned.name]
            layer = Attached(self.model, planned, codebook, self.regularizer, strength, switch)
            switch.active = snapped_forward and layer.start == 0
            self._layers.append(layer)
        self._watch = Watch(self._layers if isinstance(pull, Penalty) else ())
        self._hooks = {layer.name: WeightHook(layer) for layer in self._layers}
        self._stacks = Stacks(self._layers) if stackable(self.regularizer) else None
        self._variance: float = 0.0  # of no use where assigning has no price
        if self._stacks is None:
            # Kept as it is now: a layer that lost all but one value may grow without bounds, and
            # must not raise the price for the others.
            self._variance = pooled_variance(
                [layer.weight.numel() for layer in self._layers],
                [layer.spread() for layer in self._layers],
            )
            self._update_costs()
        self._snapping: list[Together] | None = None
        self._link()
        self._starting: dict[int, list[Attached]] = {}
        for layer in self._layers:
            self._starting.setdefault(layer.start, []).append(layer)

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
        self._show_shards()
        device = self._layers[0].weight.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            terms = self._terms(self.pull if isinstance(self.pull, Penalty) else None)
        self._forget_snapped()
        self._watch.begin()
        # Taken into account by step(): asking for the loss changes nothing.
        self._last_terms = terms
        inputs = [tensor for term in terms for tensor in term.inputs]
        return PenaltyFunction.apply(self._hooks, terms, *inputs)

    @torch.no_grad()
    def step(self) -> None:
        """In place: finish a training step; call it after the optimizer's.

        Applies the proximal pull, moves schedules on, starts pulls that are due, keeps codebooks
        in the form the regularizer allows, and revives dead representatives from time to time.

        Warns once, by the layer's name, if the optimizer does not move the representatives.

        Raises:
            CodebookError: if weights, a codebook or the last penalty became NaN or infinite.
        """
        self._check_active("step")
        self._show_shards()
        for term in self._last_terms:
            term.note_usage(USAGE_MOMENTUM)
        penalties = [(t.names, t.values) for t in self._last_terms if t.values is not None]
        self._last_terms = []
        check_numbers(self._layers, self._numbers(), self.steps, penalties)
        self._watch.end()
        if isinstance(self.pull, Proximal):
            self._apply_proximal(self.pull)
        self.steps += 1
        for layer in self._starting.get(self.steps, ()):
            self._start(layer)
            self._snapping = None
        self._forget_snapped()
        if type(self.regularizer).project is not Regularizer.project:
            for layer in self._layers:
                self._project(layer)
        if self.steps % CARE_EVERY == 0:
            for layer in self._layers:
                if self.steps > layer.start:
                    counts = look_after(layer, self.steps, revive=self.regularizer.revives)
                    if self.pull is None:
                        layer.note_usage(counts, USAGE_MOMENTUM)
        if self._stacks is None:
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
        self._show_shards()
        for layer in self._layers:
            layer.check_finite()
        for layer in self._layers:
            layer.harden()
        for hook in self._hooks.values():
            hook.remove()
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
            codebook_lr: learning rate of the representatives; if not given, `lr`, but at most
                0.002: a representative moves for all its weights at once, and a network without
                batch norm diverges at rates that suit single weights.

        Returns:
            [{"params": …, "lr": …, "weight_decay": …}, the same for the codebooks].
        """
        self._check_active("param_groups")
        self._show_shards()
        own = [p for layer in self._layers for p in layer.own_parameters()]
        ours = {id(p) for p in own}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ours]
        codebook_lr = min(lr, HIGHEST_CODEBOOK_LR) if codebook_lr is None else codebook_lr
        return [
            {"params": rest, "lr": lr, "weight_decay": weight_decay},
            {"params": own, "lr": codebook_lr, "weight_decay": 0.0},
        ]

    def codebooks(self) -> set[nn.Parameter]:
        """Return all parameters that are ours: `fully_shard` wants them as `ignored_params`."""
        self._check_active("codebooks")
        return {p for layer in self._layers for p in layer.own_parameters()}

    # -- looking --------------------------------------------------------------------------------

    @torch.no_grad()
    def gap(self) -> Gap:
        """Return what hardening now would move, and the health of every codebook."""
        self._check_active("gap")
        self._show_shards()
        return Gap(tuple(layer_gap(layer) for layer in self._layers), self.steps)

    @contextmanager
    def snapped(self) -> Iterator[None]:
        """Compute with snapped weights inside the `with`, as if hardened; nothing is changed."""
        self._check_active("snapped")
        before = [layer.switch.active for layer in self._layers]
        try:
            for layer in self._layers:
                layer.switch.active = True
            self._link()
            yield
        finally:
            for layer, active in zip(self._layers, before, strict=True):
                layer.switch.active = active
            self._link()

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs besides the model's own state dict.

        Returns:
            Plain numbers, lists and tensors: safe for `torch.load(weights_only=True)`.
        """
        return {
            "plan": self.plan.fingerprint(),
            "steps": self.steps,
            "variance": self._variance,
            "layers": {layer.name: layer.state() for layer in self._layers},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """In place: continue from a checkpoint.

        Load the model's own state dict as well, before or after.

        Args:
            state: what `state_dict` returned under the same plan.

        Raises:
            PlanError: if the checkpoint is from another plan; nothing is then changed.
        """
        self._check_active("load_state_dict")
        missing = {"plan", "steps", "variance", "layers"} - set(state)
        if missing:
            raise PlanError(
                f"not a state of Clustering: {', '.join(sorted(missing))} missing."
                " Pass what clustering.state_dict() returned."
            )
        ours, theirs = self.plan.fingerprint(), [list(row) for row in state["plan"]]
        if ours != theirs:
            raise PlanError(
                "the checkpoint is from another plan: "
                + difference(theirs, ours)
                + " Attach with the plan it was made with."
            )
        self.steps = int(state["steps"])
        self._variance = float(state["variance"])
        for layer in self._layers:
            layer.load_state(state["layers"][layer.name])
            layer.switch.active = self.snapped_forward and self.steps >= layer.start
        self._link()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_snapping": None}  # copies link their own layers

    # -- parts of a step ------------------------------------------------------------------------

    @torch.no_grad()
    def _update_costs(self) -> None:
        """In place: make layers assign as the regularizer does, from now on."""
        for layer in self._layers:
            cost = self.regularizer.cost(layer.usage)
            if cost is not None:
                layer.update_cost(cost * self._variance)

    def _link(self) -> None:
        """In place: have small layers that read as snapped weights snapped together."""
        self._snapping = [] if self._stacks is None else together(self._layers)

    def _forget_snapped(self) -> None:
        """In place: snap anew at the next read, for weights that were written through `.data`."""
        if self._snapping is None:
            self._link()
        for some in self._snapping or ():
            some.forget()

    def _stacked(self, step: int) -> list[tuple[Stack, list[float]]]:
        """Return the stacks with the strengths of their layers at a step."""
        if self._stacks is None:
            return []
        return self._stacks.current(step, moving=isinstance(self.pull, Proximal))

    def _terms(self, pull: Penalty | None) -> list[Term]:
        if self._stacks is None:
            hooks = self._hooks.values()
            return [LayerTerm(hook, self.regularizer, pull, self.steps) for hook in hooks]
        stacked = self._stacked(self.steps)
        return [StackTerm(stack, self._power, pull, strengths) for stack, strengths in stacked]

    @property
    def _power(self) -> int:
        power = self.regularizer.power
        assert power is not None  # else there are no stacks
        return power

    def _numbers(self) -> list[Tensor]:
        """Return numbers that tell whether the weights and codebooks are finite as they are now."""
        for layer in self._layers:
            layer.forget()
        if self._stacks is None:
            return [n for layer in self._layers for n in (layer.std(), layer.codebook.detach())]
        numbers = []
        penalized = isinstance(self.pull, Penalty)
        for stack, strengths in self._stacked(self.steps + penalized):
            stack.forget()
            numbers.append(stack.rows()[0])
            if strengths and penalized:
                # The pass that the next loss needs.
                numbers.append(stack.measure(self._power).std)
            elif not strengths:
                numbers += [layer.std() for layer in stack.layers]
        return numbers

    def _apply_proximal(self, pull: Proximal) -> None:
        if (self.steps + 1) % pull.every:
            return
        for stack, strengths in self._stacked(self.steps):
            if strengths:
                together = [pull.together(strength, self._power) for strength in strengths]
                counts, left = stack.move(self._power, together)
                check_numbers(stack.layers, [left], self.steps)
                stack.note_usage(counts, USAGE_MOMENTUM)
                if not self.snapped_forward:
                    stack.average(counts, left, pull.share)
        if self._stacks is None:
            share = 0.0 if self.snapped_forward else pull.share
            for layer in self._layers:
                strength = pull.together(layer.strength(self.steps), self.regularizer.power)
                counts = layer.move(self.regularizer, self.steps, strength, share)
                if counts is not None:
                    layer.note_usage(counts, USAGE_MOMENTUM)

    def _start(self, layer: Attached) -> None:
        """The pull switches on: begin from the weights as they are now."""
        codebook, order = layer.rows()
        fresh = initial_codebook(layer.whole(), codebook.shape[1], self.init)
        layer.write_codebook(fresh, order)
        layer.look()
        layer.reset_usage()
        layer.switch.active = self.snapped_forward

    def _project(self, layer: Attached) -> None:
        codebook, order = layer.rows()
        allowed = self.regularizer.project(codebook)
        if allowed is not codebook:
            layer.write_codebook(allowed, order)

    def _show_shards(self) -> None:
        """Meet weights that FSDP2 has sharded since; the first time it may hold them whole."""
        if any(layer.hidden() for layer in self._layers):
            show_shards(self.model)
        if self._stacks is None and any(is_sharded(layer.weight) for layer in self._layers):
            raise PlanError(
                f"{self.regularizer!r} does not work with sharded weights. Use Nearest(), or"
                " DistributedDataParallel in place of fully_shard."
            )

    def _check_active(self, what: str) -> None:
        if self._hardened:
            raise PlanError(f"{what}() after harden(): nothing is attached any more.")
