"""Kill -9 at random moments, full disks and rivals, against runs that were left in peace.

    OMP_NUM_THREADS=1 python benchmarks/faults.py [--moments 50] [--only save training study …]

Prints a table: how often each fault struck, how often it struck in the middle, and how often what
was there afterwards differed from what an undisturbed run gives. Everything but times must be
equal, bit for bit. It ends with 1 if anything was lost.

Each run is a fork of this process, because importing torch takes longer than a run. Forking is safe
here because nothing has started a thread yet.
"""

import argparse
import importlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fewbits
from fewbits._cli import run

# What a run imports as it goes is imported here once, before the forks.
_LATE = (
    "fewbits.lab.compare", "fewbits.report", "fewbits.lab.study", "jinja2.ext", "sklearn.datasets",
    "torch._dynamo", "torch.utils.tensorboard", "tqdm", "optuna", "sqlalchemy.dialects.sqlite",
    "matplotlib.backends.backend_svg", "matplotlib.backends.backend_pdf", "matplotlib.figure",
    "zstandard",
)  # fmt: skip
TRAINING: list[str] = [
    *(
        "compare --data digits --train-images 100 --batch-size 50 --width 0.1 --epochs 6"
        " --finetune-epochs 6 --methods kmeans,penalty-snapped --k 2,4 --out run --quiet"
    ).split()
]
RESUME = ["compare", "--resume", "run", "--quiet"]
STUDY = ["study", "grid.toml", "--out", "run", "--quiet"]
GRID = (
    'data = "digits"\ntrain_images = 100\nbatch_size = 50\nwidth = 0.1\nepochs = 6\n'
    'finetune_epochs = 6\nmethods = ["kmeans", "penalty-snapped"]\nk = [2, 4]\n'
)
# Kilobytes of a disk: from too little for the first file of a run to enough for all.
DISKS = range(8, 808, 16)


@dataclass
class Row:
    """What one fault did.

    Attributes:
        fault: what was done.
        times: how often.
        struck: how often something was going on then; the others had ended, or not begun.
        differ: how often the end differed from that of an undisturbed run.
    """

    fault: str
    times: int = 0
    struck: int = 0
    differ: int = 0


def fork(folder: Path, work: Callable[[], object]) -> int:
    """Start a process that does some work in a folder, its output in log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        log = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        os.write(2, repr(error).encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(child: int) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def cli(folder: Path, arguments: list[str]) -> int:
    """Start fewbits in a process of its own."""

    def work() -> None:
        sys.argv = ["fewbits", *arguments]
        run(arguments)

    return fork(folder, work)


def must_end_well(folder: Path, child: int) -> None:
    """Wait for a process that has to succeed."""
    if code := end(child):
        log = (folder.parent / f"{folder.name}.log").read_text()
        raise SystemExit(f"{folder}: exit code {code}\n{log}")


def found(run_folder: Path) -> dict[str, Any]:
    """All that a run has written, without times; of what tells times only the name."""
    result: dict[str, Any] = {}
    for path in sorted(p for p in run_folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(run_folder))
        if path.suffix == ".json":
            result[name] = timeless(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            result[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix in (".safetensors", ".fewbits", ".toml"):
            result[name] = path.read_bytes()
        elif not {"tensorboard", "workers"} & set(path.parts):
            result[name] = None
    return result


def differs(run_folder: Path, expected: dict[str, Any]) -> bool:
    """Whether a run differs from what is expected; says in which files."""
    there = found(run_folder)
    names = [n for n in sorted({*there, *expected}) if there.get(n, n) != expected.get(n, n)]
    if names:
        print(f"{run_folder}: {', '.join(names)}", file=sys.stderr)
    return bool(names)


def timeless(value: Any) -> Any:
    """The same without seconds."""
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items() if key != "seconds"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def killed_run(
    what: str, start: list[str], again: list[str], moments: int, root: Path, file: str
) -> Row:
    """Kill a command at random moments, go on with it each time, and compare where it ends."""
    row, chance = Row(f"kill -9 during {what}"), random.Random(0)

    def prepared(name: str) -> Path:
        folder = root / name
        folder.mkdir()
        (folder / "grid.toml").write_text(GRID)
        return folder

    def going_on(folder: Path) -> int:
        return cli(folder, again if (folder / "run" / file).exists() else start)

    whole = prepared("whole")
    began = time.monotonic()
    must_end_well(whole, cli(whole, start))
    lasts = time.monotonic() - began
    expected = found(whole / "run")
    while row.times < moments:
        folder, code = prepared(str(row.times)), -signal.SIGKILL
        while code and row.times < moments:
            child = going_on(folder)
            # On average a quarter of the run: a few kills strike it before it ends.
            time.sleep(chance.uniform(0, lasts / 2))
            os.kill(child, signal.SIGKILL)
            code = end(child)
            if code not in (0, -signal.SIGKILL):
                raise SystemExit(f"exit code {code}\n{(root / f'{folder.name}.log').read_text()}")
            row.times += 1
            row.struck += code == -signal.SIGKILL
        if code:
            must_end_well(folder, going_on(folder))
        row.differ += differs(folder / "run", expected)
    return row


def training(moments: int, root: Path) -> Row:
    """Kill a comparison of two methods, which trains three networks."""
    return killed_run("a training", TRAINING, RESUME, moments, root, "config.toml")


def study(moments: int, root: Path) -> Row:
    """Kill a study of four cells."""
    return killed_run("a study", STUDY, STUDY, moments, root, "study.toml")


def save(moments: int, root: Path) -> Row:
    """Kill a save over an earlier file, which must be the earlier one or the new one."""
    row, chance, path = Row("kill -9 during a save"), random.Random(0), root / "m.fewbits"

    def state(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        few = torch.randn(1000, 1000, generator=generator).mul(2).round() / 4
        return {"few": few, "dense": torch.randn(300, 1000, generator=generator)}

    files, lasts = [], 0.0
    for seed in (1, 2):
        began = time.monotonic()
        must_end_well(root, fork(root, lambda seed=seed: fewbits.save(state(seed), path)))
        lasts = time.monotonic() - began
        files.append(path.read_bytes())
    for _ in range(moments):
        path.write_bytes(files[0])
        child = fork(root, lambda: fewbits.save(state(2), path))
        time.sleep(chance.uniform(0, lasts))
        os.kill(child, signal.SIGKILL)
        row.times += 1
        row.struck += end(child) == -signal.SIGKILL
        row.differ += path.read_bytes() not in files
    must_end_well(root, fork(root, lambda: fewbits.save(state(2), path)))
    row.differ += path.read_bytes() != files[1]
    return row


def full_disk(
    what: str, start: list[str], again: list[str], moments: int, root: Path, file: str
) -> Row:
    """Let the disk be full at some point of a command, make room, give it again, and compare."""
    row, place = Row(f"a full disk during {what}"), root / "disk"
    for folder in (root / "whole", place):
        folder.mkdir()
        (folder.parent / "grid.toml").write_text(GRID)
    expected = undisturbed(root, start)
    for size in random.Random(0).sample(DISKS, min(moments, len(DISKS))):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place]
        if subprocess.run(mount, capture_output=True).returncode:
            print("no file system can be mounted here: full disks are left out", file=sys.stderr)
            return row
        try:
            code = end(cli(place, start))
            if code not in (0, 1):
                raise SystemExit(f"exit code {code}\n{(root / 'disk.log').read_text()}")
            row.times += 1
            row.struck += code == 1
            subprocess.run(["mount", "-o", "remount,size=50m", place], check=True)
            born = (place / "run" / file).exists()
            must_end_well(place, cli(place, again if born else start))
            row.differ += differs(place / "run", expected)
        finally:
            subprocess.run(["umount", "-l", place], check=True)
    return row


def disk(moments: int, root: Path) -> Row:
    """Let the disk be full at some point of a training."""
    return full_disk("a training", TRAINING, RESUME, moments, root, "config.toml")


def study_disk(moments: int, root: Path) -> Row:
    """Let the disk be full at some point of a study."""
    study = [*STUDY[:1], "../grid.toml", *STUDY[2:]]
    return full_disk("a study", study, [*study, "--retry"], moments, root, "study.toml")


def undisturbed(root: Path, arguments: list[str]) -> dict[str, Any]:
    """What a run finds that is left in peace."""
    must_end_well(root / "whole", cli(root / "whole", arguments))
    return found(root / "whole" / "run")


def refused(folder: Path, child: int, words: str) -> None:
    """Wait for a process that has to refuse with 1 and a line that holds some words."""
    code, log = end(child), (folder.parent / f"{folder.name}.log").read_text()
    if code != 1 or words not in log or "Traceback" in log:
        raise SystemExit(f"{folder}: exit code {code}, not 1 with {words!r}\n{log}")


def rivals(moments: int, root: Path) -> Row:
    """Start the same run twice at once: one does it, the other is refused."""
    row, expected = Row("two processes in one run folder"), undisturbed(root, TRAINING)
    for number in range(few(moments)):
        folder = root / str(number)
        children = [cli(folder, TRAINING) for _ in range(2)]
        codes = sorted(end(child) for child in children)
        if codes != [0, 1]:
            raise SystemExit(f"exit codes {codes}\n{(root / f'{number}.log').read_text()}")
        row.times, row.struck = row.times + 1, row.struck + 1
        row.differ += differs(folder / "run", expected)
    return row


def read_only(moments: int, root: Path) -> Row:
    """Begin, replace or resume a run, and begin a study, where nothing may be written."""
    row, place = Row("a read-only place"), root / "place"
    place.mkdir()
    (root / "grid.toml").write_text(GRID)
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode:
        print("no file system can be mounted here: it is left out", file=sys.stderr)
        return row
    try:
        must_end_well(place, cli(place, TRAINING))
        expected = found(place / "run")
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        elsewhere = [*TRAINING, "--out", "new"]
        study = ["study", "../grid.toml", "--out", "study", "--quiet"]
        for arguments in (RESUME, [*TRAINING, "--overwrite"], elsewhere, study):
            refused(place, cli(place, arguments), "(Read-only file system)")
            row.times, row.struck = row.times + 1, row.struck + 1
            row.differ += differs(place / "run", expected) or os.listdir(place) != ["run"]
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    return row


def clock(moments: int, root: Path) -> Row:
    """Let the clock jump by years at every look, and the files of a killed run be of the future."""
    row, expected = Row("a clock that jumps"), undisturbed(root, TRAINING)
    true, jumps = time.time, itertools.cycle([0, 3e8, -3e8, 5, -5])

    def jumping() -> None:
        time.time = lambda: true() + next(jumps)
        sys.argv = ["fewbits", *TRAINING]
        run(TRAINING)

    for number in range(few(moments)):
        folder = root / str(number)
        must_end_well(folder, fork(folder, jumping))
        for path in (folder / "run").rglob("*"):
            os.utime(path, (2e9 - len(path.name), 2e9))
        for late in ("rows.json", "jobs/penalty-snapped-k4-seed0/result.json"):
            (folder / "run" / late).unlink()
        must_end_well(folder, cli(folder, RESUME))
        row.times, row.struck = row.times + 1, row.struck + 1
        row.differ += differs(folder / "run", expected)
    return row


def mishap(kind: str, words: str, moments: int, root: Path) -> Row:
    """Let a step meet with a mishap, then go on without it."""
    arguments = [*TRAINING, "--model", "mishaps:network", "--width", "1"]
    row, expected = Row(f"{kind} at a step"), undisturbed(root, arguments)
    for step in random.Random(0).sample(range(1, 13), few(moments)):
        folder = root / str(step)
        os.environ["MISHAP"] = f"{kind}:{step}"
        refused(folder, cli(folder, arguments), words)
        del os.environ["MISHAP"]
        row.times, row.struck = row.times + 1, row.struck + 1
        must_end_well(folder, cli(folder, RESUME))
        row.differ += differs(folder / "run", expected)
    return row


def nan(moments: int, root: Path) -> Row:
    """Let the output of a network become NaN at some step."""
    return mishap("NaN", "the loss is nan", moments, root)


def memory(moments: int, root: Path) -> Row:
    """Let a step need more memory than the process may have."""
    return mishap("out of memory", "fewbits: out of memory", moments, root)


def few(moments: int) -> int:
    """How often to do what does not depend on the moment."""
    return max(moments // 5, 1)


_ALL = (save, training, study, disk, study_disk, rivals, read_only, clock, nan, memory)
FAULTS = {fault.__name__: fault for fault in _ALL}


def main() -> None:
    """Do the faults that were asked for and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for name in _LATE:
        importlib.import_module(name)
    torch.set_num_threads(1)
    rows = []
    if not options.json:
        print("| fault | times | in the middle | end differs |\n|---|---:|---:|---:|", flush=True)
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row := FAULTS[name](options.moments, Path(folder)))
        if not options.json:
            print(f"| {row.fault} | {row.times} | {row.struck} | {row.differ} |", flush=True)
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    sys.exit(any(row.differ for row in rows))


if __name__ == "__main__":
    main()
