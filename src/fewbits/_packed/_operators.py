"""The operators that layers call: opaque to torch.compile, with gradients where they make sense.

The weight is frozen: gradients reach the inputs and, through `decode`, the codebook.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from . import _eager

try:
    if os.environ.get("FEWBITS_NO_NATIVE"):
        raise ImportError
    from . import _cpu
except ImportError:
    _cpu = None

_made = _cpu or _eager
# Whether products and convolutions from the indices are faster than decoding the weight.
COMPILED = _cpu is not None and _cpu.SIMD


def convolution_pays(images: int, size: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """See `_cpu.convolution_pays`."""
    return _cpu is not None and COMPILED and _cpu.convolution_pays(images, size, shape)


# Not `torch.library.custom_op`, whose first call imports the compiler: 70 MB of memory.
_LIBRARY = torch.library.Library("fewbits", "FRAGMENT")


def _define(schema: str, function: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    """Return an operator for every device, made of a function of the same name."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fewbits::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fewbits, name).default


def _decode(packed: Tensor, codebook: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Return the dense weight of a shape."""
    shape = tuple(shape)
    count = torch.Size(shape).numel()
    return _made.decode(packed, codebook, shape, axis, (0, count)).view(shape)


def _decode_gradient(gradient: Tensor, packed: Tensor, codebook: Tensor, axis: int) -> Tensor:
    """Return the gradient of each representative: the sum over the weights that share it."""
    sums = torch.zeros(codebook.numel(), dtype=torch.float64, device=codebook.device)
    shape, flat = tuple(gradient.shape), gradient.reshape(-1)
    for start in range(0, len(flat), _eager.BLOCK):
        span = start, min(start + _eager.BLOCK, len(flat))
        where = _eager.places(packed, codebook, shape, axis, span)
        sums.index_add_(0, where, flat[span[0] : span[1]].double())
    return sums.view_as(codebook).to(codebook.dtype)


def _linear(inputs: Tensor, packed: Tensor, codebook: Tensor, rows: int, axis: int) -> Tensor:
    """Return inputs (…, n) times the transposed weight (rows, n), as (…, rows)."""
    flat = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    result = _made.linear(flat, packed, codebook, rows, axis)
    return result.view(*inputs.shape[:-1], rows)


def _linear_int8(inputs: Tensor, packed: Tensor, codebook: Tensor, rows: int, axis: int) -> Tensor:
    """As `_linear`, with inputs and representatives rounded to eight bits."""
    flat = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    result = _made.linear_int8(flat, packed, codebook, rows, axis)
    return result.view(*inputs.shape[:-1], rows)


def _convolve(
    inputs: Tensor, packed: Tensor, codebook: Tensor, shape: Sequence[int], axis: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """Return images (N, C, H, W) convolved with a weight of a shape."""
    return _made.convolve(inputs, packed, codebook, tuple(shape), axis, stride, padding, dilation)


def _fake_convolve(inputs, packed, codebook, shape, axis, stride, padding, dilation) -> Tensor:
    size = _eager.output_size(inputs.shape, shape, stride, padding, dilation)
    return inputs.new_empty(inputs.shape[0], shape[0], *size)


def _take(
    rows: Tensor, packed: Tensor, codebook: Tensor, shape: Sequence[int], axis: int
) -> Tensor:
    """Return rows (…) of the weight, as (…, shape[1])."""
    found = _eager.take(rows.reshape(-1), packed, codebook, tuple(shape), axis)
    return found.view(*rows.shape, shape[1])


def _fake_linear(inputs: Tensor, packed: Tensor, codebook: Tensor, rows: int, axis: int) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], rows)


_PRODUCT = "(Tensor inputs, Tensor packed, Tensor codebook, SymInt rows, int axis) -> Tensor"
decode = _define(
    "decode(Tensor packed, Tensor codebook, SymInt[] shape, int axis) -> Tensor",
    _decode,
    lambda packed, codebook, shape, axis: codebook.new_empty(shape),
)
decode_gradient = _define(
    "decode_gradient(Tensor gradient, Tensor packed, Tensor codebook, int axis) -> Tensor",
    _decode_gradient,
    lambda gradient, packed, codebook, axis: torch.empty_like(codebook),
)
linear = _define(f"linear{_PRODUCT}", _linear, _fake_linear)
linear_int8 = _define(f"linear_int8{_PRODUCT}", _linear_int8, _fake_linear)
convolve = _define(
    "convolve(Tensor inputs, Tensor packed, Tensor codebook, SymInt[] shape, int axis,"
    " SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> Tensor",
    _convolve,
    _fake_convolve,
)
take = _define(
    "take(Tensor rows, Tensor packed, Tensor codebook, SymInt[] shape, int axis) -> Tensor",
    _take,
    lambda rows, packed, codebook, shape, axis: codebook.new_empty(*rows.shape, shape[1]),
)


def _decode_context(ctx, inputs, output):
    packed, codebook, _, axis = inputs
    ctx.save_for_backward(packed, codebook)
    ctx.axis = axis


def _decode_backward(ctx, gradient):
    packed, codebook = ctx.saved_tensors
    return None, decode_gradient(gradient, packed, codebook, ctx.axis), None, None


def _linear_context(ctx, inputs, output):
    values, packed, codebook, rows, axis = inputs
    ctx.save_for_backward(packed, codebook)
    ctx.shape, ctx.axis = (rows, values.shape[-1]), axis


def _linear_backward(ctx, gradient):
    packed, codebook = ctx.saved_tensors
    return gradient @ decode(packed, codebook, ctx.shape, ctx.axis), None, None, None, None


def _convolve_context(ctx, inputs, output):
    images, packed, codebook, shape, axis, stride, padding, dilation = inputs
    ctx.save_for_backward(packed, codebook)
    ctx.size, ctx.shape, ctx.axis = images.shape, shape, axis
    ctx.how = stride, padding, dilation


def _convolve_backward(ctx, gradient):
    packed, codebook = ctx.saved_tensors
    weight = decode(packed, codebook, ctx.shape, ctx.axis)
    back = conv2d_input(ctx.size, weight, gradient, *ctx.how)
    return back, *[None] * 7


torch.library.register_autograd(
    "fewbits::convolve", _convolve_backward, setup_context=_convolve_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "fewbits::decode", _decode_backward, setup_context=_decode_context, lib=_LIBRARY
)
for _name in ("linear", "linear_int8"):  # rounding to eight bits has the gradient of doing nothing
    torch.library.register_autograd(
        f"fewbits::{_name}", _linear_backward, setup_context=_linear_context, lib=_LIBRARY
    )
