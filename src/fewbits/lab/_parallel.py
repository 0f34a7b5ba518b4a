"""A network trained by several processes as one process would train it on the whole batch."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode

from .. import _processes
from .._sharded import is_sharded


def parallel(model: nn.Module) -> nn.Module:
    """Return what computes as the model does and averages gradients over all processes.

    Args:
        model: with everything that is to be trained attached; every process gets the first's
            parameters. One that is cut over the processes is returned as it is.
    """
    if _processes.count() == 1 or any(map(is_sharded, model.parameters())):
        return model
    return nn.parallel.DistributedDataParallel(model)


def shared_loss(output: Tensor, labels: Tensor, whole: int) -> Tensor:
    """Return the cross-entropy whose mean over processes is that of the whole batch.

    Args:
        output: (b, classes), for this process's share.
        labels: (b,) int64.
        whole: images in the batch, over all processes; shares may differ in size.
    """
    how = "mean" if len(labels) else "sum"  # the mean of nothing is not a number
    weight = len(labels) * _processes.count() / whole
    return cross_entropy(output, labels, reduction=how) * weight


def one_batch() -> AbstractContextManager[Any]:
    """Return a context in which shares of a batch are normalized as the whole batch would be."""
    return _WholeBatchNorm() if _processes.count() > 1 else nullcontext()


class _AddUp(torch.autograd.Function):
    """The sum over all processes; so is its gradient, since each process's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        torch.distributed.all_reduce(total)
        return total


class _WholeBatchNorm(TorchFunctionMode):
    """Inside the `with`, batch norm in training takes the statistics of all processes' images.

    Whatever calls `torch.nn.functional.batch_norm` is meant, on any device.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute batch norm over all processes, and everything else as it is."""
        kwargs = kwargs or {}
        if func is not nn.functional.batch_norm:
            return func(*args, **kwargs)
        return _batch_norm(func, *args, **kwargs)


def _batch_norm(
    plain: Callable,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *more: float,
    **named: float,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, its statistics over all processes."""
    momentum, eps = (*more, *(0.1, 1e-5)[len(more) :])
    momentum, eps = named.get("momentum", momentum), named.get("eps", eps)
    if not training:
        return plain(input, running_mean, running_var, weight, bias, False, momentum, eps)
    over = [axis for axis in range(input.dim()) if axis != 1]
    column = [1, -1] + [1] * (input.dim() - 2)
    own = input.new_tensor([input.numel() / input.shape[1]])
    found = _AddUp.apply(torch.cat([own, input.sum(over)]))
    assert isinstance(found, Tensor)
    number, mean = found[0].detach(), found[1:] / found[0].detach()
    centered = input - mean.view(column)
    squares = _AddUp.apply(centered.square().sum(over))
    assert isinstance(squares, Tensor)
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean), momentum)
            variance = squares / (number - 1).clamp(min=1)
            running_var.lerp_(variance.to(running_var), momentum)
    scale = (squares / number + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    result = centered * scale.view(column)
    return result if bias is None else result + bias.view(column)
