"""Time and memory of a training step against the number of weights, ours and peers', as a plot.

    python benchmarks/scale.py                       # measures, writes docs/results/scale.json
    python benchmarks/scale.py --plot                # docs/results/scale.svg from that file alone

One square Linear layer of N weights, batch 16, SGD with momentum, K = 16; each measurement in a
process of its own, one thread. What would not fit is not run but continued from the slope of the
largest two measurements, and drawn hollow.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results"
K = 16
METHODS = ("plain", "penalty", "parq", "dkm", "table")
TITLES = {
    "plain": "no clustering",
    "penalty": "fewbits, penalty",
    "parq": "PARQ (torchao)",
    "dkm": "DKM (coremltools)",
    "table": "weights × K table, autograd",
}
SIZES = [10**5, 10**6, 10**7, 10**8, 10**9]
# Most that a measurement may take, and what the plot names.
MEMORY = 12e9
SECONDS = 100.0
LIMITS = {"a 24 GB card": 24e9, "an 80 GB card": 80e9}


def measure(method: str, size: int, steps: int = 4) -> dict[str, float]:
    """Return seconds and peak bytes of a step, medians, after one that allocates."""
    import torch
    from memory import peak_bytes  # beside this file
    from torch import nn

    from fewbits._plan import plan
    from fewbits.lab.bench import Stepper
    from fewbits.lab.methods import METHODS as ALL
    from fewbits.lab.methods import Recipe

    class Table(nn.Module):
        """Soft assignment to K values through a weights × K table, as differentiable k-means."""

        def __init__(self, side: int):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(side, side) * 0.05)
            self.values = nn.Parameter(torch.linspace(-0.1, 0.1, K))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            distance = (self.weight[..., None] - self.values).square()
            return inputs @ ((-distance / 1e-4).softmax(-1) * self.values).sum(-1).T

    torch.manual_seed(0)
    side = max(4, round(math.sqrt(size)))
    inputs, labels = torch.randn(16, side), torch.zeros(16, dtype=torch.long)
    model = Table(side) if method == "table" else nn.Sequential(nn.Linear(side, side, bias=False))
    attached: Any = None
    if method not in ("plain", "table"):
        recipe = Recipe(plan(model, k=K), 10_000)
        attach = ALL[method].attach
        assert attach is not None
        attached = attach(model, recipe)
    stepper = Stepper(model, attached)
    stepper.step(inputs, labels)
    seconds, peaks = [], []
    for _ in range(steps):
        Path("/proc/self/clear_refs").write_text("5")
        began = time.perf_counter()
        stepper.step(inputs, labels)
        seconds.append(time.perf_counter() - began)
        peaks.append(peak_bytes())
    return {"seconds": sorted(seconds)[steps // 2], "bytes": sorted(peaks)[steps // 2]}


def continued(rows: list[dict[str, Any]], size: int) -> dict[str, float]:
    """Continue the slope of the last two measurements, in weights, to another size."""
    one, two = rows[-2:]
    share = (size - two["size"]) / (two["size"] - one["size"])
    return {key: two[key] + share * (two[key] - one[key]) for key in ("seconds", "bytes")}


def run(method: str) -> list[dict[str, Any]]:
    """Measure a method at every size that fits, and continue it to those that do not."""
    rows: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    for size in SIZES:
        row: dict[str, Any] = {"method": method, "size": size, "measured": True}
        guess = continued(measured, size) if len(measured) > 1 else {"seconds": 0.0, "bytes": 0.0}
        if guess["bytes"] > MEMORY or guess["seconds"] > SECONDS:
            rows.append(row | guess | {"measured": False})
        else:
            command = [sys.executable, __file__, "--measure", method, "--size", str(size)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            output = subprocess.check_output(command, text=True, env=environment)
            row |= json.loads(output.splitlines()[-1])
            rows.append(row)
            measured.append(row)
        print(json.dumps(rows[-1]), flush=True)
    return rows


def stops(rows: list[dict[str, Any]], method: str, limit: float) -> float:
    """Return how many weights a method can take before it needs `limit` bytes."""
    mine = [row for row in rows if row["method"] == method]
    one, two = mine[-2:]
    slope = (two["bytes"] - one["bytes"]) / (two["size"] - one["size"])
    return two["size"] + (limit - two["bytes"]) / slope


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of the page."""
    rows = results["rows"]
    names = list(dict.fromkeys(row["method"] for row in rows))
    heads = [f"10^{round(math.log10(size))}" for size in SIZES]
    lines = [f"| seconds a step | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name in names:
        cells = [
            f"{row['seconds']:.3g}" if row["measured"] else f"({row['seconds']:.3g})"
            for row in rows
            if row["method"] == name
        ]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    most = " | ".join(f"most weights, {name}" for name in LIMITS)
    lines += ["", f"| | bytes a weight | {most} |", "|---|---:|" + "---:|" * len(LIMITS)]
    for name in names:
        mine = [row for row in rows if row["method"] == name]
        slope = (mine[-1]["bytes"] - mine[-2]["bytes"]) / (mine[-1]["size"] - mine[-2]["size"])
        cells = [f"{stops(rows, name, limit) / 1e6:,.0f} M" for limit in LIMITS.values()]
        lines.append(f"| {TITLES[name]} | {slope:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw seconds and peak memory against the number of weights."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = results["rows"]
    settings: Any = {"svg.hashsalt": "fewbits", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9, 4), layout="constrained")
        for axes, key, label in zip(
            figure.subplots(1, 2),
            ("seconds", "bytes"),
            ("seconds a step", "peak bytes"),
            strict=True,
        ):
            for number, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
                mine = [row for row in rows if row["method"] == name]
                color = f"C{number}"
                axes.plot([r["size"] for r in mine], [r[key] for r in mine], color=color, lw=1)
                for row in mine:
                    face = color if row["measured"] else "white"
                    axes.plot(row["size"], row[key], "o", color=color, mfc=face, ms=4)
                axes.plot([], [], "o-", color=color, label=TITLES[name], ms=4)
            if key == "bytes":
                for about, limit in LIMITS.items():
                    axes.axhline(limit, color="gray", ls=":", lw=1)
                    axes.text(SIZES[0], limit, about, va="bottom", fontsize=7, color="gray")
            axes.set(xscale="log", yscale="log", xlabel="weights in the layer", ylabel=label)
            axes.grid(alpha=0.3)
        figure.axes[0].legend(fontsize=7)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure and write, or only draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--plot", action="store_true", help="only draw what was measured")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--measure", help="used by the benchmark itself")
    parser.add_argument("--size", type=int, default=10**5)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.size)))
        return
    path = RESULTS / "scale" / "scale.json"
    if not options.plot:
        import torch

        rows = [row for method in options.methods for row in run(method)]
        path.parent.mkdir(parents=True, exist_ok=True)
        results = {"torch": torch.__version__, "k": K, "rows": rows}
        path.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text())
    plot(results, path.with_suffix(".svg"))
    print(markdown(results))


if __name__ == "__main__":
    main()
