"""The export command end to end: what it writes and prints, how it refuses."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

import fewbits
from fewbits.__main__ import main
from fewbits.lab.models import build

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'fewbits[onnx]'")


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build("convnet", classes=10, shape=(1, 8, 8)).eval()
    fewbits.quantize(model, k=16)
    fewbits.save(model, tmp_path / "m.fewbits")
    return model


def fewbits_cli(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["fewbits", *arguments])
    main()


EXPORT = ("export", "m.fewbits", "--to", "onnx", "-o", "m.onnx", "--model", "convnet")


def test_onnx_is_checked_on_real_images(model, tmp_path, monkeypatch, capsys):
    fewbits_cli(monkeypatch, *EXPORT, "--check-data", "digits", "--check-images", "200", "--json")
    result = json.loads(capsys.readouterr().out)
    assert (result["examples"], result["agreement"], result["path"]) == (200, 1.0, "m.onnx")
    assert result["bytes"] == (tmp_path / "m.onnx").stat().st_size < result["dense_bytes"]
    images = torch.randn(2, 1, 8, 8)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, model(images).numpy(), atol=1e-5)


def test_dense_weights_of_random_inputs_print_a_table(model, monkeypatch, capsys):
    fewbits_cli(monkeypatch, *EXPORT, "--input-shape", "1x8x8", "--dense")
    out = capsys.readouterr().out
    assert "22.weight" in out and "on 64 examples" in out and "same top-1 in 100.00%" in out


def test_safetensors_needs_no_model(model, tmp_path, monkeypatch, capsys):
    fewbits_cli(monkeypatch, "export", "m.fewbits", "--to", "safetensors", "-o", "m.safetensors")
    state = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert "bytes" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (EXPORT, 1, "--input-shape 3x32x32, or --check-data"),
    (EXPORT[:-2], 1, "--model"),
    (("export", "m.fewbits", "--to", "executorch", "-o", "x", "--dense"), 1, "not for executorch"),
    ((*EXPORT, "--input-shape", "8x8"), 2, "no shape like 3x32x32"),
    ((*EXPORT, "--input-shape", "1x8x0"), 2, "1 or more"),
    ((*EXPORT, "--input-shape", "3x8x8", "--check-data", "digits"), 1, "are 1x8x8. Leave it out"),
    ((*EXPORT, "--input-shape", "3x8x8"), 1, "does not fit the model"),
    ((*EXPORT, "--input-shape", "1x8x8", "--width", "0"), 1, "--width is 0"),
    (("export", "m.fewbits", "--to", "coreml", "-o", "x", "--dense"), 1, "--dense is for onnx"),
    (("export", "m.fewbits", "--to", "onnx", "-o", "m.fewbits"), 1, "exists already"),
    (("export", "m.fewbits", "--to", "tflite", "-o", "x"), 2, "'tflite' is not one of"),
])  # fmt: skip
def test_refusals(model, tmp_path, monkeypatch, capsys, arguments, code, said):
    with pytest.raises(SystemExit) as stopped:
        fewbits_cli(monkeypatch, *arguments)
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out) == (code, "") and said in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["m.fewbits"]
