"""Quantizing, unpacking and comparing files, against safetensors and against `quantize`."""

import pytest
import safetensors.torch
import torch
from torch import nn

import fewbits
from fewbits._checkpoint import differences, opened, quantize_checkpoint, unpack


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(64, 40))


@pytest.fixture
def dense(tmp_path):
    path = tmp_path / "dense.safetensors"
    safetensors.torch.save_file(network().state_dict(), path)
    return path


@pytest.mark.parametrize("method", ["kmeans", "uniform", "entropy"])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_a_quantized_checkpoint_is_what_quantize_makes_of_the_model(
    tmp_path, dense, method, granularity
):
    model = network()
    fewbits.quantize(model, plan=fewbits.plan(model, k=5, granularity=granularity), method=method)
    quantize_checkpoint(dense, tmp_path / "m", k=5, granularity=granularity, method=method)
    loaded = fewbits.load(tmp_path / "m")
    assert list(loaded) == sorted(model.state_dict())  # safetensors sorts
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_excluded_tensors_are_left_alone(tmp_path, dense):
    quantize_checkpoint(dense, tmp_path / "m", k=2, exclude=["3.*"])
    state, loaded = network().state_dict(), fewbits.load(tmp_path / "m")
    assert torch.equal(loaded["3.weight"], state["3.weight"])
    assert len(loaded["0.weight"].unique()) == 2


def test_a_tensor_that_would_not_get_smaller_is_left_alone(tmp_path):
    state = {"tiny": torch.randn(4, 4), "wide": torch.randn(64, 64)}
    safetensors.torch.save_file(state, tmp_path / "d")
    quantize_checkpoint(tmp_path / "d", tmp_path / "m", k=16)
    loaded = fewbits.load(tmp_path / "m")
    assert torch.equal(loaded["tiny"], state["tiny"])
    assert len(loaded["wide"].unique()) == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_type(tmp_path, dtype):
    safetensors.torch.save_file({"w": torch.randn(50, 50).to(dtype)}, tmp_path / "d")
    quantize_checkpoint(tmp_path / "d", tmp_path / "m", k=4)
    weight = fewbits.load(tmp_path / "m")["w"]
    assert weight.dtype == dtype
    assert len(weight.unique()) == 4


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    safetensors.torch.save_file({"w": torch.full((9, 9), torch.nan)}, tmp_path / "d")
    with pytest.raises(fewbits.CodebookError, match="w: 81 of 81"):
        quantize_checkpoint(tmp_path / "d", tmp_path / "m", k=4)
    assert not (tmp_path / "m").exists()


def test_a_pattern_that_matches_nothing_names_the_nearest(tmp_path, dense):
    with pytest.raises(fewbits.PlanError, match=r"'3.wight'. Did you mean '3.weight'"):
        quantize_checkpoint(dense, tmp_path / "m", k=4, exclude=["3.wight"])


def test_an_unpacked_file_is_read_by_safetensors(tmp_path, dense):
    quantize_checkpoint(dense, tmp_path / "m", k=4)
    unpack(tmp_path / "m", tmp_path / "u")
    read, loaded = safetensors.torch.load_file(tmp_path / "u"), fewbits.load(tmp_path / "m")
    assert set(read) == set(loaded)
    assert all(torch.equal(read[name], tensor) for name, tensor in loaded.items())


def test_unpacking_writes_tied_tensors_under_each_name(tmp_path):
    weight = torch.zeros(30, 30)
    fewbits.save({"a": weight, "b": weight, "n": torch.tensor(3)}, tmp_path / "m")
    unpack(tmp_path / "m", tmp_path / "u")
    read = safetensors.torch.load_file(tmp_path / "u")
    assert torch.equal(read["a"], weight) and torch.equal(read["b"], weight)
    assert read["n"] == 3


def test_unpacking_a_type_that_safetensors_lacks_is_refused(tmp_path):
    state = {"w": torch.zeros(30, 30), "c": torch.zeros(2, dtype=torch.complex128)}
    fewbits.save(state, tmp_path / "m")
    with pytest.raises(fewbits.FileError, match="c: safetensors has no complex128"):
        unpack(tmp_path / "m", tmp_path / "u")
    assert not (tmp_path / "u").exists()


def test_a_file_of_torch_save_is_refused_without_opening_it_as_one(tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / "d")
    with pytest.raises(fewbits.FileError, match="torch.save can run code"):
        quantize_checkpoint(tmp_path / "d", tmp_path / "m", k=4)


def test_differences_count_elements_and_say_the_largest(tmp_path):
    a = {"same": torch.zeros(9, 9), "other": torch.zeros(9, 9), "gone": torch.ones(2),
         "shape": torch.ones(3), "type": torch.ones(3)}  # fmt: skip
    b = {"same": a["same"].clone(), "other": a["other"].clone(), "new": torch.ones(2),
         "shape": torch.ones(4), "type": torch.ones(3).half()}  # fmt: skip
    b["other"][0, :3] = torch.tensor([0.5, -2.0, -0.0])
    fewbits.save(a, tmp_path / "a")
    fewbits.save(b, tmp_path / "b")
    found = {row.name: row for row in differences(tmp_path / "a", tmp_path / "b")}
    assert {name: row.status for name, row in found.items()} == {
        "same": "equal", "other": "differs", "gone": "only in A", "new": "only in B",
        "shape": "other shape", "type": "other type",
    }  # fmt: skip
    assert (found["other"].changed, found["other"].largest) == (3, 2.0)
    assert found["gone"].bytes_a == 8 and found["gone"].bytes_b is None


def test_what_is_stored_is_listed_with_all_bytes(tmp_path):
    state = {"w": torch.randint(5, (64, 64)).float(), "n": torch.tensor(1), "c": torch.ones(4)}
    fewbits.save(state, tmp_path / "m", coder="packed", dense_dtype=torch.float16)
    with opened(tmp_path / "m") as checkpoint:
        rows = {row.name: row for row in checkpoint.stored}
    assert (rows["w"].coder, rows["w"].k, rows["w"].codebooks) == ("packed", 5, 1)
    assert rows["w"].bytes == 5 * 4 + 64 * 64 * 3 // 8 + 4  # codebook, indices, padding
    assert (rows["c"].dtype, rows["c"].bytes, rows["n"].bytes) == ("float32", 8, 8)


def test_a_summary_reads_files_as_it_reads_models(tmp_path):
    model = network()
    plan = fewbits.plan(model, k=4, granularity="channel")
    fewbits.quantize(model, plan=plan)
    fewbits.save(model, tmp_path / "m")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "d")
    expected = fewbits.summary(model)
    for path in ("m", "d"):
        found = fewbits.summary(tmp_path / path)
        assert sorted(found.layers, key=lambda r: r.name) == list(expected.layers)
        assert (found.other_bytes, found.float_bytes) == (
            expected.other_bytes, expected.float_bytes,
        )  # fmt: skip
    before = fewbits.summary(tmp_path / "m", reference=network())
    assert all(row.distortion is not None and row.distortion > 0 for row in before.layers)
