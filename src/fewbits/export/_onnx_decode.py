"""Indices and codebooks as ONNX initializers, and the nodes that turn them into weights."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .._indexed import Indexed

# Nodes of a decoder carry this, so that the exporter's own folding leaves them alone.
MARK = "fewbits.decode"


@dataclass
class Decoder:
    """The initializers and nodes that make one weight.

    Attributes:
        name: the weight's name, which begins the names of all of them.
        shared: constants that all weights of a file share, by name.
        initializers: the constants of this weight alone.
        nodes: in order; the last one's output is the weight.
    """

    name: str
    shared: dict[str, ir.Value]
    initializers: list[ir.Value] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of the initializers of its own."""
        return sum(v.const_value.nbytes for v in self.initializers if v.const_value is not None)

    def constant(self, what: str, values: NDArray[Any]) -> ir.Value:
        """Add an initializer."""
        return self._initializer(ir.tensor(values, name=f"{self.name}.{what}"))

    def shared_constant(self, name: str, values: NDArray[Any]) -> ir.Value:
        """Return the file's constant of that name, made where it is the first to need it."""
        if name not in self.shared:
            self.shared[name] = _value(ir.tensor(values, name=name))
        return self.shared[name]

    def nibbles(self, what: str, values: NDArray[np.uint8]) -> ir.Value:
        """Add values below 16 as an initializer of half a byte each."""
        padded = np.append(values, np.zeros(values.size % 2, np.uint8))
        packed = padded[0::2] | padded[1::2] << 4
        name, shape = f"{self.name}.{what}", ir.Shape(values.shape)
        return self._initializer(ir.PackedTensor(packed, ir.DataType.UINT4, shape=shape, name=name))

    def node(self, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Add a node and return its output."""
        name = f"{self.name}.decode_{len(self.nodes)}"
        made = ir.node(op, inputs, attributes, name=name, metadata_props={MARK: self.name})
        made.outputs[0].name = name
        self.nodes.append(made)
        return made.outputs[0]

    def _initializer(self, tensor: Any) -> ir.Value:
        self.initializers.append(_value(tensor))
        return self.initializers[-1]


def _value(tensor: Any) -> ir.Value:
    return ir.Value(
        name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )


def table(name: str, found: Indexed, dtype: ir.DataType, shared: dict[str, ir.Value]) -> Decoder:
    """Return a decoder that looks each index up in its codebook: bit for bit the weight.

    Args:
        name: the weight's name.
        found: codebooks and indices.
        dtype: of the weight.
        shared: constants that all weights of a file share; may be added to.

    Returns:
        Its last node's output has the weight's name, shape and type.
    """
    decoder = Decoder(name, shared)
    groups, k = found.codebook.shape
    raw = found.codebook.reshape(-1)
    numpy_type = {"BFLOAT16": ir.DataType.BFLOAT16.numpy()}.get(dtype.name, dtype.numpy())
    codebook = decoder.constant("codebook", raw.view(numpy_type))
    if groups * k == 1:
        decoder.node("Expand", codebook, _constant_shape(decoder, found.shape))
    elif groups == 1:
        indices = _unpacked(decoder, found.indices.reshape(found.shape), found.width)
        decoder.node("Gather", codebook, indices, axis=0)
    else:
        layout = found.layout()
        if k == 1:
            zeros = decoder.constant("zeros", np.zeros(1, np.int32))
            indices = decoder.node("Expand", zeros, _constant_shape(decoder, layout))
        else:
            indices = _unpacked(decoder, found.indices.reshape(layout), found.width)
        first = decoder.constant("first", np.arange(groups, dtype=np.int32)[:, None] * k)
        indices = decoder.node("Add", indices, first)
        indices = decoder.node("Reshape", indices, _constant_shape(decoder, found.shape))
        decoder.node("Gather", codebook, indices, axis=0)
    decoder.nodes[-1].outputs[0].name = name
    return decoder


def _constant_shape(decoder: Decoder, shape: tuple[int, ...]) -> ir.Value:
    name = f"shape_{len(decoder.initializers)}"
    return decoder.constant(name, np.array(shape, np.int64))


def _unpacked(decoder: Decoder, indices: NDArray[np.uint16], width: int) -> ir.Value:
    """Return the indices as int32, from pieces of 8, 4, 2 and 1 bits that add up to `width`."""
    total, low = None, 0
    for bits in _pieces(width):
        piece = (indices >> low & ((1 << bits) - 1)).astype(np.uint8)
        value = _piece(decoder, piece, bits, f"bits_{low}_to_{low + bits - 1}")
        value = decoder.node("Cast", value, to=ir.DataType.INT32)
        if low:
            times = decoder.constant(f"times_{low}", np.array(1 << low, np.int32))
            value = decoder.node("Mul", value, times)
        total = value if total is None else decoder.node("Add", total, value)
        low += bits
    assert total is not None  # the width is 1 or more
    return total


def _pieces(width: int) -> list[int]:
    """Return widths of 8, 4, 2 and 1 that add up to one of 1 to 16."""
    return [8] * (width // 8) + [bits for bits in (4, 2, 1) if width % 8 & bits]


def _piece(decoder: Decoder, values: NDArray[np.uint8], bits: int, what: str) -> ir.Value:
    """Add values of some bits; return them, in their shape, one a byte or, of 4 bits, as uint4.

    uint4 needs opset 21. uint2 would need opset 25, which few runtimes read: several values of 1
    or 2 bits lie in a byte, and a table that all weights share spreads them. Shifting them out
    would do as well, but OpenVINO 2026.4 shifts bytes wrongly.
    """
    if bits == 8:
        return decoder.constant(what, values)
    if bits == 4:
        return decoder.nibbles(what, values)
    per = 8 // bits
    padded = np.append(values, np.zeros(-values.size % per, np.uint8)).reshape(-1, per)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed = np.bitwise_or.reduce(padded << shifts, axis=1)
    spread = decoder.shared_constant(
        f"fewbits.spread_{bits}",
        np.arange(256, dtype=np.uint8)[:, None] >> shifts & (1 << bits) - 1,
    )
    rows = decoder.node("Cast", decoder.constant(what, packed), to=ir.DataType.INT32)
    spread = decoder.node("Gather", spread, rows, axis=0)
    if padded.size > values.size:
        flat = decoder.node("Reshape", spread, _constant_shape(decoder, (-1,)))
        start, stop = (np.array([n], np.int64) for n in (0, values.size))
        spread = decoder.node(
            "Slice", flat, decoder.constant(f"{what}_start", start),
            decoder.constant(f"{what}_stop", stop),
        )  # fmt: skip
    return decoder.node("Reshape", spread, _constant_shape(decoder, values.shape))
