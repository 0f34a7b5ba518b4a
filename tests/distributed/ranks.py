"""Training in one process, or in several that each hold a part of every weight."""

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import fewbits
from fewbits.regularizers import Nearest, RateAware

STEPS = 52  # beyond one look at the health of the codebooks
# Of 10 rows in codebooks of 5 rows each, two processes hold 5, four hold 3, 3, 3 and 1.
GROUPS: dict[str, Any] = {"granularity": "group", "channels_per_group": 5}
CASES: dict[str, dict[str, Any]] = {
    "penalty": {"pull": fewbits.Penalty(0.5, even_rate=False), "snapped_forward": False},
    "penalty, snapped": {"pull": fewbits.Penalty(0.5, even_rate=False)},
    "penalty, power 1, even rate": {
        "pull": fewbits.Penalty(0.002),
        "regularizer": Nearest(1),
        "plan": {"0": GROUPS | {"k": 5}, "2": {"granularity": "channel"}},
    },
    "penalty, per channel, snapped": {
        "pull": fewbits.Penalty(0.5, even_rate=False),
        "plan": {"0": GROUPS, "2": {"granularity": "channel"}},
    },
    "penalty, delayed": {
        "pull": fewbits.Penalty(
            fewbits.schedules.linear(0.0, 0.5, steps=20, start=5), even_rate=False
        )
    },
    "proximal": {"pull": fewbits.Proximal(0.02), "snapped_forward": False},
    "proximal, power 1, snapped": {
        "pull": fewbits.Proximal(0.02),
        "regularizer": Nearest(1),
        "plan": {"0": GROUPS},
    },
}


def cases(world: int) -> list[str]:
    """Four processes take longer to start and stop: they do those that differ most."""
    some = ["penalty, snapped", "penalty, power 1, even rate", "proximal, power 1, snapped"]
    return list(CASES) if world == 2 else some


def network() -> nn.Sequential:
    """Rows that no number of processes divides: of 5, four processes hold 2, 2, 1 and none."""
    torch.manual_seed(0)
    layers = (nn.Linear(7, 10), nn.Tanh(), nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 3))
    return nn.Sequential(*layers).double()


def attach(model: nn.Module, case: str) -> fewbits.Clustering:
    settings = dict(CASES[case])
    plan = fewbits.plan(model, k=4, overrides=settings.pop("plan", {}))
    return fewbits.Clustering(model, plan=plan, **settings)


def kill_some(clustering: fewbits.Clustering) -> None:
    """Move some representatives to where no weight is: the care revives them."""
    for codebook in sorted(clustering.codebooks(), key=id):
        codebook.data[..., -2:] += 1e3


def train(model: nn.Module, clustering: fewbits.Clustering, rank: int, world: int) -> list[float]:
    """Train and return the losses' penalties."""
    optimizer = torch.optim.SGD(clustering.param_groups(lr=0.02, codebook_lr=0.005), momentum=0.9)
    penalties = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 7, generator=generator, dtype=torch.float64).chunk(world)[rank]
        task = model(inputs).square().mean()
        penalty = clustering.loss()
        (task + penalty).backward()
        penalties.append(penalty.item())
        optimizer.step()
        optimizer.zero_grad()
        clustering.step()
    return penalties


def outcome(model: nn.Module, clustering: fewbits.Clustering, penalties: list[float]) -> dict:
    """Everything that should not depend on how many processes there are."""
    gap = clustering.gap()
    numbers = [x for row in gap.layers for x in (row.distortion, *row.usage)]
    state = {name: _whole(value) for name, value in model.state_dict().items()}
    with clustering.snapped():
        snapped = model(torch.ones(1, 7, dtype=torch.float64)).detach()
    usage = [layer.usage.clone() for layer in clustering._layers]
    clustering.harden()
    hardened = {name: _whole(value) for name, value in model.state_dict().items()}
    after = model(torch.ones(1, 7, dtype=torch.float64)).detach()
    return {
        "penalties": torch.tensor(penalties, dtype=torch.float64),
        "state": state,
        "gap": [(r.moving, r.dead, r.merged, r.unmoved, r.weights) for r in gap.layers],
        "numbers": torch.tensor(numbers, dtype=torch.float64),
        "usage": usage,
        "snapped": snapped,
        "hardened": hardened,
        "after": after,
    }


def _whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def sharded(case: str, mesh: Any) -> tuple[nn.Module, fewbits.Clustering]:
    """A network cut over the mesh: two layers on their own, the last with the network."""
    model = network()
    clustering = attach(model, case)
    kill_some(clustering)
    ours = clustering.codebooks()
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh, ignored_params=ours)
    return model, clustering


def refusals(mesh: Any) -> dict[str, str]:
    """Run what is not supported, and return the messages."""
    weight = torch.ones(4, 4)

    def codebooks_sharded() -> None:
        model = network()
        clustering = attach(model, "penalty")
        fully_shard(model, mesh=mesh)
        clustering.loss()

    def attached_late() -> None:
        model = network()
        fully_shard(model, mesh=mesh)
        fewbits.Clustering(model, k=2)

    def rate_aware() -> None:
        model = network()
        clustering = fewbits.Clustering(model, k=2, regularizer=RateAware())
        fully_shard(model, mesh=mesh, ignored_params=clustering.codebooks())
        clustering.loss()

    def placed(*placements: Any, granularity: Any = "layer", over: Any = mesh) -> None:
        model = nn.ConvTranspose2d(4, 4, 1, bias=False)
        plan = fewbits.plan(model, k=2, granularity=granularity)
        clustering = fewbits.Clustering(model, plan=plan)
        weight = model.weight.detach()
        model._parameters["weight"] = nn.Parameter(distribute_tensor(weight, over, placements))
        clustering.loss()

    def replaced() -> None:
        model = nn.Linear(4, 4)
        clustering = fewbits.Clustering(model, k=2)
        model.weight = nn.Parameter(weight)
        clustering.loss()

    two = init_device_mesh("cpu", (1, mesh.size()))
    messages = {}
    for name, act in {
        "codebooks sharded": codebooks_sharded,
        "attached late": attached_late,
        "rate-aware": rate_aware,
        "two shards": lambda: placed(Shard(0), Shard(1), over=two),
        "channels along axis 1": lambda: placed(Shard(0), granularity="channel"),
        "replaced": replaced,
    }.items():
        try:
            act()
        except fewbits.PlanError as error:
            messages[name] = str(error)
    return messages


def late_look(mesh: Any) -> list[float]:
    """The penalty where the first look at a sharded model is taken in the midst of a step."""
    model, clustering = sharded("penalty", mesh)
    task = model(torch.ones(2, 7, dtype=torch.float64)).mean()
    first = clustering.loss()
    (task + first).backward()
    return [first.item(), clustering.loss().item()]


def work(rank: int, world: int, folder: str) -> None:
    """One process: each case in turn, its outcomes into the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for case in cases(world):
        model, clustering = sharded(case, mesh)
        penalties = train(model, clustering, rank, world)
        torch.save(outcome(model, clustering, penalties), f"{folder}/{case} {rank}.pt")
    if world == 4:
        two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        model, clustering = sharded("penalty, snapped", two)
        penalties = train(model, clustering, rank, world)
        torch.save(outcome(model, clustering, penalties), f"{folder}/replicated {rank}.pt")
    if world == 2:
        torch.save([refusals(mesh), late_look(mesh)], f"{folder}/others {rank}.pt")
    (Path(folder) / f"done {rank}").touch()
    while len(list(Path(folder).glob("done *"))) < world:
        time.sleep(0.01)
    # Gloo's threads now and then abort a process that takes them down in the ordinary way.
    os._exit(0)
