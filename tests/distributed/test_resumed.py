"""A checkpoint of two processes, by torch.distributed.checkpoint, resumed on one and on four."""

import pytest
import torch
from distributed import ranks, resumed
from torch.multiprocessing.spawn import spawn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    for world in (2, 4):
        spawn(resumed.work, (world, str(folder)), nprocs=world)
    return folder


@pytest.fixture(scope="module")
def uninterrupted():
    parts = resumed.made()
    ranks.kill_some(parts[1])
    resumed.train(parts, range(ranks.STEPS), 0, 1)
    return resumed.outcome(parts)


def same(found, expected):
    # float64 sums in another order, over 52 steps
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_four_processes_go_on_where_two_left_off(folder, uninterrupted):
    for rank in range(4):
        same(torch.load(folder / f"{rank}.pt", weights_only=True), uninterrupted)


@pytest.mark.filterwarnings("ignore:.*torch.distributed:UserWarning")
def test_one_process_goes_on_where_two_left_off(folder, uninterrupted):
    parts = resumed.made()
    resumed.load(parts, folder / "checkpoint")
    assert parts[1].steps == resumed.HALF
    resumed.train(parts, range(resumed.HALF, ranks.STEPS), 0, 1)
    same(resumed.outcome(parts), uninterrupted)
