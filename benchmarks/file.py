"""Sizes of model files against entropy bounds and other coders, and the speed of the coders.

Prints a page in Markdown. The models are safetensors files of weights on few values, such as a run
of `fewbits compare` leaves in its folder `models`, or a checkpoint to be clustered here:

    python benchmarks/file.py --run runs/vgg16/models/penalty-snapped-k16-seed0.safetensors
    python benchmarks/file.py --laplace vgg16 --repeats 9
    python benchmarks/file.py --checkpoint model.safetensors --k 16

Other coders are measured where they are installed (pip install 'fewbits[bench]'); nncodec wants an
environment of its own, whose Python --nncodec names.
"""

import argparse
import importlib
import lzma
import math
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.torch import load_file
from torch import Tensor

import fewbits
from fewbits._file import _coders
from fewbits._file._parallel import in_order
from fewbits._indexed import Indexed, axes, indexed
from fewbits.lab.models import build

State = dict[str, Tensor]

NNCODEC = """
import sys, numpy
from nncodec.tensor import encode, decode
total = 0
for path in sys.argv[1:]:
    indices = numpy.load(path).astype(numpy.int32)
    stream = encode(indices, {"verbose": False})
    assert (decode(stream) == indices).all(), path
    total += len(stream)
print("bytes", total)
"""


def laplacian(name: str, k: int) -> State:
    """A network whose weights are Laplacian, on the k means of each layer."""
    torch.manual_seed(0)
    model = build(name, classes=10, shape=(3, 32, 32))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.copy_(torch.distributions.Laplace(0.0, 0.05).sample(weight.shape))
    fewbits.quantize(model, k=k)
    return model.state_dict()


def clustered(path: str, k: int) -> State:
    """A checkpoint with each tensor of two or more axes on its k means."""
    from fewbits._checkpoint import quantize_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        quantize_checkpoint(Path(path), Path(folder) / "m", k=k)
        return fewbits.load(Path(folder) / "m")


def streams(state: State) -> dict[str, Indexed]:
    """The codebooks and indices of the weights that take few values."""
    found = {name: indexed(t) for name, t in state.items() if t.dim() >= 2}
    return {
        name: f for name, f in found.items()
        if f and f.bytes_fixed < state[name].numel() * state[name].element_size()
    }  # fmt: skip


def bits_of_table(table: np.ndarray) -> float:
    """Bits of symbols under each row's own frequencies."""
    total = np.broadcast_to(table.sum(1, keepdims=True), table.shape)
    there = table > 0
    return float((table[there] * np.log2(total[there] / table[there])).sum())


def order_0(found: Indexed) -> float:
    """Entropy of all indices of a tensor, in bits."""
    return bits_of_table(np.bincount(found.indices)[None])


def order_1(found: Indexed, distance: int) -> float:
    """The same given the index `distance` elements before, with 9 bits an entry for the table."""
    k = found.codebook.shape[1]
    before = np.zeros_like(found.indices)
    before[distance:] = found.indices[:-distance]
    pairs = before.astype(np.int64) * k + found.indices
    return bits_of_table(np.bincount(pairs, minlength=k * k).reshape(k, k)) + 9 * k * k


def coded(found: Indexed, choice: _coders.Choice = "smallest") -> bytes:
    return _coders.encode(found, choice)[1]


def constriction_bytes(found: Indexed) -> int:
    """Bytes by constriction's ANS coder, each tensor under its own frequencies."""
    constriction: Any = importlib.import_module("constriction")

    counts = np.bincount(found.indices).astype(np.float32)
    if len(counts) < 2:
        return 0
    model = constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(found.indices.astype(np.int32), model)
    return 4 * len(coder.get_compressed())


def brotli_bytes(packed: bytes) -> int:
    brotli: Any = importlib.import_module("brotli")
    return len(brotli.compress(packed, quality=5))


def nncodec_bytes(python: str, found: Iterable[Indexed]) -> int:
    """Bytes by nncodec of the indices as integers around the middle, without loss."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, f in enumerate(found):
            middle = int(np.bincount(f.indices).argmax())
            rows = f.indices.reshape(f.shape).astype(np.int32) - middle
            paths.append(f"{folder}/{number}.npy")
            np.save(paths[-1], rows)
        command = [str(Path(python).absolute()), "-c", NNCODEC, *paths]
        out = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        return int(out.stdout.split()[-1])


def rows_of_sizes(found: dict[str, Indexed], nncodec: str | None) -> list[tuple[str, float]]:
    """Bytes of all index streams by each coder."""
    packed = [coded(f, "packed") for f in found.values()]
    rows = [
        ("order-0 entropy, per tensor", sum(map(order_0, found.values())) / 8),
        ("**fewbits**", sum(len(coded(f)) for f in found.values())),
        ("fewbits, `coder=\"fast\"`", sum(len(coded(f, "fast")) for f in found.values())),
        ("packed at fixed width", sum(map(len, packed))),
    ]  # fmt: skip
    for level in (3, 19):
        compressor = zstandard.ZstdCompressor(level=level)
        size = sum(len(compressor.compress(p)) for p in packed)
        rows.append((f"packed + zstd -{level}", size))
    rows.append(("packed + xz -9", sum(len(lzma.compress(p, preset=9)) for p in packed)))
    for name, measure in (
        ("packed + brotli -q 5", lambda: sum(map(brotli_bytes, packed))),
        ("constriction ANS, per tensor", lambda: sum(map(constriction_bytes, found.values()))),
    ):
        try:
            rows.append((name, measure()))
        except ImportError:
            print(f"{name}: not installed", file=sys.stderr)
    if nncodec:
        rows.append(("nncodec, same indices", nncodec_bytes(nncodec, found.values())))
    return rows


def print_sizes(state: State, found: dict[str, Indexed], nncodec: str | None) -> None:
    weights = sum(len(f.indices) for f in found.values())
    rows = rows_of_sizes(found, nncodec)
    bound = rows[0][1]
    print("\n| indices by | bytes | bits per weight | over the entropy |\n|---|---:|---:|---:|")
    for name, size in rows:
        print(f"| {name} | {size:,.0f} | {8 * size / weights:.4f} | {size / bound - 1:+.3%} |")
    books = sum(f.codebook.nbytes for f in found.values())
    rest = sum(t.numel() * t.element_size() for n, t in state.items() if n not in found)
    with tempfile.TemporaryDirectory() as folder:
        fewbits.save(state, Path(folder) / "m")
        whole = (Path(folder) / "m").stat().st_size
    ideal = bound + books + rest
    dense = sum(t.numel() * 4 if t.is_floating_point() else t.nbytes for t in state.values())
    print(
        f"\nThe whole file has {whole:,} bytes, {dense / whole:.2f} times less than float32:"
        f" {whole / ideal - 1:+.3%} against order-0 entropy ({bound:,.0f}) + codebooks ({books:,})"
        f" + all that is not clustered ({rest:,})."
    )


def print_contexts(found: dict[str, Indexed]) -> None:
    """How far below the order-0 entropy each kind of context goes, tables counted."""
    kinds: dict[str, Callable[[Indexed], float]] = {
        "classes of channels (what fewbits does)": lambda f: 8.0 * len(coded(f)),
        "the previous index": lambda f: order_1(f, 1),
        "the same position in the previous filter": lambda f: order_1(
            f, math.prod(axes(f.shape)[1:])
        ),
    }
    base = {name: order_0(f) for name, f in found.items()}
    total = sum(base.values())
    print("\n| condition on | all tensors | best tensor |\n|---|---:|---:|")
    for kind, measure in kinds.items():
        # a tensor for which the context does not pay would be coded without it
        costs = {name: min(measure(f), base[name]) for name, f in found.items()}
        best = min((costs[n] / base[n] - 1, n) for n in found if base[n])
        change = sum(costs.values()) / total - 1
        print(f"| {kind} | {change:+.2%} | {best[0]:+.2%} (`{best[1]}`) |")


def timed(work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of a number of runs, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return times[1:]


def print_speeds(state: State, found: dict[str, Indexed], repeats: int, threads: int) -> None:
    weights = sum(len(f.indices) for f in found.values())
    outs = {name: np.empty(len(f.indices), f.codebook.dtype) for name, f in found.items()}

    def row(name: str, work: Callable[[str], Any]) -> None:
        def all_of_it() -> None:
            for _ in in_order(work, found, threads):
                pass

        rates = sorted(weights / t / 1e6 for t in timed(all_of_it, repeats))
        middle = statistics.median(rates)
        print(f"| {name} | {middle:,.0f} | {rates[0]:,.0f} … {rates[-1]:,.0f} |")

    print(f"\n| {threads} threads | million weights a second | range |\n|---|---:|---:|")
    row("find codebooks and indices", lambda name: indexed(state[name]))
    for choice in ("smallest", "fast", "packed"):
        done = {name: _coders.encode(f, choice) for name, f in found.items()}
        row(f"encode indices, `{choice}`", lambda name, c=choice: coded(found[name], c))

        def decode(name: str, done: dict[str, Any] = done) -> None:
            coder, stream = done[name]
            f, padding = found[name], bytes(len(found[name].indices) // 4096 + 8)
            view = memoryview(stream + padding) if not stream else memoryview(stream)
            _coders.decode(coder, view, f.shape, f.codebook, f.axis, outs[name])

        row(f"decode to float32, `{choice}`", decode)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        for name, work in (
            ("`save`, whole model", lambda: fewbits.save(state, path, threads=threads)),
            ("`load`, whole model", lambda: fewbits.load(path, threads=threads)),
        ):
            rates = sorted(weights / t / 1e6 for t in timed(work, repeats))
            middle = statistics.median(rates)
            print(f"| {name} | {middle:,.0f} | {rates[0]:,.0f} … {rates[-1]:,.0f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", nargs="*", default=[], help="models with weights on few values")
    parser.add_argument("--checkpoint", nargs="*", default=[], help="models to be clustered here")
    parser.add_argument("--laplace", nargs="*", default=[], help="networks with random weights")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=0, help="0 leaves the speeds out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nncodec", help="a Python that has nncodec")
    options = parser.parse_args()
    states = {f"`{Path(p).stem}`": load_file(p) for p in options.run}
    for path in options.checkpoint:
        states[f"`{Path(path).stem}` on {options.k} means"] = clustered(path, options.k)
    for name in options.laplace:
        states[f"{name}, Laplacian weights on {options.k} means"] = laplacian(name, options.k)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}."
        f"\n\n```sh\npython benchmarks/file.py {shlex.join(sys.argv[1:])}\n```"
    )
    for title, state in states.items():
        found = streams(state)
        weights = sum(len(f.indices) for f in found.values())
        print(f"\n## {title}\n\n{weights:,} weights in {len(found)} tensors on few values.")
        print_sizes(state, found, options.nncodec)
        print_contexts(found)
        if options.repeats:
            print_speeds(state, found, options.repeats, options.threads)


if __name__ == "__main__":
    main()
