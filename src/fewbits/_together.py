"""Snapped weights of many small layers in one call, made when the first of them is read.

A forward pass over 150 small layers would else pay 150 times for a sort, two kernels and a node of
the autograd graph, a third of a millisecond each. What is made beforehand is kept until its layer
reads it, once, and only as long as neither the weight nor its codebook has changed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd.function import once_differentiable

from ._kernels import Weights, compute_dtype, midpoints, snap_all, sums_all
from ._plan import CODEBOOK_SUFFIX

# Weights in a layer that is worked on with others: 256 KB of float32. For a larger one a call of
# its own is nothing, and its gradient is added in place instead of returned to autograd.
SMALL = 1 << 16


class Together:
    """Small layers of one kind: on the CPU, of one type and K, that snap to the nearest.

    Args:
        layers: the module, the attribute and the groups of each.
    """

    def __init__(self, layers: Sequence[tuple[nn.Module, str, int]]):
        self.layers = list(layers)
        self._known = [module._parameters[attribute] for module, attribute, _ in layers]
        self._weights: tuple[list[int], Weights | None] | None = None
        # By weight: the state it was snapped in, and its snapped weights.
        self._ready: dict[int, tuple[Any, Tensor]] = {}
        self._taken = len(self.layers)

    def take(self, weight: Tensor, codebook: Tensor) -> Tensor | None:
        """Return snapped weights; None where they had better be made for this layer alone.

        Args:
            weight: of one of the layers.
            codebook: its codebook.

        Returns:
            as `snap_through`.
        """
        state, snapped = self._ready.pop(id(weight), (None, None))
        if snapped is None or state != _state(weight, codebook):
            if 2 * self._taken < len(self.layers):
                return None  # read twice, say: not worth making all anew
            self._make()
            state, snapped = self._ready.pop(id(weight), (None, None))
            if state != _state(weight, codebook):
                return None  # the weight was replaced
        self._taken += 1
        return snapped

    def forget(self) -> None:
        """In place: make all anew at the next read."""
        self._ready = {}
        self._taken = len(self.layers)

    def _make(self) -> None:
        self.forget()
        self._taken = 0
        # FSDP2 shows others while it computes, and frees them when it likes.
        weights: list[Any] = [m._parameters[attribute] for m, attribute, _ in self.layers]
        if any(weight is not known for weight, known in zip(weights, self._known, strict=True)):
            return
        codebooks: list[Any] = [m._parameters[a + CODEBOOK_SUFFIX] for m, a, _ in self.layers]
        views = self._views(weights, codebooks)
        if views is None:
            return
        made = _SnapAll.apply(views, *weights, *codebooks)
        for weight, codebook, snapped in zip(weights, codebooks, made, strict=True):
            self._ready[id(weight)] = (_state(weight, codebook), snapped)

    def _views(self, weights: list[Any], codebooks: list[Any]) -> Weights | None:
        """Return the weights as (G, n) each; None where they are no longer of one kind."""
        pointers = [weight.data_ptr() for weight in weights]
        if self._weights is None or self._weights[0] != pointers:
            views = None
            kinds = {(w.dtype, c.dtype) for w, c in zip(weights, codebooks, strict=True)}
            plain = all(w.is_contiguous() and w.device.type == "cpu" for w in weights)
            if len(kinds) == 1 and plain:
                groups = [groups for _, _, groups in self.layers]
                pairs = zip(weights, groups, strict=True)
                views = Weights(weight.detach().view(g, -1) for weight, g in pairs)
            self._weights = (pointers, views)
        return self._weights[1]


def _state(weight: Tensor, codebook: Tensor) -> Any:
    """Return what changes when a weight, its codebook or what autograd wants of them does."""
    return (
        weight._version,
        codebook._version,
        weight.data_ptr(),
        codebook.data_ptr(),
        weight.requires_grad,
        codebook.requires_grad,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


class _SnapAll(torch.autograd.Function):
    """As `_snapped._Snap` for many weights: one node of the graph, one pass each way."""

    @staticmethod
    def forward(ctx, views: Weights, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, codebooks = tensors[: len(views)], tensors[len(views) :]
        now = _flatten_dense_tensors(codebooks)
        k = codebooks[0].shape[-1]
        ordered, ctx.order = now.view(-1, k).to(compute_dtype(now)).sort(dim=1)
        ctx.boundaries = midpoints(ordered)
        ctx.views, ctx.codebooks = views, codebooks
        # Watched as saved tensors are; saved, they could not be read by two backward passes.
        ctx.watched = [(tensor, tensor._version) for tensor in tensors]
        ctx.set_materialize_grads(False)
        snapped = tuple(torch.empty_like(weight) for weight in weights)
        snap_all(snapped, views, ordered, ctx.boundaries)
        return snapped

    @staticmethod
    @once_differentiable
    # The decorator's stub makes ctx positional-only; the base class calls it positionally.
    def backward(ctx, *gradients: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        count = len(ctx.views)
        wanted = ctx.needs_input_grad[1 + count :]
        here = [i for i in range(count) if gradients[i] is not None and wanted[i]]
        to_codebooks: list[Tensor | None] = [None] * count
        if here:
            for i in here:
                for tensor, version in (ctx.watched[i], ctx.watched[count + i]):
                    if tensor._version != version:
                        raise RuntimeError(
                            "a weight or codebook was modified by an inplace operation between"
                            " the forward pass and backward()."
                        )
            given = [g for i in here if (g := gradients[i]) is not None]
            found = _codebook_gradients(ctx, here, given)
            own = [ctx.codebooks[i] for i in here]
            split = _unflatten_dense_tensors(found.to(own[0].dtype).view(-1), own)
            for i, gradient in zip(here, split, strict=True):
                to_codebooks[i] = gradient
        return (None, *gradients, *to_codebooks)


def _codebook_gradients(ctx, here: list[int], gradients: list[Tensor]) -> Tensor:
    """Return the (R, K) gradient of the codebooks of some layers in their own order, float64."""
    views, boundaries, order = ctx.views, ctx.boundaries, ctx.order
    if len(here) < len(views):
        groups = torch.tensor([len(view) for view in views])
        chosen = torch.zeros(len(views), dtype=torch.bool)
        chosen[here] = True
        rows = chosen.repeat_interleave(groups)
        boundaries, order = boundaries[rows], order[rows]
        views = Weights(views[i] for i in here)
    pairs = zip(gradients, views, strict=True)
    values = [gradient.contiguous().view(view.shape) for gradient, view in pairs]
    counts, sums = sums_all(values, views, boundaries)
    # As `_snapped._codebook_gradient`: eq. 12 of docs/method.md.
    reduced = sums / counts.clamp(min=1).sqrt()
    return torch.empty_like(reduced).scatter_(1, order, reduced)
