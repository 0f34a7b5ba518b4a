"""Both callbacks under torchrun in two processes, against one process on the joined batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning.pytorch", reason="needs fewbits[lightning]")
pytest.importorskip("transformers", reason="needs fewbits[transformers]")
from integrations import loops

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.`"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loops")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, str(Path(loops.__file__)), str(folder)]
    subprocess.run(command, env=environment, check=True)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_two_processes_train_as_one_does_on_the_joined_batches(processes, tmp_path, name):
    if name == "lightning":
        alone = loops.by_lightning(tmp_path, 1)
    else:
        alone = loops.by_transformers(tmp_path, 1)
    for found in processes[1]:
        # Float32 sums in another order, over 8 steps.
        torch.testing.assert_close(found[name], alone, rtol=1e-4, atol=1e-6)
    first, second = (found[name] for found in processes[1])
    assert any("codebook" in key for key in first[0])
    for before, other in zip(first, second, strict=True):
        assert all(torch.equal(other[key], value) for key, value in before.items())


def test_a_checkpoint_of_two_processes_holds_the_state_of_the_clustering(processes):
    path = processes[0] / "trainer" / "checkpoint-8" / "fewbits.pt"
    assert torch.load(path, weights_only=True)["steps"] == 8


def test_processes_with_different_plans_are_refused_in_both(processes):
    for found in processes[1]:
        for message in found["other plan"]:
            assert "process 1 has another plan than process 0" in message
