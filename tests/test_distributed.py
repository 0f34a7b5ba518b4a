"""Two gloo processes on half a batch each against one process on the whole batch."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import batch, sgd, two_layers
from torch import nn
from torch.multiprocessing.spawn import spawn

import fewbits
from fewbits.regularizers import Nearest, RateAware

STEPS = 52  # beyond one look at the health of the codebooks
CASES: dict[str, dict[str, Any]] = {
    "penalty": {"pull": fewbits.Penalty(0.5), "snapped_forward": False},
    "penalty, snapped, delayed": {
        "pull": fewbits.Penalty(fewbits.schedules.linear(0.0, 0.5, steps=20, start=5))
    },
    "proximal": {"pull": fewbits.Proximal(0.02), "regularizer": Nearest(1)},
    "rate-aware": {"regularizer": RateAware(0.1)},
}


def train(model, clustering, rank, world):
    optimizer = sgd(clustering, lr=0.02)
    for step in range(STEPS):
        inputs, target = (t.double().chunk(world)[rank] for t in batch(step))
        (nn.functional.mse_loss(model(inputs), target) + clustering.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        clustering.step()


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    for name, settings in CASES.items():
        model = two_layers().double()
        clustering = fewbits.Clustering(model, k=4, **settings)
        wrapped = nn.parallel.DistributedDataParallel(model)
        train(wrapped, clustering, rank, world)
        state = {"model": model.state_dict(), "gap": clustering.gap().moving}
        torch.save(state, f"{folder}/{name} {rank}.pt")
    (Path(folder) / f"done {rank}").touch()
    while len(list(Path(folder).glob("done *"))) < world:
        time.sleep(0.01)
    # Everything is on disk. Gloo's threads now and then abort a process that takes them down in
    # the ordinary way ("terminate called without an active exception").
    os._exit(0)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(work, (2, str(folder)), nprocs=2)
    return {
        name: [torch.load(folder / f"{name} {rank}.pt", weights_only=True) for rank in (0, 1)]
        for name in CASES
    }


@pytest.mark.parametrize("name", CASES)
def test_both_processes_hold_the_same_weights_and_codebooks(outcomes, name):
    first, second = outcomes[name]
    assert all(torch.equal(t, second["model"][n]) for n, t in first["model"].items())
    assert "0.weight_codebook" in first["model"]
    assert first["gap"] == second["gap"]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does_on_the_joined_batch(outcomes, name):
    model = two_layers().double()
    clustering = fewbits.Clustering(model, k=4, **CASES[name])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    train(model, clustering, 0, 1)
    found = outcomes[name][0]["model"]
    # float64 sums in another order, over 52 steps
    torch.testing.assert_close(found, dict(model.state_dict()), rtol=1e-9, atol=1e-11)
    assert not torch.allclose(before["0.weight_codebook"], found["0.weight_codebook"])
