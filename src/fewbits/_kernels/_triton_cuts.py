"""How the weights of a call are cut into parts, and the tables that tell a launch about them."""

import torch
from torch import Tensor

from . import _triton_passes as passes

TILE = passes.TILE.value
# Programs of one weight at most: a few for each place on the largest devices, so that partial sums
# stay few where weights are many. And tiles in a part at least, so that they stay small beside it.
MOST_PROGRAMS, LEAST_TILES = 1 << 12, 4
# Sums that a program holds at most: 8 to a lane.
MOST_HELD = 256


def power_of_two(number: int) -> int:
    """Return the least power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def cut(groups: int, members: int, k: int) -> tuple[int, int, int, int]:
    """Return a tile's rows and columns, the tiles in a part and the parts of a row."""
    columns, rows, held = TILE, 1, min(power_of_two(k), passes.SUMMED.value)
    if groups > 1 and members <= TILE // 2:  # several short rows in a tile
        columns = max(32, power_of_two(members))
        rows = min(TILE // columns, max(1, MOST_HELD // held))
    along = -(-members // columns)
    tiles = max(LEAST_TILES, held // 8, -(-groups * along // MOST_PROGRAMS))
    return rows, columns, tiles, -(-along // tiles)


class Launch:
    """The weights that one launch can take: those with tiles of one shape.

    Attributes:
        rows, columns: of a tile.
        aligned: whether all weights and their rows begin on 16 bytes.
        fields: the rows of the table, as `_triton_passes` has them.
        programs: how many parts there are.
        table: the rows on the device.
    """

    def __init__(self, rows: int, columns: int, aligned: bool):
        self.rows, self.columns, self.aligned = rows, columns, aligned
        self.fields: list[tuple[int, ...]] = []
        self.programs = 0
        self.table = torch.empty(0)

    def add(self, programs: int, *fields: int) -> None:
        """In place: append a row whose weight takes that many programs."""
        self.fields.append((self.programs, *fields))
        self.programs += programs

    def send(self, device: torch.device) -> None:
        """In place: copy the table to the device."""
        self.table = torch.tensor(self.fields, dtype=torch.int64).to(device)

    def place(self) -> tuple[Tensor, int, int]:
        """Return the table, its rows, and how many comparisons find a program's own."""
        return self.table, len(self.fields), (len(self.fields) - 1).bit_length()
