"""Work on tensors in several threads, results in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from .._errors import FileError

Item = TypeVar("Item")
Result = TypeVar("Result")
# Called with an iterable and its length; returns what to iterate over instead, such as a bar.
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


def check_threads(threads: int | None) -> int:
    """Return how many threads to use; the processors, at most 4, where it is not said.

    Raises:
        FileError: if it is not a whole number from 1.
    """
    if threads is None:
        return min(4, os.cpu_count() or 1)
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise FileError(f"threads is {threads!r}. Give a whole number, 1 or more.")
    return threads


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """Yield `work(item)` for each item in order, at most `threads` results ahead of the reader."""
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
