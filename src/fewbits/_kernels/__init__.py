"""The nearest-representative search and its sums, for weights viewed as (groups, members).

`_eager`, in plain torch, is the definition, and what runs on every device and for every type.
`_cpu` is the same compiled, for weights in the CPU's memory, where the package was built with a C
compiler. `FEWBITS_NO_NATIVE=1` chooses `_eager` throughout.
"""

import os
from types import ModuleType

from . import _eager
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

assign = _made.assign
cluster_sums = _made.cluster_sums
measure_all = _made.measure_all
midpoints = _made.midpoints
move_all = _made.move_all
pull_all = _made.pull_all
snap = _made.snap
std = _made.std


def kernels() -> dict[str, ModuleType]:
    """Return the implementations there are here, by name, for measuring one against the other."""
    return ({} if _cpu is None else {"compiled": _cpu}) | {"plain torch": _eager}
