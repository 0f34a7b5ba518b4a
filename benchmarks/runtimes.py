"""Runtimes beside dense float32 and beside their own quantizations: speed, memory, agreement.

    python benchmarks/export_networks.py --cifar10 FOLDER
    python benchmarks/runtimes.py write                 # every form whose packages are there
    python benchmarks/runtimes.py speed > speed.txt

`write` writes a network in many forms and compares the top-1 of each with the hardened network's on
1,000 images. `speed` runs each file in processes of its own on one thread: the median latency of
one example, and how much resident memory loading and running took.
"""

import argparse
import gc
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from export_networks import FOLDER, K, read
from torch import Tensor, nn

import fewbits
from fewbits import export

Run = Callable[[np.ndarray], np.ndarray]

# The file of each form that is measured, and the function that writes it.
FORMS: dict[str, tuple[str, str]] = {
    "torch, dense": ("torch.pt", ""),
    "torch, compressed": ("model.fewbits", "_fewbits"),
    "torch, compressed, int8 activations": ("model.fewbits", "_fewbits"),
    "torch, its dynamic int8": ("int8.pt", "_torch_int8"),
    "onnx, dense": ("dense.onnx", "_onnx"),
    "onnx, indices": ("indices.onnx", "_onnx"),
    "onnx, indices, not folded": ("indices.onnx", "_onnx"),
    "onnx, affine": ("affine.onnx", "_affine"),
    "onnx, affine-int8": ("affine-int8.onnx", "_affine"),
    "onnx, its dynamic int8": ("dynamic.onnx", "_onnx_dynamic"),
    "onnx, its static int8": ("static.onnx", "_onnx_static"),
    "onnx, its MatMulNBits int4": ("int4.onnx", "_onnx_int4"),
    "openvino, dense": ("dense.xml", "_openvino"),
    "openvino, indices": ("indices.xml", "_openvino"),
    "openvino, NNCF int8 weights": ("int8.xml", "_nncf"),
    "openvino, NNCF int4 weights": ("int4.xml", "_nncf"),
    "openvino, NNCF codebook weights": ("codebook.xml", "_nncf"),
    "openvino, NNCF int8": ("static.xml", "_nncf"),
    "executorch, dense": ("dense.pte", "_executorch"),
    "executorch, its int8": ("int8.pte", "_executorch_int8"),
    "coreml, palettized": ("m.mlpackage", "_coreml"),
    "coreml, its int8 weights": ("int8.mlpackage", "_coreml"),
}


def _fewbits(model: nn.Module, images: Tensor, at: Path) -> None:
    fewbits.save(model, at / "model.fewbits", coder="packed")


def _torch_int8(model: nn.Module, images: Tensor, at: Path) -> None:
    from torch.ao.quantization import quantize_dynamic

    torch.save(quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8), at / "int8.pt")


def _onnx(model: nn.Module, images: Tensor, at: Path) -> None:
    export.onnx(model, at / "dense.onnx", example_inputs=images[:8], weights="dense",
                overwrite=True)  # fmt: skip
    export.onnx(model, at / "indices.onnx", example_inputs=images[:8], overwrite=True)


def _affine(model: nn.Module, images: Tensor, at: Path) -> None:
    fewbits.quantize(model, k=K, method="uniform")
    for how in ("affine", "affine-int8"):
        export.onnx(
            model, at / f"{how}.onnx", example_inputs=images[:8], weights=how, overwrite=True,
            tolerance=1e-4 if how == "affine" else 0.5,
        )  # fmt: skip


def _onnx_dynamic(model: nn.Module, images: Tensor, at: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(at / "dense.onnx", at / "dynamic.onnx", weight_type=QuantType.QUInt8)


def _onnx_static(model: nn.Module, images: Tensor, at: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            name = _session(at / "dense.onnx").get_inputs()[0].name
            self.left: Iterator[Any] = ({name: x.numpy()} for x in images[:200].split(50))

        def get_next(self) -> Any:
            return next(self.left, None)

    quantize_static(
        at / "dense.onnx", at / "static.onnx", Reader(), activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, per_channel=True,
    )  # fmt: skip


def _onnx_int4(model: nn.Module, images: Tensor, at: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    int4 = MatMulNBitsQuantizer(
        onnx.load(at / "dense.onnx"), block_size=32, is_symmetric=True, accuracy_level=4
    )
    int4.process()
    int4.model.save_model_to_file(str(at / "int4.onnx"))  # pyright: ignore[reportAttributeAccessIssue]


def _openvino(model: nn.Module, images: Tensor, at: Path) -> None:
    for form in ("dense", "indices"):
        export.openvino(model, at / f"{form}.xml", example_inputs=images[:8], weights=form,
                        overwrite=True)  # fmt: skip


def _nncf(model: nn.Module, images: Tensor, at: Path) -> None:
    import nncf  # pyright: ignore[reportMissingImports]
    import openvino  # pyright: ignore[reportMissingImports]

    codebook = nncf.AdvancedCompressionParameters(codebook=np.linspace(-1, 1, K, dtype=np.float32))
    modes = nncf.CompressWeightsMode
    wanted = {
        "int8": {"mode": modes.INT8_ASYM},
        "int4": {"mode": modes.INT4_SYM, "group_size": -1, "all_layers": True},
        "codebook": {"mode": modes.CODEBOOK, "group_size": -1, "all_layers": True,
                     "advanced_parameters": codebook},
    }  # fmt: skip
    for name, how in wanted.items():
        dense = openvino.Core().read_model(at / "dense.xml")
        openvino.save_model(nncf.compress_weights(dense, **how), at / f"{name}.xml")
    data = nncf.Dataset([x.numpy() for x in images[:200].split(1)])
    dense = openvino.Core().read_model(at / "dense.xml")
    openvino.save_model(nncf.quantize(dense, data, subset_size=200), at / "static.xml")


def _executorch(model: nn.Module, images: Tensor, at: Path) -> None:
    export.executorch(model, at / "dense.pte", example_inputs=images[:8], overwrite=True)


def _executorch_int8(model: nn.Module, images: Tensor, at: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
        XnnpackPartitioner,
    )
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (  # pyright: ignore[reportMissingImports]
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )  # fmt: skip
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]
    from torchao.quantization.pt2e.quantize_pt2e import (  # pyright: ignore[reportMissingImports]
        convert_pt2e,
        prepare_pt2e,
    )  # fmt: skip

    torch.backends.mha.set_fastpath_enabled(False)
    quantizer = XNNPACKQuantizer()
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    example = (images[:1],)
    prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
    for x in images[:200].split(1):
        prepared(x)
    traced = torch.export.export(convert_pt2e(prepared), example)
    edge = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()])
    (at / "int8.pte").write_bytes(edge.to_executorch().buffer)


def _coreml(model: nn.Module, images: Tensor, at: Path) -> None:
    import coremltools.optimize.coreml as optimize
    from coremltools.models import MLModel

    export.coreml(model, at / "m.mlpackage", example_inputs=images[:1], overwrite=True)
    # Its own quantization of the same weights, made dense again.
    dense = optimize.decompress_weights(MLModel(str(at / "m.mlpackage"), skip_model_load=True))
    how = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
    config = optimize.OptimizationConfig(global_config=how)
    optimize.linear_quantize_weights(dense, config).save(str(at / "int8.mlpackage"))  # pyright: ignore


def opened(form: str, path: Path) -> Run:
    """Return a function that runs a file on one thread."""
    torch.set_num_threads(1)
    if form.startswith("openvino"):
        import openvino  # pyright: ignore[reportMissingImports]

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        compiled = openvino.Core().compile_model(path, "CPU", settings)
        return lambda x: compiled([x])[0]
    if form.startswith("executorch"):
        from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

        program = Runtime.get().load_program(path)
        method = program.load_method("forward")

        def run(x: np.ndarray, program=program) -> np.ndarray:  # a method needs its program
            parts = torch.from_numpy(x).split(1)
            return np.concatenate([method.execute([part])[0].numpy().copy() for part in parts])

        return run
    if form.startswith("onnx"):
        session = _session(path, fold=not form.endswith("not folded"))
        name = session.get_inputs()[0].name
        return lambda x: session.run(None, {name: x})[0]
    model: torch.nn.Module
    # The fused encoder layer reads the weights of its layers, which int8 layers lack and compressed
    # ones decode whole.
    torch.backends.mha.set_fastpath_enabled(form.endswith("dense"))
    if "compressed" in form:
        with torch.device("meta"):
            model = torch.load(path.with_name("torch.pt"), weights_only=False, map_location="meta")
        model = fewbits.load(path, into=model, mode="compressed")
        if form.endswith("activations"):
            fewbits.compressed.compress(model, activations="int8")
    else:
        model = torch.load(path, weights_only=False, mmap=False)
    model = model.eval().requires_grad_(False)
    return lambda x: model(torch.from_numpy(x)).numpy()


def _session(path: Path, *, fold: bool = True) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"],
        disabled_optimizers=None if fold else ["ConstantFolding"],
    )  # fmt: skip


def write(name: str, folder: Path, only: str) -> None:
    """Write a network in the forms that begin with a word, and compare what they put out."""
    at = folder / name
    model, images, labels = read(name, folder)
    np.save(at / "image.npy", images[:1].numpy())
    with torch.no_grad():
        expected = torch.cat([model(part) for part in images.split(100)]).argmax(1)
    noted = at / "quality.json"
    quality = json.loads(noted.read_text()) if noted.exists() else {}
    done, failed = set(), {}
    for form, (file, writer) in FORMS.items():
        if not form.startswith(only):
            continue
        try:
            if writer and writer not in done and writer not in failed:
                done.add(writer)
                globals()[writer](read(name, folder)[0], images, at)
        except Exception as error:  # a form that a tool cannot make is a row of the table
            failed[writer] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if writer in failed:
            print(f"{name}, {form}: {failed[writer]}", flush=True)
            continue
        if form.startswith("coreml"):
            quality[form] = {}  # nothing runs it here
        else:
            try:
                run = opened(form, at / file)
                # Few large batches: without constant folding each decodes the weights anew.
                parts = [torch.as_tensor(run(x.numpy())) for x in images.split(100)]
                top = torch.cat(parts).argmax(1)
                quality[form] = {"same": (top == expected).double().mean().item(),
                                 "right": (top == labels).double().mean().item()}  # fmt: skip
            except Exception as error:
                print(f"{name}, {form}: {type(error).__name__}: {error}", flush=True)
                continue
        print(f"{name}, {form}: {quality[form]}", flush=True)
        noted.write_text(json.dumps(quality, indent=1))


def resident() -> int:
    """Resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status: run it on Linux")


def measure(form: str, path: Path) -> dict[str, float]:
    """Load a file and run it; seconds and bytes."""
    x = np.load(path.with_name("image.npy"))
    # What importing a runtime takes is not the model's.
    for runtime in ("onnxruntime", "openvino", "executorch.runtime"):
        if runtime.startswith(form.partition(",")[0]):
            importlib.import_module(runtime)
    gc.collect()
    before = resident()
    start = time.perf_counter()
    run = opened(form, path)
    run(x)
    load = time.perf_counter() - start
    times = []
    while len(times) < 5 or (sum(times) < 1 and len(times) < 500):
        start = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - start)
    gc.collect()
    return {"load": load, "latency": median(times), "resident": resident() - before}


def speed(name: str, folder: Path, only: str) -> None:
    """Print a row per form of a network that was written."""
    quality = json.loads((folder / name / "quality.json").read_text())
    for form, said in quality.items():
        if not form.startswith(only):
            continue
        path = folder / name / FORMS[form][0]
        files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
        files = path.rglob("*") if path.is_dir() else files
        size = sum(f.stat().st_size for f in files if f.is_file() and f.suffix != ".json")
        best = {}
        if said:
            # Several times in turn: a shared machine is slow at times.
            rows = [_measured(form, path) for _ in range(2)]
            best = {key: min(row[key] for row in rows) for key in rows[0]}
        cells = (
            f"{best['resident'] / 1e6:.0f} | {best['load']:.2f} | {best['latency'] * 1e3:.2f} |"
            f" {said['same']:.1%} | {said['right']:.1%}" if best else "not run | | | |"
        )  # fmt: skip
        print(f"| {name} | {form} | {size:,} | {cells} |", flush=True)


def _measured(form: str, path: Path) -> dict[str, float]:
    output = subprocess.check_output(
        [sys.executable, __file__, "measure", "--how", json.dumps([form, str(path)])], text=True
    )
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Write the forms, or measure those that were written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["write", "speed", "measure"])
    parser.add_argument("--networks", nargs="+", default=["transformer", "vgg16"], help="which")
    parser.add_argument("--only", default="", help="forms that begin with this")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the networks are")
    parser.add_argument("--how", help="used by the benchmark itself")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.what == "measure":
        form, path = json.loads(options.how)
        print(json.dumps(measure(form, Path(path))))
        return
    if options.what == "speed":
        print(
            "| network | form | bytes on disk | resident, MB | load, s | one example, ms |"
            " same top-1 | right |\n|---|---|---:|---:|---:|---:|---:|---:|"
        )
    for name in options.networks:
        if options.what == "write":
            write(name, options.out, options.only)
        else:
            speed(name, options.out, options.only)


if __name__ == "__main__":
    main()
