"""Time and memory of compressed layers and models beside the same with dense float32 weights.

Prints Markdown tables. Dense and compressed are run in turn; a ratio is the median of the dense
time over the compressed one within pairs, so that above 1 compressed is faster. With one thread the
times are those that the processor spent on it, so that other work on the machine does not count.

    python benchmarks/compressed.py --part linear
    python benchmarks/compressed.py --part int8
    python benchmarks/compressed.py --part convolutions
    python benchmarks/compressed.py --part model
    python benchmarks/compressed.py --part memory
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import fewbits
from fewbits.lab.models import build

SIZE = 4096


def pairs(dense: Callable[[], object], packed: Callable[[], object], count: int) -> list[float]:
    """Return the medians of the dense and compressed milliseconds, and of their ratio."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[tuple[float, float]] = []
    for turn in range(count + 2):
        pair = []
        for run in (dense, packed):
            start = clock()
            run()
            pair.append(1000 * (clock() - start))
        if turn >= 2:  # the first two warm up
            times.append((pair[0], pair[1]))
    ratios = [first / second for first, second in times]
    return [statistics.median(column) for column in (*zip(*times, strict=True), ratios)]


def compressed(layer: nn.Module, bits: int, **options) -> tuple[nn.Module, nn.Module]:
    """Return a layer or model with few values, dense and compressed."""
    dense = nn.Sequential(layer).eval()
    fewbits.quantize(dense, bits=bits, method="uniform")
    packed = copy.deepcopy(dense)
    fewbits.compressed.compress(packed, **options)
    return dense, packed


def row(*cells: object) -> None:
    """Print a row of a table."""
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def table(*heads: str) -> None:
    """Print the head of a table whose first column is text."""
    print()
    row(*heads)
    print("|---|" + "---:|" * (len(heads) - 1), flush=True)


def linear(options: argparse.Namespace) -> None:
    """A linear layer at several widths and batches."""
    table("bits", "batch", "dense, ms", "compressed, ms", "ratio")
    for bits in options.bits:
        dense, packed = compressed(nn.Linear(SIZE, SIZE, bias=False), bits)
        for batch in (1, 4, 16, 32, 128):
            inputs = torch.randn(batch, SIZE)
            many = max(3, options.pairs // (1 + batch // 16))
            first, second, ratio = pairs(lambda: dense(inputs), lambda: packed(inputs), many)  # noqa: B023
            row(bits, batch, f"{first:.2f}", f"{second:.2f}", f"{ratio:.2f}")


def int8(options: argparse.Namespace) -> None:
    """A linear layer with eight-bit activations, and what they cost."""
    table("bits", "batch", "dense, ms", "int8, ms", "ratio", "error, %")
    for bits in (bits for bits in options.bits if bits <= 4):
        layer = nn.Linear(SIZE, SIZE, bias=False)
        dense, packed = compressed(layer, bits, activations="int8")
        for batch in (1, 4, 16, 32):
            inputs = torch.randn(batch, SIZE)
            many = max(3, options.pairs // (1 + batch // 16))
            first, second, ratio = pairs(lambda: dense(inputs), lambda: packed(inputs), many)  # noqa: B023
            error = 100 * distance(packed(inputs), dense(inputs))
            row(bits, batch, f"{first:.2f}", f"{second:.2f}", f"{ratio:.2f}", f"{error:.2f}")


def distance(result: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of what was expected."""
    return float((result - expected).norm() / expected.norm())


def convolutions(options: argparse.Namespace) -> None:
    """The convolutions of vgg16 of different shapes, on images of 32 x 32."""
    table("convolution, output", "bits", "batch", "dense, ms", "compressed, ms", "ratio")
    for bits in options.bits:
        model, other = compressed(build("vgg16", classes=10, shape=(3, 32, 32)), bits)
        for batch in (1, 32):
            for name, (layer, inputs) in shapes(model, batch).items():
                dense, packed = (m.get_submodule(layer) for m in (model, other))
                many = options.pairs if batch == 1 else max(3, options.pairs // 10)
                first, second, ratio = pairs(lambda: dense(inputs), lambda: packed(inputs), many)  # noqa: B023
                row(name, bits, batch, f"{first:.2f}", f"{second:.2f}", f"{ratio:.2f}")


def shapes(model: nn.Module, batch: int) -> dict[str, tuple[str, Tensor]]:
    """Return a name of each shape of vgg16's convolutions, a layer of that shape and its input."""
    found: dict[str, tuple[str, Tensor]] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        size = "x".join(map(str, output.shape[1:]))
        found.setdefault(f"{layer.in_channels} to {size}", (name, inputs[0].clone()))

    hooks = [
        layer.register_forward_hook(partial(note, name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    ]
    model(torch.randn(batch, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return found


def whole(options: argparse.Namespace) -> None:
    """The whole of vgg16."""
    table("vgg16, bits", "batch", "dense, ms", "compressed, ms", "ratio", "difference")
    for bits in options.bits:
        dense, packed = compressed(build("vgg16", classes=10, shape=(3, 32, 32)), bits)
        for batch in (1, 32):
            inputs = torch.randn(batch, 3, 32, 32)
            many = max(3, options.pairs // (4 if batch == 1 else 16))
            first, second, ratio = pairs(lambda: dense(inputs), lambda: packed(inputs), many)  # noqa: B023
            off = distance(packed(inputs), dense(inputs))
            row(bits, batch, f"{first:.1f}", f"{second:.1f}", f"{ratio:.2f}", f"{off:.1e}")


def resident_bytes(what: str) -> int:
    """Return VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise SystemExit("this part reads /proc/self/status: run it on Linux")


def network() -> nn.Module:
    """Return the model of the memory table: 12 linear layers, 201 million weights."""
    return nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(12)))


def load_and_print(path: str, mode: str) -> None:
    """Load a file in a fresh process; print what memory it took in the end and at most."""
    with tempfile.TemporaryDirectory() as folder:
        # A small file first, so that the code is loaded.
        small = nn.Sequential(nn.Linear(64, 64))
        fewbits.quantize(small, bits=2)
        fewbits.save(small, f"{folder}/small")
        fewbits.load(f"{folder}/small", into=nn.Sequential(nn.Linear(64, 64)), mode=mode)  # pyright: ignore
        before = resident_bytes("VmRSS")
    if mode == "dense":
        model = network()
    else:
        with torch.device("meta"):
            model = network()
    Path("/proc/self/clear_refs").write_text("5")
    fewbits.load(path, into=model, mode=mode)  # pyright: ignore
    peak = resident_bytes("VmHWM") - before
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    with torch.no_grad():
        model(torch.randn(1, SIZE))
    print(json.dumps({"held": held, "resident": resident_bytes("VmRSS") - before, "peak": peak}))


def memory(options: argparse.Namespace) -> None:
    """What a model takes in memory while it is loaded and after."""
    table("12 x 4096 x 4096, bits", "mode", "packed, MB", "tensors, MB", "resident after a run, MB",
          "peak while loading, MB")  # fmt: skip
    for bits in options.bits:
        model = network()
        for layer in model.children():  # random values on an even grid
            values = torch.randint(1 << bits, (SIZE, SIZE)).float() - (1 << bits) / 2
            layer.weight.data.copy_(values / 1000)  # pyright: ignore
        packed = fewbits.summary(model).bytes_fixed
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model.fewbits"
            fewbits.save(model, path, coder="packed")
            for mode in ("dense", "compressed"):
                command = [sys.executable, __file__, "--load", path, mode]
                sizes = json.loads(subprocess.check_output(command, text=True))
                cells = (sizes[name] / 1e6 for name in ("held", "resident", "peak"))
                row(bits, mode, f"{packed / 1e6:.1f}", *(f"{cell:.1f}" for cell in cells))


PARTS = {"linear": linear, "int8": int8, "convolutions": convolutions, "model": whole,
         "memory": memory}  # fmt: skip


def main() -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=41)
    parser.add_argument("--load", nargs=2, help="used by the benchmark itself")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.load:
        load_and_print(*options.load)
        return
    torch.set_num_threads(options.threads)
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__},"
        f" {options.threads} thread(s), seed 0"
    )
    with torch.inference_mode():
        for name in options.part or PARTS:
            PARTS[name](options)


if __name__ == "__main__":
    main()
