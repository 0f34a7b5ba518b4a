"""What a user may ask for: numbers of values, granularity, and rules by layer name or type."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from torch import nn

from ._errors import PlanError, did_you_mean

Granularity = Literal["layer", "channel", "group"]
Rule = Mapping[str, Any] | None
Pattern = str | type[nn.Module]
Overrides = Mapping[Pattern, Rule]

MOST_VALUES = 65_536
_RULE_KEYS = ("k", "bits", "granularity", "channels_per_group")


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


def exactly_one(bits: object, k: object, plan: object) -> None:
    """Refuse anything but one of the three ways to say how many values."""
    given = [n for n, v in (("bits", bits), ("k", k), ("plan", plan)) if v is not None]
    if len(given) != 1:
        raise PlanError(
            f"give exactly one of bits, k and plan; given: {', '.join(given) or 'none'}."
        )


def check_granularity(value: object) -> str:
    """Return `value` if it is a granularity, or raise a `PlanError`."""
    if value not in get_args(Granularity):
        raise PlanError(f"granularity is {value!r}. Use 'layer', 'channel' or 'group'.")
    return str(value)


def check_channels(value: object, where: str = "") -> int:
    """Return `value` if it can be a number of channels per group, or raise a `PlanError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        place = f" for {where}" if where else ""
        raise PlanError(
            f"channels_per_group is {value!r}{place}. Granularity 'group' needs a whole number, 1"
            " or more."
        )
    return value


def check_rules(rules: Overrides, layers: Mapping[str, nn.Module]) -> None:
    """Raise a `PlanError` if a rule is malformed or matches no layer that has parameters.

    Args:
        rules: pattern to rule.
        layers: the modules by name that own parameters themselves.
    """
    for pattern, rule in rules.items():
        _check_rule(pattern, rule)
        if any(matches(pattern, name, module) for name, module in layers.items()):
            continue
        kinds = sorted({type(m).__name__ for m in layers.values()})
        if isinstance(pattern, type):
            raise PlanError(
                f"no layer with weights is a {pattern.__name__}. Types here: {', '.join(kinds)}."
            )
        known = [f"type:{kind}" for kind in kinds] if pattern.startswith("type:") else list(layers)
        raise PlanError(
            f"no layer with weights matches {pattern!r}.{_nearest(pattern, known)}"
            " print(fewbits.plan(model, k=2)) lists all names."
        )


def _nearest(pattern: str, known: Iterable[str]) -> str:
    """Name the layers inside a container, since that is what was meant, else the nearest."""
    known = [name for name in known if name]
    inside = [name for name in known if name.startswith(pattern + ".")]
    if inside:
        return f" It contains {', '.join(map(repr, inside[:3]))}: write {pattern + '.*'!r}."
    return did_you_mean(pattern, known)


def _check_rule(pattern: Pattern, rule: Rule) -> None:
    if not isinstance(pattern, str) and not (
        isinstance(pattern, type) and issubclass(pattern, nn.Module)
    ):
        raise PlanError(
            f"overrides: {pattern!r} is no pattern. Use a glob on layer names, or a module type."
        )
    if rule is None:
        return
    if not isinstance(rule, Mapping):
        raise PlanError(
            f"overrides[{pattern!r}] is {rule!r}. Give a mapping such as {{'k': 16}}, or None to"
            " leave the layer alone."
        )
    for key in rule:
        if key not in _RULE_KEYS:
            raise PlanError(
                f"overrides[{pattern!r}]: unknown key {key!r}.{did_you_mean(str(key), _RULE_KEYS)}"
                f" Known keys: {', '.join(_RULE_KEYS)}."
            )
    if "k" in rule or "bits" in rule:
        values_for(rule.get("bits"), rule.get("k"), str(pattern))
    if "granularity" in rule:
        check_granularity(rule["granularity"])
    if "channels_per_group" in rule:
        check_channels(rule["channels_per_group"], str(pattern))


def matches(pattern: Pattern, layer: str, module: nn.Module) -> bool:
    """Whether a pattern names this layer: by glob, by "type:Name" or by class."""
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if pattern.startswith("type:"):
        wanted = pattern.removeprefix("type:")
        return any(cls.__name__ == wanted for cls in type(module).__mro__)
    return fnmatch.fnmatchcase(layer, pattern)


def settings_of(
    base: Mapping[str, Any], rules: Overrides, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, Any] | None, Pattern | None]:
    """Return the settings of one weight and the last rule that matched; None if excluded.

    Args:
        base: the settings where no rule matches.
        rules: pattern to rule; later ones win.
        layers: the layers that own the weight, by name; several where it is tied.
    """
    settings: dict[str, Any] | None = dict(base)
    last = None
    for pattern, rule in rules.items():
        if not any(matches(pattern, name, module) for name, module in layers.items()):
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
