"""Outputs of a runtime against PyTorch's."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._errors import FewbitsError
from .._file._atomic import fill_atomically


def compare(
    target: str, expected: Sequence[Tensor], found: Sequence[NDArray[Any]], tolerance: float
) -> tuple[float, float | None]:
    """Compare what a runtime puts out with what PyTorch does.

    Args:
        target: name of the runtime, for the error.
        expected: PyTorch's outputs.
        found: the runtime's.
        tolerance: the largest relative difference that passes.

    Returns:
        The largest difference over the largest output, and the share of examples whose largest
        output of the first tensor is the same one (None unless that has the shape (N, classes)).

    Raises:
        FewbitsError: if shapes differ or a difference is above `tolerance`.
    """
    shapes = [tuple(a.shape) for a in expected], [tuple(b.shape) for b in found]
    if shapes[0] != shapes[1]:
        raise FewbitsError(
            f"{target}: puts out shapes {shapes[1]}, PyTorch {shapes[0]}. Nothing was written."
        )
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        ours, theirs = a.double().numpy(), np.asarray(b, np.float64)
        if not ours.size:
            continue
        scale = float(np.abs(ours).max()) or 1.0
        difference = float(np.abs(ours - theirs).max()) / scale
        if not difference <= tolerance:  # NaN included
            raise FewbitsError(
                f"{target}: outputs differ from PyTorch's by {difference:.2g} of the largest,"
                f" tolerance {tolerance:g}. Nothing was written; please report it, or allow more"
                " with tolerance=."
            )
        worst = max(worst, difference)
    first = expected[0]
    if first.dim() != 2 or first.shape[1] < 2 or not len(first):
        return worst, None
    same = torch.as_tensor(np.asarray(found[0], np.float64)).argmax(1) == first.double().argmax(1)
    return worst, float(same.double().mean())


def write_compared(
    path: Path,
    data: bytes,
    run: Callable[[str], Sequence[NDArray[Any]]],
    *,
    target: str,
    expected: Sequence[Tensor],
    tolerance: float,
) -> tuple[float, float | None]:
    """Write a file, atomically, that puts out in its runtime what PyTorch does.

    Args:
        path: the file.
        data: its content.
        run: given the name of a file with that content, returns the runtime's outputs.
        target: as for `compare`, and so the rest.
        expected: PyTorch's outputs.
        tolerance: the largest relative difference that passes.

    Returns:
        what `compare` does.

    Raises:
        FewbitsError: as `compare` and `run` do; nothing is then written.
        FileError: if the file cannot be written.
    """
    compared: tuple[float, float | None] = (0.0, None)

    def fill(file: BinaryIO) -> None:
        nonlocal compared
        file.write(data)
        file.flush()
        compared = compare(target, expected, run(file.name), tolerance)

    fill_atomically(path, fill)
    return compared
