"""The snapped forward pass: layers read snapped weights, gradients pass straight through."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ._codebook import boundaries_of, grouped, grouped_like, ungrouped
from ._kernels import compute_dtype, snap, sums_all
from ._plan import CODEBOOK_SUFFIX
from ._sharded import is_sharded
from ._together import Together

# Where a layer keeps its switches while it is attached; plain Python attribute, not a parameter.
SWITCHES = "_fewbits_switches"


@dataclass
class Switch:
    """What the snapped read of one weight needs besides the weight and its codebook.

    Attributes:
        active: whether the layer reads snapped weights now.
        axis: channel axis of the groups.
        cost: (G, K) added to the squared distance when assigning, by rising representative, in
            squared units of the weights; None for plain nearest.
        together: snaps this layer with others; not copied, as it holds their modules.
    """

    active: bool
    axis: int
    cost: Tensor | None = None
    together: Together | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"together": None}


def _forward(
    weight: Tensor, codebook: Tensor, cost: Tensor | None, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the snapped weight, and the order and boundaries of the (G, K) codebook."""
    ordered, order = codebook.to(compute_dtype(codebook)).sort(dim=1)
    boundaries = boundaries_of(ordered, cost)
    snapped = snap(grouped(weight, len(codebook), axis), ordered, boundaries)
    return ungrouped(snapped, weight, len(codebook), axis), order, boundaries


def _codebook_gradient(
    gradient: Tensor, weight: Tensor, order: Tensor, boundaries: Tensor, axis: int
) -> Tensor:
    """Return the (G, K) gradient of the codebook in its own order, float64."""
    view, values = (grouped_like(t, weight, len(order), axis) for t in (weight, gradient))
    counts, sums = sums_all([values], [view], boundaries)
    # Members whose gradients differ at random move their representative as far as themselves.
    reduced = sums / counts.clamp(min=1).to(sums.dtype).sqrt()
    return torch.empty_like(reduced).scatter_(1, order, reduced)


class _Snap(torch.autograd.Function):
    """`fewbits::snap` without the 100 microseconds that calling a custom operator takes."""

    @staticmethod
    def forward(ctx, weight: Tensor, codebook: Tensor, switch: Switch) -> Tensor:
        rows = codebook if codebook.dim() == 2 else codebook[None]
        snapped, ctx.order, ctx.boundaries = _forward(weight, rows, switch.cost, switch.axis)
        ctx.save_for_backward(weight, codebook)
        ctx.axis = switch.axis
        return snapped

    @staticmethod
    @once_differentiable
    # The decorator's stub makes ctx positional-only; the base class calls it positionally.
    def backward(ctx, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = grad_outputs
        weight, codebook = ctx.saved_tensors
        to_codebook = None
        if ctx.needs_input_grad[1]:
            # Indices are searched again rather than kept: a nanosecond a weight against a byte.
            found = _codebook_gradient(gradient, weight, ctx.order, ctx.boundaries, ctx.axis)
            to_codebook = found.to(codebook.dtype).view_as(codebook)
        return gradient, to_codebook, None


# Custom operators, so that torch.compile sees one opaque call and never unrolls the pieces.
@torch.library.custom_op("fewbits::snap", mutates_args=())
def _snap(weight: Tensor, codebook: Tensor, cost: Tensor | None, axis: int) -> Tensor:
    values, _, _ = _forward(weight, codebook, cost, axis)
    # The strides that the fake below promises; a copy only where channels are not the first axis.
    return values if values.stride() == weight.stride() else torch.empty_like(weight).copy_(values)


@_snap.register_fake
def _(weight, codebook, cost, axis):
    return torch.empty_like(weight)


@torch.library.custom_op("fewbits::snap_codebook_gradient", mutates_args=())
def _snap_codebook_gradient(
    gradient: Tensor, weight: Tensor, codebook: Tensor, cost: Tensor | None, axis: int
) -> Tensor:
    ordered, order = codebook.to(compute_dtype(codebook)).sort(dim=1)
    boundaries = boundaries_of(ordered, cost)
    return _codebook_gradient(gradient, weight, order, boundaries, axis).to(codebook.dtype)


@_snap_codebook_gradient.register_fake
def _(gradient, weight, codebook, cost, axis):
    return torch.empty_like(codebook)


def _keep(ctx, inputs, output):
    weight, codebook, cost, ctx.axis = inputs
    ctx.save_for_backward(weight, codebook, cost)


def _straight_through(ctx, gradient):
    weight, codebook, cost = ctx.saved_tensors
    to_codebook = torch.ops.fewbits.snap_codebook_gradient(
        gradient, weight, codebook, cost, ctx.axis
    )
    return gradient, to_codebook, None, None


_snap.register_autograd(_straight_through, setup_context=_keep)


def snap_through(weight: Tensor, codebook: Tensor, switch: Switch) -> Tensor:
    """Return the snapped weight; its gradient goes to the weight as it is and to the codebook.

    Args:
        weight: any shape, floating point.
        codebook: (K,) or (G, K), in any order.
        switch: granularity and assignment cost.

    Returns:
        Same shape and dtype as `weight`.

    References:
        docs/method.md, eqs. 11 and 12: what of the sum over its members a representative gets.
    """
    if _ordinary(weight):
        return _Snap.apply(weight, codebook, switch)
    rows = codebook if codebook.dim() == 2 else codebook[None]
    return torch.ops.fewbits.snap(weight, rows, switch.cost, switch.axis)


def _ordinary(weight: Tensor) -> bool:
    """Whether nothing traces, transforms or watches what is computed with a weight."""
    return (
        not torch.compiler.is_compiling()
        and type(weight) in (Tensor, nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()  # pyright: ignore
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore
    )


def install(module: nn.Module, attribute: str, switch: Switch) -> None:
    """In place: make `module.attribute` read as snapped weights while the switch is on.

    The module gets a subclass of its own class with one property; its parameters, state dict,
    hooks and name stay as they are.
    """
    switches = module.__dict__.get(SWITCHES)
    if switches is None:
        switches = {}
        object.__setattr__(module, SWITCHES, switches)
    switches[attribute] = switch
    base = _original_class(module)
    module.__class__ = _reading_class(base, tuple(sorted(switches)))


def uninstall(module: nn.Module) -> None:
    """In place: give the module its own class back and forget every switch; idempotent."""
    if SWITCHES in module.__dict__:
        module.__class__ = _without_ours(type(module))
        del module.__dict__[SWITCHES]


def _original_class(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    return cls.__dict__.get("__fewbits_original__", cls)


def _without_ours(cls: type) -> type:
    """Return the class without our property: itself, or made anew where others built on ours."""
    if "__fewbits_original__" in cls.__dict__:
        return cls.__dict__["__fewbits_original__"]
    if not hasattr(cls, "__fewbits_original__"):
        return cls
    # As fully_shard does, which derives a class of its own from the one it finds.
    body = {n: v for n, v in cls.__dict__.items() if n not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(map(_without_ours, cls.__bases__)), body)


_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _reading_class(base: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    key = (base, attributes)
    if key not in _classes:
        body: dict = {name: property(_reader(name)) for name in attributes}
        body |= {"__fewbits_original__": base, "__module__": base.__module__}
        body["__qualname__"] = base.__qualname__
        _classes[key] = type(base.__name__, (base,), body)
    return _classes[key]


def _reader(attribute: str):
    def read(self: nn.Module) -> Tensor | None:
        weight = self._parameters[attribute]
        switch = self.__dict__[SWITCHES].get(attribute)
        if weight is None or switch is None or not switch.active or is_sharded(weight):
            return weight  # a shard is not what the layer computes with
        codebook = self._parameters[attribute + CODEBOOK_SUFFIX]
        assert codebook is not None  # ours: registered when the property was installed
        if switch.together is not None and _ordinary(weight):
            snapped = switch.together.take(weight, codebook)
            if snapped is not None:
                return snapped
        return snap_through(weight, codebook, switch)

    return read
