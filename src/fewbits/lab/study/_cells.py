"""From a study's TOML file to its cells: one training or quantization each."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._errors import FileError
from .._folder import fingerprint
from ..config import Config, load_toml, typed_settings

# Settings that are not axes of the grid although their value is a list or a table.
_WHOLE = ("exclude", "overrides")
# Of a Config, what a cell has one of; a file may name several.
_PLURAL = ("methods", "k", "seeds")


@dataclass(frozen=True)
class Cell:
    """One method at one K with one seed, and every other setting.

    Attributes:
        config: with exactly one method, one K and one seed.
    """

    config: Config

    @property
    def method(self) -> str:
        """The method's name."""
        return self.config.methods[0]

    @property
    def k(self) -> int:
        """The number of values."""
        return self.config.k[0]

    @property
    def seed(self) -> int:
        """The seed."""
        return self.config.seeds[0]

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that all settings together decide."""
        return fingerprint(dataclasses.asdict(self.config), 12)

    @property
    def name(self) -> str:
        """What its folder is called."""
        model = self.config.model.rpartition(":")[2]
        return f"{model}-{self.method}-k{self.k}-seed{self.seed}-{self.key}"

    def settings(self) -> dict[str, Any]:
        """Return every setting by name, method, k and seed in the singular."""
        values = dataclasses.asdict(self.config)
        one = {"method": self.method, "k": self.k, "seed": self.seed}
        return one | {name: v for name, v in values.items() if name not in _PLURAL}


@dataclass(frozen=True)
class Study:
    """What a file asks for.

    Attributes:
        name: of the file, without its suffix.
        title: for the report.
        cells: in the order in which they are begun, each once.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]

    @property
    def axes(self) -> list[str]:
        """The settings that differ between cells, besides method, K and seed."""
        every = [cell.settings() for cell in self.cells]
        names = [name for name in every[0] if name not in ("method", "k", "seed")]
        return [name for name in names if any(s[name] != every[0][name] for s in every)]


def read_study(path: Path) -> Study:
    """Read a study's file.

    It holds the settings of `fewbits compare`, of which each may be a list of values: the grid is
    their product. Tables `[[grid]]` hold further settings, each a grid of its own on top of the
    common ones. Seeds vary slowest, so that the first results cover the whole grid.

    Args:
        path: the file.

    Returns:
        The study; a cell that several grids name is there once.

    Raises:
        FileError: if the file cannot be read, or a setting is unknown or of the wrong type.
        PlanError: if a value cannot work.
    """
    values = load_toml(path)
    title = values.pop("title", path.stem)
    if not isinstance(title, str):
        raise FileError(f"{path}: title is {title!r}. Give a text.")
    grids = values.pop("grid", [{}])
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise FileError(f"{path}: write [[grid]], and the settings that vary below it.")
    found: dict[str, Cell] = {}
    for grid in grids:
        for settings in _product(values | grid):
            cell = Cell(Config(**typed_settings(path, settings)))
            found.setdefault(cell.key, cell)
    order = {seed: i for i, seed in enumerate(dict.fromkeys(c.seed for c in found.values()))}
    cells = sorted(found.values(), key=lambda cell: order[cell.seed])
    return Study(path.stem, title, tuple(cells))


def _product(settings: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Yield one dict per combination of the values that are lists."""
    axes = {
        name: value if isinstance(value, list) and name not in _WHOLE else [value]
        for name, value in settings.items()
    }
    for name in _PLURAL:  # a cell has one: the defaults' too
        if name not in axes:
            axes[name] = list(getattr(Config(), name))
    for chosen in itertools.product(*axes.values()):
        yield dict(zip(axes, chosen, strict=True))
