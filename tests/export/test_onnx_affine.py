"""Linear layers on even grids as MatMulNBits: which grids are found, and what is computed."""

import models
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits import export

pytest.importorskip("onnx_ir", reason="pip install 'fewbits[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'fewbits[onnx]'")

from fewbits.export._onnx_affine import grid


@given(
    step=st.floats(1e-4, 1e3), start=st.floats(-20, 20),
    integers=st.sets(st.integers(0, 255), min_size=2, max_size=40),
)  # fmt: skip
def test_values_on_an_even_grid_are_found_and_given_back(step, start, integers):
    values = np.array([(start + n) * step for n in sorted(integers)], np.float32)[None]
    found = grid(values)
    if found is None:  # wide gaps whose share would be the step
        assert np.diff(sorted(integers)).min() > 1
        return
    back = found.step[:, None] * (found.integers - found.zero[:, None]) + found.offset[:, None]
    np.testing.assert_allclose(back, values, atol=2e-5 * np.abs(values).max(), rtol=0)
    assert (
        found.integers.min() == 0
        and found.integers.max() <= max(integers)
        and found.integers.max() < 1 << found.bits
    )
    assert 0 <= found.zero[0] < 1 << found.bits


def test_a_grid_of_which_some_values_are_unused_is_one():
    found = grid(np.array([[-0.5, -0.1, 0.5, 0.5]], np.float32))
    assert found is not None and found.bits == 4 and found.integers.tolist() == [[0, 2, 5, 5]]


@pytest.mark.parametrize("values", [
    [0.0, 1.0, 2.437], [0.0, 1.0, 300.0], [-1.0, 0.0, 1.0001], [0.0, np.nan], [0.0, np.inf],
])  # fmt: skip
def test_uneven_values_are_no_grid(values):
    assert grid(np.array([values], np.float32)) is None


class Words(nn.Module):
    """Linear layers on two and on three axes, one of them used twice, one without a bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(97, 64)
        self.twice = nn.Linear(64, 64, bias=False)
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        y = self.first(x)[:, None].expand(-1, 3, -1).relu()
        return self.last(self.twice(self.twice(y).relu()).mean(1))


@pytest.mark.parametrize(("k", "how", "bits"), [
    (3, {}, 2), (4, {"granularity": "channel"}, 2), (200, {}, 8),
    (16, {"granularity": "group", "channels_per_group": 2}, 4),
])  # fmt: skip
def test_outputs_are_pytorchs(tmp_path, k, how, bits):
    torch.manual_seed(0)
    model = Words().eval()
    fewbits.quantize(model, plan=fewbits.plan(model, k=k, **how), method="uniform")
    inputs = torch.randn(20, 97)
    result = export.onnx(model, tmp_path / "m.onnx", example_inputs=inputs, weights="affine")
    assert {row.stored for row in result.weights} == {f"MatMulNBits, integers of {bits} bits"}
    assert result.difference is not None and result.difference < 1e-5
    if bits == 4:
        rounded = export.onnx(
            model, tmp_path / "r.onnx", example_inputs=inputs, weights="affine-int8", tolerance=0.1
        )
        assert rounded.difference is not None and 1e-5 < rounded.difference < 0.1


def test_what_is_on_no_grid_or_no_linear_layer_is_looked_up(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, 30), nn.Linear(30, 10))
    fewbits.quantize(model[:3], k=4, method="uniform")
    fewbits.quantize(model[3], k=5)
    result = export.onnx(
        model, tmp_path / "m.onnx", example_inputs=torch.randn(3, 1, 8, 8), weights="affine"
    )
    assert [row.stored for row in result.weights] == [
        "table, indices of 2 bits", "MatMulNBits, integers of 2 bits", "table, indices of 3 bits",
    ]  # fmt: skip


def test_a_model_without_even_grids_is_refused(tmp_path):
    model = models.quantized(nn.Linear(97, 96), 5)
    with pytest.raises(fewbits.PlanError, match=r"weight, …\): .*method=\"uniform\""):
        export.onnx(model, tmp_path / "m", example_inputs=torch.randn(2, 97), weights="affine")
    assert not list(tmp_path.iterdir())


def test_values_trained_on_a_grid_need_no_decoding(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    clustering = fewbits.Clustering(model, k=16, regularizer=fewbits.regularizers.Periodic())
    optimizer = torch.optim.SGD(clustering.param_groups(lr=0.1))
    for _ in range(10):
        inputs = torch.randn(32, 64)
        ((model(inputs) - inputs).square().mean() + clustering.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        clustering.step()
    clustering.harden()
    result = export.onnx(
        model, tmp_path / "m.onnx", example_inputs=torch.randn(8, 64), weights="affine"
    )
    assert all("MatMulNBits" in row.stored for row in result.weights), result
