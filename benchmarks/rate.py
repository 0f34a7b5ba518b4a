"""Bits per weight against accuracy: rate-aware training, and quantizing after it.

The rows of ours are those of a study that was carried out (fewbits study studies/rate.toml). Beside
them the float networks of the same study, coded by nncodec, the reference software of MPEG's neural
network coding, at several step sizes, with and without dependent quantization. It wants an
environment of its own (pip install nncodec 'numpy<2'), whose Python --nncodec names:

    python benchmarks/rate.py studies/rate.toml --out runs/rate \\
        --nncodec ~/nncodec/bin/python > docs/results/bits.md

Every accuracy is that of the decoded network after batch-norm statistics are re-estimated. A
weight's bits are those of the whole file without the parameters that are left as they are, which
take 32 bits each in both, over the number of weights that are coded.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drops import cell
from torch import Tensor

import fewbits
from fewbits.lab import data as lab_data
from fewbits.lab._floats import shared_folder
from fewbits.lab.compare import Comparison, environment
from fewbits.lab.progress import Progress
from fewbits.lab.study import Cell, read_study
from fewbits.lab.training import reestimated_accuracy

# Reads weights, writes what nncodec makes of them at a step size, prints the bytes.
NNCODEC = """
import sys, numpy
from nncodec.nn import encode, decode
source, target, qp, dependent = sys.argv[1:]
weights = dict(numpy.load(source))
settings = {"qp": int(qp), "use_dq": dependent == "True", "verbose": False}
stream = encode(weights, settings)
decoded = decode(bytearray(stream), {"lsa": False, "bnf": False})
numpy.savez(target, **{name: decoded[name] for name in weights})
print("bytes", len(stream))
"""

HEAD = """# Bits against accuracy

Rows of fewbits and of LSQ are those of a [study](rate/report.md): the same start, data and epochs.
Rows of nncodec are the same float networks, trained for as many epochs, coded after training by the
reference software of MPEG's neural network coding. A weight's bits are those of the whole file
without the parameters that are left as they are; a drop is in points against the float network,
with batch-norm statistics re-estimated.

```sh
fewbits study studies/rate.toml
python benchmarks/rate.py studies/rate.toml --out runs/rate --nncodec NNCODEC/bin/python
```
"""

Row = tuple[str, float, float]  # what, bits a weight, drop in points


def nncodec(
    python: str, weights: Mapping[str, Tensor], qp: int, dependent: bool
) -> tuple[int, dict[str, Tensor]]:
    """Return the bytes of nncodec's stream and the weights that it holds."""
    with tempfile.TemporaryDirectory() as folder:
        arrays: dict[str, Any] = {name: w.numpy() for name, w in weights.items()}
        np.savez(f"{folder}/in.npz", **arrays)
        command = [str(Path(python).absolute()), "-c", NNCODEC, f"{folder}/in.npz"]
        command += [f"{folder}/out.npz", str(qp), str(dependent)]
        said = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        decoded = np.load(f"{folder}/out.npz")
        found = {name: torch.from_numpy(decoded[name]).view_as(w) for name, w in weights.items()}
        return int(said.stdout.split()[-1]), found


def coded_weights(model: torch.nn.Module, k: int) -> dict[str, Tensor]:
    """Return the weights that a plan at K values selects, by name."""
    names = [planned.name for planned in fewbits.plan(model, k=k).selected]
    return {name: model.get_parameter(name).detach() for name in names}


def nncodec_rows(
    python: str, work: Comparison, cells: Iterable[Cell], steps: list[int]
) -> list[Row]:
    """Return one row per float network, step size and kind of quantization."""
    rows = []
    k, size_of_batch = work.config.k[0], work.config.batch_size
    for seed in sorted({one.seed for one in cells}):
        reference = work.float.get(seed, continued=True)
        for dependent in (False, True):
            for qp in steps:
                model = work.float.fresh(seed)
                model.load_state_dict(reference["state"])
                weights = coded_weights(model, k)
                size, decoded = nncodec(python, weights, qp, dependent)
                model.load_state_dict(decoded, strict=False)
                now = reestimated_accuracy(model, work.data, size_of_batch, work.augment)
                bits = 8 * size / sum(w.numel() for w in weights.values())
                name = f"nncodec{', dependent quantization' if dependent else ''}, qp {qp}"
                rows.append((name, bits, reference["accuracy"] - now))
    return rows


def our_rows(results: Mapping[str, Any], rest: int, weights: int) -> list[Row]:
    """Return a study's rows; a label has what differs between them."""
    rows = []
    for row in results["rows"]:
        label = [row["method"], f"K = {row['k']}"]
        label += [f"{axis} {row[axis]}" for axis in results["axes"]]
        rows.append((", ".join(label), 8 * (row["file_bytes"] - rest) / weights, row["drop"]))
    return rows


def table(rows: Iterable[Row]) -> str:
    """Return means over seeds as Markdown, by rising bits."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for label, bits, drop in rows:
        found[label].append((bits, drop))
    lines = ["| what | bits a weight | drop, points | seeds |", "|---|---:|---:|---:|"]
    for label, pairs in sorted(
        found.items(), key=lambda item: statistics.mean(b for b, _ in item[1])
    ):
        bits, drops = zip(*pairs, strict=True)
        lines.append(f"| {label} | {statistics.mean(bits):.3f} | {cell(drops)} | {len(pairs)} |")
    return "\n".join(lines)


def machine(python: str) -> str:
    """Say what the figures depend on."""
    ask = "import importlib.metadata as m; print(m.version('nncodec'))"
    said = subprocess.run([python, "-c", ask], stdout=subprocess.PIPE, text=True, check=True)
    about = environment(torch.device("cpu"))
    return (
        f"{about['device']}, torch {about['torch']}, Python {about['python']}, fewbits"
        f" {about['fewbits']}; nncodec {said.stdout.strip()}."
    )


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", type=Path, help="the study's file")
    parser.add_argument("--out", type=Path, required=True, help="the folder it was carried out in")
    parser.add_argument("--nncodec", required=True, help="a Python that has nncodec")
    parser.add_argument(
        "--qp", type=int, nargs="+", default=[-24, -20, -18, -16, -14, -12], help="step sizes"
    )
    given = parser.parse_args()
    cells = read_study(given.study).cells
    results = json.loads((given.out / "report" / "results.json").read_text())
    config = cells[0].config
    data = lab_data.load(config.data, image_size=config.image_size)
    floats = given.out / "float"
    work = Comparison(config, floats, data, torch.device("cpu"), Progress(), shared_folder(floats))
    model = work.float.fresh(cells[0].seed)
    weights = sum(w.numel() for w in coded_weights(model, cells[0].k).values())
    rest = sum(4 * t.numel() for t in model.state_dict().values() if t.is_floating_point())
    rows = our_rows(results, rest - 4 * weights, weights)
    rows += nncodec_rows(given.nncodec, work, cells, given.qp)
    print(f"{HEAD}\n{machine(given.nncodec)}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
