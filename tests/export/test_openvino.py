"""OpenVINO models against PyTorch: the same outputs from few bytes, or a refusal."""

import models
import numpy as np
import pytest
import torch
from torch import nn

import fewbits
from fewbits import export

ov = pytest.importorskip("openvino", reason="pip install 'fewbits[openvino]'")


@pytest.mark.parametrize("k", [4, 16, 300])
def test_outputs_are_pytorchs_from_packed_bytes(tmp_path, k):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(97, 256, bias=False), nn.ReLU(), nn.Linear(256, 10))
    models.quantized(model, k)
    result = export.openvino(model, tmp_path / "m.xml", example_inputs=torch.randn(5, 97))
    assert result.agreement == 1 and result.difference is not None and result.difference < 1e-5
    packed = sum(row.packed_bytes for row in result.weights)
    assert packed < (tmp_path / "m.bin").stat().st_size < packed + 5000
    assert result.bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    more = torch.randn(3, 97)
    compiled = ov.Core().compile_model(
        tmp_path / "m.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    with torch.no_grad():
        np.testing.assert_allclose(compiled(more.numpy())[0], model(more).numpy(), atol=1e-4)


@pytest.mark.parametrize(("make", "inputs"), models.NETWORKS.values(), ids=models.NETWORKS)
def test_networks(tmp_path, make, inputs):
    torch.manual_seed(0)
    result = export.openvino(make(), tmp_path / "m.xml", example_inputs=inputs)
    assert result.agreement == 1 and result.examples == len(inputs)


def test_refusals_leave_nothing_and_earlier_files_stay(tmp_path):
    model = models.quantized(nn.Linear(97, 96), 4)
    inputs = torch.randn(2, 97)
    with pytest.raises(fewbits.FileError, match=r"must end in \.xml"):
        export.openvino(model, tmp_path / "m.onnx", example_inputs=inputs)
    with pytest.raises(fewbits.FewbitsError, match="OpenVINO: outputs differ"):
        export.openvino(model, tmp_path / "m.xml", example_inputs=inputs, tolerance=-1)
    with pytest.raises(fewbits.PlanError, match="no weight of the model has few values"):
        export.openvino(nn.Linear(97, 96), tmp_path / "m.xml", example_inputs=inputs)
    with pytest.raises(fewbits.PlanError, match="use dynamic_batch=False"):
        fixed = models.quantized(models.Fixed(97, 96), 4)
        export.openvino(fixed, tmp_path / "m.xml", example_inputs=torch.randn(4, 97))
    with pytest.raises(fewbits.PlanError, match="lacks the operator special_bessel_j0, of layer 1"):
        odd = models.quantized(nn.Sequential(nn.Linear(97, 97), models.Odd(97, 96)), 4)
        export.openvino(odd, tmp_path / "m.xml", example_inputs=inputs)
    with pytest.raises(fewbits.PlanError, match="weights is 'affine'"):
        export.openvino(model, tmp_path / "m.xml", example_inputs=inputs, weights="affine")  # pyright: ignore
    with pytest.raises(fewbits.PlanError, match=r"attached to a Clustering .* Call harden\(\)"):
        attached = nn.Linear(97, 96)
        fewbits.Clustering(attached, k=4)
        export.openvino(attached, tmp_path / "m.xml", example_inputs=inputs)
    assert not list(tmp_path.iterdir())
    (tmp_path / "m.bin").write_bytes(b"mine")
    with pytest.raises(fewbits.FileError, match="m.bin: exists already"):
        export.openvino(model, tmp_path / "m.xml", example_inputs=inputs)
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [b"mine"]
