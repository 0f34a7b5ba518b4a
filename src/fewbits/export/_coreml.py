"""Core ML: palettized constants, one for each weight of few values."""

import contextlib
import io
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._errors import FewbitsError, FileError, PlanError
from .._file._atomic import check_path
from ._lacking import converting, tracing
from ._ready import Clustered, Ready, needs, plain_attention, ready
from ._result import Exported, ExportedWeight

Precision = Literal["float32", "float16"]
_BITS = (1, 2, 3, 4, 6, 8)  # of an index of constexpr_lut_to_dense
_PREFIX = "_COREML_/"  # of the buffers that coremltools reads palettes from
_PALETTIZED = 2  # coremltools' number of this kind of compression


def coreml(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Tensor | Sequence[Tensor],
    batch: int = 1,
    precision: Precision = "float32",
    overwrite: bool = False,
) -> Exported:
    """Write a hardened model as a Core ML package whose weights are palettized constants.

    Core ML keeps a table (its palette) and indices of 1, 2, 3, 4, 6 or 8 bits for each weight; a
    codebook of another size is padded to the next of these. The package is read again, and each
    constant is compared with its weight, bit for bit in float32. Nothing is run: prediction needs
    a Mac. Needs iOS 18, macOS 15 or later.

    Args:
        model: a hardened module with tensors as inputs and outputs; traced in evaluation mode,
            not modified.
        path: the package, NAME.mlpackage: a folder.
        example_inputs: a tensor, or the positional inputs of `forward`; examples along the first
            axis of each.
        batch: the number of examples that the package takes, always the same; not more than there
            are example inputs.
        precision: of the arithmetic and the tables. "float16" rounds, and runs on the Neural
            Engine.
        overwrite: whether to replace a package.

    Returns:
        What was written and how each weight is stored.

    Raises:
        PlanError: if the model is not hardened, has no weight of few values or one with above
            256, or `batch` or `precision` is not possible.
        FileError: if the package exists or cannot be written, or `path` has another ending.
        FewbitsError: if coremltools is missing or cannot convert the model, or a weight did not
            become such a constant. Nothing is written in any of these cases.
    """
    with needs("coreml"), _quiet():
        import coremltools
    path = Path(path)
    check_path(path)
    if path.suffix != ".mlpackage":
        raise FileError(f"{path}: must end in .mlpackage.")
    if precision not in ("float32", "float16"):
        raise PlanError(f"precision is {precision!r}. Use float32 or float16.")
    prepared = ready(model, path, example_inputs, overwrite=overwrite)
    if not 1 <= batch <= len(prepared.inputs[0]):
        raise PlanError(f"batch is {batch}. Give 1 to {len(prepared.inputs[0])} (the examples).")
    _check_sizes(prepared.weights)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fewbits-", dir=path.parent) as folder:
            written = Path(folder) / path.name
            _convert(prepared, written, batch, precision)
            rows = _checked(prepared, written, precision)
            size = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
            if path.exists():
                shutil.move(path, Path(folder) / "earlier")
            shutil.move(written, path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error}).") from error
    version = torch.__version__.partition("+")[0]
    return Exported(
        target="coreml",
        path=path,
        runtime=f"coremltools {coremltools.__version__}",
        bytes=size,
        dense_bytes=prepared.state_bytes,
        weights=rows,
        examples=0,
        difference=None,
        agreement=None,
        notes=(
            "every constant was read again and equals its weight; prediction needs a Mac",
            f"converted with torch {version}, which is later than coremltools' authors tested",
        ),
    )


def _check_sizes(weights: tuple[Clustered, ...]) -> None:
    for weight in weights:
        k = weight.found.codebook.shape[1]
        if k > 256:
            raise PlanError(
                f"{weight.name}: has {k:,} values; Core ML holds at most 256 in a table. Cluster"
                " it on fewer, or a codebook per channel (granularity)."
            )


def _bits(found_width: int) -> int:
    """Return the bits of an index in Core ML."""
    return next(bits for bits in _BITS if bits >= found_width)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back coremltools' progress bars, and its warnings about torch and missing macOS."""
    log = logging.getLogger("coremltools")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with (
            plain_attention(),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _convert(prepared: Ready, path: Path, batch: int, precision: Precision) -> None:
    inputs = tuple(x[:batch] for x in prepared.inputs)
    with _quiet():
        import coremltools as ct

        types = [
            ct.TensorType(shape=x.shape, dtype=np.float32 if x.is_floating_point() else np.int32)
            for x in inputs
        ]
        with _palettes(prepared):
            with tracing("Core ML"):
                traced = torch.export.export(prepared.model, inputs).run_decompositions({})
            with converting("coremltools", prepared.model, inputs):
                converted: Any = ct.convert(
                    traced, inputs=types, minimum_deployment_target=ct.target.iOS18,
                    compute_precision=getattr(ct.precision, precision.upper()),
                    skip_model_load=True,
                )  # fmt: skip
        converted.save(str(path))
    # Names of operators for debugging, of which the package's manifest does not know.
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)


@contextlib.contextmanager
def _palettes(prepared: Ready) -> Iterator[None]:
    """In place: put beside each weight the buffers that coremltools makes its table from."""
    model = prepared.model
    added: list[tuple[nn.Module, str]] = []

    def add(module: nn.Module, name: str, values: Tensor) -> None:
        module.register_buffer(_PREFIX + name, values)
        added.append((module, _PREFIX + name))

    try:
        add(model, "metadata_version", torch.tensor(1))
        for weight in prepared.weights:
            for name in weight.names:
                owner, _, leaf = name.rpartition(".")
                module = model.get_submodule(owner)
                add(module, f"{leaf}/lut", _table(weight))
                add(module, f"{leaf}/compression_type", torch.tensor([_PALETTIZED]))
        yield
    finally:
        for module, name in added:
            del module._buffers[name]


def _table(weight: Clustered) -> Tensor:
    """Return the codebooks as (1, …, G, …, 1, 2^bits, 1), the last value repeated."""
    found = weight.found
    groups, k = found.codebook.shape
    size = 1 << _bits(found.width)
    padded = np.pad(found.codebook, ((0, 0), (0, size - k)), "edge")
    raw = torch.from_numpy(padded.view(f"<i{padded.itemsize}").copy())
    shape = [1] * len(found.shape)
    shape[found.axis] = groups
    return raw.view(weight.values.dtype).view(*shape, size, 1)


def _checked(prepared: Ready, path: Path, precision: Precision) -> tuple[ExportedWeight, ...]:
    """Read a package again; return how each weight is stored, or refuse one without a table."""
    constants = _constants(path)
    rows = []
    for weight in prepared.weights:
        values = weight.values.to(getattr(torch, precision)).numpy()
        found = weight.found
        groups, k = found.codebook.shape
        bits = _bits(found.width)
        if any(_same(values, constant) for constant in constants):
            padded = "" if k == 1 << bits else f", padded to {1 << bits}"
            size = math.ceil(values.size * bits / 8) + (groups << bits) * values.itemsize
            stored = f"constexpr_lut_to_dense, indices of {bits} bits{padded}"
        elif _used(prepared, weight):
            raise FewbitsError(
                f"{weight.name}: coremltools did not keep this weight as a table of values, so"
                " the package would be dense there. Nothing was written. Leave the weight dense"
                " (exclude it from the plan), or use another layer in its place."
            )
        else:
            stored, size = "left out: forward does not use it", 0
        rows.append(
            ExportedWeight(weight.name, found.shape, k, groups, stored, size, found.bytes_fixed)
        )
    return tuple(rows)


def _constants(path: Path) -> list[NDArray[Any]]:
    """Return what each palettized constant of a package decodes to."""
    with _quiet():
        import coremltools as ct
        from coremltools.converters.mil.frontend.milproto.load import load

        package: Any = ct.models.MLModel(str(path), skip_model_load=True)
        spec = package.get_spec()
        program = load(spec, spec.specificationVersion, file_weights_dir=package.weights_dir)
        return [
            operation.materialized_val_inference()
            for function in program.functions.values()
            for operation in function.operations
            if operation.op_type == "constexpr_lut_to_dense"
        ]


def _same(values: NDArray[Any], constant: NDArray[Any]) -> bool:
    return any(
        constant.shape == form.shape and np.array_equal(constant, form)
        for form in (values, values.swapaxes(-1, -2))
    )


def _used(prepared: Ready, weight: Clustered) -> bool:
    """Whether an output changes when a weight is not a number."""
    parameter = dict(prepared.model.named_parameters(remove_duplicate=False))[weight.name]
    with torch.no_grad():
        parameter.fill_(math.nan)
        outputs = prepared.model(*prepared.inputs)
        parameter.copy_(weight.values)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    pairs = zip(prepared.outputs, outputs, strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)
