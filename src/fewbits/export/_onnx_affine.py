"""Linear layers on even grids as MatMulNBits, which computes from packed integers."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ._onnx_decode import Decoder
from ._ready import Clustered

DOMAIN = "com.microsoft"
_BITS = (2, 4, 8)
_MOST_BLOCK = 128  # weights that share a scale in the operator; a power of 2 from 16
# Of the largest value: a grid's values are sums and products of rounded numbers.
_ROUNDING = 16.0
_MOST_INTEGER = 255
_MOST_SHARES = 8  # of the narrowest gap between two values that a step may be


@dataclass(frozen=True)
class Grid:
    """Codebooks that are even grids: value = step x (integer - zero) + offset.

    Attributes:
        bits: of the integers, 2, 4 or 8.
        integers: (G, K) the integer of each value.
        step: (G,) float64.
        zero: (G,) an integer of the same bits.
        offset: (G,) what is left: 0 where zero lies on the grid.
    """

    bits: int
    integers: NDArray[np.int64]
    step: NDArray[np.float64]
    zero: NDArray[np.int64]
    offset: NDArray[np.float64]


def grid(codebook: NDArray[Any]) -> Grid | None:
    """Find the even grids that rows of values lie on, within the rounding of float32.

    Args:
        codebook: (G, K) floats, each row ascending, its last value repeated.

    Returns:
        The grids, or None where a row lies on none of up to 256 values.
    """
    rows = [_row(row) for row in codebook.astype(np.float64)]
    found = [row for row in rows if row is not None]
    if len(found) < len(rows):
        return None
    step, integers = np.array([row[0] for row in found]), np.stack([row[1] for row in found])
    bits = next(bits for bits in _BITS if integers.max() < 1 << bits)
    start = codebook[:, 0].astype(np.float64)
    zero = np.clip(np.rint(-start / step), 0, (1 << bits) - 1)
    offset = start + zero * step
    offset[np.abs(offset) <= _slack(codebook)] = 0.0
    return Grid(bits, integers.astype(np.int64), step, zero.astype(np.int64), offset)


def _slack(values: NDArray[Any]) -> NDArray[np.float64]:
    return _ROUNDING * np.finfo(np.float32).eps * np.abs(values).max(axis=-1)


def _row(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]] | None:
    """Return the step and the integers of the coarsest even grid that holds ascending values."""
    slack, span = _slack(values), values[-1] - values[0]
    if not np.isfinite(values).all():
        return None
    gaps = np.diff(values)
    gaps = gaps[gaps > slack]
    if not len(gaps):
        return 1.0, np.zeros(len(values))
    for share in range(1, _MOST_SHARES + 1):  # neighbours that nobody uses leave wider gaps
        count = np.rint(span * share / gaps.min())
        if count > _MOST_INTEGER:
            return None
        step = span / count
        integers = np.rint((values - values[0]) / step)
        if (np.abs(values[0] + integers * step - values) <= slack).all():
            return float(step), integers
    return None


def multiply(
    weight: Clustered, grids: Grid, uses: list[ir.Node], int8_activations: bool
) -> Decoder:
    """In place: replace the matrix products of a Linear weight; return the constants added.

    Args:
        weight: (outputs, inputs), one codebook or several along the outputs.
        grids: of its codebooks.
        uses: what `products` found.
        int8_activations: whether the operator may round its inputs to 8 bits in blocks.
    """
    constants = Decoder(weight.name, {})
    outputs, inputs = weight.found.shape
    block = min(_MOST_BLOCK, max(16, 1 << (inputs - 1).bit_length()))
    blocks = math.ceil(inputs / block)
    per_row = outputs // len(grids.step)
    groups, _, run = len(grids.step), None, inputs * per_row
    which = weight.found.indices.reshape(groups, run)
    integers = np.take_along_axis(grids.integers, which.astype(np.int64), axis=1)
    padded = np.zeros((outputs, blocks * block), np.uint8)
    padded[:, :inputs] = integers.reshape(outputs, inputs)
    packed = _packed(padded, grids.bits).reshape(outputs, blocks, -1)
    step, zero, offset = (np.repeat(x, per_row) for x in (grids.step, grids.zero, grids.offset))
    zeros = np.repeat(zero.astype(np.uint8)[:, None], blocks, axis=1)
    given = [
        constants.constant("integers", packed),
        constants.constant("steps", np.repeat(step, blocks).astype(np.float32)),
        constants.constant("zeros", _packed(zeros, grids.bits).reshape(-1)),
    ]
    shift = constants.constant("offsets", offset.astype(np.float32)) if offset.any() else None
    last = constants.constant("last_axis", np.array([-1], np.int64)) if offset.any() else None
    for use in uses:
        _replace(weight.name, use, given, shift, last, {
            "K": inputs, "N": outputs, "bits": grids.bits, "block_size": block,
            "accuracy_level": 4 if int8_activations else 1,
        })  # fmt: skip
    return constants


def products(value: ir.Value) -> list[ir.Node] | None:
    """Return the Gemm and MatMul nodes that use a weight as Linear does; None if others do."""
    found: list[ir.Node] = []
    for node, index in value.uses():
        attributes = {name: a.value for name, a in node.attributes.items()}
        if node.op_type == "Gemm" and index == 1 and attributes.get("transB") == 1:
            if (attributes.get("alpha", 1.0), attributes.get("beta", 1.0)) != (1.0, 1.0):
                return None
            found.append(node)
        elif node.op_type == "Transpose" and list(attributes.get("perm", [1, 0])) == [1, 0]:
            for use, place in node.outputs[0].uses():
                if use.op_type != "MatMul" or place != 1:
                    return None
                found.append(use)
        else:
            return None
    return found


def _packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack the last axis, lowest bits first, its end padded with zeros."""
    per = 8 // bits
    if per == 1:
        return values
    short = -values.shape[-1] % per
    padded = np.pad(values, ((0, 0), (0, short))).reshape(len(values), -1, per)
    return np.bitwise_or.reduce(padded << np.arange(0, 8, bits, dtype=np.uint8), axis=2)


def _replace(
    name: str, use: ir.Node, given: list[ir.Value], shift: ir.Value | None, last: ir.Value | None,
    attributes: dict[str, int],
) -> None:  # fmt: skip
    """In place: put MatMulNBits where a product was, with what an offset and a bias add."""
    graph, old = use.graph, use.outputs[0]
    assert graph is not None  # it was found in one
    activations = use.inputs[0]
    nodes = [ir.node("MatMulNBits", [activations, *given], attributes, domain=DOMAIN)]
    result = nodes[-1].outputs[0]
    terms: list[ir.Value] = []
    if shift is not None and last is not None:
        nodes.append(ir.node("ReduceSum", [activations, last], {"keepdims": 1}))
        nodes.append(ir.node("Mul", [nodes[-1].outputs[0], shift]))
        terms.append(nodes[-1].outputs[0])
    if use.op_type == "Gemm" and len(use.inputs) > 2 and use.inputs[2] is not None:
        terms.append(use.inputs[2])
    for term in terms:
        nodes.append(ir.node("Add", [result, term]))
        result = nodes[-1].outputs[0]
    for i, node in enumerate(nodes):
        node.name = f"{name}.{use.name}.{i}"
        node.outputs[0].name = f"{name}.{old.name}.{i}"
    graph.insert_before(use, nodes)
    result.type, result.shape = old.type, old.shape
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(use, safe=True)
