"""The threads that compiled passes run on, kept between calls."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # a child has none of its parent's threads


def spread(work: Callable[[int, int], None], parts: int, threads: int, *, rounds: int = 1) -> None:
    """Do work on ranges of parts, which releases the interpreter's lock, on several threads.

    Args:
        work: called with the first part of a range and the one after its last.
        parts: how many.
        threads: how many, this one among them; it works alone where they are below 2.
        rounds: ranges for each thread; a few, so that none waits long for another.
    """
    if threads < 2:
        work(0, parts)
        return
    pool = _pools.get(threads)
    if pool is None:
        pool = _pools[threads] = ThreadPoolExecutor(threads - 1, "fewbits")
    cuts = [parts * i // (rounds * threads) for i in range(rounds * threads + 1)]
    ranges = iter(list(zip(cuts, cuts[1:], strict=False)))

    def take() -> None:
        for first, last in ranges:  # under the interpreter's lock, so that each is taken once
            if first < last:
                work(first, last)

    others = [pool.submit(take) for _ in range(threads - 1)]
    take()
    for other in others:
        other.result()
