"""In a traced ONNX graph: plain weights out, indices and codebooks or packed integers in."""

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import optimizer

from .._errors import FewbitsError, PlanError
from ._lacking import older_torch
from ._onnx_affine import DOMAIN, grid, multiply, products
from ._onnx_decode import MARK, table
from ._ready import Clustered, stored_row
from ._result import ExportedWeight


def compact(program: Any, weights: tuple[Clustered, ...], how: str) -> tuple[ExportedWeight, ...]:
    """In place: replace each weight of few values; say how each is stored.

    Args:
        program: torch's ONNX program, parameters under their own names.
        weights: the weights of few values.
        how: "indices", "affine" or "affine-int8"; see `onnx`.

    Raises:
        PlanError: if no weight can become MatMulNBits where `how` asks for it.
        FewbitsError: if a weight is not in the program as it is in the model.
    """
    graph = program.model.graph
    unused = _unused(program)
    rows, shared = [], {}
    for weight in weights:
        values = [graph.initializers[name] for name in weight.names if name in graph.initializers]
        if not values:
            if not unused.issuperset(weight.names):
                raise FewbitsError(
                    f"{weight.name}: the exporter changed this weight, so that it cannot be stored"
                    f' as indices. Use weights="dense", and please report it.{older_torch()}'
                )
            rows.append(stored_row(weight, "left out: forward does not use it", 0))
            continue
        row = None
        if how in ("affine", "affine-int8"):
            row = _multiplied(graph, weight, values, int8=how == "affine-int8")
        rows.append(row or _looked_up(graph, weight, values, shared))
    for constant in shared.values():
        graph.register_initializer(constant)
    if how != "indices":
        _check_multiplied(rows)
        program.model.opset_imports[DOMAIN] = 1
    # What is left of tracing (shapes, casts) goes; batch norms stay apart from the weights.
    optimizer.fold_constants(
        program.model, should_fold=lambda node: False if MARK in node.metadata_props else None
    )
    for node in graph:
        _drop_zero_bias(node)
    optimizer.remove_unused_nodes(program.model)
    return tuple(rows)


def _looked_up(
    graph: Any, weight: Clustered, values: list[Any], shared: dict[str, Any]
) -> ExportedWeight:
    """In place: replace the initializers of a weight by one decoder."""
    decoder = table(weight.name, weight.found, values[0].dtype or ir.DataType.FLOAT, shared)
    for constant in decoder.initializers:
        graph.register_initializer(constant)
    if len(graph):
        graph.insert_before(graph[0], decoder.nodes)
    else:
        graph.extend(decoder.nodes)
    for value in values:
        del graph.initializers[value.name]
        value.replace_all_uses_with(decoder.nodes[-1].outputs[0], replace_graph_outputs=True)
    return stored_row(weight, f"table, indices of {weight.found.width} bits", decoder.bytes)


def _multiplied(
    graph: Any, weight: Clustered, values: list[Any], *, int8: bool
) -> ExportedWeight | None:
    """In place: replace the products of a Linear weight on even grids; None if it is none."""
    found = weight.found
    groups = len(found.codebook)
    if weight.values.dtype != torch.float32 or len(found.shape) != 2:
        return None
    if groups > 1 and found.axis != 0:
        return None
    grids = grid(found.codebook.view(np.float32))
    uses = [products(value) for value in values]
    if grids is None or not all(uses):
        return None
    constants = multiply(weight, grids, [n for nodes in uses if nodes for n in nodes], int8)
    for constant in constants.initializers:
        graph.register_initializer(constant)
    for value in values:
        for node, _ in list(value.uses()):  # transposes that nothing reads any more
            graph.remove(node, safe=True)
        del graph.initializers[value.name]
    return stored_row(weight, f"MatMulNBits, integers of {grids.bits} bits", constants.bytes)


def _drop_zero_bias(node: Any) -> None:
    """In place: drop the bias of zeros that the exporter gives a convolution without one."""
    if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < 3:
        return
    bias = node.inputs[2]
    while bias is not None and bias.producer() and bias.producer().op_type == "Expand":
        bias = bias.producer().inputs[0]
    constant = bias and bias.const_value
    if constant is not None and constant.size <= 1 and not constant.numpy().any():
        node.replace_input_with(2, None)


def _check_multiplied(rows: list[ExportedWeight]) -> None:
    if not any(row.stored.startswith("MatMulNBits") for row in rows):
        raise PlanError(
            f"no weight can become MatMulNBits ({rows[0].name}, …): it takes float32 Linear layers"
            ' whose values are an even grid. Quantize with method="uniform" or train with the'
            ' regularizer Periodic, or use weights="indices".'
        )


def _unused(program: Any) -> set[str]:
    """Return the parameters that no operation of the traced program reads."""
    traced = program.exported_program
    if traced is None:
        return set()
    users = {node.name: len(node.users) for node in traced.graph.nodes if node.op == "placeholder"}
    names = traced.graph_signature.inputs_to_parameters
    return {name for node, name in names.items() if not users.get(node)}
