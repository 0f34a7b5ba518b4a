"""Arrays of few distinct values, their indices, and the indices as bytes.

Compiled where the package was built with a C compiler, else in NumPy: the same results and the
same bytes, far more slowly. `FEWBITS_NO_NATIVE=1` chooses NumPy.
"""

import os

from . import _numpy

try:
    if os.environ.get("FEWBITS_NO_NATIVE"):
        raise ImportError
    from . import _native as native  # pyright: ignore[reportAttributeAccessIssue]  # compiled
except ImportError:
    native = None

_made = native or _numpy

decode = _made.decode
distinct = _made.distinct
encode = _made.encode
expand = _made.expand
histogram = _made.histogram
pack = _made.pack
remap = _made.remap
reorder = _made.reorder
unpack = _made.unpack
unpack_expand = _made.unpack_expand
