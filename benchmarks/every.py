"""The proximal pull at every m-th step only: accuracy on digits, and the time that it spares.

    OMP_NUM_THREADS=1 python benchmarks/every.py

Prints one table of drops, mean and standard deviation over seeds, and one of steps of VGG16 with 32
random images over plain ones.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import fewbits
from fewbits.lab import bench
from fewbits.lab.compare import Comparison
from fewbits.lab.config import Config
from fewbits.lab.data import load
from fewbits.lab.methods import METHODS, Recipe
from fewbits.lab.models import build
from fewbits.lab.progress import Progress
from fewbits.report import comparison


def register(name: str, every: int) -> str:
    """Add a method that differs from `name` in its `every`, and return what it is called."""
    attach = METHODS[name].attach
    assert attach is not None  # both train

    def attached(model: nn.Module, recipe: Recipe) -> fewbits.Clustering:
        clustering = attach(model, recipe)
        assert isinstance(clustering, fewbits.Clustering)
        assert isinstance(clustering.pull, fewbits.Proximal)
        clustering.pull = replace(clustering.pull, every=every)
        return clustering

    label = f"{name}-every{every}"
    METHODS[label] = replace(METHODS[name], attach=attached)
    return label


def accuracies(steps: list[int], seeds: int) -> None:
    """Train on digits and print the drops."""
    methods = [register(name, m) for name in ("proximal", "proximal-snapped") for m in steps]
    config = Config(methods=tuple(methods), k=(2, 4), seeds=tuple(range(seeds)))
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cpu")
        run = Comparison(config, Path(folder), load("digits"), device, Progress())
        entries = comparison(run.run(command=""))
    print(f"digits, {seeds} seeds\n\n| method | K | every | drop, points |\n|---|---:|---:|---:|")
    for entry in entries:
        name, _, every = entry["method"].rpartition("-every")
        drop = f"{entry['drop']:.2f} ± {entry['drop_sd']:.2f}"
        print(f"| {name} | {entry['k']} | {every} | {drop} |")


def times(steps: list[int], pairs: int) -> None:
    """Measure steps of VGG16 and print their ratios to plain ones."""

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return build("vgg16", classes=10, shape=(3, 32, 32))

    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    plain = bench.Stepper(fresh(), None)
    rows = []
    for m in steps:
        network = fresh()
        pull = fewbits.Proximal(every=m)
        clustering = fewbits.Clustering(network, k=16, pull=pull, snapped_forward=False)
        stepper = bench.Stepper(network, clustering)

        def several(stepper: bench.Stepper, count: int = max(steps)) -> None:
            for _ in range(count):
                stepper.step(images, labels)

        figures = bench.in_turn(
            lambda: several(plain), lambda stepper=stepper: several(stepper), pairs
        )
        rows.append({"what": f"proximal, every {m}", "k": 16, **figures})
    print(f"\nVGG16, {max(steps)} steps of 32 images\n\n{bench.markdown(rows)}")


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seeds", type=int, default=5, help="0 measures no accuracy")
    parser.add_argument("--pairs", type=int, default=3, help="0 measures no time")
    options = parser.parse_args()
    if options.seeds:
        accuracies(options.every, options.seeds)
    if options.pairs:
        times(options.every, options.pairs)


if __name__ == "__main__":
    main()
