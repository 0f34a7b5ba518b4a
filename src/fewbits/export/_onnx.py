"""ONNX: weights as indices and codebooks that the graph looks up."""

import importlib.metadata
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._errors import FewbitsError, PlanError
from ._compare import write_compared
from ._lacking import lacking, older_torch
from ._ready import Ready, dense_row, needs, ready
from ._result import Exported, ExportedWeight

Weights = Literal["indices", "affine", "affine-int8", "dense"]
_WEIGHTS: tuple[Weights, ...] = ("indices", "affine", "affine-int8", "dense")
OPSET = 21  # the first with uint4
_MOST_BYTES = (1 << 31) - 1  # of one protobuf message


def onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Tensor | Sequence[Tensor],
    weights: Weights = "indices",
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
    overwrite: bool = False,
) -> Exported:
    """Write a hardened model as an ONNX file, run it in onnxruntime and compare with PyTorch.

    With "indices" each weight of few values is stored as packed indices and its codebooks, which
    the graph looks up: bit for bit the weight. onnxruntime does that once, when it loads the file
    with constant folding (its default); the model then runs as a dense one does, in the memory of
    a dense one or rather more. The file alone is small.

    With "affine" the weights of Linear layers whose codebooks are even grids (of
    `quantize(method="uniform")` or the regularizer `Periodic`) become onnxruntime's MatMulNBits,
    which computes from the packed integers and stays small in memory; "affine-int8" lets it round
    its inputs to 8 bits, which is faster, and needs a `tolerance` of about 0.05. All others are
    looked up.

    Args:
        model: a hardened module with tensors as inputs and outputs; exported in evaluation mode,
            not modified.
        path: the file, usually NAME.onnx.
        example_inputs: a tensor, or the positional inputs of `forward`; examples along the first
            axis of each. The outputs on all of them are compared.
        weights: "indices", "affine", "affine-int8", or "dense" for runtimes that lack the
            operators of the others.
        dynamic_batch: whether the file takes any number of examples.
        tolerance: the largest difference to PyTorch, over the largest output, that passes.
        overwrite: whether to replace a file.

    Returns:
        What was written, how each weight is stored, and how the outputs compare.

    Raises:
        PlanError: if the model is not hardened, has no weight of few values, cannot be traced, or
            has no Linear layer on even grids where "affine" asks for one.
        FileError: if the file exists or cannot be written.
        FewbitsError: if onnx, onnxscript or onnxruntime are missing, the file would be above
            2 GiB, or the outputs differ. Nothing is written in any of these cases.
    """
    check_weights(weights)
    with needs("onnx"):
        import onnx_ir  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    path = Path(path)
    prepared = ready(model, path, example_inputs, overwrite=overwrite)
    data, stored = build(prepared, weights, dynamic_batch)
    difference, agreement = write_compared(
        path, data, lambda name: run(name, prepared.inputs),
        target="onnxruntime", expected=prepared.outputs, tolerance=tolerance,
    )  # fmt: skip
    return Exported(
        target="onnx",
        path=path,
        runtime=f"onnxruntime {onnxruntime.__version__}",
        bytes=len(data),
        dense_bytes=prepared.state_bytes,
        weights=stored,
        examples=len(prepared.inputs[0]),
        difference=difference,
        agreement=agreement,
        notes=(f"opset {OPSET}; tables are small on disk, decoded when a session loads them",),
    )


def check_weights(weights: str) -> None:
    """Refuse an unknown way to store weights."""
    if weights not in _WEIGHTS:
        raise PlanError(f"weights is {weights!r}. Use one of {', '.join(_WEIGHTS)}.")


def build(
    prepared: Ready, weights: Weights, dynamic_batch: bool
) -> tuple[bytes, tuple[ExportedWeight, ...]]:
    """Return the bytes of an ONNX file, and how each weight is stored in it; see `onnx`."""
    from ._onnx_compact import compact

    program = _traced(prepared, dynamic_batch, optimize=weights == "dense")
    if weights == "dense":
        stored = tuple(dense_row(weight) for weight in prepared.weights)
    else:
        stored = compact(program, prepared.weights, weights)
    return _serialized(program.model), stored


def run(path: str, inputs: Sequence[Tensor], *, fold: bool = True) -> list[Any]:
    """Run an ONNX file in onnxruntime.

    Args:
        path: the file.
        inputs: in the order of the graph's inputs.
        fold: whether constants are folded when the file is loaded.

    Returns:
        The outputs as arrays.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about the exporter's spare nodes
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"],
        disabled_optimizers=None if fold else ["ConstantFolding"],
    )  # fmt: skip
    named = zip(session.get_inputs(), inputs, strict=True)
    return list(session.run(None, {node.name: tensor.numpy() for node, tensor in named}))


def _traced(prepared: Ready, dynamic_batch: bool, *, optimize: bool) -> Any:
    """Return torch's ONNX program of the model, its parameters under their own names."""
    # A batch of one would be taken for a constant.
    inputs = tuple(torch.cat([x, x])[:2] for x in prepared.inputs)
    inputs = inputs if dynamic_batch else prepared.inputs
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs) if dynamic_batch else None
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns that torchvision is not there
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the exporter's own use of torch
            program = torch.onnx.export(
                prepared.model, inputs, dynamo=True, dynamic_shapes=shapes, opset_version=OPSET,
                optimize=optimize, verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter raises whatever torch.export and torchlib raise
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        older = older_torch()
        hint = "" if older else lacking(prepared.model, inputs, error)
        if dynamic_batch and not hint:
            hint = " If the batch is fixed in it, use dynamic_batch=False."
        raise PlanError(f"the model cannot be traced for ONNX: {reason}{older}{hint}") from error
    finally:
        log.setLevel(level)
    assert program is not None  # it is where dynamo=True
    return program


def _serialized(model: Any) -> bytes:
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    if size > _MOST_BYTES:
        raise FewbitsError(
            f"the ONNX file would hold {size:,} bytes, above the 2 GiB of one protobuf message."
        )
    model.producer_name, model.producer_version = "fewbits", importlib.metadata.version("fewbits")
    # Torch's notes of where things come from, with paths of this machine, and inferred shapes: more
    # bytes than the rest of the graph. Runtimes infer the shapes for themselves.
    model.graph.metadata_props.clear()
    for at, node in enumerate(model.graph):
        node.metadata_props.clear()
        node.name = f"n{at}"
    data = ir.serde.serialize_model(model)
    del data.graph.value_info[:]
    return data.SerializeToString(deterministic=True)
