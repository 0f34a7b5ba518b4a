"""After hardening: train representatives with assignments fixed; re-estimate batch norm."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ._codebook import grouped, std_of, ungrouped
from ._errors import CodebookError, PlanError
from ._kernels import accumulate, compute_dtype, gather, index_dtype
from ._plan import Plan, unwrapped
from ._plan import plan as make_plan
from ._summary import summary


class _Shared(torch.autograd.Function):
    """weights = codebook[indices]; the gradient of a value is the sum over its weights."""

    @staticmethod
    def forward(ctx, codebook: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape = codebook.shape
        return gather(codebook, indices)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (indices,), (gradient,) = ctx.saved_tensors, grad_outputs
        _, sums = accumulate(gradient, indices, ctx.shape[1])
        return sums.to(gradient.dtype), None


class _SharedWeight:
    """One hardened weight as indices into a trainable codebook."""

    def __init__(self, weight: nn.Parameter, groups: int, axis: int):
        self.weight, self.groups, self.axis = weight, groups, axis
        view = grouped(weight.detach(), groups, axis)
        found = [torch.unique(row, return_inverse=True) for row in view]
        k = max(len(values) for values, _ in found)
        codebook = torch.stack([torch.cat([v, v[-1:].expand(k - len(v))]) for v, _ in found])
        # At least float32: a step of Adam is lost in a float16 number, and its eps is zero there.
        self.codebook = codebook.to(compute_dtype(codebook)).requires_grad_()
        self.indices = torch.stack([i for _, i in found]).to(index_dtype(k))
        std = std_of(view)
        self.std = float(std) if std > 0 else 1.0

    def read(self) -> Tensor:
        values = _Shared.apply(self.codebook, self.indices).to(self.weight.dtype)
        return ungrouped(values, self.weight, self.groups, self.axis)


def finetune_codebooks(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 1e-3,
    plan: Plan | None = None,
) -> None:
    """In place: train the values that hardened weights share, their assignment fixed.

    Biases and normalization are trained along. The optimizer is Adam, since the gradient of a
    value is a sum over all its weights and its size means little.

    Args:
        model: a hardened or quantized module, in the mode (train or eval) you want.
        batches: (input, target) pairs on the model's device; one optimizer step each.
        loss: called with the model's output and the target; returns a 0-d tensor.
        lr: learning rate of Adam: for values in standard deviations of their weight, for biases
            and normalization as it is.
        plan: what the weights were clustered by; read off their values if not given.

    Raises:
        PlanError: if no weight of the model has few distinct values.
        CodebookError: if a loss is NaN or infinite; the parameters are then unchanged.

    References:
        Han, Mao & Dally, "Deep Compression" (ICLR 2016); docs/method.md, eq. 11.
    """
    model = unwrapped(model)
    shared = _shared_weights(model, plan)
    values = {id(s.weight) for s in shared.values()}
    free = {
        name: (p, p.detach().to(compute_dtype(p), copy=True).requires_grad_())
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in values and p.dim() < 2
    }
    groups: list[dict[str, Any]] = [
        {"params": [s.codebook], "lr": lr * s.std} for s in shared.values()
    ]
    groups += [{"params": [wide for _, wide in free.values()], "lr": lr}] if free else []
    optimizer = torch.optim.Adam(groups)
    for step, (inputs, target) in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        weights = {name: s.read() for name, s in shared.items()}
        weights |= {name: wide.to(p.dtype) for name, (p, wide) in free.items()}
        value = loss(functional_call(model, weights, (inputs,)), target)
        if not bool(value.isfinite()):
            raise CodebookError(
                f"finetune_codebooks: the loss is {float(value.detach())} at step {step}. Lower lr."
            )
        value.backward()
        optimizer.step()
    with torch.no_grad():
        for s in shared.values():
            s.weight.copy_(s.read())
        for p, wide in free.values():
            p.copy_(wide)


def _shared_weights(model: nn.Module, plan: Plan | None) -> dict[str, _SharedWeight]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if plan is not None:
        rows = [(w.name, w.groups, w.axis) for w in plan.selected]
    else:
        axes = {w.name: w.axis for w in make_plan(model, k=1).selected}
        found = summary(model).layers
        rows = [
            # Values per input channel, as another tool may leave them, lie along the other axis.
            (r.name, r.codebooks, axes[r.name] ^ (1 < r.codebooks != r.shape[axes[r.name]]))
            for r in found
            if r.name in axes
        ]
    if not rows:
        raise PlanError(
            f"{type(model).__name__} has no weight with few distinct values."
            " Call harden() or fewbits.quantize() first."
        )
    return {n: _SharedWeight(parameters[n], g, axis) for n, g, axis in rows}


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """In place: replace running batch-norm statistics by their average over some batches.

    Snapping shifts what every layer puts out, so statistics from before do not fit after.

    Args:
        model: any module; its modes and momentums are as before afterwards.
        batches: inputs, or tuples whose first item is the input.

    Returns:
        The number of batch-norm layers re-estimated; 0 leaves `batches` unread.

    Raises:
        PlanError: if there is no batch; the statistics are then unchanged.
    """
    norms = [norm for norm in batch_norms(model) if norm.track_running_stats]
    if not norms:
        return 0
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise PlanError("reestimate_batch_norm: there is no batch. Pass a few training batches.")
    with only_training(model, norms):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the cumulative average
        for batch in chain([first], stream):
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    return len(norms)


def batch_norms(model: nn.Module) -> list[Any]:
    """Return the batch-norm layers of a model."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def only_training(model: nn.Module, norms: list[Any]) -> Iterator[None]:
    """Put `norms` in training mode, everything else in evaluation mode, and undo it after."""
    modes = {module: module.training for module in model.modules()}
    momentums = [norm.momentum for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.train()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for norm, momentum in zip(norms, momentums, strict=True):
            norm.momentum = momentum
