"""What a run does, as a config: from flags or TOML, saved with the run."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._errors import FileError, PlanError, did_you_mean
from .._plan import Granularity, check_k
from ._optimizers import OPTIMIZERS
from .methods import METHODS, REGULARIZERS

# What a list in the TOML file holds, and the least value of each whole number.
_ITEMS: dict[str, type] = {"methods": str, "k": int, "seeds": int, "exclude": str}
_LEAST = {
    "epochs": 1,
    "finetune_epochs": 0,
    "batch_size": 2,
    "train_images": 0,
    "image_size": 0,
    "channels_per_group": 0,
}


@dataclass(frozen=True)
class Config:
    """What to train, on what, how long, and which methods to compare.

    Attributes:
        data: "digits", "cifar10" or a folder.
        model: a name for `fewbits.lab.models.build`.
        width: multiplies the channel counts of our own models.
        methods: names from `fewbits.lab.methods`.
        k: numbers of values per weight.
        seeds: one float training each.
        epochs: epochs of float training that all methods start from.
        finetune_epochs: further epochs, the same number for every method and for the float
            network they are compared with.
        batch_size: images per step.
        optimizer: "sgd", with Nesterov's momentum, or "adamw".
        lr: peak learning rate from scratch.
        finetune_lr: peak learning rate of the further epochs, as a share of `lr`.
        codebook_lr: peak learning rate of the representatives; 0 means as
            `Clustering.param_groups` chooses it.
        weight_decay: of the weights.
        regularizer: what the methods that train pull with, a name from `fewbits.lab.methods`.
        strength: multiplies each method's own default strength.
        rate: bits against squared error in the rate-aware regularizers and the post-training
            method "entropy", as in `fewbits.RateAware`.
        granularity: "layer", "channel" or "group".
        channels_per_group: for "group".
        allocation: "even" gives every weight k values; "measured" gives each as many as
            `fewbits.allocate` finds on the float network, in no more bytes.
        exclude: globs on layer names that are left alone.
        overrides: rules by glob on the layer's name, as `fewbits.plan` takes them.
        train_images: use only so many training images; 0 means all.
        image_size: bring the images of a folder to this size; 0 takes them as they are.
    """

    data: str = "digits"
    model: str = "convnet"
    width: float = 1.0
    methods: tuple[str, ...] = ("kmeans", "penalty-snapped")
    k: tuple[int, ...] = (4,)
    seeds: tuple[int, ...] = (0,)
    epochs: int = 12
    finetune_epochs: int = 6
    batch_size: int = 64
    optimizer: str = "sgd"
    lr: float = 0.05
    finetune_lr: float = 0.2
    codebook_lr: float = 0.0
    weight_decay: float = 5e-4
    regularizer: str = "nearest-2"
    strength: float = 1.0
    rate: float = 0.02
    granularity: Granularity = "layer"
    channels_per_group: int = 0
    allocation: str = "even"
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    train_images: int = 0
    image_size: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot work, by name."""
        for method in self.methods:
            _check_known("methods", method, METHODS)
        _check_known("regularizer", self.regularizer, REGULARIZERS)
        _check_known("optimizer", self.optimizer, OPTIMIZERS)
        _check_known("allocation", self.allocation, dict.fromkeys(("even", "measured")))
        for k in self.k:
            check_k(k)
        for name in ("methods", "k", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise PlanError(f"{name} is {list(values)}. Give at least one, each once.")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise PlanError(f"{name} is {getattr(self, name)}. Give {least} or more.")
        for name in ("lr", "finetune_lr", "width"):
            if not 0 < getattr(self, name) < 1e3:
                raise PlanError(f"{name} is {getattr(self, name)}. Give a number above 0.")
        for name in ("weight_decay", "codebook_lr", "strength", "rate"):
            if not 0 <= getattr(self, name) < 1e6:
                raise PlanError(f"{name} is {getattr(self, name)}. Give 0 or more.")

    def plan_settings(self) -> dict[str, Any]:
        """Return what `fewbits.plan` is told besides the model and k."""
        return {
            "granularity": self.granularity,
            "channels_per_group": self.channels_per_group or None,
            "overrides": {**self.overrides, **dict.fromkeys(self.exclude)},
        }

    def to_toml(self) -> str:
        """Return the config as TOML text that `read_toml` reads back."""
        values = dataclasses.asdict(self)
        tables = values.pop("overrides")
        lines = [f"{name} = {_toml(value)}\n" for name, value in values.items()]
        for pattern, rule in tables.items():
            lines.append(f"\n[overrides.{_toml(pattern)}]\n")
            lines += [f"{key} = {_toml(value)}\n" for key, value in rule.items()]
        return "".join(lines)


def _check_known(name: str, value: str, known: Mapping[str, Any]) -> None:
    if value not in known:
        raise PlanError(
            f"{name}: there is no {value!r}.{did_you_mean(value, known)} Known: {', '.join(known)}."
        )


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    # JSON escapes a string as TOML does, but for DEL, which TOML wants escaped as well.
    return json.dumps(value).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)


def read_toml(path: Path) -> dict[str, Any]:
    """Read the settings in a TOML file.

    Args:
        path: the file.

    Returns:
        The settings by name, types checked, ready for `Config(**settings)`.

    Raises:
        FileError: as `load_toml` and `typed_settings` do.
    """
    return typed_settings(path, load_toml(path))


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file, whatever it holds.

    Raises:
        FileError: if it cannot be read or is not TOML.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: is not TOML ({error}).") from error


def typed_settings(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the names and types of settings that stood in a file.

    Args:
        path: the file, for messages.
        values: as TOML has them; one item may stand for a list of one.

    Returns:
        The settings, ready for `Config(**settings)`.

    Raises:
        FileError: if there is no such setting (with the nearest names), or its value is of the
            wrong type.
    """
    defaults = dataclasses.asdict(Config())
    settings = {}
    for key, value in values.items():
        if key not in defaults:
            raise FileError(
                f"{path}: there is no setting {key!r}.{did_you_mean(key, defaults)}"
                f" Settings: {', '.join(defaults)}."
            )
        if key in _ITEMS:
            items = value if isinstance(value, list) else [value]
            settings[key] = tuple(_typed(path, key, item, _ITEMS[key]) for item in items)
        else:
            settings[key] = _typed(path, key, value, type(defaults[key]))
    return settings


def _typed(path: Path, key: str, value: Any, wanted: type) -> Any:
    """Return `value` as `wanted`, or raise a `FileError`."""
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted:
        word = {str: "text", int: "whole number", float: "number", dict: "table"}[wanted]
        raise FileError(f"{path}: {key} is {value!r}. Give a {word}.")
    if isinstance(value, dict) and not all(isinstance(rule, dict) for rule in value.values()):
        raise FileError(f'{path}: overrides: write [overrides."PATTERN"] and k = 16 below it.')
    return value
