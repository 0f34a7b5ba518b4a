"""What the Triton kernels are tried on, in the interpreter and on a GPU, and how exact they are."""

from typing import Any

import torch
from kernels.test_kernels import measured_by_brute_force

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# Each way to cut a weight: one number, less than a tile, more than one, more than one part; rows
# that share a tile, rows of their own tiles. And each way to find and to sum: comparisons,
# bisection, the clusters of several programs.
CASES = [
    (1, 1, 1),
    (1, 7, 2),
    (1, 5_201, 5),
    (1, 700, 16),
    (1, 700, 17),
    (3, 501, 4),
    (70, 27, 3),
    (2, 1_025, 3),
    (2, 40, 66),
]
# A tile's sum in float32 is 31 additions in a lane, five across lanes, and a rounding of the term.
ROUNDING = 37 * 2**-24


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_measured(found: Any, weight: torch.Tensor, codebook: torch.Tensor, power: int) -> None:
    """Compare what `measure_all` found for one weight: total, spread, counts, sums."""
    total, spread, counts, sums = measured_by_brute_force(weight, codebook, power)
    torch.testing.assert_close(found[0], total, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(found[1], spread, rtol=2 * ROUNDING, atol=0)
    assert torch.equal(found[2], counts)
    assert ((found[3] - sums).abs() <= ROUNDING * total + 1e-30).all()
