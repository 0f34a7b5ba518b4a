"""The command line: parse, call, print, map errors to exit codes."""

import dataclasses
import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from . import _cli_export, _cli_files, _cli_study
from ._errors import FewbitsError, PlanError, refused_by_the_machine

EXIT_REFUSED, EXIT_BUG, EXIT_INTERRUPTED = 1, 70, 130


class _InOrder(click.Group):
    """A group whose help lists commands as a newcomer meets them, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in _ORDER if name in self.commands]


_ORDER = (
    "train", "compare", "study", "quantize", "inspect", "diff", "unpack", "export", "bench",
)  # fmt: skip


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fewbits")
def cli() -> None:
    """Train PyTorch networks whose weights cluster on a few learned values.

    \b
    First steps:
      fewbits train                                   a minute on handwritten digits
      fewbits train --bits 1                          the same at one bit per weight
      fewbits quantize model.safetensors -o model.fewbits --bits 4
                                                      a checkpoint you have, no training
      fewbits inspect model.fewbits                   what the file holds

    `fewbits COMMAND --help` has examples and every option. Settings may also stand in a
    TOML file, --config. Anything that prints a table prints JSON with --json.
    """  # noqa: D301 (click wants the backspace itself)


for _command in (*_cli_files.COMMANDS, *_cli_export.COMMANDS, _cli_study.study):
    cli.add_command(_command)


def _numbers(context: Any, parameter: Any, text: str | None) -> tuple[int, ...] | None:
    """Parse "2,4,16" or "0-2"; click reports what it cannot read."""
    if text is None:
        return None
    numbers: list[int] = []
    try:
        for part in text.split(","):
            low, dash, high = part.partition("-")
            numbers += range(int(low), int(high) + 1) if dash and low else [int(part)]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of whole numbers like 2,4,16.") from None
    return tuple(numbers)


def _words(context: Any, parameter: Any, text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(","))


_RUN_OPTIONS = [
    click.option("--config", type=click.Path(path_type=Path), help="TOML file; flags override it."),
    click.option("--data", help="digits, cifar10, or a folder of images or Parquet files."),
    click.option(
        "--model",
        help="convnet, alexnet, vgg16, vit, torchvision:NAME, timm:NAME or package.module:factory.",
    ),
    click.option("--width", type=float, help="Multiplies the channel counts."),
    click.option("--bits", callback=_numbers, help="Bits per weight: 2, or 1,2,4."),
    click.option(
        "--k", callback=_numbers, help="Values per weight instead of --bits: 3, or 2,4,16."
    ),
    click.option("--seed", "seeds", callback=_numbers, help="0, or 0,1,2, or 0-2."),
    click.option(
        "--epochs", type=int, help="Epochs of float training that all methods start from."
    ),
    click.option("--finetune-epochs", type=int, help="Further epochs, the same for every method."),
    click.option("--batch-size", type=int, help="Images per step."),
    click.option("--optimizer", help="sgd or adamw; sgd if not given."),
    click.option("--lr", type=float, help="Peak learning rate."),
    click.option(
        "--finetune-lr",
        type=float,
        help="Peak learning rate of the further epochs, as a share of --lr.",
    ),
    click.option(
        "--codebook-lr",
        type=float,
        help="Peak learning rate of the representatives; chosen by the clustering if not given.",
    ),
    click.option("--weight-decay", type=float, help="Weight decay."),
    click.option("--regularizer", help="What pulls in the methods that train; see below."),
    click.option("--strength", type=float, help="Multiplies each method's default strength."),
    click.option(
        "--rate", type=float, help="What a bit is worth to rate-aware methods; 0.02 if not given."
    ),
    click.option(
        "--granularity",
        type=click.Choice(["layer", "channel", "group"]),
        help="What shares a codebook.",
    ),
    click.option("--channels-per-group", type=int, help="For --granularity group."),
    click.option(
        "--allocation",
        type=click.Choice(["even", "measured"]),
        help="Give every layer --k values, or each as many as it needs in the same bytes.",
    ),
    click.option(
        "--exclude", callback=_words, help="Globs on layer names to leave alone, commas between."
    ),
    click.option("--train-images", type=int, help="Use only so many training images."),
    click.option("--image-size", type=int, help="Bring the images of a folder to this size."),
    click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
    ),
    click.option(
        "--shard", is_flag=True, help="Of several processes each holds a part of every weight."
    ),
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        help="Run folder; runs/DATA-MODEL-TIME if not given.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace the run in --out."),
    click.option(
        "--resume",
        type=click.Path(path_type=Path),
        help="Go on with an interrupted run, its own config.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON."),
    click.option("--quiet", is_flag=True, help="No progress bars."),
    click.option("--debug", is_flag=True, help="Show the traceback of an internal error."),
]


def _run_options(command: Callable) -> Callable:
    for option in reversed(_RUN_OPTIONS):
        command = option(command)
    return command


class _WithNames(click.Command):
    """A command whose help ends with the names of methods and regularizers."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from .lab.methods import METHODS, REGULARIZERS  # here: importing torch takes a second

        with formatter.section("Methods"):
            formatter.write_dl([(name, method.about) for name, method in METHODS.items()])
        with formatter.section("Regularizers"):
            formatter.write_text(", ".join(REGULARIZERS))


@cli.command(cls=_WithNames, short_help="Train a network on few values, beside k-means.")
@click.option("--method", help="The method to train with; see below.")
@_run_options
def train(method: str | None, **options: Any) -> None:
    """Train a network, quantize it, and compare with quantizing after training.

    \b
    fewbits train                                    # digits, 2 bits, a minute
    fewbits train --data cifar10 --model vgg16 --bits 2
    fewbits train --resume runs/demo
    """  # noqa: D301 (click wants the backspace itself)
    settings = {} if method is None else {"methods": _with_baseline(method)}
    _compare(settings, options)


@cli.command(cls=_WithNames, short_help="Compare methods, numbers of values and seeds.")
@click.option("--methods", callback=_words, help="Names with commas between them; see below.")
@_run_options
def compare(methods: tuple[str, ...] | None, **options: Any) -> None:
    """Compare methods, numbers of values and seeds from one float training per seed.

    \b
    fewbits compare --methods kmeans,penalty,penalty-snapped --bits 1,2,4 --seed 0-2
    fewbits compare --data photos/ --model torchvision:resnet18 --k 3,16 --json > rows.json
    fewbits compare --config mine.toml --out runs/mine
    fewbits compare --resume runs/mine                # after Ctrl-C, a crash or a kill
    """  # noqa: D301 (click wants the backspace itself)
    _compare({} if methods is None else {"methods": methods}, options)


@cli.command()
@click.option("--model", default="vgg16", show_default=True, help="A network by name.")
@click.option("--batch", default=32, show_default=True, help="Images in a step.")
@click.option("--k", default="4,16,256", show_default=True, callback=_numbers, help="Values: 4,16.")
@click.option("--weights", default=45_088_768, show_default=True, help="Not for steps, layers.")
@click.option("--pairs", default=10, show_default=True, help="Pairs measured in turn, 2 or more.")
@click.option("--width", default=1.0, show_default=True, help="Multiplies the channel counts.")
@click.option("--tables", callback=_words, help="Only: passes,snapped,attaching,steps,layers.")
@click.option(
    "--peers",
    is_flag=True,
    help="Only steps with DKM, PARQ and LSQ at the first --k: minutes, and gigabytes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an internal error.")
def bench(model: str, batch: int, k: tuple[int, ...], weights: int, pairs: int, **how: Any) -> None:
    """Measure what the pull costs on this machine.

    \b
    fewbits bench                                    # VGG16, batch 32; some minutes
    fewbits bench --model convnet --batch 64 --k 4   # a small network
    OMP_NUM_THREADS=1 fewbits bench --peers --k 16 --width 0.25 --pairs 3
                                                     # and what DKM, PARQ and LSQ cost
    """  # noqa: D301
    from .lab import bench as lab

    if min(batch, weights, *k) < 1 or max(k) > 65_536 or pairs < 2:
        raise PlanError("give --batch and --weights above 0, --k from 1 to 65,536, --pairs from 2.")
    network = {"model": model, "batch": batch, "width": how["width"], "pairs": pairs}
    if how["peers"]:
        tables = {"peers": lab.peers(k=k[0], **network)}
    else:
        measures = {
            "passes": lambda: lab.passes(weights, k, pairs),
            "snapped": lambda: lab.snapped(weights, k, pairs),
            "attaching": lambda: lab.attaching(weights, k),
            "steps": lambda: lab.steps(sizes=k, **network),
            "layers": lambda: lab.many_layers(batch, k, 4 * pairs),
        }
        for name in how["tables"] or ():
            if name not in measures:
                raise PlanError(f"--tables has {name!r}. Choose from {', '.join(measures)}.")
        tables = {name: measures[name]() for name in how["tables"] or measures}
    if how["as_json"]:
        print(json.dumps(lab.environment() | tables, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in lab.environment().items()))
    for rows in tables.values():
        print("\n" + lab.markdown(rows))


def _with_baseline(method: str) -> tuple[str, ...]:
    return ("kmeans",) if method == "kmeans" else ("kmeans", method)


def _compare(settings: dict[str, Any], options: dict[str, Any]) -> None:
    """Gather the config, run the comparison, print the table and the report's path."""
    from .lab.config import Config, read_toml

    fields = {field.name for field in dataclasses.fields(Config)}
    given = settings | {n: v for n, v in options.items() if n in fields and v is not None}
    if options["bits"] is not None:
        if options["k"] is not None:
            raise PlanError("give one of --bits and --k; both are given.")
        for bits in options["bits"]:
            if not 0 <= bits <= 16:
                raise PlanError(f"--bits is {bits}. Give whole numbers from 0 to 16, or --k.")
        given["k"] = tuple(2**bits for bits in options["bits"])
    if options["resume"]:
        if given or options["config"] or options["out"] or options["overwrite"]:
            raise PlanError(
                "--resume goes on with the run's own config. Leave the other settings out."
            )
        folder = options["resume"]
        config = Config(**read_toml(folder / "config.toml"))
    else:
        read = read_toml(options["config"]) if options["config"] else {}
        config = Config(**(read | given))
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{Path(config.data).name}-{config.model.rpartition(':')[2]}-{stamp}"
        folder = options["out"] or Path("runs") / name
    _run_comparison(config, folder, options)


def _run_comparison(config: Any, folder: Path, options: dict[str, Any]) -> None:
    from . import _processes
    from ._bars import Bars, each
    from .lab import _folder
    from .lab.compare import Comparison
    from .lab.data import load
    from .lab.device import pick_device

    device = pick_device(options["device"])
    with _processes.together(device), ExitStack() as stack:
        resume = options["resume"] or _processes.in_first(
            lambda: _folder.restarted(folder, config.to_toml())
        )
        if not resume:
            _processes.in_first(lambda: _folder.check(folder, overwrite=options["overwrite"]))
        quiet = options["quiet"] or _processes.rank() > 0
        progress = Bars(quiet=quiet)
        with _processes.first_on_machine():  # it may have to download
            data = load(config.data, image_size=config.image_size, progress=None if quiet else each)
        comparison = Comparison(
            config, folder, data.to(device), device, progress, shard=options["shard"]
        )
        comparison.check()  # before an earlier run is replaced
        _processes.in_first(lambda: stack.enter_context(_folder.held(folder)))
        if not resume:
            command = "fewbits " + shlex.join(sys.argv[1:])
            _processes.in_first(lambda: _begin(folder, config, command, options["overwrite"]))
        rows = _carried_out(comparison, progress)
        _processes.in_first(lambda: _print_rows(rows, folder, as_json=options["as_json"]))


def _begin(folder: Path, config: Any, command: str, overwrite: bool) -> None:
    """Make the run's folder, now that it is held."""
    from .lab import _folder

    _folder.check(folder, overwrite=overwrite)  # nor was a run begun meanwhile
    _folder.create(folder, config.to_toml(), command)


def _carried_out(comparison: Any, progress: Any) -> list[dict[str, Any]]:
    """Do all of a comparison's jobs, and write its report."""
    from . import _processes
    from .lab import _folder
    from .report import write_report

    folder = comparison.folder
    try:
        command = _processes.in_first(lambda: _folder.command_of(folder))
        rows = comparison.run(command)
    except KeyboardInterrupt:
        progress.close()
        again = f"fewbits compare --resume {shlex.quote(str(folder))}"
        print(f"fewbits: stopped. Go on with: {again}", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    finally:
        progress.close()
    _processes.in_first(lambda: write_report(folder))
    return rows


def _print_rows(rows: list[dict[str, Any]], folder: Path, *, as_json: bool) -> None:
    from .report import text

    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print(text(rows))
    print(f"report: {folder / 'report.html'}")


def _in_a_line(error: click.ClickException) -> str:
    """Return what click says of a wrong option or argument, and whose help has the right ones."""
    said = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    return f"{said} `{context.command_path} --help` lists what there is." if context else said


def run(arguments: list[str] | None = None) -> None:
    """Run the command line: errors are one line on stderr and an exit code.

    Exit codes: 0 done; 1 refused (a `FewbitsError`); 2 usage; 130 interrupted; 70 a bug of ours.

    Args:
        arguments: instead of `sys.argv[1:]`.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        cli.main(args=words, prog_name="fewbits", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except click.ClickException as error:
        print(f"fewbits: {_in_a_line(error)}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except click.Abort:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except FewbitsError as error:
        print(f"fewbits: {error}", file=sys.stderr)
        raise SystemExit(EXIT_REFUSED) from None
    except KeyboardInterrupt:
        print("fewbits: stopped.", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        if refused := refused_by_the_machine(error):
            print(f"fewbits: {refused}", file=sys.stderr)
            raise SystemExit(EXIT_REFUSED) from None
        print(
            f"fewbits: internal error: {type(error).__name__}: {str(error).splitlines()[:1]}."
            " Re-run with --debug for the traceback, and please report it.",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_BUG) from None
