"""`fewbits train` in several processes against one process at the same global batch."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import jobs
from safetensors.torch import load_file
from torch.multiprocessing.spawn import spawn

from fewbits._cli import run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
# In batches of 33 the last has one image more in one process than in the other.
SMALL = (
    "compare --data digits --train-images 102 --batch-size 33 --width 0.2 --epochs 3"
    " --finetune-epochs 2 --methods kmeans-finetuned,penalty-snapped --device cpu --quiet"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def processes(folder):
    spawn(jobs.work, (jobs.PROCESSES, str(folder)), nprocs=jobs.PROCESSES)
    return [torch.load(folder / f"{n}.pt", weights_only=True) for n in range(jobs.PROCESSES)]


def test_processes_train_as_one_does_on_whole_batches(processes, tmp_path):
    alone = jobs.outcome(tmp_path / "checkpoint.pt")
    for found in processes:
        # float32 sums in another order, batch norm's among them, over 12 steps
        torch.testing.assert_close(found["state"], alone["state"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found["history"], alone["history"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sharded", "resumed"])
def test_processes_that_hold_parts_of_weights_train_as_one_does(processes, tmp_path, name):
    alone = jobs.outcome(tmp_path / "checkpoint.pt")
    for found in processes:
        assert found["held"] < 0.5  # of three processes, where rows do not divide evenly
        # as above
        for part in ("state", "hardened"):
            torch.testing.assert_close(found[name][part], alone[part], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[name]["history"], alone["history"], rtol=1e-4, atol=1e-6)


def test_one_process_goes_on_from_a_checkpoint_of_parts(processes, folder, tmp_path):
    shutil.copy(folder / "kept.pt", tmp_path / "checkpoint.pt")
    found = jobs.outcome(tmp_path / "checkpoint.pt")
    assert len(found["history"]) == 3
    torch.testing.assert_close(found["state"], processes[0]["state"], rtol=1e-3, atol=1e-5)


def test_processes_hold_the_same_bits(processes):
    first, *others = processes
    for other in others:
        assert other["history"] == first["history"]
        for name, value in first["state"].items():
            assert torch.equal(other["state"][name], value), name


def test_what_differs_between_processes_is_refused_in_every_one(processes):
    for found in processes:
        refused = found["refused"]
        assert "process 2 has another config than process 0: lr is 0.1" in refused["other config"]
        assert "process 1 has another plan than process 0: 0.weight is" in refused["other plan"]
        assert refused["first fails"] == "the disk is full"


# -- the command line -----------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def fewbits(command: list[str], folder: Path, *arguments: str) -> str:
    """Run fewbits in a folder and return what it printed."""
    settings: dict[str, Any] = {"env": environment(), "cwd": folder, "text": True}
    done = subprocess.run(
        [*command, "-m", "fewbits", *arguments], stdout=subprocess.PIPE, check=True, **settings
    )
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes by torchrun, in peace."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "run", fewbits(TORCHRUN, folder, *SMALL, "--out", "run", "--json")


def models(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.stem: load_file(path) for path in sorted(run.glob("models/*.safetensors"))}


def test_torchrun_finds_what_one_process_finds(whole, tmp_path):
    folder, printed = whole
    rows = json.loads(fewbits([sys.executable], tmp_path, *SMALL, "--out", "run", "--json"))
    together = json.loads(printed)  # one process alone has printed
    timeless = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in x] for x in (rows, together)
    ]
    assert timeless[0] == timeless[1]
    assert (folder / "report.html").exists()
    assert json.loads((folder / "details.json").read_text())["environment"]["processes"] == "2"
    same_models(tmp_path / "run", folder)


def same_models(one: Path, other: Path) -> None:
    alone, found = models(one), models(other)
    assert alone.keys() == found.keys() and alone
    for name, state in alone.items():
        # float32 sums in another order, batch norm's among them, over 20 steps
        torch.testing.assert_close(found[name], state, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_torchrun_finds_the_same_where_processes_hold_parts_of_weights(whole, tmp_path):
    fewbits(TORCHRUN, tmp_path, *SMALL, "--shard", "--out", "run")
    same_models(whole[0], tmp_path / "run")


@pytest.mark.slow
def test_accelerate_launches_what_torchrun_does(whole, tmp_path):
    pytest.importorskip("accelerate")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--main_process_port", str(free_port())]
    fewbits(launch, tmp_path, *SMALL, "--out", "run")
    details = json.loads((tmp_path / "run" / "details.json").read_text())
    assert details["environment"]["processes"] == "2"
    same_models(whole[0], tmp_path / "run")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_peers_find_in_two_processes_what_they_find_in_one(tmp_path):
    pytest.importorskip("torchao.prototype.parq")
    pytest.importorskip("coremltools.optimize.torch")
    peers = [*SMALL, "--methods", "parq,dkm,lsq", "--out"]
    fewbits([sys.executable], tmp_path, *peers, "one")
    fewbits(TORCHRUN, tmp_path, *peers, "two")
    same_models(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "kmeans,lsq"], "lsq trains whole weights only"),
        (["--regularizer", "rate-aware"], "'rate-aware' does not work with --shard"),
    ],
)
def test_what_does_not_train_on_parts_is_refused(tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run([*SMALL, *more, "--shard", "--out", "run"])
    assert said in capsys.readouterr().err and not (tmp_path / "run" / "config.toml").exists()


def test_a_run_that_torchrun_restarts_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = [*SMALL[:-4], "kmeans", "--device", "cpu", "--quiet", "--out", "run"]
    run(start)
    with pytest.raises(SystemExit):
        run(start)
    assert "run: exists already" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(start)
    with pytest.raises(SystemExit):
        run([*start, "--lr", "0.01"])  # another config is no restart
    assert "run: exists already" in capsys.readouterr().err


def test_a_process_that_is_killed_ends_the_other_and_the_run_resumes_bit_for_bit(whole, tmp_path):
    port = str(free_port())
    start = [sys.executable, "-m", "fewbits", *SMALL, "--out", "run"]
    pair = [
        subprocess.Popen(
            start, cwd=tmp_path, stderr=subprocess.PIPE if n == "0" else None, text=True,
            env=environment(
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=n, LOCAL_RANK=n
            ),
        )
        for n in "01"
    ]  # fmt: skip
    job = tmp_path / "run" / "jobs" / "penalty-snapped-k4-seed0"
    while not (job / "checkpoint.pt").exists() and pair[0].poll() is None:
        time.sleep(0.002)
    pair[1].send_signal(signal.SIGKILL)
    _, said = pair[0].communicate(timeout=60)
    assert pair[0].returncode == 1 and pair[1].wait() == -signal.SIGKILL
    assert said.startswith("fewbits: the processes have lost each other") and said.count("\n") == 1
    assert not (job / "result.json").exists()  # it was killed in the middle
    fewbits(TORCHRUN, tmp_path, "compare", "--resume", "run", "--device", "cpu", "--quiet")
    resumed, expected = models(tmp_path / "run"), models(whole[0])
    for name, state in expected.items():
        for key, value in state.items():
            assert torch.equal(resumed[name][key], value), (name, key)
