"""Several processes that train one network together: what each needs to know of the others.

All of them do the same with the same numbers, but for their shares of a batch. The first alone
touches the disk, and tells the others what it found there. Without a process group there is one
process, and everything here is trivial.
"""

import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._errors import FewbitsError, PlanError

T = TypeVar("T")


def count() -> int:
    """Return how many processes there are."""
    return torch.distributed.get_world_size() if _grouped() else 1


def rank() -> int:
    """Return which of them this is, from 0."""
    return torch.distributed.get_rank() if _grouped() else 0


def local_rank() -> int:
    """Return which one on its machine this is, as whoever launched it has told, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def launched() -> int:
    """Return how many processes torchrun or the like has launched to work together."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "MASTER_ADDR" in os.environ else 1


def _grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Work with the other processes that were launched, inside the `with`; alone, do nothing.

    Args:
        device: of this process; gloo carries what is on the CPU, NCCL what is on CUDA devices.

    Raises:
        FewbitsError: if the others cannot be reached, or one of them has ended.
    """
    if launched() == 1:
        yield
        return
    dist = torch.distributed
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        yield
        dist.barrier()  # a process that leaves early takes its connections with it
    except RuntimeError as error:  # torch's errors of connections have no class in common
        if not re.search("gloo|nccl|connection|TCPStore", str(error), re.IGNORECASE):
            raise
        said = " ".join(str(error).split())
        raise FewbitsError(
            f"the processes have lost each other: another one has ended, or cannot be reached"
            f" ({said[:200]}). Its own output says why; start all of them again with --resume."
        ) from error
    finally:
        if dist.is_initialized():
            # What holds the group in cycles of references would end its threads while the
            # interpreter shuts down, where a few runs in a hundred aborted after all was done.
            gc.collect()
            dist.destroy_process_group()


def in_first(act: Callable[[], T]) -> T:
    """Return what `act` returns in the first process; it is not called in the others.

    Raises:
        Exception: what `act` raises, in every process.
    """
    if count() == 1:
        return act()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = act()
        except Exception as error:
            told[1] = error if isinstance(error, FewbitsError) else FewbitsError(repr(error))
            _tell(told)
            raise
    _tell(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def _tell(told: list[Any]) -> None:
    torch.distributed.broadcast_object_list(told, src=0, device=torch.device("cpu"))


@contextmanager
def first_on_machine() -> Iterator[None]:
    """Let the first process of each machine through the `with`, and when it is done the others."""
    alone, first = count() == 1, local_rank() == 0
    if not alone and not first:
        torch.distributed.barrier()
    yield
    if not alone and first:
        torch.distributed.barrier()


def add_up(*numbers: float) -> list[float]:
    """Return the sum over all processes of each number."""
    if count() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def share(batch: Tensor) -> Tensor:
    """Return this process's share of a batch, (B, …): consecutive items, none where B is small."""
    return batch.tensor_split(count())[rank()]


def check_same(what: str, values: Mapping[str, Any]) -> None:
    """Refuse processes that were started with different values; one small exchange.

    Args:
        what: they describe, for the message: "the config".
        values: plain values by name.

    Raises:
        PlanError: in every process, with the first value in which one differs from the first.
    """
    if count() == 1:
        return
    all_of_them: list[Any] = [None] * count()
    torch.distributed.all_gather_object(all_of_them, dict(values))
    first = all_of_them[0]
    for number, other in enumerate(all_of_them):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise PlanError(
                    f"process {number} has another {what} than process 0: {name} is"
                    f" {other.get(name)!r} there and {first.get(name)!r} here. Start all with the"
                    " same command on the same data."
                )


def check_same_plan(rows: Iterable[Sequence[Any]]) -> None:
    """Refuse processes whose models are planned in different ways, as `check_same` does.

    Args:
        rows: `Plan.fingerprint()`.
    """
    check_same("plan", {str(name): list(rest) for name, *rest in rows})
