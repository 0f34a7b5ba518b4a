"""The operators that layers call: opaque to torch.compile, with gradients where they make sense.

The weight is frozen: gradients reach the inputs and, through `decode`, the codebook.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _eager

try:
    if os.environ.get("FEWBITS_NO_NATIVE"):
        raise ImportError
    from . import _cpu
except ImportError:
    _cpu = None

_made = _cpu or _eager
# Whether products with few inputs are faster than decoding the weight.
COMPILED = _cpu is not None and _cpu.SIMD


@torch.library.custom_op("fewbits::decode", mutates_args=())
def decode(packed: Tensor, codebook: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Return the dense weight of a shape."""
    shape = tuple(shape)
    count = torch.Size(shape).numel()
    return _made.decode(packed, codebook, shape, axis, (0, count)).view(shape)


@decode.register_fake
def _(packed, codebook, shape, axis):
    return codebook.new_empty(shape)


@torch.library.custom_op("fewbits::decode_gradient", mutates_args=())
def decode_gradient(gradient: Tensor, packed: Tensor, codebook: Tensor, axis: int) -> Tensor:
    """Return the gradient of each representative: the sum over the weights that share it."""
    sums = torch.zeros(codebook.numel(), dtype=torch.float64, device=codebook.device)
    shape, flat = tuple(gradient.shape), gradient.reshape(-1)
    for start in range(0, len(flat), _eager.BLOCK):
        span = start, min(start + _eager.BLOCK, len(flat))
        where = _eager.places(packed, codebook, shape, axis, span)
        sums.index_add_(0, where, flat[span[0] : span[1]].double())
    return sums.view_as(codebook).to(codebook.dtype)


@decode_gradient.register_fake
def _(gradient, packed, codebook, axis):
    return torch.empty_like(codebook)


def _decode_context(ctx, inputs, output):
    packed, codebook, _, axis = inputs
    ctx.save_for_backward(packed, codebook)
    ctx.axis = axis


def _decode_backward(ctx, gradient):
    packed, codebook = ctx.saved_tensors
    return None, decode_gradient(gradient, packed, codebook, ctx.axis), None, None


decode.register_autograd(_decode_backward, setup_context=_decode_context)


@torch.library.custom_op("fewbits::linear", mutates_args=())
def linear(inputs: Tensor, packed: Tensor, codebook: Tensor, rows: int, axis: int) -> Tensor:
    """Return inputs (…, n) times the transposed weight (rows, n), as (…, rows)."""
    flat = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    result = _made.linear(flat, packed, codebook, rows, axis)
    return result.view(*inputs.shape[:-1], rows)


@linear.register_fake
def _(inputs, packed, codebook, rows, axis):
    return inputs.new_empty(*inputs.shape[:-1], rows)


def _linear_context(ctx, inputs, output):
    values, packed, codebook, rows, axis = inputs
    ctx.save_for_backward(packed, codebook)
    ctx.shape, ctx.axis = (rows, values.shape[-1]), axis


def _linear_backward(ctx, gradient):
    packed, codebook = ctx.saved_tensors
    weight = decode(packed, codebook, ctx.shape, ctx.axis)
    return gradient @ weight, None, None, None, None


@torch.library.custom_op("fewbits::linear_int8", mutates_args=())
def linear_int8(inputs: Tensor, packed: Tensor, codebook: Tensor, rows: int, axis: int) -> Tensor:
    """As `linear`, with inputs and representatives rounded to eight bits.

    Each row of the inputs and each codebook has a factor of its own; the sums are exact.
    """
    flat = inputs.reshape(-1, inputs.shape[-1])
    integers, factor = _eager.to_bytes(flat)
    values, step = _eager.to_bytes(codebook)
    sums = _made.linear_bytes(integers, packed, values, rows, axis)
    steps = step.repeat_interleave(rows // len(step), dim=0).t()
    result = (sums * (factor * steps)).to(inputs.dtype)
    return result.view(*inputs.shape[:-1], rows)


@linear_int8.register_fake
def _(inputs, packed, codebook, rows, axis):
    return inputs.new_empty(*inputs.shape[:-1], rows)


# As if nothing had been rounded, for both.
linear_int8.register_autograd(_linear_backward, setup_context=_linear_context)
linear.register_autograd(_linear_backward, setup_context=_linear_context)


@torch.library.custom_op("fewbits::take", mutates_args=())
def take(rows: Tensor, packed: Tensor, codebook: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Return rows (…) of the weight, as (…, shape[1])."""
    found = _eager.take(rows.reshape(-1), packed, codebook, tuple(shape), axis)
    return found.view(*rows.shape, shape[1])


@take.register_fake
def _(rows, packed, codebook, shape, axis):
    return codebook.new_empty(*rows.shape, shape[1])
