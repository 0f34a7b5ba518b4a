"""Peak memory of a training step with the penalty against a plain one, in bytes per weight.

One Linear layer, 4096 x 11008 by default, SGD with momentum; each measurement in a process of its
own. The peak is that of the step alone: Linux's high-water mark is reset just before it, so
attaching and the optimizer's own state are not in the difference.

    python benchmarks/memory.py
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import fewbits


def peak_bytes() -> int:
    """Return the process's high-water mark of resident memory since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status: run it on Linux")


def measure(rows: int, columns: int, k: int, batch: int) -> int:
    """Return the peak of the third training step; k = 0 trains without clustering."""
    torch.manual_seed(0)
    model = nn.Linear(columns, rows, bias=False)
    clustering = fewbits.Clustering(model, k=k, snapped_forward=False) if k else None
    groups = clustering.param_groups(lr=0.01) if clustering else [{"params": model.weight}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    inputs = torch.randn(batch, columns)
    peak = 0
    for _ in range(3):
        Path("/proc/self/clear_refs").write_text("5")
        loss = model(inputs).square().mean()
        if clustering:
            loss = loss + clustering.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if clustering:
            clustering.step()
        peak = peak_bytes()
    return peak


def main() -> None:
    """Measure each k in a fresh process and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 256])
    parser.add_argument("--measure", type=int, help="used by the benchmark itself")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.rows, options.columns, options.measure, options.batch)))
        return
    size = options.rows * options.columns
    about = f"Linear {options.rows} x {options.columns}, batch {options.batch}"
    print(f"{about}, torch {torch.__version__}")
    print("| step | peak resident, MB | more than plain, bytes per weight |\n|---|---:|---:|")
    plain = 0
    for k in (0, *options.k):
        output = subprocess.check_output(
            [sys.executable, *sys.argv, "--measure", str(k)], text=True
        )
        peak = json.loads(output.splitlines()[-1])
        plain = plain or peak
        name = f"penalty, K = {k}" if k else "plain"
        print(f"| {name} | {peak / 1e6:,.0f} | {(peak - plain) / size:.3f} |", flush=True)


if __name__ == "__main__":
    main()
