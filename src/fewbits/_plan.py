"""Which weights are clustered, on how many values, at what granularity: the dry run."""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ._errors import PlanError
from ._html import folded, table
from ._rules import Granularity as Granularity
from ._rules import (
    Overrides,
    Pattern,
    check_channels,
    check_granularity,
    check_rules,
    exactly_one,
    settings_of,
    values_for,
)
from ._rules import check_k as check_k

# Ends the name of the codebook's parameter: `weight` has `weight_codebook` beside it.
CODEBOOK_SUFFIX = "_codebook"

_HEAD = ("weight", "shape", "k", "bits", "granularity")

# Weight names and the axis of their output channels (rows of an embedding), by module type.
# A transposed convolution with `groups` holds one output channel of each group in a slice of its
# axis: those share a codebook at granularity "channel".
_KINDS: tuple[tuple[tuple[type[nn.Module], ...], tuple[str, ...], int], ...] = (
    ((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Bilinear), ("weight",), 0),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ("weight",), 1),
    ((nn.Embedding, nn.EmbeddingBag), ("weight",), 0),
    (
        (nn.MultiheadAttention,),
        ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
        0,
    ),
)


@dataclass(frozen=True)
class PlannedWeight:
    """One weight that will be clustered.

    Attributes:
        name: the parameter's name in the model, such as "features.0.weight".
        module_type: class name of the layer it belongs to.
        shape: its shape.
        k: number of representatives in each codebook.
        granularity: "layer", "channel" or "group".
        groups: number of codebooks.
        axis: the channel axis.
        aliases: other names of the same tensor (tied weights).
    """

    name: str
    module_type: str
    shape: tuple[int, ...]
    k: int
    granularity: Granularity = "layer"
    groups: int = 1
    axis: int = 0
    aliases: tuple[str, ...] = ()

    @property
    def bits(self) -> float:
        """log2 of `k`: bits per weight at fixed width."""
        return math.log2(self.k)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class SkippedWeight:
    """One parameter that is left alone.

    Attributes:
        name: the parameter's name.
        shape: its shape.
        reason: why.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    """What will be clustered and what is left alone; print it to read it.

    Attributes:
        selected: the weights to cluster, in the model's order.
        skipped: every other parameter with its reason.
        notes: what was adjusted, such as a k above the number of weights.
    """

    selected: tuple[PlannedWeight, ...]
    skipped: tuple[SkippedWeight, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the plan as a table."""
        rows = [_HEAD, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(c.ljust(n) for c, n in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        lines += [f"left alone: {s.name}: {s.reason}" for s in self.skipped]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, self._total()])

    def _repr_html_(self) -> str:
        """Return the plan as Jupyter shows it."""
        left = [f"{s.name}: {s.reason}" for s in self.skipped]
        below = table(_HEAD, self._rows(), [*self.notes, self._total()])
        return below + folded(f"{len(left)} tensors left alone", left)

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for w in self.selected:
            name = w.name + "".join(f" = {alias}" for alias in w.aliases)
            shape = "x".join(map(str, w.shape))
            grain = w.granularity if w.groups == 1 else f"{w.granularity} ({w.groups} codebooks)"
            rows.append((name, shape, str(w.k), f"{w.bits:.3g}", grain))
        return rows

    def _total(self) -> str:
        total = sum(w.weights for w in self.selected)
        return f"{len(self.selected)} tensors to cluster, {total:,} weights"

    def fingerprint(self) -> list[list[Any]]:
        """Return what a checkpoint must agree on, as plain JSON values."""
        return [[w.name, list(w.shape), w.k, w.groups, w.axis] for w in self.selected]


def plan(
    model: nn.Module,
    *,
    bits: int | None = None,
    k: int | None = None,
    granularity: Granularity = "layer",
    channels_per_group: int | None = None,
    overrides: Overrides | None = None,
) -> Plan:
    """Say which weights of a model would be clustered and how; changes nothing.

    Args:
        model: any module.
        bits: log2 of the number of values per codebook, 0 … 16.
        k: the number of values instead, 1 … 65,536. Exactly one of the two.
        granularity: one codebook per "layer", per output "channel", or per "group" of channels.
        channels_per_group: for "group": how many neighbouring channels share a codebook.
        overrides: rules by glob on the layer's name ("classifier.*") or by module type
            (`nn.Embedding`, or "type:Embedding" as a string), later ones winning: a mapping with
            any of `k`, `bits`, `granularity`, `channels_per_group`, or None to leave it alone.
            A tied weight follows the rules of every layer that holds it.

    Returns:
        The plan. A weight that cannot be clustered is listed as skipped with the reason.

    Raises:
        PlanError: if a number is out of range, a pattern matches no layer with parameters, a rule
            has an unknown key, the model is clustered already, or nothing is left to cluster.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> print(fewbits.plan(model, bits=2, overrides={"1": {"k": 3}}))
        weight    shape  k  bits  granularity
        0.weight  4x8    4  2     layer
        1.weight  2x4    3  1.58  layer
        left alone: 0.bias: bias
        left alone: 1.bias: bias
        2 tensors to cluster, 40 weights
    """
    base = {
        "k": values_for(bits, k),
        "granularity": check_granularity(granularity),
        "channels_per_group": channels_per_group,
    }
    if granularity == "group":
        check_channels(channels_per_group)
    model = unwrapped(model)
    _refuse_attached(model)
    rules = dict(overrides or {})
    modules = dict(model.named_modules(remove_duplicate=False))
    check_rules(rules, {name: m for name, m in modules.items() if m._parameters})

    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    candidates = {name: (module, axis) for name, module, axis in _candidates(modules)}
    selected: list[PlannedWeight] = []
    skipped: list[SkippedWeight] = []
    notes: list[str] = []
    for name, parameter in model.named_parameters():
        aliases = names[id(parameter)]
        owner = next((a for a in aliases if a in candidates), None)
        if owner is None:
            why = _why_not_a_candidate(modules, name)
            skipped.append(SkippedWeight(name, _shape(parameter), why))
            continue
        layers = {a.rpartition(".")[0]: modules[a.rpartition(".")[0]] for a in aliases}
        settings, pattern = settings_of(base, rules, layers)
        row = _decide(owner, parameter, *candidates[owner], aliases, settings, pattern)
        if isinstance(row, SkippedWeight):
            skipped.append(row)
            continue
        selected.append(row)
        if settings is not None and row.k < settings["k"]:
            notes.append(f"{owner}: k lowered from {settings['k']:,} to its {row.k:,} weights")
    if not selected:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:5]) or "it has no parameters"
        raise PlanError(
            f"{type(model).__name__} has nothing to cluster ({reasons}). Give a model with a"
            " trainable weight of a layer type that is clustered."
        )
    return Plan(tuple(selected), tuple(skipped), tuple(notes))


def carried_out(model: nn.Module, bits: int | None, k: int | None, plan_: Plan | None) -> Plan:
    """Return the plan to carry out on `model`, checked against it; warn of what was adjusted.

    Args:
        model: the module that will be changed.
        bits: as in `plan`.
        k: as in `plan`.
        plan_: a plan made before instead. Exactly one of the three.

    Raises:
        PlanError: if not exactly one is given, or the plan does not fit the model.
    """
    exactly_one(bits, k, plan_)
    if plan_ is None:
        plan_ = plan(model, bits=bits, k=k)
    elif not isinstance(plan_, Plan):
        raise PlanError(f"plan is {plan_!r}. Pass what fewbits.plan(model, …) returned.")
    _refuse_attached(model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    for row in plan_.selected:
        weight = weights.get(row.name)
        if weight is None or tuple(weight.shape) != row.shape:
            now = "no such weight" if weight is None else tuple(weight.shape)
            raise PlanError(
                f"{row.name}: the plan says shape {row.shape}, the model has {now}."
                " Make the plan from this model."
            )
        reason = _why_unfit(model.get_submodule(row.name.rpartition(".")[0]), weight)
        if reason:
            raise PlanError(f"{row.name}: since the plan was made: {reason}. Make a new plan.")
    for note in plan_.notes:
        warnings.warn(note, stacklevel=4)
    return plan_


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's module where torch.compile has wrapped it; both share all parameters."""
    while type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
        model = model.get_submodule("_orig_mod")
    return model


def _decide(
    name: str,
    parameter: nn.Parameter,
    module: nn.Module,
    axis: int,
    aliases: list[str],
    settings: Mapping[str, Any] | None,
    pattern: Pattern | None,
) -> PlannedWeight | SkippedWeight:
    """Plan one weight of a layer type that is clustered, or say why it is left alone."""
    shape = _shape(parameter)
    if settings is None:
        rule = pattern.__name__ if isinstance(pattern, type) else repr(pattern)
        return SkippedWeight(name, shape, f"excluded by {rule}")
    groups, reason = 1, _why_unfit(module, parameter)
    if reason is None:
        groups, reason = _groups(settings, shape[axis])
    if reason is not None:
        return SkippedWeight(name, shape, reason)
    return PlannedWeight(
        name=name,
        module_type=type(module).__name__,
        shape=shape,
        k=min(settings["k"], math.prod(shape) // groups),
        granularity=settings["granularity"],
        groups=groups,
        axis=axis,
        aliases=tuple(a for a in aliases if a != name),
    )


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return () if nn.parameter.is_lazy(parameter) else tuple(parameter.shape)


def _candidates(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, int]]:
    for prefix, module in modules.items():
        for attribute, axis in _weights_of(module):
            if module._parameters.get(attribute) is not None:
                yield f"{prefix}.{attribute}" if prefix else attribute, module, axis


def _weights_of(module: nn.Module) -> list[tuple[str, int]]:
    for types, attributes, axis in _KINDS:
        if isinstance(module, types):
            return [(attribute, axis) for attribute in attributes]
    cls = type(module)
    # transformers' Conv1D is a Linear with its weight stored (in, out); known without importing it.
    if cls.__name__ == "Conv1D" and cls.__module__.split(".")[0] == "transformers":
        return [("weight", 1)]
    return []


def _why_not_a_candidate(modules: dict[str, nn.Module], name: str) -> str:
    prefix, _, attribute = name.rpartition(".")
    module = modules[prefix]
    kind = type(module).__name__
    if "original" in attribute and prefix.split(".")[-2:-1] == ["parametrizations"]:
        return "computed by a parametrization; remove it first (torch.nn.utils.parametrize)"
    if "Norm" in kind:
        return f"normalization ({kind})"
    if attribute.startswith("bias") or attribute.endswith("bias"):
        return "bias"
    return f"not a weight of a layer type that is clustered ({kind})"


def _why_unfit(module: nn.Module, parameter: nn.Parameter) -> str | None:
    """Return why a weight of the right layer type cannot be clustered, or nothing."""
    if nn.parameter.is_lazy(parameter):
        return "not initialized yet; run one batch through the model first"
    if parameter.layout != torch.strided:
        return f"sparse ({parameter.layout}); convert it with .to_dense()"
    if parameter.is_quantized:
        return "already quantized; dequantize it first"
    if not parameter.is_floating_point():
        return f"{parameter.dtype} is not a floating-point type; convert it first"
    if parameter.dtype.itemsize < 2:
        return f"{parameter.dtype} is narrower than 16 bits; convert it first"
    if parameter.is_meta:
        return "on the meta device, without values; load the weights first"
    if parameter.numel() == 0:
        return "empty"
    if not parameter.requires_grad:
        return "frozen (requires_grad is False)"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
        return "its gradients are sparse; make the layer with sparse=False"
    return None


def _groups(settings: Mapping[str, Any], channels: int) -> tuple[int, str | None]:
    grain, size = settings["granularity"], settings["channels_per_group"]
    if grain == "layer":
        return 1, None
    if grain == "channel":
        return channels, None
    size = check_channels(size)
    if channels % size:
        return 1, f"{channels} channels do not divide into groups of {size}"
    return channels // size, None


def _refuse_attached(model: nn.Module) -> None:
    """Refuse a model that carries codebooks already."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sorted(names):
        if name.endswith(CODEBOOK_SUFFIX) and name.removesuffix(CODEBOOK_SUFFIX) in names:
            raise PlanError(
                f"{name.removesuffix(CODEBOOK_SUFFIX)} is clustered already."
                " Call harden() on the first Clustering before attaching another."
            )
