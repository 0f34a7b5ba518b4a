"""Layers whose weight is packed indices and a codebook, decoded when it is used.

A layer keeps its identity: only its class changes, to a child of the one it had, and its weight
moves into a `PackedWeight` below it. `layer.weight` decodes, so that whatever reads it gets the
dense weight; nothing keeps it.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import _symbols
from .._indexed import Indexed
from . import _eager, _operators

Activations = Literal["float", "int8"]
# What a layer calls the module that holds its weight.
PACKED = "packed_weight"


class PackedWeight(nn.Module):
    """A weight as packed indices and codebooks, both of them buffers.

    Layers with one weight between them share one such module, and so one set of indices, on
    whatever device or in whatever type they are.

    Attributes:
        indices: (ceil(N x bits / 8),) uint8, in row-major order, the lowest bit first.
        codebook: (G, K), each row ascending.
        shape: the weight's.
        axis: which axis the G codebooks run along.
    """

    indices: Tensor
    codebook: Tensor

    def __init__(self, found: Indexed, dtype: torch.dtype, device: torch.device):
        super().__init__()
        packed = np.zeros(-(-len(found.indices) * found.width // 8), np.uint8)
        _symbols.pack(found.indices, found.width, packed)
        codebook = torch.from_numpy(found.codebook.view(np.uint8).copy()).view(dtype)
        self.register_buffer("indices", torch.from_numpy(packed).to(device))
        self.register_buffer("codebook", codebook.to(device))
        self.shape, self.axis = found.shape, found.axis

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return _eager.width_of(self.codebook)

    @property
    def size_bytes(self) -> int:
        """Bytes of the indices and the codebooks."""
        return self.indices.nbytes + self.codebook.nbytes

    def forward(self) -> Tensor:
        """Return the dense weight."""
        return _operators.decode(self.indices, self.codebook, self.shape, self.axis)

    def linear(self, inputs: Tensor, activations: Activations = "float") -> Tensor:
        """Return inputs (…, n) times the transposed weight, (…, rows)."""
        codebook = self.codebook
        device = inputs.device.type
        if torch.is_autocast_enabled(device):
            wide = torch.get_autocast_dtype(device)
            inputs, codebook = inputs.to(wide), codebook.to(wide)
        if codebook.requires_grad and torch.is_grad_enabled():
            weight = _operators.decode(self.indices, codebook, self.shape, self.axis)
            return nn.functional.linear(inputs, weight.flatten(1))
        product = _operators.linear_int8 if activations == "int8" else _operators.linear
        return product(inputs, self.indices, codebook, self.shape[0], self.axis)

    def take(self, rows: Tensor) -> Tensor:
        """Return rows (…) of the weight, (…, shape[1])."""
        if self.codebook.requires_grad and torch.is_grad_enabled():
            return nn.functional.embedding(rows, self())
        return _operators.take(rows, self.indices, self.codebook, self.shape, self.axis)

    def extra_repr(self) -> str:
        """Return the shape, how many values, and the bytes."""
        shape, (groups, k) = "x".join(map(str, self.shape)), self.codebook.shape
        books = f", {groups} codebooks along axis {self.axis}" if groups > 1 else ""
        return f"{shape}, {self.bits} bits, {k} values{books}, {self.size_bytes:,} bytes"


def _weight(layer: nn.Module) -> Tensor:
    return layer._modules[PACKED]()  # pyright: ignore[reportOptionalCall]


def _linear(layer: Any, input: Tensor) -> Tensor:
    output = layer.packed_weight.linear(input, layer.activations)
    return output if layer.bias is None else output + layer.bias.to(output.dtype)


def _embedding(layer: Any, input: Tensor) -> Tensor:
    return layer.packed_weight.take(input)


def _convolution(layer: Any, input: Tensor) -> Tensor:
    weight = layer.packed_weight
    if not _convolves_packed(layer, weight, input):
        return layer._conv_forward(input, layer.weight, layer.bias)
    output = _operators.convolve(
        input, weight.indices, weight.codebook, weight.shape, weight.axis, layer.stride,
        layer.padding, layer.dilation,
    )  # fmt: skip
    return output if layer.bias is None else output + layer.bias[:, None, None]


def _convolves_packed(layer: Any, weight: PackedWeight, input: Tensor) -> bool:
    """Whether a convolution is computed from the indices, without its dense weight."""
    codebook = weight.codebook
    if not (
        input.dim() == 4
        and input.device.type == "cpu"
        and input.dtype == codebook.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not (codebook.requires_grad and torch.is_grad_enabled())
        and (len(codebook) == 1 or weight.axis == 0)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and input.shape[1] == weight.shape[1]
    ):
        return False
    size = _eager.output_size(
        input.shape, weight.shape, layer.stride, layer.padding, layer.dilation
    )
    return min(size) > 0 and _operators.convolution_pays(len(input), size, weight.shape)


def _linear_repr(layer: Any) -> str:
    plain = nn.Linear.extra_repr(layer)
    return plain if layer.activations == "float" else f"{plain}, activations=int8"


def weight_name(layer: nn.Module | type[nn.Module]) -> str:
    """Return the parameter of a layer or a class of layers that can be packed."""
    kind = layer if isinstance(layer, type) else type(layer)
    return "in_proj_weight" if issubclass(kind, nn.MultiheadAttention) else "weight"


def _compressed(base: type[nn.Module], name: str, **more: Any) -> type[nn.Module]:
    """Return a child of a layer's class that reads its weight from `packed_weight`."""
    members = {
        "__module__": __name__,
        "__doc__": f"`{base.__name__}` with a packed weight.",
        weight_name(base): property(_weight),
    }
    return type(name, (base,), members | more)


_LINEAR: dict[str, Any] = {
    "forward": _linear,
    "extra_repr": _linear_repr,
    "activations": "float",
}
CompressedLinear = _compressed(nn.Linear, "CompressedLinear", **_LINEAR)
# What nn.MultiheadAttention has for its output.
CompressedProjection = _compressed(
    NonDynamicallyQuantizableLinear, "CompressedProjection", **_LINEAR
)
CompressedAttention = _compressed(nn.MultiheadAttention, "CompressedAttention")
CompressedEmbedding = _compressed(nn.Embedding, "CompressedEmbedding", forward=_embedding)
CompressedConv1d = _compressed(nn.Conv1d, "CompressedConv1d")
CompressedConv2d = _compressed(nn.Conv2d, "CompressedConv2d", forward=_convolution)
CompressedConv3d = _compressed(nn.Conv3d, "CompressedConv3d")
CompressedConvTranspose1d = _compressed(nn.ConvTranspose1d, "CompressedConvTranspose1d")
CompressedConvTranspose2d = _compressed(nn.ConvTranspose2d, "CompressedConvTranspose2d")
CompressedConvTranspose3d = _compressed(nn.ConvTranspose3d, "CompressedConvTranspose3d")

_CLASSES = {
    made.__bases__[0]: made
    for made in (
        CompressedLinear, CompressedProjection, CompressedAttention, CompressedEmbedding,
        CompressedConv1d, CompressedConv2d, CompressedConv3d,
        CompressedConvTranspose1d, CompressedConvTranspose2d, CompressedConvTranspose3d,
    )
}  # fmt: skip


def is_compressed(layer: nn.Module) -> bool:
    """Whether a layer's weight is packed."""
    return type(layer) in _CLASSES.values()


def why_dense(layer: nn.Module, attribute: str) -> str | None:
    """Return why a layer's parameter cannot be packed, or nothing."""
    if type(layer) not in _CLASSES:
        return f"{type(layer).__name__} has no compressed form"
    if attribute != weight_name(layer):
        return "it is not the layer's weight"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "max_norm changes the weight in the forward pass"
    return None


def set_activations(layer: Any, activations: Activations) -> None:
    """In place: set how a compressed layer computes; in floats where int8 is not possible."""
    if hasattr(layer, "activations"):
        layer.activations = "float" if why_float(layer) else activations


def why_float(layer: Any) -> str | None:
    """Return why a compressed layer cannot compute in eight bits, or nothing."""
    if not hasattr(layer, "activations"):
        return f"{type(layer).__name__} has no int8 form"
    weight: PackedWeight = layer.packed_weight
    columns = weight.shape[1]
    if weight.bits not in range(1, _eager.MOST_BYTE_BITS + 1):
        return f"{weight.bits} bits; int8 is for 1 to {_eager.MOST_BYTE_BITS}"
    if len(weight.codebook) > 1 and weight.axis:
        return "its codebooks run along the inputs"
    if columns * weight.bits % 8:
        return f"rows of {columns:,} inputs at {weight.bits} bits do not end with a byte"
    if columns > _eager.MOST_BYTE_COLUMNS:
        return f"{columns:,} inputs; int8 is for at most {_eager.MOST_BYTE_COLUMNS:,}"
    return None


def attach(layer: nn.Module, weight: PackedWeight) -> None:
    """In place: give a layer a packed weight instead of its dense one."""
    del layer._parameters[weight_name(layer)]
    layer.__class__ = _CLASSES[type(layer)]
    layer.register_module(PACKED, weight)


def detach(layer: nn.Module, weight: nn.Parameter) -> None:
    """In place: give a layer a dense weight instead of its packed one."""
    del layer._modules[PACKED]
    vars(layer).pop("activations", None)
    layer.__class__ = type(layer).__bases__[0]
    own = layer._parameters
    others = dict(own)
    own.clear()  # the weight comes first again
    layer.register_parameter(weight_name(layer), weight)
    own.update(others)
