"""What `save` and `load` refuse, what the error says, and that nothing was changed or written."""

import pytest
import torch
from helpers import distinct, same_state, two_layers
from torch import nn

import fewbits


def hardened(k: int = 3) -> nn.Sequential:
    model = two_layers()
    fewbits.quantize(model, k=k)
    return model


def test_a_model_that_is_still_clustered_is_refused_with_its_layers(tmp_path):
    model = two_layers()
    clustering = fewbits.Clustering(model, k=3)
    with pytest.raises(fewbits.FileError, match=r"not hardened.*harden\(\)") as error:
        fewbits.save(model, tmp_path / "m")
    count = distinct(model.state_dict()["0.weight"])  # of the weights behind the snapped ones
    assert f"0.weight has {count:,} distinct values" in str(error.value)
    assert not list(tmp_path.iterdir())
    clustering.harden()
    fewbits.save(model, tmp_path / "m")


def test_a_model_without_few_values_is_refused_with_counts_and_remedies(tmp_path):
    model = two_layers()
    with pytest.raises(fewbits.FileError, match=r"harden\(\).*fewbits\.quantize") as error:
        fewbits.save(model, tmp_path / "m")
    for name in ("0.weight", "2.weight"):
        weight = model.state_dict()[name]
        said = f"{name} has {distinct(weight):,} distinct values in {weight.numel():,} weights"
        assert said in str(error.value)
    assert not list(tmp_path.iterdir())


def test_one_layer_left_in_floating_point_is_no_error(tmp_path):
    model = two_layers()
    plan = fewbits.plan(model, k=3, overrides={"2": None})
    fewbits.quantize(model, plan=plan)
    fewbits.save(model, tmp_path / "m")
    assert same_state(fewbits.load(tmp_path / "m", into=two_layers(1)), model)


def test_nan_in_a_codebook_is_stored_with_a_warning(tmp_path):
    weight = torch.tensor([1.0, torch.nan, 2.0])[torch.randint(3, (9, 9))]
    with pytest.warns(UserWarning, match="layer.weight: NaN"):
        fewbits.save({"layer.weight": weight}, tmp_path / "m")
    assert torch.equal(fewbits.load(tmp_path / "m")["layer.weight"].view(torch.int32),
                       weight.view(torch.int32))  # fmt: skip


@pytest.mark.parametrize(("name", "value", "said"), [
    ("x", "text", "x: is a str, not a tensor"),
    ("x", torch.ones(2, 2).to_sparse(), "x: is sparse.*to_dense"),
    ("x", torch.ones(2, device="meta"), "x: is on the meta device"),
    ("__metadata__", torch.ones(2), "named '__metadata__'"),
    ("\ud800", torch.ones(2), "no Unicode text"),
    (3, torch.ones(2), "named 3"),
])  # fmt: skip
def test_what_cannot_be_stored_is_named(tmp_path, name, value, said):
    with pytest.raises(fewbits.FileError, match=said):
        fewbits.save({"weight": torch.zeros(9, 9), name: value}, tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_torchs_own_quantized_tensors_are_refused(tmp_path):
    quantized = torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8)
    with pytest.raises(fewbits.FileError, match="x: torch.qint8"):
        fewbits.save({"x": quantized}, tmp_path / "m")


@pytest.mark.parametrize(("options", "said"), [
    ({"coder": "smalest"}, "'smalest'. Did you mean 'smallest'"),
    ({"threads": 0}, "threads is 0"),
    ({"dense_dtype": torch.int8}, "dense_dtype is torch.int8"),
])  # fmt: skip
def test_options_that_do_not_exist_are_refused(tmp_path, options, said):
    with pytest.raises(fewbits.FileError, match=said):
        fewbits.save(hardened(), tmp_path / "m", **options)


def test_a_value_beyond_float16_is_refused_there_by_name(tmp_path):
    state = {"weight": torch.zeros(9, 9), "bias": torch.tensor([1.0, 1e5])}
    with pytest.raises(fewbits.FileError, match=r"bias: 1e\+05 is too large.*bfloat16"):
        fewbits.save(state, tmp_path / "m", dense_dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_every_difference_to_the_model_is_listed_and_nothing_changed(tmp_path):
    fewbits.save(hardened(), tmp_path / "m")
    other = nn.Sequential(
        nn.Linear(12, 17), nn.ReLU(), nn.Linear(17, 4, bias=False), nn.Linear(2, 2)
    )
    other[2].half()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(fewbits.FileError) as error:
        fewbits.load(tmp_path / "m", into=other)
    for said in (
        "0.weight is float32 (16, 12) in the file, float32 (17, 12) in the model",
        "0.bias is float32 (16,) in the file, float32 (17,) in the model",
        "2.weight is float32 (4, 16) in the file, float16 (4, 17) in the model",
        "2.bias is in the file only", "3.weight is in the model only",
        "3.bias is in the model only",
    ):  # fmt: skip
        assert said in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_a_model_on_the_meta_device_is_refused(tmp_path):
    fewbits.save(hardened(), tmp_path / "m")
    with pytest.raises(fewbits.FileError, match=r"meta device \(to_empty"):
        fewbits.load(tmp_path / "m", into=two_layers().to("meta"))


def tied(a: torch.Tensor) -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.Linear(9, 9, bias=False), "b": nn.Linear(9, 9, bias=False)})
    model["a"].weight = model["b"].weight = nn.Parameter(a)
    return model


def test_two_values_for_one_tied_tensor_are_refused(tmp_path):
    state = {"a.weight": torch.zeros(9, 9), "b.weight": torch.ones(9, 9)}
    fewbits.save(state, tmp_path / "m")
    model = tied(torch.full((9, 9), 7.0))
    with pytest.raises(fewbits.FileError, match="a.weight and b.weight are one tensor"):
        fewbits.load(tmp_path / "m", into=model)
    assert torch.equal(model.state_dict()["a.weight"], torch.full((9, 9), 7.0))
    fewbits.save(state | {"b.weight": torch.zeros(9, 9)}, tmp_path / "m")
    fewbits.load(tmp_path / "m", into=model)
    assert torch.equal(model.state_dict()["b.weight"], torch.zeros(9, 9))


def test_a_file_missing_or_a_folder_is_said_in_one_line(tmp_path):
    for path, said in ((tmp_path / "no", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(fewbits.FileError, match=said) as error:
            fewbits.load(path)
        assert "\n" not in str(error.value)
