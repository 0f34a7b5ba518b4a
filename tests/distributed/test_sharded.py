"""Processes that hold a part of every weight each, against one process that holds them whole."""

import pytest
import torch
from distributed import ranks
from torch.multiprocessing.spawn import spawn


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(ranks.work, (request.param, str(folder)), nprocs=request.param)

    def outcomes(name):
        files = [folder / f"{name} {rank}.pt" for rank in range(request.param)]
        return [torch.load(file, weights_only=True) for file in files if file.exists()]

    return outcomes


@pytest.fixture(scope="module")
def alone():
    found = {}
    for case in ranks.CASES:
        model = ranks.network()
        clustering = ranks.attach(model, case)
        ranks.kill_some(clustering)
        found[case] = ranks.outcome(model, clustering, ranks.train(model, clustering, 0, 1))
    return found


def same(found, expected):
    # float64 sums in another order, over 52 steps
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", ranks.CASES)
def test_sharded_weights_train_and_harden_as_whole_ones_do(processes, alone, case):
    if not processes(case):
        pytest.skip("left to two processes")
    first, *others = processes(case)
    expected = alone[case]
    for key in expected:
        same(first[key], expected[key])
        for other in others:
            same(other[key], first[key])
    assert not any("codebook" in name for name in first["hardened"])
    same(first["after"], first["snapped"])


def test_shards_that_are_replicated_train_alike(processes, alone):
    for found in processes("replicated"):  # by four processes only
        for key, value in alone["penalty, snapped"].items():
            same(found[key], value)


REMEDIES = {
    "codebooks sharded": "ignored_params=clustering.codebooks()",
    "attached late": "Attach Clustering first",
    "rate-aware": "Use Nearest()",
    "two shards": "at most one Shard",
    "channels along axis 1": "granularity='layer'",
    "replaced": "was replaced after attaching",
}


def test_what_is_not_supported_is_refused_with_its_remedy(processes):
    for messages, _ in processes("others"):  # by two processes only
        assert messages.keys() == REMEDIES.keys()
        for name, remedy in REMEDIES.items():
            assert remedy in messages[name]


def test_the_first_look_may_come_when_weights_are_whole(processes):
    for _, (first, second) in processes("others"):
        assert first == second > 0
