"""`fewbits study`: a grid of trainings from a file, and its report."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from ._errors import FileError

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


@click.command(short_help="Do a grid of trainings from a file; go on where it stopped.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder; runs/FILE if not given.")
@click.option("--storage", help="Database URL that several machines share; study.db in --out.")
@click.option("--report", is_flag=True, help="Only make tables and plots of what is done.")
@click.option("--retry", is_flag=True, help="Do failed cells again.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.option("--debug", is_flag=True, help="Show the traceback of an internal error.")
def study(file: Path, out: Path | None, **options: Any) -> None:
    """Do every cell of the grid in FILE that is not done yet; run it again to go on.

    Run it several times at once to share the work, with --storage on several machines.

    \b
    fewbits study studies/digits.toml
    fewbits study studies/digits.toml --report       # tables and plots in runs/digits/report
    """  # noqa: D301 (click wants the backspace itself)
    from .lab.study import Queue, read_study

    what = read_study(file)
    folder = out or Path("runs") / what.name
    _open(folder, file)
    queue = Queue(folder, what.name, options["storage"])
    try:
        with queue.guarded():
            if not options["report"]:
                _work(what, folder, queue, options)
            _finish(what, folder, queue, file, options)
    finally:
        queue.close()


def _open(folder: Path, file: Path) -> None:
    """Make the folder, or refuse one that holds something else."""
    from ._file import write_atomically
    from .lab._folder import held, is_vacant, sweep

    kept = folder / "study.toml"
    # In this order: what another process writes first, once it is not vacant, is this file.
    if not is_vacant(folder) and not kept.exists():
        raise FileError(f"{folder}: holds no study (no study.toml). Choose another --out.")
    try:
        with held(folder, wait=True):
            sweep(folder, f"{kept.name}.*")
            write_atomically(kept, file.read_bytes())
    except OSError as error:
        raise FileError(
            f"{folder}: cannot be made ({error.strerror}). Choose another --out."
        ) from error


def _work(what: Any, folder: Path, queue: Any, options: dict[str, Any]) -> None:
    from ._bars import Bars, each
    from .lab.data import load
    from .lab.device import pick_device
    from .lab.study import Worker

    bar = None if options["quiet"] else each
    progress = Bars(quiet=options["quiet"])
    worker = Worker(
        what,
        folder,
        queue,
        pick_device(options["device"]),
        lambda data, image_size: load(data, image_size=image_size, progress=bar),
        progress,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    worker.check()
    queue.fill(what.cells, retry=options["retry"])
    try:
        worker.run()
    except KeyboardInterrupt:
        progress.close()
        print("fewbits: stopped. Run the same command to go on.", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    finally:
        progress.close()


def _finish(what: Any, folder: Path, queue: Any, file: Path, options: dict[str, Any]) -> None:
    """Write the report, and print it with what is missing."""
    from .lab._folder import held, sweep
    from .lab.study import gather_results
    from .report import study_text, write_study

    command = f"fewbits study {shlex.quote(str(file))}"
    results = gather_results(what, queue.done(), queue.failed(), command)
    if results["rows"]:
        with held(folder / "report", wait=True):
            sweep(folder / "report")
            write_study(folder / "report", results)
    if options["as_json"]:
        print(json.dumps(results, indent=1))
    elif results["rows"]:
        print(study_text(results))
        print(f"report: {folder / 'report'}")
    if (running := queue.running()) and not options["report"]:
        print(f"fewbits: other processes are still at {running} cells.", file=sys.stderr)
    if results["failed"]:
        count = f"{len(results['failed'])} of {results['cells']}"
        print(f"fewbits: {count} cells failed; --retry does them again:", file=sys.stderr)
        for row in results["failed"]:
            print(
                f"  {row['method']} k={row['k']} seed={row['seed']}: {row['error']}",
                file=sys.stderr,
            )
        raise SystemExit(EXIT_FAILED)
    if not results["rows"]:
        print("fewbits: no cell is done yet.", file=sys.stderr)
