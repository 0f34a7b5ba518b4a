"""Exports of hardened networks: sizes, and agreement with PyTorch on 1,000 images.

    python benchmarks/export_networks.py --cifar10 FOLDER
    python benchmarks/export.py
    python benchmarks/export.py --targets executorch    # in an environment that has it

Every network goes to every target; those whose packages are missing say so in their row. The
targets include PyTorch itself, with the weights packed.
"""

import argparse
import copy
import sys
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from export_networks import FOLDER, NETWORKS, read
from torch import Tensor, nn

import fewbits
from fewbits import export
from fewbits.export._compare import compare

TARGETS = ("onnx", "onnx, dense", "openvino", "coreml", "torch, compressed", "executorch")
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


@torch.no_grad()
def compressed(model: nn.Module, path: Path, *, example_inputs: Tensor) -> export.Exported:
    """Save a model with packed indices, load it with packed weights, and compare their outputs."""
    fewbits.save(model, path, coder="packed")
    packed = fewbits.load(path, into=copy.deepcopy(model), mode="compressed")
    expected, found = (
        torch.cat([m(x) for x in example_inputs.split(100)]) for m in (model, packed)
    )
    difference, same = compare("torch, compressed", [expected], [found.numpy()], tolerance=1e-4)
    return export.Exported(
        target="torch, compressed",
        path=path,
        runtime=f"torch {torch.__version__}",
        bytes=path.stat().st_size,
        dense_bytes=sum(t.nbytes for t in model.state_dict().values()),
        weights=(),
        examples=len(found),
        difference=difference,
        agreement=same,
        notes=(f"{fewbits.compressed.memory(packed).bytes:,}",),
    )


def agreement(name: str, targets: list[str], folder: Path) -> None:
    """Print a row per target of a network."""
    model, images, _ = read(name, folder)
    packed = sum(layer.bytes_fixed for layer in fewbits.summary(model).layers)
    with tempfile.TemporaryDirectory() as place:
        at = Path(place)
        writers = {
            "onnx": partial(export.onnx, model, at / "m.onnx"),
            "onnx, dense": partial(export.onnx, model, at / "d.onnx", weights="dense"),
            "openvino": partial(export.openvino, model, at / "m.xml"),
            "coreml": partial(export.coreml, model, at / "m.mlpackage"),
            "torch, compressed": partial(compressed, model, at / "m.fewbits"),
            "executorch": partial(export.executorch, model, at / "m.pte", batch=100),
        }
        for target in targets:
            start = time.perf_counter()
            try:
                row = writers[target](example_inputs=images)
            except fewbits.FewbitsError as error:
                print(f"| {name} | {target} | {error} | | | | |", flush=True)
                continue
            difference = "not run" if row.difference is None else f"{row.difference:.1e}"
            same = "" if row.agreement is None else f"{row.agreement:.1%}"
            print(
                f"| {name} | {target} | {row.bytes:,} | {row.bytes / row.dense_bytes:.3f} |"
                f" {row.bytes / packed:.3f} | {difference} | {same} |",
                flush=True,
            )
            said = f", tensors of {row.notes[0]} bytes" if target == "torch, compressed" else ""
            seconds = time.perf_counter() - start
            print(
                f"{name}, {target}: {row.examples:,} images, {seconds:.0f} s{said}", file=sys.stderr
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
