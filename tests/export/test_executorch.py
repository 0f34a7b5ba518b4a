"""ExecuTorch programs against PyTorch: the same outputs from dense floats, or a refusal."""

import models
import pytest
import torch
from torch import nn

import fewbits
from fewbits import export

pytest.importorskip("executorch", reason="pip install 'fewbits[executorch]'")


def test_a_program_takes_its_batch_and_is_dense(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
                          nn.Linear(576, 64)).eval()  # fmt: skip
    fewbits.quantize(model, bits=2)
    images, path = torch.randn(7, 1, 8, 8), tmp_path / "m.pte"
    result = export.executorch(model, path, example_inputs=images, batch=2)
    assert result.examples == 6 and result.agreement == 1
    assert result.difference is not None and result.difference < 1e-5
    assert {row.stored for row in result.weights} == {"dense"}
    assert result.bytes == path.stat().st_size > sum(row.bytes for row in result.weights)
    assert "no tables" in str(result)

    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    found = method.execute([images[5:]])[0]
    with torch.no_grad():
        torch.testing.assert_close(found, model(images[5:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("make", "inputs"), models.NETWORKS.values(), ids=models.NETWORKS)
def test_networks(tmp_path, make, inputs):
    torch.manual_seed(0)
    model = make()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = export.executorch(model, tmp_path / "m.pte", example_inputs=inputs)
    assert result.agreement == 1 and result.examples == len(inputs)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(("make", "name", "how", "said"), [
    (lambda: nn.Linear(97, 96), "m.pte", {}, "no weight of the model has few values"),
    (lambda: models.quantized(nn.Linear(97, 96), 4), "m.onnx", {}, r"must end in \.pte"),
    (lambda: models.quantized(nn.Linear(97, 96), 4), "m.pte", {"batch": 5}, "batch is 5. Give 1"),
    (lambda: models.quantized(models.Fixed(97, 96), 4), "m.pte", {}, "give that as batch="),
    (lambda: models.quantized(nn.Linear(97, 96), 4), "m.pte", {"tolerance": -1.0}, "outputs diffe"),
    (lambda: models.quantized(nn.Sequential(nn.Linear(97, 97), models.Odd(97, 96)), 4), "m.pte", {},
     r"lacks the operator special_bessel_j0, of layer 1"),
])  # fmt: skip
def test_refusals_say_what_is_wrong_and_leave_nothing(tmp_path, make, name, how, said):
    with pytest.raises(fewbits.FewbitsError, match=said):
        export.executorch(make(), tmp_path / name, example_inputs=torch.randn(4, 97), **how)
    assert not list(tmp_path.iterdir())


def test_a_program_whose_bytes_are_too_many_to_linger_once_freed_is_run_whole(tmp_path):
    layer = nn.Linear(2500, 4000)  # above 32 MB glibc gives memory back at once
    layer.weight.data = layer.weight.data.sign() / 100
    model = nn.Sequential(layer)
    result = export.executorch(model, tmp_path / "m.pte", example_inputs=torch.randn(2, 2500))
    assert result.bytes > 1 << 25 and result.agreement == 1


def test_an_earlier_file_stays_unless_overwritten(tmp_path):
    path, model = tmp_path / "m.pte", models.quantized(nn.Linear(97, 96), 4)
    path.write_bytes(b"mine")
    with pytest.raises(fewbits.FileError, match="exists already"):
        export.executorch(model, path, example_inputs=torch.randn(2, 97))
    with pytest.raises(fewbits.FewbitsError, match="differ"):
        export.executorch(
            model, path, example_inputs=torch.randn(2, 97), tolerance=-1, overwrite=True
        )
    assert path.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1
    export.executorch(model, path, example_inputs=torch.randn(2, 97), overwrite=True)
    assert path.read_bytes() != b"mine"
