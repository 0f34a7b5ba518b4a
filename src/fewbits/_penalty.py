"""The penalty as one node of the autograd graph, for all layers at once.

The gradient of the weights is not returned to autograd, which would hold a second copy of every
gradient. It is added piece by piece to `weight.grad` in the weight's post-accumulate hook, right
after the task's gradient arrived there and before anything else, such as DDP, looks at it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ._attach import Attached
from ._pull import (
    Penalty,
    Pieces,
    add_weight_gradient,
    evaluate,
    reduce_codebook_gradient,
)
from .regularizers import Regularizer


class WeightHook:
    """Adds the penalty's gradient to one weight's `.grad` after each backward pass.

    Attributes:
        pending: (layer, factor) pairs whose gradient is owed to `weight.grad`.
    """

    def __init__(self, attached: Attached, regularizer: Regularizer):
        self.attached, self.regularizer = attached, regularizer
        self.pending: list[tuple[Pieces, Tensor]] = []
        self.handle = attached.weight.register_post_accumulate_grad_hook(self._add)

    def _add(self, weight: Tensor) -> None:
        owed, self.pending = self.pending, []
        if not owed:
            return
        if weight.grad is None:  # the task's loss did not reach this weight
            weight.grad = torch.zeros_like(weight)
        view = self.attached.view(weight.grad)
        for layer, factor in owed:
            add_weight_gradient(self.regularizer, layer, factor, view)
        self.attached.write_view(weight.grad, view)

    def remove(self) -> None:
        """In place: take the hook off the weight, and the list of hooks if that leaves it empty."""
        self.handle.remove()
        weight = self.attached.weight
        if not weight._post_accumulate_grad_hooks:
            # As torch has it for a tensor that never had a hook; its stubs do not say so.
            weight._post_accumulate_grad_hooks = None  # pyright: ignore[reportAttributeAccessIssue]

    def flush(self) -> None:
        """In place: pay what is still owed: torch before 2.10 skips hooks without a gradient."""
        self._add(self.attached.weight)


class PenaltyFunction(torch.autograd.Function):
    """Sum of strength x R over layers; see the module's docstring for the weights' gradient."""

    @staticmethod
    def forward(ctx, hooks: Sequence[WeightHook], terms: "Terms", *tensors: Tensor) -> Tensor:
        """Evaluate every layer that has a strength; `tensors` are each layer's parameters."""
        ctx.save_for_backward(*tensors)
        ctx.hooks, ctx.terms = hooks, terms
        return terms.total(tensors[0])

    @staticmethod
    @once_differentiable
    # The decorator's stub makes ctx positional-only; the base class calls it positionally.
    def backward(ctx, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the codebooks' gradients; leave the weights' to their hooks where they run."""
        (gradient,) = grad_outputs
        tensors = ctx.saved_tensors  # raises if a weight or codebook was changed in between
        result: list[Tensor | None] = []
        owed = []
        for hook, layer, strength, grads in ctx.terms.rows:
            weight, own = (
                tensors[len(result)],
                tensors[len(result) + 1 : len(result) + 1 + len(grads)],
            )
            to_weight = None
            if layer is not None and weight.requires_grad:
                factor = gradient.to(weight.device) * strength
                if _accumulates(weight):
                    hook.pending.append((layer, factor))
                    owed.append(hook)
                else:
                    to_weight = torch.zeros_like(weight)
                    view = hook.attached.view(to_weight)
                    add_weight_gradient(hook.regularizer, layer, factor, view)
                    hook.attached.write_view(to_weight, view)
            result.append(to_weight)
            result += [
                (g * gradient.to(g.device)).to(p.dtype) for g, p in zip(grads, own, strict=True)
            ]
        if owed:
            engine = torch.autograd.Variable._execution_engine  # pyright: ignore
            engine.queue_callback(lambda: _flush(owed))
        return (None, None, *result)


def _flush(hooks: Sequence[WeightHook]) -> None:
    for hook in hooks:
        hook.flush()


def _accumulates(weight: Tensor) -> bool:
    """Whether the running backward pass adds to `weight.grad`: not so under `autograd.grad`."""
    node = torch.autograd.graph.get_gradient_edge(weight).node
    try:
        return torch._C._will_engine_execute_node(node)  # pyright: ignore
    except RuntimeError:  # a leaf whose gradient is returned instead
        return False


class Terms:
    """What the penalty consists of at one step, with the gradients of all but the weights.

    Attributes:
        rows: per layer its hook, its pieces (None without a strength), the strength, and the
            gradients of its own parameters, already multiplied by the strength.
        values: (layer, strength x R) of the layers that have a strength, 0-d float64.
        counts: (layer, members of each representative) of the same, (G, K) float64.
    """

    def __init__(
        self,
        hooks: Sequence[WeightHook],
        step: int,
        pull: Penalty | None,
    ):
        self.rows: list[tuple[WeightHook, Pieces | None, float | Tensor, list[Tensor]]] = []
        self.values: list[tuple[Attached, Tensor]] = []
        self.counts: list[tuple[Attached, Tensor]] = []
        for hook in hooks:
            attached = hook.attached
            own = attached.own_parameters()
            strength: float | Tensor = attached.strength(step)
            if pull is None or not strength:
                self.rows.append((hook, None, 0.0, [torch.zeros_like(p) for p in own]))
                continue
            attached.measure(hook.regularizer)
            layer = attached.pieces(step)
            value, counts, gradients = evaluate(hook.regularizer, layer)
            gradients["codebook"] = reduce_codebook_gradient(
                gradients["codebook"], hook.regularizer.members(counts), pull.codebook_gradient
            )
            if pull.even_rate:
                strength = strength * layer.weight.numel() * layer.std.square()
            _, order = attached.rows()
            grads = [
                strength * _in_own_order(gradients[name], order, parameter)
                for name, parameter in zip(gradients, own, strict=True)
            ]
            self.rows.append((hook, layer, strength, grads))
            self.values.append((attached, strength * value))
            self.counts.append((attached, counts))

    def total(self, like: Tensor) -> Tensor:
        """Return the sum over layers, 0-d, on the device of `like`, float32 at least."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=torch.float64, device=like.device)
        for _, value in self.values:
            total += value.to(like.device)
        return total.to(dtype)


def _in_own_order(gradient: Tensor, order: Tensor, parameter: nn.Parameter) -> Tensor:
    """Undo the sort by value: (G, K) gradient in the shape and order of the parameter."""
    return torch.empty_like(gradient).scatter_(1, order, gradient).view_as(parameter)
