"""A training of the lab in one process, or in several that each have a share of every batch."""

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fewbits
from fewbits import _processes
from fewbits.lab import _shard
from fewbits.lab.compare import Comparison
from fewbits.lab.config import Config
from fewbits.lab.data import Augment, ImageData, load
from fewbits.lab.models import build
from fewbits.lab.progress import Progress
from fewbits.lab.training import Job

PROCESSES = 3
SHAPE = (1, 6, 6)


def data() -> ImageData:
    """20 images: in batches of 6 the last has 2, of which one of three processes has none."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, *SHAPE), dtype=torch.uint8, generator=generator)
    labels = torch.arange(20) % 3
    return ImageData("made", images, labels, images[:7], labels[:7], ("a", "b", "c"))


def job(k: int = 4, *, shard: bool = False) -> Job:
    """Convolutions with batch norm, clustered, with a snapped forward."""
    torch.manual_seed(0)
    model = build("convnet", classes=3, shape=SHAPE, width=0.2)
    ramp = fewbits.schedules.cubic(0.0, 0.05, steps=12)
    clustering = fewbits.Clustering(model, k=k, pull=fewbits.Penalty(ramp))
    return Job(
        name="penalty-k4-seed0", model=model, data=data(), augment=Augment(1, True), epochs=3,
        batch_size=6, lr=0.05, weight_decay=1e-3, seed=0, clustering=clustering, shard=shard,
    )  # fmt: skip


def outcome(checkpoint: Path, *, shard: bool = False) -> dict[str, Any]:
    """Train, and return the network and what was measured, before and after it is hardened."""
    trained = job(shard=shard)
    trained.run(checkpoint, progress=Progress(), during=largest)
    history = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in trained.history]
    state = {name: value.clone() for name, value in trained.model.state_dict().items()}
    assert isinstance(trained.clustering, fewbits.Clustering)
    trained.clustering.harden()
    hardened = trained.model.state_dict()
    return {"state": state, "history": history, "hardened": hardened}


def largest(model: nn.Module) -> list[float]:
    """What is asked of whole weights half-way."""
    return [float(parameter.detach().abs().max()) for parameter in model.parameters()]


class Stopping(Progress):
    """Stops a training once its first epoch is on disk."""

    def epoch(self, job: str, history: list[dict[str, Any]]) -> None:
        """Stop."""
        raise KeyboardInterrupt


def sharded(folder: Path) -> dict[str, Any]:
    """Train on parts of weights: without a stop, and again from a checkpoint after one epoch."""
    _shard.LEAST = 100  # so that some layers are cut on their own
    found: dict[str, Any] = {"sharded": outcome(folder / "sharded.pt", shard=True)}
    with contextlib.suppress(KeyboardInterrupt):
        job(shard=True).run(folder / "stopped.pt", progress=Stopping())
    if dist.get_rank() == 0:
        shutil.copy(folder / "stopped.pt", folder / "kept.pt")
    found["resumed"] = outcome(folder / "stopped.pt", shard=True)
    model, _ = _shard.sharded(job().model, None)
    pieces: list[Any] = list(model.parameters())
    held = sum(piece.to_local().numel() for piece in pieces)
    found["held"] = held / sum(piece.numel() for piece in pieces)
    return found


def refusals(rank: int, folder: Path) -> dict[str, str]:
    """Run what is refused, and return the messages."""

    def other_config() -> None:
        config = Config(lr=0.1 if rank == 2 else 0.05)
        Comparison(config, folder, load("digits"), torch.device("cpu"), Progress()).check()

    def other_plan() -> None:
        job(k=3 if rank == 1 else 4).run(folder / "other.pt", progress=Progress())

    def failing() -> None:
        raise fewbits.FileError("the disk is full")

    messages = {}
    for name, act in {
        "other config": other_config,
        "other plan": other_plan,
        "first fails": lambda: _processes.in_first(failing),
    }.items():
        try:
            act()
        except fewbits.FewbitsError as error:
            messages[name] = str(error)
    return messages


def work(rank: int, world: int, folder: str) -> None:
    """One process, its outcomes into the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    found = outcome(Path(folder) / "checkpoint.pt") | {"refused": refusals(rank, Path(folder))}
    found |= sharded(Path(folder))
    torch.save(found, f"{folder}/{rank}.pt")
    (Path(folder) / f"done {rank}").touch()
    while len(list(Path(folder).glob("done *"))) < world:
        time.sleep(0.01)
    # Gloo's threads now and then abort a process that takes them down in the ordinary way.
    os._exit(0)
