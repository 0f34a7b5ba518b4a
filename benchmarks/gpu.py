"""What the penalty costs on a GPU: its passes against a copy, a training step against a plain one.

The first table is the penalty alone, value, sums and gradient of one weight, in bytes that it has
to move (16 a float32 weight: read twice, gradient read and written) a second, as a share of what
copying a tensor of that size reaches. The second is VGG16 on random 32 x 32 images, with the
model compiled and in bfloat16 by autocast, in pairs of a plain step and one with the penalty: the
medians of the ratios, with the quartiles.

    python benchmarks/gpu.py
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fewbits
from fewbits import _kernels as kernels
from fewbits.lab.models import build

MOVED = 16  # bytes a weight: see above


def seconds(work: Callable[[], object]) -> float:
    """Return how long the device takes for some work."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def median(work: Callable[[], object], times: int) -> float:
    """Return the median of some runs, after three that compile and allocate."""
    for _ in range(3):
        work()
    return statistics.median(seconds(work) for _ in range(times))


def passes(size: int, sizes: list[int], times: int) -> None:
    """Print how near to a copy the penalty's two passes come."""
    weight, gradient = torch.randn(1, size, device="cuda") * 0.05, torch.zeros(1, size).cuda()
    copy = 8 * size / median(lambda: gradient.copy_(weight), times)
    print(f"\n{size:,} float32 weights; a copy moves {copy / 1e9:,.0f} GB a second\n")
    print("| K | ms | GB a second | share of a copy's |\n|---:|---:|---:|---:|")
    factor = torch.tensor([1e-9], dtype=torch.float64, device="cuda")
    for k in sizes:
        codebook = torch.linspace(-0.1, 0.1, k, device="cuda")[None]

        def penalty(codebook: Tensor = codebook) -> None:
            kernels.measure_all([weight], codebook, None, 2)
            kernels.pull_all([gradient], [weight], codebook, None, 2, factor)

        time = median(penalty, times)
        speed = MOVED * size / time
        print(f"| {k} | {time * 1e3:.3f} | {speed / 1e9:,.0f} | {speed / copy:.2f} |", flush=True)


def stepper(k: int, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a function that takes a training step of VGG16; k = 0 trains without clustering."""
    torch.manual_seed(0)
    model = build("vgg16", classes=10, shape=(3, 32, 32)).cuda()
    clustering = fewbits.Clustering(model, k=k, snapped_forward=False) if k else None
    groups = clustering.param_groups(lr=0.01) if clustering else model.parameters()
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    forward = torch.compile(model)
    assert isinstance(forward, nn.Module)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = cross_entropy(forward(images), labels)
        if clustering:
            loss = loss + clustering.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if clustering:
            clustering.step()

    return step


def steps(batch: int, sizes: list[int], pairs: int) -> None:
    """Print what the penalty adds to a training step."""
    images = torch.randn(batch, 3, 32, 32, device="cuda")
    labels = torch.randint(10, (batch,), device="cuda")
    plain = stepper(0, images, labels)
    print(f"\nVGG16, batch {batch}, bfloat16, compiled\n")
    print("| K | plain, ms | with the penalty, ms | ratio | quartiles |")
    print("|---:|---:|---:|---:|---|")
    for k in sizes:
        clustered = stepper(k, images, labels)
        for work in (plain, clustered) * 5:
            work()
        times = [(seconds(plain), seconds(clustered)) for _ in range(pairs)]
        ratios = [b / a for a, b in times]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        one, other = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
        cells = f"{one:.3f} | {other:.3f} | {ratio:.3f} | {low:.3f} … {high:.3f}"
        print(f"| {k} | {cells} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", type=int, default=1 << 27)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 16, 256])
    parser.add_argument("--times", type=int, default=50)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark measures a GPU, and torch sees no CUDA device.")
    name, made = torch.cuda.get_device_name(), kernels.for_cuda().__name__
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, kernels: {made}")
    passes(options.weights, options.k, options.times)
    steps(options.batch, options.k, options.times)


if __name__ == "__main__":
    main()
