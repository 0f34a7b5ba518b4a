"""The penalty as one node of the autograd graph, for all layers at once.

The gradient of a large weight is not returned to autograd, which would hold a second copy of it.
It is added piece by piece to `weight.grad` in the weight's post-accumulate hook, right after the
task's gradient arrived there and before anything else, such as DDP, looks at it. Those of small
weights are computed in one call and returned, which costs less than a hook for each.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._attach import Attached
from ._kernels import pull_all
from ._pull import Penalty, add_weight_gradient, evaluate
from ._sharded import mean_gradients
from ._stack import Stack
from .regularizers import Regularizer

# Adds a gradient to a (G, n) tensor.
Adds = Callable[[Tensor], None]
# Pays a gradient that is owed, once the backward pass is over.
Pays = Callable[[], None]
Gradients = list[Tensor | None]


class WeightHook:
    """Adds the penalty's gradient to one weight's `.grad` after each backward pass.

    Attributes:
        pending: what is owed to `weight.grad`.
    """

    def __init__(self, attached: Attached):
        self.attached = attached
        self.pending: list[Adds] = []
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def owe(self, add: Adds) -> None:
        """In place: add a gradient to `weight.grad` once the running backward pass got there."""
        if self._handle is None:
            weight = self.attached.weight
            self._handle = weight.register_post_accumulate_grad_hook(self._pay)
        self.pending.append(add)

    def _pay(self, weight: Tensor) -> None:
        owed, self.pending = self.pending, []
        if not owed:
            return
        if weight.grad is None:  # the task's loss did not reach this weight
            weight.grad = torch.zeros_like(weight)
        self.write(weight.grad, *owed)

    def write(self, gradient: Tensor, *adds: Adds) -> None:
        """In place: add gradients to one that is shaped like the weight."""
        view = self.attached.view(gradient)
        for add in adds:
            add(view)
        self.attached.write_view(gradient, view)

    def gradient(self, add: Adds) -> Tensor | None:
        """Owe a gradient to the weight, or return it where the running pass does not write it."""
        weight = self.attached.weight
        if _accumulates(weight):
            self.owe(add)
            return None
        result = torch.zeros_like(weight)
        self.write(result, add)
        return result

    def remove(self) -> None:
        """In place: take the hook off the weight, and the list of hooks if that leaves it empty."""
        if self._handle is None:
            return
        self._handle.remove()
        weight = self.attached.weight
        if not weight._post_accumulate_grad_hooks:
            # As torch has it for a tensor that never had a hook; its stubs do not say so.
            weight._post_accumulate_grad_hooks = None  # pyright: ignore[reportAttributeAccessIssue]

    def flush(self) -> None:
        """In place: pay what is still owed: torch before 2.10 skips hooks without a gradient."""
        self._pay(self.attached.weight)


def _accumulates(weight: Tensor) -> bool:
    """Whether the running backward pass adds to `weight.grad`: not so under `autograd.grad`."""
    node = torch.autograd.graph.get_gradient_edge(weight).node
    try:
        return torch._C._will_engine_execute_node(node)  # pyright: ignore
    except RuntimeError:  # a leaf whose gradient is returned instead
        return False


class LayerTerm:
    """One layer's part of the penalty at one step, for any regularizer.

    Attributes:
        names: the layer's name.
        inputs: its weight and its own parameters.
        values: (1,) strength x R; None without a strength.
    """

    def __init__(self, hook: WeightHook, regularizer: Regularizer, pull: Penalty | None, step: int):
        attached = self.attached = hook.attached
        self.hook, self.regularizer = hook, regularizer
        own = attached.own_parameters()
        self.names, self.inputs = [attached.name], [attached.weight, *own]
        self.values = None
        self.gradients = [torch.zeros_like(p) for p in own]
        strength: float | Tensor = attached.strength(step)
        if pull is None or not strength:
            return
        self.layer = attached.pieces(step)
        value, self.counts, found = evaluate(regularizer, self.layer)
        if pull.even_rate:
            members = regularizer.members(self.counts).clamp(min=1)
            found["codebook"] = found["codebook"] / members
            strength = strength * self.layer.weight.numel() * self.layer.std.square()
            strength = strength * regularizer.even_scale(self.layer.codebook / self.layer.std)
        self.strength = strength
        _, order = attached.rows()
        self.gradients = [
            strength * torch.empty_like(g).scatter_(1, order, g).view_as(parameter)
            for g, parameter in zip(found.values(), own, strict=True)
        ]
        self.values = (strength * value).view(1)

    def note_usage(self, momentum: float) -> None:
        """In place: take the members of each representative into the running usage."""
        if self.values is not None:
            self.attached.note_usage(self.counts, momentum)

    def backward(self, gradient: Tensor) -> tuple[Gradients, list[Pays]]:
        """Return the gradients of the inputs, and what pays those that are owed."""
        to_weight, owing = None, []
        if self.values is not None and self.inputs[0].requires_grad:
            factor = gradient.to(self.inputs[0].device) * self.strength
            to_weight = self.hook.gradient(
                lambda out: add_weight_gradient(self.regularizer, self.layer, factor, out)
            )
            owing = [self.hook.flush] if to_weight is None else []
        own = zip(self.gradients, self.inputs[1:], strict=True)
        to_own = [(g * gradient.to(g.device)).to(p.dtype) for g, p in own]
        return [to_weight, *to_own], owing


class StackTerm:
    """A stack's part of the penalty at one step.

    Attributes:
        names: the layers' names.
        inputs: their weights, then their codebooks.
        values: (L,) strength x R; None where their pull is off.
    """

    def __init__(self, stack: Stack, power: int, pull: Penalty | None, strengths: list[float]):
        self.stack, self.power = stack, power
        self.names = [layer.name for layer in stack.layers]
        self.inputs = [*stack.parameters, *stack.codebooks]
        self.values = None
        self.codebook, order = stack.rows()
        self.gradient = torch.zeros_like(self.codebook)
        if pull is None or not any(strengths):
            return
        found = stack.measure(power)
        self.counts = found.counts
        factors = stack.strengths(strengths)
        if pull.even_rate:
            factors = factors * stack.sizes * found.std.square()
        factors = factors / (stack.sizes.clamp(min=1) * found.std**power)
        self.values = found.totals * factors
        self.factors = power * factors
        to_codebook = found.sums * -self.factors[stack.row_layer, None]
        if pull.even_rate:
            to_codebook = to_codebook / found.counts.clamp(min=1)
        self.gradient = stack.in_own_order(to_codebook, order)

    def note_usage(self, momentum: float) -> None:
        """In place: take the members of each representative into the running usage."""
        if self.values is not None:
            self.stack.note_usage(self.counts, momentum)

    def backward(
        self, gradient: Tensor, hooks: dict[str, WeightHook]
    ) -> tuple[Gradients, list[Pays]]:
        """Return the gradients of the inputs, and what pays those that are owed."""
        stack, count = self.stack, len(self.names)
        if stack.sharding is not None:
            return [None] * len(self.inputs), [lambda: _queue(lambda: self._finish(gradient))]
        to_weights: Gradients = [None] * count
        owing = []
        if self.values is not None:
            factors = self.factors * gradient.to(self.factors)
            to_weights[: stack.small] = self._small_gradients(factors)
            for i in range(stack.small, count):
                hook = hooks[self.names[i]]
                if stack.parameters[i].requires_grad:
                    to_weights[i] = hook.gradient(self._adds(i, factors[i : i + 1]))
                    owing += [hook.flush] if to_weights[i] is None else []
        dtype = stack.layers[0].codebook.dtype
        to_codebooks = (self.gradient * gradient.to(self.gradient)).to(dtype)
        return [*to_weights, *stack.split(to_codebooks)], owing

    @torch.no_grad()
    def _finish(self, gradient: Tensor) -> None:
        """In place: give sharded weights and their codebooks what they are owed.

        After FSDP2 has finished: it writes gradients of shards itself, on streams of its own.
        """
        stack = self.stack
        assert stack.sharding is not None  # so backward() found
        # The snapped forward pass leaves each process the gradient of its own inputs.
        mean_gradients(stack.codebooks, stack.sharding.everyone)
        if self.values is None:
            return
        factors = self.factors * gradient.to(self.factors)
        stack.sharding.pull(self.codebook, self.power, factors)
        to_codebooks = (self.gradient * gradient.to(self.gradient)).to(stack.codebooks[0].dtype)
        for codebook, own in zip(stack.codebooks, stack.split(to_codebooks), strict=True):
            codebook.grad = own if codebook.grad is None else codebook.grad + own

    def _adds(self, i: int, factor: Tensor) -> Adds:
        layer, rows = self.stack.layers[i], self.codebook[self.stack.spans[i]]
        return lambda out: pull_all([out], [layer.view()], rows, None, self.power, factor)

    def _small_gradients(self, factors: Tensor) -> Gradients:
        stack = self.stack
        if not stack.small:
            return []
        weights = stack.parameters[: stack.small]
        outs = [torch.zeros_like(weight) for weight in weights]
        rows = self.codebook[: stack.spans[stack.small - 1].stop]
        pull_all(outs, stack.small_weights, rows, None, self.power, factors[: stack.small])
        return [o if w.requires_grad else None for o, w in zip(outs, weights, strict=True)]


Term = LayerTerm | StackTerm


class PenaltyFunction(torch.autograd.Function):
    """Sum of strength x R over layers; see the module's docstring for the weights' gradient."""

    @staticmethod
    def forward(ctx, hooks: dict[str, WeightHook], terms: Sequence[Term], *tensors: Tensor):
        """Add up the terms, on the device of the first of the terms' inputs, `tensors`."""
        # Watched as saved tensors are, which cost a microsecond each.
        ctx.watched = [(tensor, tensor._version) for tensor in tensors]
        ctx.hooks, ctx.terms = hooks, terms
        dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
        for term in terms:
            if term.values is not None:
                total += term.values.sum().to(total.device)
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    # The decorator's stub makes ctx positional-only; the base class calls it positionally.
    def backward(ctx, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of codebooks and small weights; leave the others to their hooks."""
        (gradient,) = grad_outputs
        if any(tensor._version != version for tensor, version in ctx.watched):
            raise RuntimeError(
                "a weight or codebook was modified by an inplace operation between"
                " clustering.loss() and backward(). Call loss() after it."
            )
        result: Gradients = []
        owed: list[Pays] = []
        for term in ctx.terms:
            if isinstance(term, StackTerm):
                gradients, owing = term.backward(gradient, ctx.hooks)
            else:
                gradients, owing = term.backward(gradient)
            result += gradients
            owed += owing
        if owed:
            _queue(lambda: _pay(owed))
        return (None, None, *result)


def _queue(callback: Callable[[], None]) -> None:
    """Have a function called when the running backward pass is over, after those queued before."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # pyright: ignore


def _pay(owed: Sequence[Pays]) -> None:
    for pay in owed:
        pay()
