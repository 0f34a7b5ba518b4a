"""Models that run from packed indices and codebooks, for deployment where memory is the limit.

Linear, attention, convolution and embedding layers keep their weight packed and decode it when they
use it; the weights are frozen. docs/compressed.md says when that pays.
"""

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from ._errors import CodebookError, PlanError, did_you_mean
from ._indexed import bits_of, indexed
from ._packed import (
    MOST_SPARED,
    PACKED,
    Activations,
    PackedWeight,
    attach,
    detach,
    is_compressed,
    is_convolution,
    set_activations,
    spared,
    weight_name,
    why_dense,
    why_float,
)
from ._plan import CODEBOOK_SUFFIX, unwrapped

_MOST_NAMED = 5


@dataclass(frozen=True)
class PackedLayer:
    """One packed weight of a `Memory`.

    Attributes:
        name: of the weight.
        aliases: other layers' names of it, where it is tied.
        shape: of the weight.
        bits: of an index.
        codebooks: number of codebooks (1, or one per channel or group).
        values: representatives of each codebook.
        bytes: of the packed indices and the codebooks.
        bytes_dense: of the weight in the codebook's type.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    bits: int
    codebooks: int
    values: int
    bytes: int
    bytes_dense: int


@dataclass(frozen=True)
class Memory:
    """What the weights of a compressed model take in memory; print it as a table.

    Attributes:
        layers: the packed weights.
        dense: the weights that stayed dense, by name, and why.
        floats: where other layers compute in eight bits, the packed weights that do not, and why.
        other_bytes: bytes of all other parameters and buffers, `dense` included.
    """

    layers: tuple[PackedLayer, ...]
    dense: dict[str, str]
    floats: dict[str, str]
    other_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        return self.other_bytes + sum(row.bytes for row in self.layers)

    @property
    def bytes_dense(self) -> int:
        """Bytes that they would take with dense weights."""
        return self.other_bytes + sum(row.bytes_dense for row in self.layers)

    def __str__(self) -> str:
        """Return the table."""
        lines = [f"{'weight':32} {'shape':>16} {'bits':>4} {'codebooks':>9} {'bytes':>12}"]
        for row in self.layers:
            shape = "x".join(map(str, row.shape))
            lines.append(
                f"{row.name:32} {shape:>16} {row.bits:4} {row.codebooks:9,} {row.bytes:12,}"
            )
            lines += [f"{alias:32} tied to {row.name}" for alias in row.aliases]
        lines += [f"{name:32} dense: {why}" for name, why in self.dense.items()]
        lines += [f"{name:32} computes in floats: {why}" for name, why in self.floats.items()]
        lines.append(f"everything else: {self.other_bytes:,} bytes")
        lines.append(f"whole model: {self.bytes:,} bytes, dense {self.bytes_dense:,}")
        return "\n".join(lines)


@torch.no_grad()
def compress(model: nn.Module, *, activations: Activations = "float") -> Memory:
    """In place: keep the weights with few distinct values as packed indices and codebooks.

    `nn.Linear`, `nn.Embedding`, `nn.MultiheadAttention` and the convolutions of torch keep working
    as they do, with equal results within rounding; their class becomes a child of what it was, and
    their weight is frozen. Everything else stays dense, and the result says why: also the smallest
    convolutions, which are faster so, up to 1% of the bytes of the packed weights. Layers that are
    compressed already stay so.

    Args:
        model: a hardened or quantized module; it does not matter who made the values few.
        activations: "float" computes as the dense layers do. "int8" rounds the inputs of linear
            layers to 255 levels, row by row, and their representatives likewise, codebook by
            codebook, and adds up integers: faster on the CPU, with an error that docs/compressed.md
            measures. It is for up to 16 values, in one codebook or several along the outputs;
            other layers compute in floats, and the result says why.

    Returns:
        What the model takes in memory now.

    Raises:
        CodebookError: if the model is not hardened, or no weight can be packed. The model is then
            unchanged.
        PlanError: if there is no such `activations`; or "int8" fits no layer, and the model
            computes in floats.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.ReLU())
        >>> _ = fewbits.quantize(model, bits=4)
        >>> memory = fewbits.compressed.compress(model)
        >>> memory.layers[0].bytes, memory.layers[0].bytes_dense
        (8256, 65536)
    """
    if activations not in get_args(Activations):
        near = did_you_mean(str(activations), get_args(Activations))
        known = ", ".join(get_args(Activations))
        raise PlanError(f"activations is {activations!r}.{near} Use one of {known}.")
    model = unwrapped(model)
    _refuse_attached(model)
    made: dict[tuple[str, ...], PackedWeight] = {}
    refused: dict[str, nn.Parameter] = {}
    for names, parameter in _weights(model).items():
        if _why_all(model, names) is not None:
            continue
        found = indexed(parameter)
        if found is None or found.bytes_fixed >= parameter.nbytes:
            refused[names[0]] = parameter
            continue
        made[names] = PackedWeight(found, parameter.dtype, parameter.device)
    _attach_all(model, made)
    layers = {name: layer for name, layer in model.named_modules() if is_compressed(layer)}
    if not layers:
        raise CodebookError(_nothing(model, refused))
    why = {name: why_float(layer) for name, layer in layers.items()}
    if activations == "int8" and all(why.values()):
        said = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in why.items())
        raise PlanError(f"int8 fits no layer: {said}. Leave activations at 'float'.")
    for layer in layers.values():
        set_activations(layer, activations)
    return memory(model)


def _attach_all(model: nn.Module, made: dict[tuple[str, ...], PackedWeight]) -> None:
    """In place: give layers their packed weights, but for convolutions too small to be worth it."""
    before = {m for m in model.modules() if isinstance(m, PackedWeight)}
    owners = {names: [_owner(model, name) for name in names] for names in made}
    small = {
        names[0]: math.prod(weight.shape) * weight.codebook.element_size()
        for names, weight in made.items()
        if all(map(is_convolution, owners[names]))
    }
    kept = spared(small, sum(weight.size_bytes for weight in (*before, *made.values())))
    for names, weight in made.items():
        for owner in owners[names] if names[0] not in kept else ():
            attach(owner, weight)


@torch.no_grad()
def decompress(model: nn.Module) -> None:
    """In place: give every compressed layer its dense weight and its own class again.

    Args:
        model: a model with compressed layers; the others stay as they are.
    """
    dense: dict[PackedWeight, nn.Parameter] = {}
    for layer in list(unwrapped(model).modules()):
        if is_compressed(layer):
            weight = layer.get_submodule(PACKED)
            assert isinstance(weight, PackedWeight)
            if weight not in dense:
                dense[weight] = nn.Parameter(weight())
            detach(layer, dense[weight])


def memory(model: nn.Module) -> Memory:
    """Return what the weights of a model take in memory, which are packed, and why others are not.

    Args:
        model: any module.
    """
    model = unwrapped(model)
    owners: dict[PackedWeight, list[str]] = {}
    reasons, eight = {}, False
    for name, layer in model.named_modules(remove_duplicate=False):
        if is_compressed(layer):
            weight = layer.get_submodule(PACKED)
            assert isinstance(weight, PackedWeight)
            full = f"{name}.{weight_name(layer)}".removeprefix(".")
            owners.setdefault(weight, []).append(full)
            reasons[full] = why_float(layer)
            eight = eight or getattr(layer, "activations", "float") == "int8"
    layers = tuple(_row(weight, names) for weight, names in owners.items())
    most = MOST_SPARED * sum(row.bytes for row in layers)
    dense = {
        names[0]: _why_all(model, names) or _why_kept(_owner(model, names[0]), parameter, most)
        for names, parameter in _weights(model).items()
    }
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    other = sum(t.nbytes for t in held.values()) - sum(row.bytes for row in layers)
    floats = {name: why for name, why in reasons.items() if eight and why}
    return Memory(layers, dense, floats, other)


def _row(weight: PackedWeight, names: list[str]) -> PackedLayer:
    groups, k = weight.codebook.shape
    return PackedLayer(
        names[0],
        tuple(names[1:]),
        weight.shape,
        weight.bits,
        codebooks=groups,
        values=k,
        bytes=weight.size_bytes,
        bytes_dense=math.prod(weight.shape) * weight.codebook.element_size(),
    )


def _weights(model: nn.Module) -> dict[tuple[str, ...], nn.Parameter]:
    """Return the dense parameters of two or more axes, by all the names that each has."""
    names: dict[int, list[str]] = {}
    found: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() and parameter.dim() >= 2:
            names.setdefault(id(parameter), []).append(name)
            found[id(parameter)] = parameter
    return {tuple(names[key]): parameter for key, parameter in found.items()}


def _why_all(model: nn.Module, names: tuple[str, ...] | list[str]) -> str | None:
    """Return why a parameter of these names cannot be packed, or nothing."""
    for name in names:
        why = why_dense(_owner(model, name), name.rpartition(".")[2])
        if why is not None:
            return why
    return None


def _why_kept(layer: nn.Module, weight: nn.Parameter, most: float) -> str:
    """Return why a parameter stayed dense that could be packed."""
    if is_convolution(layer) and weight.nbytes <= most:
        return "a convolution so small is faster dense"
    return "its values are not few enough to take less room"


def _owner(model: nn.Module, name: str) -> nn.Module:
    """Return the layer that a parameter of this name belongs to."""
    return model.get_submodule(name.rpartition(".")[0])


def _refuse_attached(model: nn.Module) -> None:
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    attached = sorted(name for name in names if name + CODEBOOK_SUFFIX in names)
    if attached:
        more = f" and {len(attached) - 1} more" if len(attached) > 1 else ""
        raise CodebookError(
            f"the model is not hardened: {attached[0]}{more} still has its codebook attached."
            " Call harden() on its Clustering first."
        )


def _distinct(tensor: Tensor) -> int:
    return len(torch.from_numpy(bits_of(tensor).copy().view(f"<i{tensor.element_size()}")).unique())


def _nothing(model: nn.Module, refused: dict[str, nn.Parameter]) -> str:
    """Say why no weight of a model can be packed."""
    said = [
        f"{name} has {_distinct(weight):,} distinct values in {weight.numel():,} weights"
        for name, weight in list(refused.items())[:_MOST_NAMED]
    ] or [f"{names[0]}: {_why_all(model, names)}" for names in list(_weights(model))[:_MOST_NAMED]]
    what = "; ".join(said) or "it has no weights"
    return (
        f"no weight of the model can be packed: {what}. Train with fewbits.Clustering and harden()"
        " it, or call fewbits.quantize."
    )
