"""What is said where a model cannot be traced or converted: why, and in which layer."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from .._errors import FewbitsError, PlanError

# The oldest PyTorch whose ONNX exporter does all that the tests ask for.
TESTED = "2.13"

# How the converters' messages name an operator.
_NAMES = re.compile(r"torch\._?ops\.\w+\.(\w+)|fx node (\w+)")


def reason(error: Exception) -> str:
    """Return the beginning of what an error says, in one line."""
    return " ".join(str(error).split())[:300]


@contextmanager
def tracing(target: str) -> Iterator[None]:
    """Trace a model with a fixed number of examples inside the `with`.

    Raises:
        PlanError: for whatever tracing meets.
    """
    try:
        yield
    except Exception as error:  # torch.export raises whatever it meets
        raise PlanError(
            f"the model cannot be traced for {target}: {reason(error)}. If it takes a fixed number"
            " of examples, give that as batch=."
        ) from error


@contextmanager
def converting(converter: str, model: nn.Module, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Convert a model that was traced with some inputs inside the `with`.

    Raises:
        FewbitsError: for whatever the converter meets.
    """
    try:
        yield
    except Exception as error:  # converters raise whatever they meet
        raise FewbitsError(
            f"{converter} cannot convert the model: {type(error).__name__}: {reason(error)}."
            f"{lacking(model, inputs, error)}"
        ) from error


def older_torch() -> str:
    """Return a sentence on this PyTorch where it is older than what exports were tested with."""
    if TorchVersion(torch.__version__) >= TESTED:
        return ""
    return (
        f" The exporter of PyTorch {torch.__version__} fails at some layers, batch norm among them:"
        f" install PyTorch {TESTED} or newer."
    )


def lacking(model: nn.Module, inputs: Sequence[Tensor], error: BaseException) -> str:
    """Return a sentence on the layer whose operator an error names, or nothing if it names none.

    Args:
        model: what was to be converted.
        inputs: what it was traced with.
        error: what the converter raised, its causes included.
    """
    said, cause = "", error
    while cause is not None:
        said, cause = f"{said} {cause}", cause.__cause__
    named = _NAMES.search(said)
    if named is None:
        return ""
    name = named[1] or named[2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch.export.export(model, tuple(inputs)).graph
    except Exception:  # whatever tracing raises: the converter's own message has to do
        return ""
    for node in graph.nodes:
        found = getattr(node.target, "__name__", "").partition(".")[0]
        if node.op == "call_function" and (found == name or found.endswith(f"_{name}")):
            layers = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
            where = f"layer {layers[-1]}" if layers else "the model's own forward"
            return (
                f" The target lacks the operator {found}, of {where}: compute that part in another"
                " way, or choose another target."
            )
    return ""
