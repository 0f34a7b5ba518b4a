"""Training that is killed and resumed, bit for bit against training that is left in peace."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewbits._errors import CodebookError, FileError
from fewbits.lab._folder import load_checkpoint
from fewbits.lab.data import ImageData
from fewbits.lab.progress import Progress
from fewbits.lab.training import Job, learning_rate_factor, steps_per_epoch

FEWBITS = [sys.executable, "-m", "fewbits"]
KILLER = Path(__file__).with_name("killed_runs.py")
SMALL = (
    "compare --data digits --train-images 100 --batch-size 50 --width 0.1 --epochs 2"
    " --finetune-epochs 2"
).split()


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k != "seconds"}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def what_a_run_found(run: Path) -> dict[str, Any]:
    """All that a run has written, by path; of times, the report and TensorBoard only the names."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(path.relative_to(run))
        if path.suffix == ".json":
            found[name] = without_seconds(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            lines = path.read_text().splitlines()
            found[name] = [without_seconds(json.loads(line)) for line in lines]
        elif path.suffix in (".safetensors", ".toml"):
            found[name] = path.read_bytes()
        elif "tensorboard" not in name:
            found[name] = None
    return found


def killed_and_resumed(folder: Path, moments: str, *arguments: str) -> dict[str, Any]:
    """Run `killed_runs.py`; return what each run found, by the moment at which it was killed."""
    command = [sys.executable, str(KILLER), str(folder), moments, *SMALL, *arguments]
    subprocess.run(command, env=environment(), check=True)
    return {path.name: what_a_run_found(path / "run") for path in folder.iterdir()}


def test_killed_before_any_of_its_files_a_run_resumes_bit_for_bit(tmp_path: Path):
    found = killed_and_resumed(tmp_path, "all", "--methods", "kmeans-finetuned,penalty")
    whole = found["whole"]
    assert "models/penalty-k4-seed0.safetensors" in whole
    assert "report.html" in whole
    assert not [name for name in whole if "tmp" in name or "checkpoint" in name]
    # The config, two files and a checkpoint for each of six epochs, eight of results, and so on.
    assert len(found) > 30
    for moment, result in found.items():
        assert result == whole, f"killed before its file {moment}"


@pytest.mark.parametrize(
    "settings",
    [
        ["--methods", "penalty-snapped", "--regularizer", "soft-min"],
        ["--methods", "proximal", "--regularizer", "rate-aware-sparse", "--granularity", "channel"],
        ["--methods", "penalty-scratch", "--regularizer", "periodic"],
    ],
)
def test_every_regularizer_resumes_bit_for_bit(tmp_path: Path, settings: list[str]):
    # 20 files on, the method has finished an epoch: its checkpoint is there.
    found = killed_and_resumed(tmp_path, "20", *settings)
    assert found["20"] == found["whole"]


def test_killed_from_outside_in_the_middle_a_run_resumes_bit_for_bit(tmp_path: Path):
    start = [*FEWBITS, *SMALL, "--methods", "penalty-snapped", "--out", "run", "--quiet"]
    start[start.index("--epochs") + 1] = "40"
    resume = [*FEWBITS, "compare", "--resume", "run", "--quiet"]
    settings: dict[str, Any] = {"env": environment(), "stdout": subprocess.DEVNULL}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    subprocess.run(start, cwd=whole, check=True, **settings)
    child = subprocess.Popen(start, cwd=killed, **settings)
    job = killed / "run" / "jobs" / "float-seed0"
    while not (job / "checkpoint.pt").exists() and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (job / "result.json").exists()  # it was killed in the middle
    for _ in range(2):  # resuming what is complete changes nothing
        subprocess.run(resume, cwd=killed, check=True, **settings)
        assert what_a_run_found(killed / "run") == what_a_run_found(whole / "run")


# -- one job --------------------------------------------------------------------------------------


def job(**changed: Any) -> Job:
    torch.manual_seed(0)
    images = torch.randint(256, (20, 1, 4, 4), dtype=torch.uint8)
    labels = torch.arange(20) % 2
    settings = {
        "name": "float-seed0",
        "model": nn.Sequential(nn.Flatten(), nn.Linear(16, 2)),
        "data": ImageData("made", images, labels, images[:6], labels[:6], ("a", "b")),
        "augment": None,
        "epochs": 2,
        "batch_size": 8,
        "lr": 0.1,
        "weight_decay": 0.0,
        "seed": 0,
    }
    return Job(**(settings | changed))


def test_a_checkpoint_is_resumed_in_the_middle_of_the_schedule(tmp_path: Path):
    class Stop(Progress):
        def epoch(self, job: str, history: list[dict[str, Any]]) -> None:
            raise KeyboardInterrupt

    whole, stopped, resumed = job(), job(), job()
    whole.run(tmp_path / "whole.pt", progress=Progress())
    with pytest.raises(KeyboardInterrupt):
        stopped.run(tmp_path / "stopped.pt", progress=Stop())
    resumed.run(tmp_path / "stopped.pt", progress=Progress())
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight)
    assert without_seconds(resumed.history) == without_seconds(whole.history)


def test_a_loss_that_is_not_finite_names_job_and_step(tmp_path: Path):
    broken = job(lr=1e38)
    with pytest.raises(
        CodebookError, match=r"float-seed0: the loss is (nan|inf) .*at step [1-5]\."
    ):
        broken.run(tmp_path / "checkpoint.pt", progress=Progress())


@pytest.mark.parametrize("damage", ["cut short", "emptied", "scrambled", "no checkpoint"])
def test_a_damaged_checkpoint_is_named_with_the_remedy(tmp_path: Path, damage: str):
    path = tmp_path / "checkpoint.pt"
    job().run(path, progress=Progress())
    half = path.read_bytes()[: path.stat().st_size // 2]
    if damage == "no checkpoint":
        torch.save({"something": "else"}, path)
    else:
        damaged = {"cut short": half, "emptied": b"", "scrambled": b"x" + half[1:]}
        path.write_bytes(damaged[damage])
    with pytest.raises(
        FileError, match=rf"{re.escape(str(path))}: .*elete it to restart this part"
    ):
        job().run(path, progress=Progress())


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path):
    path = tmp_path / "checkpoint.pt"
    job().run(path, progress=Progress())
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 2))
    with pytest.raises(FileError, match="holds no such training as float-seed0 .*Undo what chang"):
        job(model=other).run(path, progress=Progress())


def test_a_checkpoint_runs_no_code(tmp_path: Path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"history": Harm()}, tmp_path / "checkpoint.pt")
    with pytest.raises(FileError, match="damaged"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "harm").exists()


def test_what_happens_half_way_is_kept_in_one_epoch(tmp_path: Path):
    for epochs, where in ((1, 0), (2, 0), (5, 2)):
        one = job(epochs=epochs)
        one.run(tmp_path / f"{epochs}.pt", progress=Progress(), during=lambda model: "seen")
        assert [i for i, epoch in enumerate(one.history) if "during" in epoch] == [where]


@pytest.mark.parametrize(
    ("images", "size", "steps"), [(20, 8, 3), (17, 8, 2), (16, 8, 2), (1, 8, 0)]
)
def test_the_schedule_counts_the_batches_there_are(
    images: int, size: int, steps: int, tmp_path: Path
):
    data = job().data.subset(train=images)
    assert steps_per_epoch(data, size) == steps
    if steps:
        counted = []

        class Count(Progress):
            def step(self, metrics: dict[str, Any]) -> None:
                counted.append(metrics)

        one = job(data=data, epochs=1, batch_size=size)
        one.run(tmp_path / "checkpoint.pt", progress=Count())
        assert len(counted) == steps


def test_the_learning_rate_rises_in_a_line_and_falls_along_half_a_cosine_to_almost_nothing():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)  # half-way down
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[99] < 1e-3
    assert factors[99] == pytest.approx(math.sin(math.pi / 180) ** 2)
    assert learning_rate_factor(0, 1, 0.0) == 1.0
