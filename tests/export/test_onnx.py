"""ONNX files against PyTorch: the same outputs, the same weights, few bytes, or a refusal."""

from pathlib import Path

import models
import numpy as np
import pytest
import torch
from torch import nn

import fewbits
from fewbits import export

onnx = pytest.importorskip("onnx", reason="pip install 'fewbits[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'fewbits[onnx]'")

IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
WORDS = torch.randint(0, 40, (5, 7), generator=torch.Generator().manual_seed(0))


def run(path: Path, inputs: torch.Tensor, *, fold: bool = True) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        path, providers=["CPUExecutionProvider"],
        disabled_optimizers=None if fold else ["ConstantFolding"],
    )  # fmt: skip
    return session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]


def decoded(path: Path, name: str) -> np.ndarray:
    """A weight as onnxruntime decodes it."""
    graph = onnx.load(path)
    wanted, kept = {name}, []
    for node in reversed(graph.graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    output = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    for some in (graph.graph.output, graph.graph.input, graph.graph.node):
        del some[:]
    graph.graph.output.append(output)
    graph.graph.node.extend(reversed(kept))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    return session.run(None, {})[0]


@pytest.fixture(scope="module")
def image_model():
    torch.manual_seed(0)
    return models.quantized(models.resnet(), 16)


@pytest.fixture(scope="module")
def exported(image_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    image_model.train()  # exported in evaluation mode all the same
    before = {name: t.clone() for name, t in image_model.state_dict().items()}
    result = export.onnx(image_model, path, example_inputs=IMAGES)
    assert image_model.training and all(p.requires_grad for p in image_model.parameters())
    assert all(torch.equal(before[name], t) for name, t in image_model.state_dict().items())
    image_model.eval()
    return result


def test_result_says_how_outputs_compare_and_how_large_it_is(exported):
    assert exported.difference is not None and exported.difference < 1e-5
    assert exported.agreement == 1 and exported.examples == 6
    said = str(exported)
    assert all(row["name"] in said for row in exported.rows())
    assert f"{exported.bytes:,} bytes" in said
    assert f"onnxruntime {onnxruntime.__version__}" in said


@pytest.mark.parametrize("fold", [True, False])
def test_outputs_are_pytorchs_with_and_without_constant_folding(image_model, exported, fold):
    more = torch.randn(11, 1, 8, 8)  # another batch size than the example's
    with torch.no_grad():
        expected = image_model(more).numpy()
    found = run(exported.path, more, fold=fold)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def layer(k: int, size: int = 96) -> nn.Linear:
    """A Linear layer of 96 x 97 weights on exactly k values, an odd number of indices."""
    linear = nn.Linear(97, size, bias=False)
    values = torch.randn(k, generator=torch.Generator().manual_seed(k))
    which = torch.arange(size * 97) * 7919 % k
    with torch.no_grad():
        linear.weight.copy_(values[which].view(size, 97))
    return linear


class Sum(nn.ModuleList):
    def forward(self, x):
        return sum(module(x) for module in self.children())


def test_every_number_of_values_is_decoded_bit_for_bit_at_its_packed_size(tmp_path):
    sizes = [1, 2, 3, 4, 5, 16, 17, 200, 256, 300, 1200]
    model, path = Sum([layer(k, 95) for k in sizes]), tmp_path / "m.onnx"
    result = export.onnx(model, path, example_inputs=torch.randn(2, 97))
    for row, k in zip(result.weights, sizes, strict=True):
        assert np.array_equal(
            decoded(path, row.name), model.get_parameter(row.name).detach().numpy()
        )
        assert (row.k, row.codebooks) == (k, 1)
        assert row.packed_bytes <= row.bytes <= row.packed_bytes + 128
    inputs = torch.randn(3, 97)
    np.testing.assert_allclose(run(path, inputs, fold=False), run(path, inputs), atol=1e-4)


@pytest.mark.parametrize("how", [
    {"granularity": "channel"}, {"granularity": "group", "channels_per_group": 4},
])  # fmt: skip
def test_codebooks_of_channels_and_groups_on_either_axis(tmp_path, how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(1, 8, 3), nn.Conv2d(8, 16, 3), nn.Flatten())
    models.quantized(model, 3, **how)
    result = export.onnx(model, tmp_path / "m.onnx", example_inputs=IMAGES)
    assert all(row.codebooks > 1 for row in result.weights)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            assert np.array_equal(decoded(tmp_path / "m.onnx", name), weight.detach().numpy())


def test_a_tied_weight_is_stored_once(tmp_path):
    torch.manual_seed(0)
    model = models.quantized(models.Language(), 5)
    result = export.onnx(model, tmp_path / "m.onnx", example_inputs=WORDS)
    names = [row.name for row in result.weights]
    assert "embedding.weight" in names and "head.weight" not in names
    constants = [t.name for t in onnx.load(tmp_path / "m.onnx").graph.initializer]
    assert "embedding.weight.codebook" in constants and "head.weight.codebook" not in constants
    assert result.agreement == 1


def test_convolutions_of_one_axis_and_an_lstm(tmp_path):
    torch.manual_seed(0)
    model = models.snap_all(models.Signals(), 4)
    result = export.onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(3, 3, 10))
    stored = {row.name: row.stored for row in result.weights}
    assert {"conv.weight", "up.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"} <= set(stored)
    assert set(stored.values()) == {"table, indices of 2 bits"}


def test_half_precision_weights_keep_their_type(tmp_path):
    linear = models.quantized(layer(16), 16).half()
    export.onnx(linear, tmp_path / "m.onnx", example_inputs=torch.randn(2, 97).half(),
                tolerance=1e-2)  # fmt: skip
    found = {t.name: t.data_type for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert found["weight.codebook"] == onnx.TensorProto.FLOAT16


def test_file_of_4_bits_is_at_most_a_tenth_above_packed_indices_and_codebooks(tmp_path):
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.ReLU(), nn.Linear(512, 10))
    models.quantized(model, 16)
    result = export.onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 512))
    packed = sum(row.packed_bytes for row in result.weights)
    assert packed < result.bytes == (tmp_path / "m.onnx").stat().st_size <= 1.1 * packed


def test_graph_takes_little_beside_its_tensors(exported):
    graph = onnx.load(exported.path).graph
    tensors = sum(len(t.raw_data) for t in graph.initializer)
    # Names and attributes; no inferred shapes, notes of the exporter or biases of zeros.
    assert exported.bytes - tensors < 100 * (len(graph.node) + len(graph.initializer))
    assert not graph.value_info and not graph.metadata_props
    assert {node.op_type for node in graph.node}.isdisjoint({"Expand", "CastLike"})
    names = [node.name for node in graph.node]
    assert all(names) and len(set(names)) == len(names)


def test_dense_file_holds_no_tables(image_model, tmp_path):
    result = export.onnx(image_model, tmp_path / "m.onnx", example_inputs=IMAGES, weights="dense")
    assert result.bytes > result.dense_bytes > 0 and {r.stored for r in result.weights} == {"dense"}
    assert result.agreement == 1


def test_a_weight_that_forward_does_not_use_is_said_to_be_left_out(tmp_path):
    model = models.quantized(models.resnet(), 4)
    model.spare = nn.Linear(8, 8)
    model.forward = lambda x: nn.Sequential.forward(model[:6], x)  # type: ignore[method-assign]
    models.snap_all(model, 4)
    with torch.no_grad():
        result = export.onnx(model, tmp_path / "m.onnx", example_inputs=IMAGES)
    assert {r.name: r.stored for r in result.weights}["spare.weight"].startswith("left out")


def test_file_tells_nothing_of_the_machine_and_is_deterministic(image_model, exported, tmp_path):
    export.onnx(image_model, tmp_path / "b", example_inputs=IMAGES)
    assert (tmp_path / "b").read_bytes() == exported.path.read_bytes()
    assert str(Path(export.__file__).parents[3]).encode() not in exported.path.read_bytes()


def attached() -> nn.Module:
    model = nn.Linear(97, 96)
    fewbits.Clustering(model, k=4)
    return model


@pytest.mark.parametrize(("make", "how", "said"), [
    (attached, {}, "weight is attached to a Clustering still. Call harden()"),
    (lambda: nn.Linear(97, 96), {}, "no weight of the model has few values. Harden it"),
    (lambda: layer(4), {"example_inputs": torch.randn(2, 5)}, "cannot take example inputs"),
    (lambda: layer(4), {"example_inputs": ()}, "example_inputs must be a tensor"),
    (lambda: layer(4), {"weights": "int4"}, "weights is 'int4'. Use one of"),
    (lambda: layer(4), {"tolerance": -1.0}, "differ from PyTorch's by"),
    (lambda: models.quantized(models.Fixed(97, 96), 4), {"example_inputs": torch.randn(4, 97)},
     "use dynamic_batch=False"),
    (lambda: models.quantized(nn.Sequential(nn.Linear(97, 97), models.Odd(97, 96)), 4), {},
     "lacks the operator special_bessel_j0, of layer 1"),
    (lambda: {"weight": torch.zeros(2)}, {}, "dict is no torch module"),
])  # fmt: skip
def test_refusals_say_what_is_wrong_and_leave_nothing(tmp_path, make, how, said):
    how = {"example_inputs": torch.randn(2, 97)} | how
    with pytest.raises(
        fewbits.FewbitsError, match="(?s)" + said.replace("(", "\\(").replace(")", "\\)")
    ):
        export.onnx(make(), tmp_path / "m.onnx", **how)
    assert not list(tmp_path.iterdir())


def test_where_an_older_pytorch_fails_a_newer_one_is_asked_for(tmp_path, monkeypatch):
    model = models.quantized(nn.Sequential(nn.Linear(97, 97), models.Odd(97, 96)), 4)
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    with pytest.raises(fewbits.PlanError, match=r"exporter of PyTorch 2\.6\.0.*or newer"):
        export.onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 97))


def test_a_fixed_batch_is_exported_as_one(tmp_path):
    model = models.quantized(models.Fixed(97, 96), 4)
    result = export.onnx(
        model, tmp_path / "m.onnx", example_inputs=torch.randn(4, 97), dynamic_batch=False
    )
    assert result.examples == 4


def test_an_earlier_file_stays_unless_overwritten(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(fewbits.FileError, match="exists already"):
        export.onnx(layer(4), path, example_inputs=torch.randn(2, 97))
    with pytest.raises(fewbits.FewbitsError, match="differ"):
        export.onnx(layer(4), path, example_inputs=torch.randn(2, 97), tolerance=-1, overwrite=True)
    assert path.read_bytes() == b"mine"
    export.onnx(layer(4), path, example_inputs=torch.randn(2, 97), overwrite=True)
    assert path.read_bytes() != b"mine"
