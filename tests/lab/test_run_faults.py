"""Runs and studies that meet with a fault: nothing is lost, and the end is as if it had not been.

benchmarks/faults.py has the faults that take processes of their own; here each strikes once.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewbits._errors import FileError, refused_by_the_machine
from fewbits.lab._folder import held
from fewbits.lab._jobs import Jobs
from fewbits.lab.progress import Progress
from fewbits.lab.study import Queue, read_study

FAULTS = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.mark.skipif(sys.platform != "linux", reason="forks, mounts and limits of Linux")
def test_every_fault_leaves_what_an_undisturbed_run_leaves():
    done = subprocess.run(
        [sys.executable, FAULTS, "--moments", "1", "--json"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) >= 10
    assert [row["differ"] for row in rows] == [0] * len(rows)


def test_a_folder_at_which_somebody_is_is_refused_until_he_has_left(tmp_path: Path):
    with held(tmp_path / "run"):
        with pytest.raises(FileError, match="run: another process is at work here. Wait until"):
            with held(tmp_path / "run"):
                raise AssertionError("two at once")
    with held(tmp_path / "run"):
        pass


def test_files_from_the_future_do_not_reorder_the_metrics(tmp_path: Path):
    jobs = Jobs(tmp_path, Progress())
    future = time.time() + 1e8
    for number, name in enumerate(("float-seed0", "penalty-k4-seed0", "float-seed1")):
        path = jobs.path(name) / "history.json"
        path.parent.mkdir(parents=True)
        path.write_text('[{"epoch": 1}]')
        os.utime(path, (future - number, future - number))
        jobs.write_metrics()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["job"] for x in lines] == [
        "float-seed0", "penalty-k4-seed0", "float-seed1",
    ]  # fmt: skip


def test_a_cell_whose_process_seems_dead_and_is_not_is_recorded_once(tmp_path: Path):
    (tmp_path / "grid.toml").write_text("k = [2, 4]\nmethods = 'kmeans'\n")
    cells = {cell.key: cell for cell in read_study(tmp_path / "grid.toml").cells}
    one, two = Queue(tmp_path, "grid"), Queue(tmp_path, "grid")
    one.fill(cells.values())
    done = []

    def do(cell, queue=one):
        done.append(cell.key)
        if len(done) == 1:  # the clock jumps: the other process takes this one for dead
            (trial,) = one._trials(one._states.RUNNING)
            two._fail(trial.number)
            two.fill(cells.values())
            while two.do_next(cells, do):
                pass
        return 50.0, {"row": cell.k}

    while one.do_next(cells, do):
        pass
    assert one.done() == {key: {"row": cell.k} for key, cell in cells.items()}
    assert one.failed() == {}
    assert one.running() == 0
    one.close()
    two.close()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory. Lower --batch-size"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory ([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried).",
        ),
        (OSError(28, "No space left on device", "m.bin"), "m.bin: No space left on device. Free"),
        (RuntimeError("shapes do not match"), None),
        (OSError("no number"), None),
    ],
)
def test_what_the_machine_refuses_is_told_from_bugs(error: Exception, said: str | None):
    found = refused_by_the_machine(error)
    assert found is None if said is None else found is not None and found.startswith(said)
