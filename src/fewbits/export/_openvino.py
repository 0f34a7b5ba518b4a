"""OpenVINO: the same lookup in its own format, from the ONNX graph."""

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from .._errors import FewbitsError, FileError, PlanError
from .._file._atomic import check_path
from ._compare import compare
from ._onnx import build
from ._ready import needs, ready
from ._result import Exported


def openvino(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Tensor | Sequence[Tensor],
    weights: Literal["indices", "dense"] = "indices",
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
    overwrite: bool = False,
) -> Exported:
    """Write a hardened model for OpenVINO, run it on its CPU plugin and compare with PyTorch.

    With "indices" each weight of few values is a constant of packed indices, looked up in its
    codebooks. The files are small; the plugin decodes the weights once, when it compiles the
    model, which then runs as a dense one does, in the memory of a dense one.

    Args:
        model: a hardened module with tensors as inputs and outputs; exported in evaluation mode,
            not modified.
        path: NAME.xml; the weights lie in NAME.bin beside it.
        example_inputs: a tensor, or the positional inputs of `forward`; examples along the first
            axis of each. The outputs on all of them are compared.
        weights: "indices", or "dense".
        dynamic_batch: whether the model takes any number of examples.
        tolerance: the largest difference to PyTorch, over the largest output, that passes.
        overwrite: whether to replace files.

    Returns:
        What was written, how each weight is stored, and how the outputs compare.

    Raises:
        PlanError: if the model is not hardened, has no weight of few values, or cannot be traced.
        FileError: if a file exists or cannot be written, or `path` does not end in .xml.
        FewbitsError: if OpenVINO or what the ONNX export needs is missing, OpenVINO lacks an
            operator, or the outputs differ. Nothing is written in any of these cases.
    """
    if weights not in ("indices", "dense"):
        raise PlanError(f"weights is {weights!r}. Use indices or dense.")
    with needs("openvino"):
        import onnxscript  # noqa: F401
        import openvino as ov  # pyright: ignore[reportMissingImports]
    path = Path(path)
    check_path(path)
    if path.suffix != ".xml":
        raise FileError(f"{path}: must end in .xml. The weights get the same name with .bin.")
    binary = path.with_suffix(".bin")
    if binary.exists() and not overwrite:
        raise FileError(f"{binary}: exists already. Choose another name, or use overwrite=True.")
    prepared = ready(model, path, example_inputs, overwrite=overwrite)
    data, stored = build(prepared, weights, dynamic_batch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fewbits-", dir=path.parent) as folder:
            written = Path(folder) / path.name
            _convert(data, written)
            outputs = run(written, prepared.inputs)
            difference, agreement = compare("OpenVINO", prepared.outputs, outputs, tolerance)
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
            # The .xml last: without it nothing reads the .bin.
            shutil.move(written.with_suffix(".bin"), binary)
            shutil.move(written, path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error}).") from error
    return Exported(
        target="openvino",
        path=path,
        runtime=f"OpenVINO {ov.__version__.partition('-')[0]}",
        bytes=size,
        dense_bytes=prepared.state_bytes,
        weights=stored,
        examples=len(prepared.inputs[0]),
        difference=difference,
        agreement=agreement,
        notes=("small on disk, decoded in memory when the plugin compiles it",),
    )


def run(path: Path, inputs: Sequence[Tensor]) -> list[Any]:
    """Run a model on the CPU plugin in float32; return the outputs as arrays."""
    import openvino as ov  # pyright: ignore[reportMissingImports]

    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled([tensor.numpy() for tensor in inputs]).values())


def _convert(data: bytes, path: Path) -> None:
    import openvino as ov  # pyright: ignore[reportMissingImports]

    try:
        converted = ov.Core().read_model(data, b"")
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-300:]
        raise FewbitsError(f"OpenVINO cannot read the model: … {reason}") from error
    # Constants stay as they are: 16-bit floats would not be the model's values.
    ov.save_model(converted, path, compress_to_fp16=False)
    # A sixth of the description is indentation.
    path.write_bytes(re.sub(rb">\s+<", b"><", path.read_bytes()))
