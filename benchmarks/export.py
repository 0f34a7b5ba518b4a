"""Exports of hardened networks: sizes, agreement with PyTorch, latency and memory of each runtime.

    python benchmarks/export.py agreement --cifar10 FOLDER    # a folder with CIFAR-10 as Parquet
    python benchmarks/export.py write --cifar10 FOLDER --networks transformer vgg16
    python benchmarks/export.py speed --networks transformer vgg16

Networks are trained briefly with fewbits.Clustering and hardened, from seed 0; K = 16. `agreement`
exports each to every runtime that is installed and compares on 1,000 images. `write` writes
networks in many forms, and `speed` runs each file in processes of its own on one thread: the
median latency of one example, and how much resident memory loading and running took.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fewbits
from fewbits import export
from fewbits.lab import data as lab_data
from fewbits.lab.models import build

K = 16
CHECKED = 1000
NETWORKS = ["convnet", "resnet18", "transformer", "vgg16"]


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return (self.path(x) + self.shortcut(x)).relu()


def resnet18(channels: int, classes: int, width: int) -> nn.Module:
    """ResNet-18's eight blocks for small images; width 64 is the usual one."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False)]
    layers += [nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(4):
        outputs = width << stage
        layers += [Block(inputs, outputs, 2 if stage else 1), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class Transformer(nn.Module):
    """Rows of pixels as words of a transformer encoder."""

    def __init__(self, row: int, classes: int, width: int = 256):
        super().__init__()
        self.words = nn.Linear(row, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(images.permute(0, 2, 1, 3).flatten(2))).mean(1))


def normalized(data: lab_data.ImageData, count: int) -> Tensor:
    """The first held-out images, as a network sees them."""
    mean, std = (t[:, None, None] for t in data.normalization)
    return (data.test_images[:count].float() - mean) / std


def trained(model: nn.Module, data: lab_data.ImageData, steps: int) -> nn.Module:
    """Cluster and train a network for some steps, and harden it."""
    clustering = fewbits.Clustering(model, k=K)
    optimizer = torch.optim.SGD(clustering.param_groups(lr=0.02), momentum=0.9)
    done = 0
    while done < steps:
        generator = torch.Generator().manual_seed(done)
        for images, labels in lab_data.batches(
            data.train_images, data.train_labels, 64, normalization=data.normalization,
            generator=generator,
        ):  # fmt: skip
            loss = nn.functional.cross_entropy(model(images), labels) + clustering.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clustering.step()
            done += 1
            if done == steps:
                break
    clustering.harden()
    return model.eval()


def networks(folder: str) -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    """Hardened networks and images to compare on, by name."""

    def digits(make: Callable[[lab_data.ImageData], nn.Module], steps: int):
        data = lab_data.load("digits")
        torch.manual_seed(0)
        # Fewer than 1,000 are held out: images it was trained on make up the rest.
        images = torch.cat([normalized(data, CHECKED), _train_images(data)])[:CHECKED]
        return trained(make(data), data, steps), images

    def cifar10(make: Callable[[lab_data.ImageData], nn.Module], steps: int):
        data = lab_data.load(folder)
        torch.manual_seed(0)
        return trained(make(data), data, steps), normalized(data, CHECKED)

    return {
        "convnet": lambda: digits(lambda d: build("convnet", classes=10, shape=d.shape), 100),
        "resnet18": lambda: digits(lambda d: resnet18(1, 10, 32), 20),
        "transformer": lambda: digits(lambda d: Transformer(8, 10), 30),
        "vgg16": lambda: cifar10(lambda d: build("vgg16", classes=10, shape=d.shape), 10),
    }


def _train_images(data: lab_data.ImageData) -> Tensor:
    mean, std = (t[:, None, None] for t in data.normalization)
    return (data.train_images.float() - mean) / std


def versions() -> str:
    """The installed versions of what is compared."""
    from importlib import metadata

    names = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "coremltools")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def agreement(folder: str, only: list[str]) -> None:
    """Print a row per network and target."""
    print(
        "| network | target | bytes | of dense | over packed weights | largest difference |"
        " same top-1 |\n|---|---|---:|---:|---:|---:|---:|"
    )
    for name, make in networks(folder).items():
        if name not in only:
            continue
        model, images = make()
        with tempfile.TemporaryDirectory() as place:
            at = Path(place)
            writers = {
                "onnx": partial(export.onnx, model, at / "m.onnx"),
                "onnx, dense": partial(export.onnx, model, at / "d.onnx", weights="dense"),
                "openvino": partial(export.openvino, model, at / "m.xml"),
                "coreml": partial(export.coreml, model, at / "m.mlpackage"),
            }
            for target, write in writers.items():
                try:
                    row = write(example_inputs=images)
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


def resident() -> int:
    """Resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status: run it on Linux")


def opened(kind: str, path: Path) -> Callable[[np.ndarray], Any]:
    """Return a function that runs a file on one thread."""
    if kind.startswith("openvino"):
        import openvino  # pyright: ignore[reportMissingImports]

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        compiled = openvino.Core().compile_model(path, "CPU", settings)
        return lambda x: compiled([x])
    if kind.startswith("torch"):
        torch.set_num_threads(1)
        model = torch.load(path, weights_only=False, mmap=False).requires_grad_(False)
        return lambda x: model(torch.from_numpy(x))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"],
        disabled_optimizers=["ConstantFolding"] if kind.endswith("not folded") else None,
    )  # fmt: skip
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def measure(kind: str, path: Path) -> dict[str, float]:
    """Load a file and run it; seconds and bytes."""
    if kind.startswith("openvino"):
        pass
    elif not kind.startswith("torch"):
        pass
    x = np.load(path.with_name("image.npy"))
    gc.collect()
    before = resident()
    start = time.perf_counter()
    run = opened(kind, path)
    run(x)
    load = time.perf_counter() - start
    times = []
    while len(times) < 5 or (sum(times) < 2 and len(times) < 500):
        start = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - start)
    gc.collect()
    return {"load": load, "latency": median(times), "resident": resident() - before}


# The file of each form that is measured.
FORMS = {
    "torch, dense": "torch.pt",
    "onnx, dense": "dense.onnx",
    "onnx, indices": "indices.onnx",
    "onnx, indices, not folded": "indices.onnx",
    "onnx, onnxruntime's dynamic int8": "int8.onnx",
    "onnx, onnxruntime's MatMulNBits int4": "int4.onnx",
    "onnx, affine": "affine.onnx",
    "onnx, affine-int8": "affine-int8.onnx",
    "openvino, dense": "dense.xml",
    "openvino, indices": "indices.xml",
}


def write(name: str, folder: str, at: Path) -> None:
    """Write a network in every form that is measured."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    at.mkdir(parents=True)
    model, images = networks(folder)[name]()
    images = images[:8]
    np.save(at / "image.npy", images[:1].numpy())
    torch.save(model, at / "torch.pt")
    export.onnx(model, at / "dense.onnx", example_inputs=images, weights="dense")
    export.onnx(model, at / "indices.onnx", example_inputs=images)
    quantize_dynamic(at / "dense.onnx", at / "int8.onnx", weight_type=QuantType.QUInt8)
    for form in ("dense", "indices"):
        export.openvino(model, at / f"{form}.xml", example_inputs=images, weights=form)
    if name != "transformer":
        return  # its other layers are no matrix products
    int4 = MatMulNBitsQuantizer(
        onnx.load(at / "dense.onnx"), block_size=32, is_symmetric=True, accuracy_level=4
    )
    int4.process()
    int4.model.save_model_to_file(str(at / "int4.onnx"))  # pyright: ignore[reportAttributeAccessIssue]
    fewbits.quantize(model, k=K, method="uniform")
    export.onnx(model, at / "affine.onnx", example_inputs=images, weights="affine")
    export.onnx(
        model, at / "affine-int8.onnx", example_inputs=images, weights="affine-int8", tolerance=0.1
    )


def speed(name: str, at: Path) -> None:
    """Print a row per form of a network that was written."""
    for form, file in FORMS.items():
        path = at / file
        if not path.exists():
            continue
        # Several times in turn: a shared machine is slow at times.
        rows = [_measured(form, path) for _ in range(2)]
        best = {key: min(row[key] for row in rows) for key in rows[0]}
        size = path.stat().st_size
        size += path.with_suffix(".bin").stat().st_size if path.suffix == ".xml" else 0
        print(
            f"| {name} | {form} | {size:,} | {best['resident'] / 1e6:.0f} |"
            f" {best['load']:.2f} | {best['latency'] * 1e3:.2f} |",
            flush=True,
        )


def _measured(form: str, path: Path) -> dict[str, float]:
    output = subprocess.check_output(
        [sys.executable, __file__, "measure", json.dumps([form, str(path)])], text=True
    )
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Run one of the two tables, or write what the second measures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["agreement", "write", "speed", "measure"])
    parser.add_argument("how", nargs="?", help="used by the benchmark itself")
    parser.add_argument("--cifar10", default="cifar10", help="data of vgg16")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="which ones")
    parser.add_argument("--out", type=Path, default=Path("runs/export"), help="for write and speed")
    options = parser.parse_args()
    if options.what == "measure":
        form, path = json.loads(options.how)
        print(json.dumps(measure(form, Path(path))))
        return
    if options.what == "write":
        for name in options.networks:
            write(name, options.cifar10, options.out / name)
        return
    print(f"{versions()}\n")
    if options.what == "agreement":
        agreement(options.cifar10, options.networks)
        return
    print(
        "| network | form | bytes on disk | resident, MB | load, s | one example, ms |"
        "\n|---|---|---:|---:|---:|---:|"
    )
    for name in options.networks:
        speed(name, options.out / name)


if __name__ == "__main__":
    main()
