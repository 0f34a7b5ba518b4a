"""What every export asks of a model before any work, and the weights of few values in it."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .._errors import FewbitsError, FileError, PlanError
from .._indexed import Indexed, indexed
from .._plan import CODEBOOK_SUFFIX, unwrapped
from ._result import ExportedWeight

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Clustered:
    """A weight of few values.

    Attributes:
        names: the parameter's name, then its other names where it is tied.
        values: the weight, on the CPU.
        found: its codebooks and indices.
    """

    names: tuple[str, ...]
    values: Tensor
    found: Indexed

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


@dataclass(frozen=True)
class Ready:
    """A model that can be exported.

    Attributes:
        model: a copy on the CPU, in evaluation mode, without gradients.
        inputs: example inputs on the CPU.
        outputs: what the model makes of them.
        weights: the weights of few values, each tensor once.
        state_bytes: bytes of the state dict, tied tensors counted once.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: tuple[Clustered, ...]
    state_bytes: int


def ready(
    model: nn.Module, path: Path, example_inputs: Tensor | Sequence[Tensor], *, overwrite: bool
) -> Ready:
    """Check a model, its inputs and the path of the output, and run the model.

    Args:
        model: a hardened module, not modified.
        path: where the export will be.
        example_inputs: a tensor, or the positional inputs of `forward`.
        overwrite: whether `path` may exist.

    Returns:
        A copy of the model with all that an export needs to know.

    Raises:
        PlanError: if the model is not hardened, has no weight of few values, or cannot be run.
        FileError: if the output exists.
    """
    if path.exists() and not overwrite:
        raise FileError(f"{path}: exists already. Choose another name, or use overwrite=True.")
    if not isinstance(model, nn.Module):
        raise PlanError(f"{type(model).__name__} is no torch module. Load the file into one first.")
    model = unwrapped(model)
    _refuse_attached(model)
    weights = clustered(model)
    inputs = _inputs(example_inputs)
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    with torch.no_grad():
        try:
            outputs = model(*inputs)
        except Exception as error:  # whatever a model raises on inputs it was not made for
            shapes = ", ".join(str(list(x.shape)) for x in inputs)
            raise PlanError(
                f"the model cannot take example inputs of shape {shapes}:"
                f" {type(error).__name__}: {str(error).partition(chr(10))[0]}."
            ) from error
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    if not isinstance(outputs, (tuple, list)) or not all(isinstance(y, Tensor) for y in outputs):
        raise PlanError(
            f"the model returns a {type(outputs).__name__}. Wrap it in a module that returns a"
            " tensor or a tuple of tensors."
        )
    return Ready(model, inputs, tuple(outputs), weights, _state_bytes(model))


def clustered(model: nn.Module) -> tuple[Clustered, ...]:
    """Find the weights that take less room as codebooks and indices, each tensor once.

    Raises:
        PlanError: if there are none.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter.detach()
    result = []
    for key, tensor in tensors.items():
        if tensor.dim() < 2 or tensor.dtype not in FLOATS:
            continue
        values = tensor.cpu().contiguous()
        found = indexed(values)
        if found is not None and found.bytes_fixed < values.numel() * values.element_size():
            result.append(Clustered(tuple(names[key]), values, found))
    if not result:
        raise PlanError(
            "no weight of the model has few values. Harden it (Clustering.harden()) or quantize it"
            " (fewbits.quantize) first."
        )
    return tuple(result)


def _refuse_attached(model: nn.Module) -> None:
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sorted(names):
        base = name.removesuffix(CODEBOOK_SUFFIX)
        if base != name and base in names:
            raise PlanError(
                f"{base} is attached to a Clustering still. Call harden() on that first."
            )


def _inputs(example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    given = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not given or not all(isinstance(x, Tensor) and x.dim() and len(x) for x in given):
        raise PlanError(
            "example_inputs must be a tensor, or several in the order of forward's arguments,"
            " each with one example or more along its first axis."
        )
    return tuple(x.detach().cpu() for x in given)


def _state_bytes(model: nn.Module) -> int:
    tensors = [t for t in model.state_dict().values() if isinstance(t, Tensor)]
    sizes = {(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in tensors}
    return sum(sizes.values())


@contextmanager
def plain_attention() -> Iterator[None]:
    """Compute attention as plain operations inside the `with`: targets lack torch's fused one."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def stored_row(weight: Clustered, stored: str, size: int) -> ExportedWeight:
    """Say how a weight is stored, and in how many bytes."""
    groups, k = weight.found.codebook.shape
    return ExportedWeight(
        weight.name, weight.found.shape, k, groups, stored, size, weight.found.bytes_fixed
    )


def dense_row(weight: Clustered) -> ExportedWeight:
    """Say that a weight is stored as plain floats."""
    return stored_row(weight, "dense", weight.values.nbytes)


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turn a missing package into an error that names the extra to install."""
    try:
        yield
    except ImportError as error:
        package = error.name or str(error)
        raise FewbitsError(
            f"this export needs {package}: pip install 'fewbits[{extra}]'"
        ) from error
