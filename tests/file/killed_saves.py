"""A program that saves in processes of its own and kills them, or denies them what they need.

    python killed_saves.py FOLDER HOW

It says on stdout how often what was found, and fails where a file is neither the old nor the new
one. Each save is a fork of this process: importing torch takes longer than a save. Forking is safe
here because this process starts no thread.
"""

import collections
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import zstandard  # what a save imports is imported once, before the forks
from torch import Tensor

import fewbits

assert zstandard
torch.set_num_threads(1)
LAST = 60  # moments of a save: the last write, flush and renaming are among them


def state(seed: int, size: int = 40) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randint(5, (size, size), generator=generator) / 4,
        "skewed": torch.rand(size, size, generator=generator).mul(3).square().round() / 4,
        "dense": torch.randn(size, size, generator=generator),
    }


def fork(work: Callable[[], None]) -> int:
    """Start a process that does some work; it exits with 3 after a `FileError`, which it prints."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        work()
        code = 0
    except fewbits.FileError as error:
        print(error, flush=True)
        code = 3
    finally:
        os._exit(code)


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def saved(seed: int, path: Path, size: int = 40) -> bytes:
    """Save in a process; return the bytes."""
    assert end(fork(lambda: fewbits.save(state(seed, size), path))) == 0
    return path.read_bytes()


def whole(path: Path, old: bytes, new: bytes) -> str:
    found = path.read_bytes()
    if found not in (old, new):
        raise SystemExit(f"{len(found)} bytes are neither the old file nor the new one")
    return "old" if found == old else "new"


def save_with_moments(path: Path, kill_at: int | None, log: Path | None = None) -> None:
    """Save, and be killed at a moment: a call or return of Python's, counted from 0."""
    count = 0

    def step(*_: object) -> None:
        nonlocal count
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    made = state(2)
    sys.setprofile(step)
    fewbits.save(made, path, threads=1)
    sys.setprofile(None)
    if log:
        log.write_text(str(count))


def killed_at_moments(folder: Path) -> None:
    path, log = folder / "m.fewbits", folder / "moments"
    new, old = saved(2, path), saved(1, path)
    assert end(fork(lambda: save_with_moments(path, None, log))) == 0
    moments = int(log.read_text())
    chosen = {0, *random.Random(0).sample(range(moments), 40), *range(moments - LAST, moments)}
    found = collections.Counter[str]()
    for moment in sorted(chosen):
        path.write_bytes(old)
        code = end(fork(lambda moment=moment: save_with_moments(path, moment)))
        outcome = whole(path, old, new)
        # Not every save has as many moments: one may end before its last.
        assert code == -signal.SIGKILL or (code == 0 and outcome == "new"), code
        found[outcome] += 1
        if moment % 10 == 0:
            assert saved(2, path) == new
    assert saved(1, path) == old
    print(f"{dict(found)}")


def killed_in_time(folder: Path) -> None:
    path, size = folder / "m.fewbits", 500
    new = saved(2, path, size)
    began = time.monotonic()
    old = saved(1, path, size)
    lasts = time.monotonic() - began
    chance, found = random.Random(0), collections.Counter[str]()
    for _ in range(25):
        path.write_bytes(old)
        child = fork(lambda: fewbits.save(state(2, size), path, threads=2))
        time.sleep(chance.uniform(0, 1.1 * lasts))
        os.kill(child, signal.SIGKILL)
        found["killed"] += end(child) == -signal.SIGKILL
        whole(path, old, new)
        found["whole"] += 1
    assert saved(2, path, size) == new
    print(f"{dict(found)}")


def together(folder: Path) -> None:
    path, times = folder / "m.fewbits", 25
    files = saved(1, path), saved(2, path)
    gate, opener = os.pipe()

    def work(seed: int) -> None:
        os.close(opener)
        os.read(gate, 1)  # until the parent closes it
        for _ in range(times):
            fewbits.save(state(seed), path)

    children = [fork(lambda seed=seed: work(seed)) for seed in (1, 2)]
    os.close(opener)
    found = collections.Counter[str]()
    while len(children):
        found[whole(path, *files)] += 1
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0
                children.remove(child)
    print(f"{dict(found)} {sorted(os.listdir(folder))}")


def denied(folder: Path, deny: Callable[[], None]) -> None:
    """Save over a file in a process that is denied something, which refuses and leaves it."""
    path = folder / "m.fewbits"
    old = saved(1, path)

    def work() -> None:
        deny()
        fewbits.save(state(2, 300), path, coder="packed")

    assert end(fork(work)) == 3
    assert path.read_bytes() == old
    print(sorted(os.listdir(folder)))


def as_a_stranger(folder: Path) -> None:
    def deny() -> None:
        folder.chmod(0o555)
        if os.getuid() == 0:  # root may write everywhere
            os.setuid(65_534)

    denied(folder, deny)


def with_short_files(folder: Path) -> None:
    denied(folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))


if __name__ == "__main__":
    {
        "moments": killed_at_moments,
        "time": killed_in_time,
        "together": together,
        "stranger": as_a_stranger,
        "short": with_short_files,
    }[sys.argv[2]](Path(sys.argv[1]))
