"""What a run does, as a config: from flags or TOML, saved with the run."""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._errors import FileError, PlanError, did_you_mean
from .._plan import check_k
from .methods import METHODS


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
        lr: peak learning rate from scratch; 0 takes the model's own default.
        finetune_lr: peak learning rate of the further epochs, as a share of `lr`.
        weight_decay: of the weights.
        strength: multiplies each method's own default strength.
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
    lr: float = 0.05
    finetune_lr: float = 0.2
    weight_decay: float = 5e-4
    strength: float = 1.0
    train_images: int = 0
    image_size: int = 0

    def __post_init__(self):
        """Refuse values that cannot work, by name."""
        for method in self.methods:
            if method not in METHODS:
                raise PlanError(
                    f"methods: unknown method {method!r}.{did_you_mean(method, METHODS)}"
                    f" Known: {', '.join(METHODS)}."
                )
        for k in self.k:
            check_k(k)
        for name in ("methods", "k", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise PlanError(f"{name} is {list(values)}. Give at least one, each once.")
        for name, least in (
            ("epochs", 1),
            ("finetune_epochs", 0),
            ("batch_size", 2),
            ("train_images", 0),
            ("image_size", 0),
        ):
            if getattr(self, name) < least:
                raise PlanError(f"{name} is {getattr(self, name)}. Give {least} or more.")
        for name in ("lr", "finetune_lr", "width"):
            if not 0 < getattr(self, name) < 1e3:
                raise PlanError(f"{name} is {getattr(self, name)}. Give a number above 0.")
        for name in ("weight_decay", "strength"):
            if not 0 <= getattr(self, name) < 1e6:
                raise PlanError(f"{name} is {getattr(self, name)}. Give 0 or more.")

    def to_toml(self) -> str:
        """Return the config as TOML text that `from_toml` reads back."""
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            lines.append(f"{field.name} = {_toml(value)}")
        return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)


def read_toml(path: Path) -> dict[str, Any]:
    """Read the settings in a TOML file.

    Args:
        path: the file.

    Returns:
        The settings by name, types checked, ready for `Config(**settings)`.

    Raises:
        FileError: if it cannot be read, is not TOML, has a key that does not exist (with the
            nearest names), or a value of the wrong type.
    """
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}).") from error
    except tomllib.TOMLDecodeError as error:
        raise FileError(f"{path}: is not TOML ({error}).") from error
    fields = {field.name: field for field in dataclasses.fields(Config)}
    settings = {}
    for key, value in values.items():
        if key not in fields:
            raise FileError(
                f"{path}: there is no setting {key!r}.{did_you_mean(key, fields)}"
                f" Settings: {', '.join(fields)}."
            )
        settings[key] = _typed(path, key, value, fields[key].default)
    return settings


def _typed(path: Path, key: str, value: Any, default: Any) -> Any:
    """Return `value` as the type of `default`, or raise a `FileError`."""
    if isinstance(default, tuple):
        items = value if isinstance(value, list) else [value]
        return tuple(_typed(path, key, item, default[0]) for item in items)
    wanted = type(default)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted:
        raise FileError(f"{path}: {key} is {value!r}. Give a {wanted.__name__}.")
    return value
