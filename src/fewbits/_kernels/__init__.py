"""The nearest-representative search and its sums, for weights viewed as (groups, members).

`_eager`, in plain torch, is the definition, and what runs on every device and for every type.
`_cpu` is the same compiled, for weights in the CPU's memory, where the package was built with a C
compiler; `_triton` the same for CUDA, where Triton is installed, loaded with the first weight
there. `FEWBITS_NO_NATIVE=1` chooses `_eager` throughout.
"""

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar

from torch import Tensor

from . import _eager, _runs
from ._eager import PIECE as PIECE
from ._eager import Measures as Measures
from ._eager import Weights as Weights
from ._eager import accumulate as accumulate
from ._eager import assign_pieces as assign_pieces
from ._eager import compute_dtype as compute_dtype
from ._eager import count as count
from ._eager import gather as gather
from ._eager import index_dtype as index_dtype

try:
    if os.environ.get("FEWBITS_NO_NATIVE"):
        raise ImportError
    from . import _cpu
except ImportError:
    _cpu = None

COMPILED = _cpu is not None
_made = _cpu or _eager

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def for_cuda() -> ModuleType:
    """Return the implementation for CUDA: importing Triton takes a second, so not before."""
    if os.environ.get("FEWBITS_NO_NATIVE"):
        return _eager
    try:
        from . import _triton
    except ImportError:
        return _eager
    return _triton


def _by_device(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that calls its twin for the device of its first tensor."""
    name = function.__name__
    on_cpu = getattr(_made, name)
    plain = getattr(_eager, name)

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        first = arguments[0]
        tensor = first if isinstance(first, Tensor) else next(iter(first), None)  # pyright: ignore
        on_cuda = tensor is not None and tensor.is_cuda
        made = getattr(for_cuda(), name, plain) if on_cuda else on_cpu
        return made(*arguments, **named)

    return call


assign = _by_device(_eager.assign)
cluster_sums = _by_device(_eager.cluster_sums)
measure_all = _by_device(_eager.measure_all)
midpoints = _by_device(_eager.midpoints)
move_all = _by_device(_eager.move_all)
pull_all = _by_device(_eager.pull_all)
snap = _by_device(_eager.snap)
snap_all = _by_device(_eager.snap_all)
std = _by_device(_eager.std)
sums_all = _by_device(_eager.sums_all)

best_runs = _runs.best_runs if _cpu is None else _cpu.best_runs


def kernels() -> dict[str, ModuleType]:
    """Return the implementations there are here, by name, for measuring one against the other."""
    return ({} if _cpu is None else {"compiled": _cpu}) | {"plain torch": _eager}
