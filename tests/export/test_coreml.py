"""Core ML packages: every weight of few values is a palettized constant equal to it."""

import models
import numpy as np
import pytest
import torch
from torch import nn

import fewbits
from fewbits import export

coremltools = pytest.importorskip("coremltools", reason="pip install 'fewbits[coreml]'")
# coremltools leaves folders of its own to the garbage collector, which warns about each.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_tables_are_there_padded_and_equal_and_the_package_is_small(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64),
        nn.ReLU(), nn.Linear(64, 10),
    ).eval()  # fmt: skip
    fewbits.quantize(
        model, plan=fewbits.plan(model, k=5, overrides={"4": {"k": 16}, "6": {"k": 17}})
    )
    path = tmp_path / "m.mlpackage"
    result = export.coreml(model, path, example_inputs=torch.randn(3, 1, 8, 8), batch=2)
    stored = {row.name: row.stored for row in result.weights}
    assert stored == {
        "0.weight": "constexpr_lut_to_dense, indices of 3 bits, padded to 8",
        "4.weight": "constexpr_lut_to_dense, indices of 4 bits",
        "6.weight": "constexpr_lut_to_dense, indices of 6 bits, padded to 64",
    }
    assert result.difference is None and result.agreement is None and result.examples == 0
    assert "prediction needs a Mac" in str(result)
    assert result.bytes == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert {f.name for f in path.rglob("*") if f.is_file()} == {
        "Manifest.json", "model.mlmodel", "weight.bin"
    }  # fmt: skip
    packed = sum(row.packed_bytes for row in result.weights)
    assert packed < result.bytes < packed + 12_000 and result.ratio > 4
    spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
    assert list(spec.description.input[0].type.multiArrayType.shape) == [2, 1, 8, 8]


@pytest.mark.parametrize("how", [
    {"granularity": "channel"}, {"granularity": "group", "channels_per_group": 4},
])  # fmt: skip
def test_codebooks_of_channels_and_groups(tmp_path, how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, 20))
    models.quantized(model, 3, **how)
    result = export.coreml(model, tmp_path / "m.mlpackage", example_inputs=torch.randn(1, 1, 8, 8))
    assert all(row.codebooks > 1 and "2 bits, padded to 4" in row.stored for row in result.weights)


@pytest.mark.parametrize(("make", "inputs"), [
    (lambda: models.quantized(models.resnet(), 4), torch.randn(1, 1, 8, 8)),
    (lambda: models.quantized(models.Language(), 5), torch.randint(0, 40, (1, 7))),
], ids=["resnet", "transformer"])  # fmt: skip
def test_networks(tmp_path, make, inputs):
    torch.manual_seed(0)
    model = make()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = export.coreml(model, tmp_path / "m.mlpackage", example_inputs=inputs)
    assert all(row.stored.startswith("constexpr_lut_to_dense") for row in result.weights)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_float16_rounds_the_tables(tmp_path):
    torch.manual_seed(0)
    model = models.quantized(nn.Linear(97, 96), 16)
    result = export.coreml(
        model, tmp_path / "m.mlpackage", example_inputs=torch.randn(1, 97), precision="float16"
    )
    assert result.weights[0].stored == "constexpr_lut_to_dense, indices of 4 bits"


@pytest.mark.parametrize(("make", "name", "how", "said"), [
    (lambda: models.quantized(nn.Linear(97, 96), 300), "m.mlpackage", {}, "weight: has 300 values"),
    (lambda: models.quantized(nn.Linear(97, 96), 4), "m", {}, "must end in .mlpackage"),
    (lambda: models.quantized(nn.Linear(97, 96), 4), "m.mlpackage", {"batch": 5}, "batch is 5"),
    (lambda: models.quantized(nn.Linear(97, 96), 4), "m.mlpackage", {"precision": "int8"},
     "precision is 'int8'"),
    (lambda: models.quantized(nn.Sequential(nn.Linear(97, 97), models.Odd(97, 96)), 4),
     "m.mlpackage", {}, "lacks the operator special_bessel_j0, of layer 1: compute"),
    (lambda: models.quantized(models.Fixed(97, 96), 4), "m.mlpackage", {}, "give that as batch="),
    (lambda: nn.Linear(97, 96), "m.mlpackage", {}, "no weight of the model has few values"),
])  # fmt: skip
def test_refusals_say_what_is_wrong_and_leave_nothing(tmp_path, make, name, how, said):
    with pytest.raises(fewbits.FewbitsError, match=said):
        export.coreml(make(), tmp_path / name, example_inputs=torch.randn(4, 97), **how)
    assert not list(tmp_path.iterdir())


def test_an_operator_that_coremltools_lacks_is_named(tmp_path):
    model = models.snap_all(models.Signals(), 4)
    with pytest.raises(fewbits.FewbitsError, match="cannot convert .*lstm, of layer lstm: "):
        export.coreml(model, tmp_path / "m.mlpackage", example_inputs=torch.randn(1, 3, 10))
    assert not list(tmp_path.iterdir())


def test_an_earlier_package_stays_unless_overwritten(tmp_path):
    path = tmp_path / "m.mlpackage"
    path.mkdir()
    (path / "mine").write_bytes(b"mine")
    model = models.quantized(nn.Linear(97, 96), 4)
    with pytest.raises(fewbits.FileError, match="exists already"):
        export.coreml(model, path, example_inputs=torch.randn(1, 97))
    assert (path / "mine").exists()
    result = export.coreml(model, path, example_inputs=torch.randn(1, 97), overwrite=True)
    assert not (path / "mine").exists() and [f.name for f in tmp_path.iterdir()] == [path.name]
    assert np.isfinite(result.ratio)
