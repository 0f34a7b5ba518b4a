"""The commands on files: parse, call, print."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from ._errors import FileError, PlanError, printable

_PATH = click.Path(path_type=Path)
_quiet = click.option("--quiet", is_flag=True, help="No progress bars.")
_debug = click.option("--debug", is_flag=True, help="Show the traceback of an internal error.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace the file in --output.")


def _output(text: str) -> Callable:
    return click.option("-o", "--output", type=_PATH, required=True, help=text)


def _bar(what: str, quiet: bool) -> Callable[[Iterable[Any], int], Iterable[Any]] | None:
    from ._bars import each

    return None if quiet else functools.partial(each, what=what)


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise FileError(f"{output}: exists already. Choose another name, or use --overwrite.")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Return aligned text; the first `left` columns are words, the others numbers."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


@click.command()
@click.argument("file", type=_PATH)
@_json
@_debug
def inspect(file: Path, as_json: bool, debug: bool) -> None:
    """List the tensors of a fewbits or safetensors file.

    \b
    fewbits inspect model.fewbits
    fewbits inspect model.safetensors --json | jq '.tensors[].name'

    `fixed` and `file` are bits per weight: of an index of fixed width, and of the file.
    """  # noqa: D301 (click wants the backspace itself)
    from ._checkpoint import opened

    with opened(file) as checkpoint:
        stored, size, tied = checkpoint.stored, checkpoint.size, checkpoint.tied
    if as_json:
        tensors = [dataclasses.asdict(row) | {"bits_file": row.bits_file} for row in stored]
        print(json.dumps({"bytes": size, "tensors": tensors, "tied": tied}, indent=1))
        return
    rows = [
        (
            row.name, "x".join(map(str, row.shape)) or "scalar", row.dtype, row.coder,
            "" if row.k is None else f"{row.k:,}",
            "" if row.k is None else f"{(row.k - 1).bit_length()}",
            f"{row.bits_file:.3f}", f"{row.bytes:,}", f"{row.bytes / size:.1%}",
        )
        for row in stored
    ]  # fmt: skip
    head = ("tensor", "shape", "type", "coder", "k", "fixed", "file", "bytes", "share")
    print(_table(head, rows, left=4))
    for alias, name in tied.items():
        print(printable(f"{alias} = {name}"))
    rest = size - sum(row.bytes for row in stored)
    dense = sum(row.elements * 4 if "float" in row.dtype else row.bytes for row in stored)
    print(
        f"{len(stored)} tensors, {sum(row.elements for row in stored):,} elements;"
        f" {size:,} bytes, {rest:,} of them the header;"
        f" {dense / size:.1f} times smaller than in float32"
    )


@click.command()
@click.argument("a", type=_PATH)
@click.argument("b", type=_PATH)
@_json
@_quiet
@_debug
def diff(a: Path, b: Path, as_json: bool, quiet: bool, debug: bool) -> None:
    """Compare two fewbits or safetensors files tensor by tensor.

    \b
    fewbits diff before.safetensors after.fewbits
    fewbits diff --json a.fewbits b.fewbits
    """  # noqa: D301
    from ._checkpoint import differences

    rows = differences(a, b, progress=_bar("comparing", quiet))
    if as_json:
        known = [
            dataclasses.asdict(row)
            | {
                "largest": row.largest
                if row.largest is None or math.isfinite(row.largest)
                else None
            }
            for row in rows
        ]
        print(json.dumps(known, indent=1))
        return

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    table = [
        (
            row.name, row.status, number(row.changed, ","), number(row.largest, ".3g"),
            number(row.bytes_a, ","), number(row.bytes_b, ","),
        )
        for row in rows
    ]  # fmt: skip
    head = ("tensor", "status", "elements changed", "largest", "bytes in A", "bytes in B")
    print(_table(head, table, left=2))
    equal = sum(row.status == "equal" for row in rows)
    print(f"{equal} of {len(rows)} tensors are equal")


@click.command()
@click.argument("checkpoint", type=_PATH)
@_output("The fewbits file to write.")
@click.option("--bits", type=int, help="Bits per weight: 2^bits values per codebook.")
@click.option("--k", type=int, help="Values per codebook instead of --bits.")
@click.option(
    "--granularity", type=click.Choice(["layer", "channel"]), default="layer", show_default=True,
    help="What shares a codebook: the tensor, or a channel of its first axis.",
)  # fmt: skip
@click.option(
    "--method", type=click.Choice(["kmeans", "uniform", "entropy"]), default="kmeans",
    show_default=True, help="How values are chosen.",
)  # fmt: skip
@click.option("--exclude", multiple=True, help="Glob on names of tensors to leave alone.")
@click.option(
    "--coder", type=click.Choice(["smallest", "fast", "packed"]), default="smallest",
    show_default=True, help="Fewest bytes, fastest to decode, or a fixed width.",
)  # fmt: skip
@_overwrite
@_json
@_quiet
@_debug
def quantize(checkpoint: Path, output: Path, bits: int | None, k: int | None, **rest: Any) -> None:
    """Quantize a checkpoint after training, without the model's class.

    Clusters every floating-point tensor of two or more axes.

    \b
    fewbits quantize model.safetensors -o model.fewbits --bits 4
    fewbits quantize model.safetensors -o model.fewbits --k 12 --exclude '*embed*'
    """  # noqa: D301
    from ._rules import values_for

    if (bits is None) == (k is None):
        raise PlanError("give one of --bits and --k.")
    count = values_for(bits, k)
    _check_output(output, rest.pop("overwrite"))
    rest.pop("debug")
    as_json = rest.pop("as_json")
    progress = _bar("quantizing", rest.pop("quiet"))
    from ._checkpoint import quantize_checkpoint

    quantize_checkpoint(checkpoint, output, k=count, progress=progress, **rest)
    _say_sizes(checkpoint, output, as_json)


@click.command()
@click.argument("file", type=_PATH)
@_output("The safetensors file to write.")
@_overwrite
@_json
@_quiet
@_debug
def unpack(file: Path, output: Path, overwrite: bool, as_json: bool, quiet: bool, **_: Any) -> None:
    """Write the tensors of a fewbits file as a dense safetensors file.

    \b
    fewbits unpack model.fewbits -o dense.safetensors
    """  # noqa: D301
    from ._checkpoint import unpack as unpack_file

    _check_output(output, overwrite)
    unpack_file(file, output, progress=_bar("unpacking", quiet))
    _say_sizes(file, output, as_json)


def _say_sizes(source: Path, target: Path, as_json: bool) -> None:
    before, after = source.stat().st_size, target.stat().st_size
    if as_json:
        files = [{"path": str(path), "bytes": path.stat().st_size} for path in (source, target)]
        print(json.dumps({"source": files[0], "target": files[1]}, indent=1))
        return
    ratio, word = max(before, after) / min(before, after), "smaller" if after < before else "larger"
    print(f"{source}: {before:,} bytes; {target}: {after:,} bytes, {ratio:.2f} times {word}")


COMMANDS = (quantize, inspect, diff, unpack)
