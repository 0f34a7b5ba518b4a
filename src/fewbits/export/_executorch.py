"""ExecuTorch: a dense program, since its CPU backend has no tables for weights."""

import contextlib
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._errors import FewbitsError, FileError, PlanError
from .._file._atomic import check_path
from ._compare import write_compared
from ._lacking import converting, reason, tracing
from ._ready import Ready, dense_row, needs, plain_attention, ready
from ._result import Exported


def executorch(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Tensor | Sequence[Tensor],
    batch: int = 1,
    tolerance: float = 1e-4,
    overwrite: bool = False,
) -> Exported:
    """Write a hardened model for ExecuTorch, run it there and compare with PyTorch.

    The program is for the XNNPACK backend, operators that it lacks for ExecuTorch's portable ones.
    It is dense: XNNPACK takes weights as floats or as integers on an even grid, with no table, and
    folds batch norms into the weights before them. The file is as large as the state dict,
    whatever the number of values; nothing is saved but what a transfer of the file compresses.

    Args:
        model: a hardened module with tensors as inputs and outputs; exported in evaluation mode,
            not modified.
        path: the file, NAME.pte.
        example_inputs: a tensor, or the positional inputs of `forward`; examples along the first
            axis of each. The outputs on them are compared, `batch` at a time; a rest of fewer is
            left out.
        batch: the number of examples that the program takes, always the same; not more than there
            are example inputs.
        tolerance: the largest difference to PyTorch, over the largest output, that passes.
        overwrite: whether to replace a file.

    Returns:
        What was written, how each weight is stored, and how the outputs compare.

    Raises:
        PlanError: if the model is not hardened, has no weight of few values, or cannot be traced,
            or `batch` is not possible.
        FileError: if the file exists or cannot be written, or `path` does not end in .pte.
        FewbitsError: if executorch is missing or cannot convert or run the model, or the outputs
            differ. Nothing is written in any of these cases.
    """
    with needs("executorch"), _quiet():
        import executorch.exir  # pyright: ignore[reportMissingImports]
        import executorch.runtime  # noqa: F401  # pyright: ignore[reportMissingImports]
    path = Path(path)
    check_path(path)
    if path.suffix != ".pte":
        raise FileError(f"{path}: must end in .pte.")
    prepared = ready(model, path, example_inputs, overwrite=overwrite)
    if not 1 <= batch <= len(prepared.inputs[0]):
        raise PlanError(f"batch is {batch}. Give 1 to {len(prepared.inputs[0])} (the examples).")
    data = _program(prepared, batch)
    whole = len(prepared.inputs[0]) // batch * batch
    expected = [output[:whole] for output in prepared.outputs]
    inputs = [x[:whole] for x in prepared.inputs]
    difference, agreement = write_compared(
        path, data, lambda name: run(Path(name), inputs, batch),
        target="ExecuTorch", expected=expected, tolerance=tolerance,
    )  # fmt: skip
    return Exported(
        target="executorch",
        path=path,
        runtime=f"ExecuTorch {importlib.metadata.version('executorch')}",
        bytes=len(data),
        dense_bytes=prepared.state_bytes,
        weights=tuple(dense_row(weight) for weight in prepared.weights),
        examples=whole,
        difference=difference,
        agreement=agreement,
        notes=("dense: XNNPACK has no tables for weights, so few values save nothing here",),
    )


def run(path: Path, inputs: Sequence[Tensor], batch: int) -> list[Any]:
    """Run a program on inputs, `batch` examples at a time; return the outputs as arrays.

    Raises:
        FewbitsError: if ExecuTorch cannot load or run it.
    """
    with _quiet():
        from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

        try:
            # A program holds its bytes, a method neither: freed, they would be read all the same.
            program = Runtime.get().load_program(path.read_bytes())
            method = program.load_method("forward")
            parts = [
                # Copied: the method writes its outputs to the same memory again.
                [y.numpy().copy() for y in method.execute([x.contiguous() for x in part])]
                for part in zip(*(x.split(batch) for x in inputs), strict=True)
            ]
        except Exception as error:  # the runtime raises RuntimeError with a number
            raise FewbitsError(f"ExecuTorch cannot run the program: {reason(error)}") from error
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def _program(prepared: Ready, batch: int) -> bytes:
    inputs = tuple(x[:batch] for x in prepared.inputs)
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
            XnnpackPartitioner,
        )
        from executorch.exir import (  # pyright: ignore[reportMissingImports]
            to_edge_transform_and_lower,
        )

        with tracing("ExecuTorch"):
            traced = torch.export.export(prepared.model, inputs)
        with converting("ExecuTorch", prepared.model, inputs):
            edge = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()])
            return bytes(edge.to_executorch().buffer)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what ExecuTorch and its imports warn about and log."""
    level = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with plain_attention(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
