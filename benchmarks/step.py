"""Time of a training step with clustering over that of a plain one, measured in turn.

Random images of 32 x 32, SGD with momentum. Each pair runs a plain step and a step of every
variant one after the other; the figure is the median of the ratios within pairs, with the
quartiles, so that a slow moment of the machine falls on both sides.

    python benchmarks/step.py --model vgg16 --batch 32 --k 4 16 256
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fewbits
from fewbits.lab.models import build, parameter_count

VARIANTS: dict[str, Callable[[nn.Module, int], fewbits.Clustering]] = {
    "penalty": lambda model, k: fewbits.Clustering(model, k=k, snapped_forward=False),
    "penalty, snapped forward": lambda model, k: fewbits.Clustering(model, k=k),
    "proximal": lambda model, k: fewbits.Clustering(
        model, k=k, pull=fewbits.Proximal(), snapped_forward=False
    ),
}


class Stepper:
    """A network with its optimizer, and perhaps a clustering, that takes one step at a time."""

    def __init__(self, model: nn.Module, clustering: fewbits.Clustering | None):
        self.model, self.clustering = model, clustering
        groups = clustering.param_groups(lr=0.01) if clustering else model.parameters()
        self.optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Take a training step and return its seconds."""
        began = time.perf_counter()
        loss = cross_entropy(self.model(images), labels)
        if self.clustering:
            loss = loss + self.clustering.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.clustering:
            self.clustering.step()
        return time.perf_counter() - began


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="vgg16")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 16, 256])
    parser.add_argument("--pairs", type=int, default=10)
    options = parser.parse_args()

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return build(options.model, classes=10, shape=(3, 32, 32), width=options.width)

    images = torch.randn(options.batch, 3, 32, 32)
    labels = torch.randint(10, (options.batch,))
    plain = Stepper(fresh(), None)
    print(
        f"{options.model}, width {options.width}, {parameter_count(plain.model):,} parameters,"
        f" batch {options.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print("| step | K | ratio to plain | quartiles | seconds |\n|---|---:|---:|---:|---:|")
    for name, attach in VARIANTS.items():
        for k in options.k:
            model = fresh()
            clustered = Stepper(model, attach(model, k))
            for stepper in (plain, clustered):
                stepper.step(images, labels)  # the first step allocates
            pairs = [
                (plain.step(images, labels), clustered.step(images, labels))
                for _ in range(options.pairs)
            ]
            low, ratio, high = statistics.quantiles([b / a for a, b in pairs], n=4)
            seconds = statistics.median(b for _, b in pairs)
            print(
                f"| {name} | {k} | {ratio:.2f} | {low:.2f} … {high:.2f} | {seconds:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
