"""Where the time of `fewbits train` goes, from importing to writing the report.

    OMP_NUM_THREADS=1 python benchmarks/job.py                    # the defaults: digits
    OMP_NUM_THREADS=1 python benchmarks/job.py --data FOLDER --model vgg16 --width 0.25 \
        --train-images 2560 --epochs 1 --finetune-epochs 1

Options are those of `fewbits train`. Imports are timed by `python -X importtime` in processes of
their own, best of three; the job under `cProfile`, which makes small functions look slower.
"""

import cProfile
import pstats
import subprocess
import sys
import tempfile
from typing import Any

# What is shown: where the function is, its name, and whether it is a part of the line above.
PHASES = [
    ("reading the images", "lab/data/__init__.py", "load", 0),
    ("importing scikit-learn", "sklearn/datasets/__init__.py", "<module>", 1),
    ("training", "lab/training.py", "run", 0),
    ("importing torch._dynamo, as torch's optimizers do", "_dynamo/__init__.py", "<module>", 1),
    ("steps, with making batches", "lab/training.py", "_epoch", 1),
    ("backward passes", "torch/_tensor.py", "backward", 2),
    ("penalty: measuring", "fewbits/_clustering.py", "loss", 2),
    ("penalty: adding its gradients", "fewbits/_penalty.py", "backward", 2),
    ("snapping weights", "fewbits/_snapped.py", "read", 2),
    ("`clustering.step()`", "fewbits/_clustering.py", "step", 2),
    ("the optimizer", "torch/optim/sgd.py", "step", 2),
    ("evaluating after each epoch", "lab/training.py", "_measure", 1),
    ("checkpoints", "lab/_folder.py", "save_checkpoint", 1),
    ("first codebooks, k-means", "fewbits/_codebook.py", "initial_codebook", 0),
    ("evaluating at the end", "lab/training.py", "accuracy", 0),
    ("saving files", "fewbits/_file/_save.py", "save", 0),
    ("the report", "report/__init__.py", "write_report", 0),
]


def import_seconds(module: str) -> float:
    """Return how long a fresh process takes to import a module, best of three."""
    found = []
    for _ in range(3):
        command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        last = [line for line in lines.splitlines() if line.rpartition("|")[2].strip() == module]
        found.append(int(last[-1].split("|")[1]) / 1e6)
    return min(found)


def profiled(arguments: list[str]) -> tuple[float, dict[tuple[str, str], tuple[int, float]]]:
    """Run the command in this process; return its seconds, and calls and seconds by function."""
    from fewbits._cli import cli

    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        given = ["train", *arguments, "--quiet", "--out", f"{folder}/run"]
        profile.enable()
        cli.main(given, standalone_mode=False)
        profile.disable()
    stats: Any = pstats.Stats(profile)
    calls: dict[tuple[str, str], tuple[int, float]] = {}
    for (file, _, name), (_, count, _, seconds, _) in stats.stats.items():
        for _, where, function, _ in PHASES:
            if name == function and file.endswith(where):
                calls[where, function] = (count, seconds)
    return stats.total_tt, calls


def main() -> None:
    """Print the imports and the job as Markdown tables."""
    torch, ours = import_seconds("torch"), import_seconds("fewbits")
    print("| imported | seconds |\n|---|---:|")
    print(f"| `import torch` | {torch:.2f} |\n| `import fewbits`, torch included | {ours:.2f} |\n")
    total, calls = profiled(sys.argv[1:])
    print("| part of the job | calls | seconds | share |\n|---|---:|---:|---:|")
    print(f"| all | 1 | {total:.2f} | 100% |")
    for title, where, function, depth in PHASES:
        count, seconds = calls.get((where, function), (0, 0.0))
        indent = "– " * depth
        print(f"| {indent}{title} | {count} | {seconds:.2f} | {100 * seconds / total:.1f}% |")


if __name__ == "__main__":
    main()
