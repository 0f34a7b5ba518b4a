"""`load(mode="compressed")`: what is in memory, while and after, and what is refused."""

import subprocess
import sys

import pytest
import torch
from compressed.networks import Everything, both, packed_weight, quantized, tokens
from helpers import same_state
from torch import nn

import fewbits
from fewbits import FileError, compressed


def on_meta(kind) -> nn.Module:
    with torch.device("meta"):
        return kind()


@pytest.fixture
def saved(tmp_path):
    """A hardened model of every layer, and its file."""
    model = quantized(Everything())
    fewbits.save(model, tmp_path / "model.fewbits")
    return model, tmp_path / "model.fewbits"


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("coder", ["smallest", "fast", "packed"])
def test_a_loaded_model_is_the_compressed_one(tmp_path, meta, coder):
    dense, packed = both(Everything())
    fewbits.save(dense, tmp_path / "f", coder=coder)
    model = on_meta(Everything) if meta else Everything()
    loaded = fewbits.load(tmp_path / "f", into=model.eval(), mode="compressed")
    assert loaded is model
    assert same_state(loaded, packed)
    assert str(compressed.memory(loaded)) == str(compressed.memory(packed))
    assert packed_weight(loaded.embedding) is packed_weight(loaded.output)
    some = tokens()
    assert torch.equal(loaded(some), packed(some))
    compressed.decompress(loaded)
    assert same_state(loaded, dense)


def test_parameters_keep_whether_they_train(saved):
    model = on_meta(Everything)
    model.get_parameter("linear.bias").requires_grad_(False)
    loaded = fewbits.load(saved[1], into=model, mode="compressed")
    trains = {name: p.requires_grad for name, p in loaded.named_parameters()}
    assert not trains.pop("linear.bias") and all(trains.values())


def test_codebooks_per_channel_and_group_come_back(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32), nn.ConvTranspose1d(8, 64, 9))
    plan = fewbits.plan(model, k=4, granularity="channel")
    dense, packed = both(model, plan=plan)
    fewbits.save(dense, tmp_path / "f")
    other = nn.Sequential(nn.Linear(64, 32), nn.ConvTranspose1d(8, 64, 9))
    loaded = fewbits.load(tmp_path / "f", into=other, mode="compressed")
    assert [row.codebooks for row in compressed.memory(loaded).layers] == [32, 64]
    assert same_state(loaded, packed)


class TwoOfOne(nn.Sequential):
    def __init__(self):
        first, second = nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False)
        second.weight = first.weight
        super().__init__(first, second)


def test_one_tensor_in_the_model_stays_one(tmp_path):
    state = {"0.weight": torch.randint(3, (40, 40)).float()}
    state["1.weight"] = state["0.weight"].clone()
    fewbits.save(state, tmp_path / "f")
    for meta in (True, False):
        model = on_meta(TwoOfOne) if meta else TwoOfOne()
        fewbits.load(tmp_path / "f", into=model, mode="compressed")
        first, second = model.children()
        assert packed_weight(first) is packed_weight(second)
    other = torch.randint(3, (40, 40)).float()
    fewbits.save(state | {"1.weight": other}, tmp_path / "g")
    model = on_meta(TwoOfOne)
    with pytest.raises(FileError, match="are one tensor in the model, and differ in the file"):
        fewbits.load(tmp_path / "g", into=model, mode="compressed")


def test_wrong_modes_and_models_are_refused(saved):
    path = saved[1]
    with pytest.raises(FileError, match="mode is 'compresed'. Did you mean 'compressed'?"):
        fewbits.load(path, into=Everything(), mode="compresed")  # pyright: ignore
    with pytest.raises(FileError, match="without a model. Give one as into="):
        fewbits.load(path, mode="compressed")
    with pytest.raises(FileError, match="does not fit the model: .*0.weight is in the model only"):
        fewbits.load(path, into=nn.Sequential(nn.Linear(4, 4)), mode="compressed")


class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("positions", torch.arange(64), persistent=False)


def test_buffers_that_no_file_holds_are_named(tmp_path):
    fewbits.save(quantized(Extra()), tmp_path / "f")
    model = on_meta(Extra)
    with pytest.raises(FileError, match="has no values for positions, on the meta device"):
        fewbits.load(tmp_path / "f", into=model, mode="compressed")
        first, second = model.children()
    assert type(model.get_submodule("linear")) is nn.Linear


def test_a_damaged_file_changes_nothing(saved):
    path = saved[1]
    data = bytearray(path.read_bytes())
    data[-200] ^= 1  # in the last of the tensors
    path.write_bytes(data)
    model = Everything()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FileError, match="checksum is wrong"):
        fewbits.load(path, into=model, mode="compressed")
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


def test_a_progress_bar_runs_to_its_end(saved):
    seen = []

    def progress(items, count):
        for item in items:
            yield item
            seen.append(item)
        seen.append(count)

    fewbits.load(saved[1], into=Everything(), mode="compressed", progress=progress)
    assert seen[-1] == len(seen) - 1


# Loads a file into a model on the meta device; prints by how many bytes memory grew at most and in
# the end. A first load of a small file has the code itself loaded.
PEAK = """
import sys, resource, torch, fewbits
from torch import nn
def load(path, layers, size):
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers)))
    return fewbits.load(path, into=net, mode="compressed")
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load(sys.argv[1], 2, 64)
before = peak()
net = load(sys.argv[2], 12, 1024)
held = fewbits.compressed.memory(net).bytes
print(peak() - before, held)
"""


def test_loading_takes_the_packed_size_and_one_layer(tmp_path):
    for name, layers, size in (("small", 2, 64), ("large", 12, 1024)):
        weights = {f"{i}.weight": torch.randint(16, (size, size)).float() for i in range(layers)}
        fewbits.save(weights, tmp_path / name, coder="packed")
    command = [sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large"]
    grown, held = map(int, subprocess.check_output(command, text=True).split())
    layer = 4 * 1024 * 1024
    assert held < 1.01 * 12 * layer / 8
    # Beside what is held: one layer's stream, indices of 16 bits and packed indices, each less than
    # a dense layer together, and what the allocator keeps. Twelve dense layers would be 50 MB.
    assert grown < held + 2.5 * layer, f"{grown:,} bytes for {held:,}"


def test_a_compressed_model_is_not_saved_as_if_it_were_dense(tmp_path):
    for model, name in ((nn.Sequential(nn.Linear(64, 64)), "0"), (nn.Linear(64, 64), "the model")):
        packed = both(model)[1]
        with pytest.raises(FileError, match=f"is compressed: {name} holds .*decompress first"):
            fewbits.save(packed, tmp_path / "f")
    assert not (tmp_path / "f").exists()
