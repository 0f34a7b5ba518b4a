"""The implementations of the kernels on this machine, each held against the same references."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fewbits._kernels import _eager

try:
    from fewbits._kernels import _cpu, _native  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # built without a compiler
    _cpu = _native = None
if _cpu is None:  # or told to do without
    _native = None

COMPILED = [] if _native is None else ["compiled", "compiled, portable"]
BACKENDS = ["eager", *COMPILED]


@contextmanager
def using(backend: str) -> Iterator[Any]:
    """Give the module of that name; the portable variant is the one for processors without AVX2."""
    if backend == "eager" or _native is None:
        yield _eager
        return
    try:
        _native.use_simd(backend == "compiled")
        yield _cpu
    finally:
        _native.use_simd(True)
