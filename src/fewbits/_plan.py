"""Which weights are clustered, on how many values, at what granularity: the dry run."""

import fnmatch
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from ._errors import PlanError, did_you_mean

Granularity = Literal["layer", "channel", "group"]
Rule = Mapping[str, Any] | None
Overrides = Mapping[str | type[nn.Module], Rule]

MOST_VALUES = 65_536
_RULE_KEYS = ("k", "bits", "granularity", "channels_per_group")

# Weight names and the axis of their output channels (rows of an embedding), by module type.
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
        rows = [("weight", "shape", "k", "bits", "granularity")]
        for w in self.selected:
            name = w.name + "".join(f" = {alias}" for alias in w.aliases)
            shape = "x".join(map(str, w.shape))
            grain = w.granularity if w.groups == 1 else f"{w.granularity} ({w.groups} codebooks)"
            rows.append((name, shape, str(w.k), f"{w.bits:.3g}", grain))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(c.ljust(n) for c, n in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        lines += [f"left alone: {s.name}: {s.reason}" for s in self.skipped]
        lines += [f"note: {note}" for note in self.notes]
        total = sum(w.weights for w in self.selected)
        lines.append(f"{len(self.selected)} tensors to cluster, {total:,} weights")
        return "\n".join(lines)

    def fingerprint(self) -> list[list[Any]]:
        """Return what a checkpoint must agree on, as plain JSON values."""
        return [[w.name, list(w.shape), w.k, w.groups, w.axis] for w in self.selected]


def check_k(k: object, where: str = "") -> int:
    """Return `k` as an integer, or raise a `PlanError` that says what is wrong with it."""
    place = f" for {where}" if where else ""
    if isinstance(k, bool) or not isinstance(k, int):
        raise PlanError(f"k is {k!r}{place}. Give a whole number from 1 to {MOST_VALUES:,}.")
    if not 1 <= k <= MOST_VALUES:
        raise PlanError(f"k is {k}{place}. Give a whole number from 1 to {MOST_VALUES:,}.")
    return k


def values_for(bits: object, k: object, where: str = "") -> int:
    """Return the number of values from exactly one of `bits` and `k`.

    Raises:
        PlanError: if both or neither are given, or the one given is out of range.
    """
    place = f" for {where}" if where else ""
    if (bits is None) == (k is None):
        given = "neither is" if bits is None else f"both bits={bits!r} and k={k!r} are"
        raise PlanError(f"give exactly one of bits and k{place}; {given} given.")
    if k is not None:
        return check_k(k, where)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 0 <= bits <= 16:
        raise PlanError(
            f"bits is {bits!r}{place}. Give a whole number from 0 to 16, or k= for other counts."
        )
    return 2**bits


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

    Returns:
        The plan. A weight that cannot be clustered is listed as skipped with the reason.

    Raises:
        PlanError: if a number is out of range, a pattern matches nothing, a rule names an unknown
            key or a layer that cannot be clustered, or nothing is left to cluster.

    Example:
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
        "granularity": _check_granularity(granularity),
        "channels_per_group": channels_per_group,
    }
    _attached(model)
    rules = dict(overrides or {})
    modules = dict(model.named_modules())
    for pattern, rule in rules.items():
        _check_rule(pattern, rule, modules)

    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    candidates = {name: (module, axis) for name, module, axis in _candidates(model)}
    selected, skipped, notes, excluded = [], [], [], set()
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        aliases = names[id(parameter)]
        owner = next((a for a in aliases if a in candidates), None)
        if owner is None:
            skipped.append(SkippedWeight(name, shape, _why_not_a_candidate(modules, name)))
            continue
        module, axis = candidates[owner]
        settings, pattern = _settings(base, rules, modules, aliases)
        reason = _why_unfit(parameter)
        if settings is None:
            skipped.append(SkippedWeight(name, shape, f"excluded by {pattern!r}"))
            excluded.add(name)
            continue
        groups, why = _groups(settings, shape[axis] if shape else 0)
        reason = reason or why
        if reason:
            if pattern == owner.rpartition(".")[0]:
                raise PlanError(
                    f"{pattern!r} asks for {owner}, which cannot be clustered: {reason}."
                )
            skipped.append(SkippedWeight(name, shape, reason))
            continue
        count = settings["k"]
        per_group = math.prod(shape) // groups
        if count > per_group:
            notes.append(f"{owner}: k lowered from {count:,} to its {per_group:,} weights")
            count = per_group
        others = tuple(a for a in aliases if a != owner)
        kind = type(module).__name__
        grain = settings["granularity"]
        selected.append(PlannedWeight(owner, kind, shape, count, grain, groups, axis, others))
    if not selected:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:5]) or "it has no parameters"
        raise PlanError(f"{type(model).__name__} has nothing to cluster ({reasons}).")
    return Plan(tuple(selected), tuple(skipped), tuple(notes))


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
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


def _why_unfit(parameter: nn.Parameter) -> str | None:
    """Return why a weight of the right layer type cannot be clustered, or nothing."""
    if isinstance(parameter, nn.parameter.UninitializedTensorMixin):
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
    return None


def _groups(settings: Mapping[str, Any], channels: int) -> tuple[int, str | None]:
    grain, size = settings["granularity"], settings["channels_per_group"]
    if grain == "layer":
        return 1, None
    if grain == "channel":
        return channels, None
    if size is None or isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise PlanError(f"channels_per_group is {size!r}. Granularity 'group' needs 1 or more.")
    if channels % size:
        return 1, f"{channels} channels do not divide into groups of {size}"
    return channels // size, None


def _check_granularity(value: object) -> str:
    if value not in get_args(Granularity):
        raise PlanError(f"granularity is {value!r}. Use 'layer', 'channel' or 'group'.")
    return str(value)


def _matches(pattern: str | type[nn.Module], layer: str, module: nn.Module) -> bool:
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if pattern.startswith("type:"):
        wanted = pattern.removeprefix("type:")
        return any(cls.__name__ == wanted for cls in type(module).__mro__)
    return fnmatch.fnmatchcase(layer, pattern)


def _check_rule(
    pattern: str | type[nn.Module], rule: Rule, modules: Mapping[str, nn.Module]
) -> None:
    if rule is not None:
        for key in rule:
            if key not in _RULE_KEYS:
                known = ", ".join(_RULE_KEYS)
                raise PlanError(
                    f"overrides[{pattern!r}]: unknown key {key!r}.{did_you_mean(key, _RULE_KEYS)}"
                    f" Known keys: {known}."
                )
        if "k" in rule or "bits" in rule:
            values_for(rule.get("bits"), rule.get("k"), str(pattern))
        if "granularity" in rule:
            _check_granularity(rule["granularity"])
    if any(_matches(pattern, name, module) for name, module in modules.items()):
        return
    if isinstance(pattern, type):
        kinds = sorted({type(m).__name__ for m in modules.values()})
        raise PlanError(f"no layer is a {pattern.__name__}. Types here: {', '.join(kinds)}.")
    if pattern.startswith("type:"):
        near = did_you_mean(pattern, (f"type:{type(m).__name__}" for m in modules.values()))
    else:
        near = did_you_mean(pattern, (n for n in modules if n))
    raise PlanError(f"no layer matches {pattern!r}.{near} fewbits.plan(model) lists all names.")


def _settings(
    base: Mapping[str, Any],
    rules: Overrides,
    modules: Mapping[str, nn.Module],
    aliases: list[str],
) -> tuple[dict[str, Any] | None, str | type[nn.Module] | None]:
    """Return the settings of one weight and the last rule that matched; None if excluded."""
    settings: dict[str, Any] | None = dict(base)
    last = None
    layers = [name.rpartition(".")[0] for name in aliases]
    for pattern, rule in rules.items():
        if not any(
            _matches(pattern, layer, modules[layer]) for layer in layers if layer in modules
        ):
            continue
        last = pattern
        if rule is None:
            settings = None
            continue
        settings = settings or dict(base)
        settings.update({key: value for key, value in rule.items() if key != "bits"})
        if "k" in rule or "bits" in rule:
            settings["k"] = values_for(rule.get("bits"), rule.get("k"), str(pattern))
    return settings, last


CODEBOOK_SUFFIX = "_codebook"


def _attached(model: nn.Module) -> None:
    """Refuse a model that carries codebooks already."""
    for name, _ in model.named_parameters():
        if name.endswith(CODEBOOK_SUFFIX):
            raise PlanError(
                f"{name.removesuffix(CODEBOOK_SUFFIX)} is clustered already."
                " Call harden() on the first Clustering before attaching another."
            )
