"""Without a runtime every export names the extra to install, before it looks at the model."""

import sys

import models
import pytest
import torch
from torch import nn

import fewbits
from fewbits import export


@pytest.mark.parametrize(("write", "package", "path", "extra"), [
    (export.onnx, "onnxruntime", "m.onnx", "onnx"),
    (export.onnx, "onnxscript", "m.onnx", "onnx"),
    (export.openvino, "openvino", "m.xml", "openvino"),
    (export.openvino, "onnxscript", "m.xml", "openvino"),
    (export.coreml, "coremltools", "m.mlpackage", "coreml"),
    (export.executorch, "executorch", "m.pte", "executorch"),
])  # fmt: skip
def test_a_missing_runtime_is_named_with_its_extra(
    tmp_path, monkeypatch, write, package, path, extra
):
    model = models.quantized(nn.Linear(97, 96), 4)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(fewbits.FewbitsError) as raised:
        write(model, tmp_path / path, example_inputs=torch.randn(2, 97))
    said = str(raised.value)
    # A runtime before it may be missing as well; the extra has them all.
    assert said.startswith("this export needs ") and f"pip install 'fewbits[{extra}]'" in said
    assert not list(tmp_path.iterdir())
