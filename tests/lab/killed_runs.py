"""A program that runs fewbits again and again, kills it at given moments and resumes it.

    python killed_runs.py FOLDER MOMENTS ARGUMENTS…

The first run, in FOLDER/whole, is left in peace. Then, for each of the MOMENTS (numbers with
commas between them, or "all"), a run in FOLDER/<moment> is killed just before it gives its file of
that number its name, and resumed. What a run has done is on disk only by such files, so that
"all" is every moment at which a kill can differ from another one.

Each run is a fork of this process: importing torch takes longer than a run. Forking is safe here
because nothing has started a thread yet.
"""

import importlib
import os
import signal
import sys
from itertools import count
from pathlib import Path

from fewbits._cli import run

# What a run imports as it goes is imported here once, before the forks.
for late in (
    "fewbits.lab.compare", "fewbits.report", "jinja2.ext", "sklearn.datasets", "torch._dynamo",
    "torch.utils.tensorboard", "tqdm",
):  # fmt: skip
    importlib.import_module(late)

# A job that makes no progress would be killed and resumed for ever.
MOST = 200


def attempt(folder: Path, arguments: list[str], kill_before: int | None = None) -> int:
    """Run fewbits in `folder`; return its exit code, or minus the signal that ended it."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["fewbits", *arguments]
        if kill_before is not None:
            kill_at(kill_before)
        run(arguments)
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(99)
    os._exit(0)


def kill_at(number: int) -> None:
    """End this process without warning in place of its `number`-th renaming, counted from 0."""
    rename, numbers = os.replace, count()

    def replace(source, target) -> None:
        if next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace


def main(folder: Path, moments: str, arguments: list[str]) -> None:
    start = [*arguments, "--out", "run", "--quiet"]
    if attempt(folder / "whole", start):
        raise SystemExit((folder / "whole" / "log.txt").read_text())
    for moment in range(MOST) if moments == "all" else map(int, moments.split(",")):
        here = folder / str(moment)
        code = attempt(here, start, kill_before=moment)
        if code == 0 and moments == "all":
            return  # it ended before its file of that number
        born = (here / "run" / "config.toml").exists()
        again = ["compare", "--resume", "run", "--quiet"] if born else start
        if code != -signal.SIGKILL or attempt(here, again):
            raise SystemExit(f"killed at {moment}, exit {code}: {(here / 'log.txt').read_text()}")
    if moments == "all":
        raise SystemExit(f"not done after {MOST} files")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
