"""Time and memory of a training step against the number of weights, ours and peers', as a plot.

    python benchmarks/scale.py                       # measures: docs/results/scale/scale.json
    python benchmarks/scale.py --methods dkm         # measures one anew, beside what is there
    python benchmarks/scale.py --plot                # scale.svg and the tables from that file alone

One square Linear layer of N weights at K = 16, and one of 10^5 at other K, batch 16, SGD with
momentum; each measurement in a process of its own, one thread. What would not fit, or takes longer
than a minute, is continued from the slope of the largest two measurements, and drawn hollow.
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
VALUES, AT = [4, 16, 64, 256], 10**5
# Most that a measurement may take: bytes, seconds a step, seconds with attaching and all.
MEMORY, SECONDS, PATIENCE = 10e9, 10.0, 60.0
LIMITS = {"a 24 GB card": 24e9, "an 80 GB card": 80e9}


def measure(method: str, size: int, k: int, steps: int = 4) -> dict[str, float]:
    """Return seconds and peak bytes of a step, medians, after one that allocates.

    Bytes are those above what the process holds before there is a layer.
    """
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
            self.values = nn.Parameter(torch.linspace(-0.1, 0.1, k))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            distance = (self.weight[..., None] - self.values).square()
            return inputs @ ((-distance / 1e-4).softmax(-1) * self.values).sum(-1).T

    torch.manual_seed(0)
    Stepper(nn.Linear(4, 4), None).step(torch.randn(16, 4), torch.zeros(16, dtype=torch.long))
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    side = max(4, round(math.sqrt(size)))
    inputs, labels = torch.randn(16, side), torch.zeros(16, dtype=torch.long)
    model = Table(side) if method == "table" else nn.Sequential(nn.Linear(side, side, bias=False))
    attached: Any = None
    if method not in ("plain", "table"):
        recipe = Recipe(plan(model, k=k), 10_000)
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
    return {"seconds": sorted(seconds)[steps // 2], "bytes": sorted(peaks)[steps // 2] - before}


def continued(rows: list[dict[str, Any]], size: int) -> dict[str, float]:
    """Continue the slope of the last two measurements, in weights, to another size."""
    one, two = rows[-2:]
    share = (size - two["size"]) / (two["size"] - one["size"])
    return {key: two[key] + share * (two[key] - one[key]) for key in ("seconds", "bytes")}


def attempt(method: str, size: int, k: int) -> dict[str, float] | None:
    """Measure in a process of its own; None where it fails or takes too long."""
    command = [sys.executable, __file__, "--measure", method, "--size", str(size), "--k", str(k)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        output = subprocess.check_output(
            command, text=True, env=environment, timeout=PATIENCE, stderr=subprocess.DEVNULL
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return json.loads(output.splitlines()[-1])


def run(method: str) -> list[dict[str, Any]]:
    """Measure a method at every size that fits, continue it to the others; then at each K."""
    rows: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    for size in SIZES:
        row: dict[str, Any] = {"method": method, "size": size, "k": K, "measured": True}
        guess = continued(measured, size) if len(measured) > 1 else {"seconds": 0.0, "bytes": 0.0}
        fits = guess["bytes"] <= MEMORY and guess["seconds"] <= SECONDS
        found = attempt(method, size, K) if fits else None
        if found is not None:
            rows.append(row | found)
            measured.append(rows[-1])
        elif len(measured) > 1:
            rows.append(row | continued(measured, size) | {"measured": False})
        print(json.dumps(rows[-1:]), flush=True)
    for k in VALUES if method != "plain" else ():
        found = None if k == K else attempt(method, AT, k)
        if found is not None:
            rows.append({"method": method, "size": AT, "k": k, "measured": True} | found)
            print(json.dumps(rows[-1]), flush=True)
    return rows


def by_size(rows: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """Return a method's rows at K = 16, by rising size."""
    return [row for row in rows if row["method"] == method and row["k"] == K]


def by_values(rows: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """Return a method's rows of 10^5 weights, by rising K."""
    mine = [row for row in rows if row["method"] == method and row["size"] == AT]
    return sorted(mine, key=lambda row: row["k"])


def stops(rows: list[dict[str, Any]], method: str, limit: float) -> float:
    """Return how many weights a method can take before it needs `limit` bytes."""
    one, two = by_size(rows, method)[-2:]
    slope = (two["bytes"] - one["bytes"]) / (two["size"] - one["size"])
    return two["size"] + (limit - two["bytes"]) / slope


def _cell(row: dict[str, Any] | None, key: str, unit: float = 1.0) -> str:
    if row is None:
        return ""
    text = f"{row[key] / unit:.3g}"
    return text if row["measured"] else f"({text})"


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of the page."""
    rows = results["rows"]
    names = [name for name in METHODS if by_size(rows, name)]
    lines = []
    for about, key, unit in (("seconds a step", "seconds", 1.0), ("peak, MB", "bytes", 1e6)):
        heads = [f"N = 10^{round(math.log10(size))}" for size in SIZES]
        lines += [f"| {about} | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
        for name in names:
            found = {row["size"]: row for row in by_size(rows, name)}
            cells = [_cell(found.get(size), key, unit) for size in SIZES]
            lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
        lines.append("")
    most = " | ".join(f"most weights, {name}" for name in LIMITS)
    lines += [f"| | bytes a weight | {most} |", "|---|---:|" + "---:|" * len(LIMITS)]
    for name in names:
        one, two = by_size(rows, name)[-2:]
        slope = (two["bytes"] - one["bytes"]) / (two["size"] - one["size"])
        cells = [f"{stops(rows, name, limit) / 1e6:,.0f} M" for limit in LIMITS.values()]
        lines.append(f"| {TITLES[name]} | {slope:.1f} | {' | '.join(cells)} |")
    heads = [f"K = {k}" for k in VALUES]
    for about, key, unit in (("seconds a step", "seconds", 1.0), ("peak, MB", "bytes", 1e6)):
        lines += ["", f"| {about} | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
        for name in names:
            found = {row["k"]: row for row in by_values(rows, name)}
            if name != "plain":
                cells = [_cell(found.get(k), key, unit) for k in VALUES]
                lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _curve(axes: Any, rows: list[dict[str, Any]], across: str, key: str, number: int) -> None:
    color = f"C{number}"
    axes.plot([r[across] for r in rows], [r[key] for r in rows], color=color, lw=1)
    for row in rows:
        face = color if row["measured"] else "white"
        axes.plot(row[across], row[key], "o", color=color, mfc=face, ms=4)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw seconds and peak memory against the number of weights, and against K."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = results["rows"]
    settings: Any = {"svg.hashsalt": "fewbits", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9, 7), layout="constrained")
        grid = figure.subplots(2, 2)
        for column, (key, label) in enumerate(
            (("seconds", "seconds a step"), ("bytes", "peak bytes"))
        ):
            above, below = grid[:, column]
            for number, name in enumerate(METHODS):
                _curve(above, by_size(rows, name), "size", key, number)
                above.plot([], [], "o-", color=f"C{number}", label=TITLES[name], ms=4)
                if name != "plain":
                    _curve(below, by_values(rows, name), "k", key, number)
            if key == "bytes":
                for about, limit in LIMITS.items():
                    above.axhline(limit, color="gray", ls=":", lw=1)
                    above.text(SIZES[0], limit, about, va="bottom", fontsize=7, color="gray")
            above.set(xscale="log", yscale="log", xlabel=f"weights, K = {K}", ylabel=label)
            if below.lines:
                below.set(xscale="log", yscale="log")
            below.set(xlabel="K, 10^5 weights", ylabel=label)
            for axes in (above, below):
                axes.grid(alpha=0.3)
        grid[0, 0].legend(fontsize=7)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure and write, or only draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--plot", action="store_true", help="only draw what was measured")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--measure", help="used by the benchmark itself")
    parser.add_argument("--size", type=int, default=10**5)
    parser.add_argument("--k", type=int, default=K)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.size, options.k)))
        return
    path = RESULTS / "scale" / "scale.json"
    if not options.plot:
        import torch

        before = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = [row for row in before if row["method"] not in options.methods]
        rows += [row for method in options.methods for row in run(method)]
        path.parent.mkdir(parents=True, exist_ok=True)
        results = {"torch": torch.__version__, "k": K, "rows": rows}
        path.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text())
    plot(results, path.with_suffix(".svg"))
    print(markdown(results))


if __name__ == "__main__":
    main()
