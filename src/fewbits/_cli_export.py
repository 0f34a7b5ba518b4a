"""The export command: parse, call, print."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import click

from ._cli_files import _debug, _overwrite, _say_sizes
from ._errors import FileError, PlanError

_PATH = click.Path(path_type=Path)
_TARGETS = ("onnx", "openvino", "coreml", "executorch", "safetensors")
# Inputs for a check without data: enough that one differing example in fifty shows.
_RANDOM_EXAMPLES = 64


def _shape(context: Any, parameter: Any, text: str | None) -> tuple[int, int, int] | None:
    """Parse "3x32x32"; click reports what it cannot read."""
    if text is None:
        return None
    try:
        channels, height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no shape like 3x32x32.") from None
    if min(channels, height, width) < 1:
        raise click.BadParameter(f"{text!r}: every number must be 1 or more.")
    return channels, height, width


@click.command(short_help="Write a file for ONNX, OpenVINO, Core ML or ExecuTorch.")
@click.argument("file", type=_PATH)
@click.option("--to", "target", type=click.Choice(_TARGETS), required=True, help="The runtime.")
@click.option("-o", "--output", type=_PATH, required=True, help="The file or package to write.")
@click.option(
    "--model",
    help="convnet, alexnet, vgg16, vit, torchvision:NAME, timm:NAME or package.module:factory.",
)
@click.option("--width", type=float, default=1.0, help="Multiplies the channel counts.")
@click.option("--classes", type=int, help="Outputs of the model; those of --check-data, else 10.")
@click.option(
    "--input-shape", callback=_shape, help="CHANNELSxHEIGHTxWIDTH; that of --check-data otherwise."
)
@click.option("--check-data", help="Held-out images to compare on: digits, cifar10 or a folder.")
@click.option(
    "--check-images", type=click.IntRange(min=1), default=1000, show_default=True,
    help="How many of them.",
)  # fmt: skip
@click.option("--dense", is_flag=True, help="Plain float weights, for onnx and openvino.")
@_overwrite
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@_debug
def export(file: Path, target: str, output: Path, overwrite: bool, **how: Any) -> None:
    """Write a fewbits file for another runtime, run it there and compare with PyTorch.

    \b
    fewbits export model.fewbits --to onnx -o model.onnx --model convnet --check-data digits
    fewbits export model.fewbits --to coreml -o model.mlpackage --model vgg16 --input-shape 3x32x32

    Without --check-data outputs are compared on random inputs. safetensors needs no model: it
    takes the dense weights.
    """  # noqa: D301 (click wants the backspace itself)
    if output.exists() and not overwrite:
        raise FileError(f"{output}: exists already. Choose another name, or use --overwrite.")
    if how["dense"] and target not in ("onnx", "openvino"):
        raise PlanError(f"--dense is for onnx and openvino, not for {target}.")
    if target == "safetensors":
        from ._checkpoint import unpack

        unpack(file, output)
        _say_sizes(file, output, how["as_json"])
        return
    model, inputs = _prepared(file, how)
    from . import export as targets

    more = {"weights": "dense"} if how["dense"] else {}
    write = getattr(targets, target)
    result = write(model, output, example_inputs=inputs, overwrite=overwrite, **more)
    if how["as_json"]:
        print(json.dumps(dataclasses.asdict(result) | {"path": str(result.path)}, indent=1))
    else:
        print(result)


def _prepared(file: Path, how: dict[str, Any]) -> tuple[Any, Any]:
    """Return the model with the file's weights, and inputs to compare on."""
    import torch

    from ._loading import load
    from .lab import data as lab_data
    from .lab.models import build

    if how["model"] is None:
        raise PlanError("give the model that the file was saved from: --model.")
    shape, classes, inputs = how["input_shape"], how["classes"], None
    if how["check_data"] is not None:
        data = lab_data.load(how["check_data"])
        if shape not in (None, data.shape):
            raise PlanError(
                f"--input-shape is {'x'.join(map(str, shape))}, but the images of --check-data are"
                f" {'x'.join(map(str, data.shape))}. Leave it out."
            )
        count = how["check_images"]
        images, labels = data.test_images[:count], data.test_labels[:count]
        normalization = data.normalization
        ((inputs, _),) = lab_data.batches(images, labels, count, normalization=normalization)
        shape, classes = data.shape, classes or len(data.classes)
    if shape is None:
        raise PlanError("give the shape of an input, --input-shape 3x32x32, or --check-data.")
    if inputs is None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(_RANDOM_EXAMPLES, *shape, generator=generator)
    if not math.isfinite(how["width"]) or how["width"] <= 0:
        raise PlanError(f"--width is {how['width']:g}. Give a number above 0.")
    model = build(how["model"], classes=classes or 10, shape=shape, width=how["width"])
    return load(file, into=model), inputs


COMMANDS = (export,)
