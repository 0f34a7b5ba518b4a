"""Training that goes on from a checkpoint of another number of processes."""

import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed import ranks
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

import fewbits

CASE = "penalty, snapped"
HALF = 26  # of ranks.STEPS


def made(mesh: Any = None) -> tuple[nn.Module, fewbits.Clustering, torch.optim.Optimizer]:
    """A network with its clustering and optimizer, sharded where there is a mesh."""
    if mesh is None:
        model = ranks.network()
        clustering = ranks.attach(model, CASE)
    else:
        model, clustering = ranks.sharded(CASE, mesh)
    optimizer = torch.optim.SGD(clustering.param_groups(lr=0.02), momentum=0.9)
    return model, clustering, optimizer


def train(parts: tuple, steps: range, rank: int, world: int) -> None:
    model, clustering, optimizer = parts
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 7, generator=generator, dtype=torch.float64).chunk(world)[rank]
        (model(inputs).square().mean() + clustering.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        clustering.step()


def state_of(parts: tuple) -> dict[str, Any]:
    """What a checkpoint holds; to be filled in place when one is loaded."""
    model, clustering, optimizer = parts
    own, optimizers = get_state_dict(model, optimizer)
    return {"model": own, "optimizer": optimizers, "clustering": clustering.state_dict()}


def save(parts: tuple, folder: Path) -> None:
    state_dict_saver.save(state_of(parts), checkpoint_id=folder)


def load(parts: tuple, folder: Path) -> None:
    model, clustering, optimizer = parts
    state = state_of(parts)
    state_dict_loader.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    clustering.load_state_dict(state["clustering"])


def outcome(parts: tuple) -> dict[str, Any]:
    return ranks.outcome(parts[0], parts[1], [])


def work(rank: int, world: int, folder: str) -> None:
    """Two processes train the first half and save; four load and train the second."""
    warnings.simplefilter("ignore")  # of torch's own about its checkpoints
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet{world}", rank=rank, world_size=world)
    parts = made(init_device_mesh("cpu", (world,)))
    if world == 2:
        train(parts, range(HALF), rank, world)
        save(parts, Path(folder) / "checkpoint")
    else:
        load(parts, Path(folder) / "checkpoint")
        train(parts, range(HALF, ranks.STEPS), rank, world)
        torch.save(outcome(parts), f"{folder}/{rank}.pt")
    (Path(folder) / f"done {world} {rank}").touch()
    while len(list(Path(folder).glob(f"done {world} *"))) < world:
        time.sleep(0.01)
    # Gloo's threads now and then abort a process that takes them down in the ordinary way.
    os._exit(0)
