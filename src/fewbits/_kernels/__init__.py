"""The nearest-representative search and its sums, for weights viewed as (groups, members).

One implementation so far: `_eager`, in plain torch. It is also the definition that a faster one
must equal.
"""

from ._eager import PIECE as PIECE
from ._eager import accumulate as accumulate
from ._eager import assign as assign
from ._eager import assign_pieces as assign_pieces
from ._eager import cluster_sums as cluster_sums
from ._eager import compute_dtype as compute_dtype
from ._eager import count as count
from ._eager import gather as gather
from ._eager import index_dtype as index_dtype
from ._eager import midpoints as midpoints
from ._eager import snap as snap
