"""Exports of hardened networks: sizes, and agreement with PyTorch on 1,000 images.

    python benchmarks/export_networks.py --cifar10 FOLDER
    python benchmarks/export.py
    python benchmarks/export.py --targets executorch    # in an environment that has it

Every network goes to every target; those whose packages are missing say so in their row.
"""

import argparse
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path

from export_networks import FOLDER, NETWORKS, read

import fewbits
from fewbits import export

TARGETS = ("onnx", "onnx, dense", "openvino", "coreml", "executorch")
PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "openvino", "coremltools",
            "executorch")  # fmt: skip


def versions(names: tuple[str, ...]) -> str:
    """The installed versions of what is compared."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def agreement(name: str, targets: list[str], folder: Path) -> None:
    """Print a row per target of a network."""
    model, images, _ = read(name, folder)
    with tempfile.TemporaryDirectory() as place:
        at = Path(place)
        writers = {
            "onnx": partial(export.onnx, model, at / "m.onnx"),
            "onnx, dense": partial(export.onnx, model, at / "d.onnx", weights="dense"),
            "openvino": partial(export.openvino, model, at / "m.xml"),
            "coreml": partial(export.coreml, model, at / "m.mlpackage"),
            "executorch": partial(export.executorch, model, at / "m.pte", batch=100),
        }
        for target in targets:
            try:
                row = writers[target](example_inputs=images)
            except fewbits.FewbitsError as error:
                print(f"| {name} | {target} | {error} | | | | |", flush=True)
                continue
            packed = sum(w.packed_bytes for w in row.weights)
            difference = "not run" if row.difference is None else f"{row.difference:.1e}"
            same = "" if row.agreement is None else f"{row.agreement:.1%}"
            print(
                f"| {name} | {target} | {row.bytes:,} | {row.bytes / row.dense_bytes:.3f} |"
                f" {row.bytes / packed:.3f} | {difference} | {same} |",
                flush=True,
            )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="which ones")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS[:-1])
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the networks are")
    options = parser.parse_args()
    print(
        f"{versions(PACKAGES)}\n\n"
        "| network | target | bytes | of dense | over packed weights | largest difference |"
        " same top-1 |\n|---|---|---:|---:|---:|---:|---:|"
    )
    for name in options.networks:
        agreement(name, options.targets, options.out)


if __name__ == "__main__":
    main()
