"""What `load` gives against what `save` got, bit for bit; sizes against the indices' entropy."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import batch, same_state, sgd, train, two_layers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

import fewbits
from fewbits._indexed import bits_of
from fewbits.regularizers import RateAware

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64, torch.complex128,
]  # fmt: skip
SHAPES = [(), (0,), (3, 0, 2), (1,), (5,), (60, 70), (1, 1, 1, 1, 2)]


def equal(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and bits_of(a).tobytes() == bits_of(b).tobytes()


def round_trip(state: dict[str, Tensor], folder: Path, **options) -> dict[str, Tensor]:
    path = folder / "m.fewbits"
    fewbits.save(state, path, **options)
    loaded = fewbits.load(path)
    assert set(loaded) == set(state)
    for name, tensor in state.items():
        assert equal(loaded[name], tensor), name
    return loaded


def few(k: int, *shape: int) -> Tensor:
    """Random weights on k values; all k of them where there are so many weights."""
    indices = torch.randint(k, shape)
    indices.view(-1)[:k] = torch.arange(min(k, indices.numel()))
    return (torch.arange(k) * 0.37 - 5)[indices]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_and_shape_comes_back(tmp_path, dtype):
    state = {str(shape): torch.randint(0, 2, shape).to(dtype) for shape in SHAPES}
    state["dense"] = torch.randint(0, 99, (7, 9)).to(dtype)
    round_trip(state | {"weight": few(3, 8, 8)}, tmp_path)


@pytest.mark.parametrize("coder", ["smallest", "fast", "packed"])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 65_536])
def test_every_number_of_values_comes_back(tmp_path, coder, k):
    state = {"weight": few(k, 300, 500), "values": few(3, 9, 9)}
    round_trip(state, tmp_path, coder=coder)


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data(), names=st.lists(any_text, min_size=1, max_size=6, unique=True))
def test_any_state_comes_back_under_any_names(tmp_path, data, names):
    state = {"weight": few(2, 4, 4)}
    for name in names:
        shape = data.draw(hnp.array_shapes(max_dims=4, max_side=6))
        k = data.draw(st.integers(1, 9))
        state[name] = few(k, *shape)
    if len(state) > 1:
        state |= {"weight:codebook": torch.ones(2), "weight::indices": torch.ones(3)}
    round_trip(state, tmp_path)


def test_strides_do_not_matter(tmp_path):
    weight = few(4, 8, 6, 3, 3)
    state = {
        "t": few(5, 30, 40).t(), "slice": few(3, 50, 50)[::2, 5:],
        "last": weight.contiguous(memory_format=torch.channels_last),
        "expanded": torch.ones(1, 1).expand(9, 9), "conj": torch.ones(3, dtype=torch.cfloat).conj(),
    }  # fmt: skip
    round_trip(state, tmp_path)


def test_views_that_conjugate_or_negate_are_not_tied_to_what_they_view(tmp_path):
    values = torch.randn(4, dtype=torch.complex64)
    state = {"w": few(3, 9, 9), "z": values, "conj": values.conj(), "imag": values.imag,
             "neg": values.conj().imag}  # fmt: skip
    assert state["neg"].is_neg()
    round_trip(state, tmp_path)


def test_the_state_dict_comes_back_in_its_order(tmp_path):
    state = {"b": torch.ones(3), "weight": few(2, 9, 9), "a": torch.ones(2, dtype=torch.float64)}
    assert list(round_trip(state, tmp_path)) == list(state)


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    for weight in (few(256, 300, 300), torch.randn(300, 300)):
        other = {"other": few(2, 9, 9)}
        tied = round_trip({"in": weight, "bias": torch.ones(2), "out": weight} | other, tmp_path)
        assert tied["in"] is tied["out"]
        size = (tmp_path / "m.fewbits").stat().st_size
        round_trip({"in": weight, "bias": torch.ones(2), "out": weight.clone()} | other, tmp_path)
        assert (tmp_path / "m.fewbits").stat().st_size > 1.8 * size


@pytest.mark.parametrize("regularizer", [None, RateAware(pin_zero=True)], ids=str)
def test_a_hardened_model_comes_back_into_a_fresh_one(tmp_path, regularizer):
    model = two_layers()
    clustering = fewbits.Clustering(
        model, k=3, **({} if regularizer is None else {"regularizer": regularizer})
    )
    train(model, clustering, sgd(clustering), range(20))
    clustering.harden()
    fewbits.save(model, tmp_path / "m.fewbits")
    fresh = two_layers(seed=1)
    assert fewbits.load(tmp_path / "m.fewbits", into=fresh) is fresh
    assert same_state(fresh, model)
    inputs, _ = batch(0)
    assert torch.equal(fresh(inputs), model(inputs))
    assert all(p.requires_grad and p.is_leaf for p in fresh.parameters())


@pytest.mark.parametrize("granularity", ["layer", "channel", "group"])
def test_codebooks_of_every_granularity_are_recognized(tmp_path, granularity):
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ConvTranspose2d(32, 16, 3))
    size = 4 if granularity == "group" else None
    plan = fewbits.plan(model, k=4, granularity=granularity, channels_per_group=size)
    fewbits.quantize(model, plan=plan)
    fewbits.save(model, tmp_path / "m.fewbits", coder="packed")
    fresh = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ConvTranspose2d(32, 16, 3))
    assert same_state(fewbits.load(tmp_path / "m.fewbits", into=fresh), model)
    books = {"layer": (1, 1), "channel": (32, 16), "group": (8, 4)}[granularity]
    planned = sum(w.weights * 2 // 8 + g * 4 * 4 for w, g in zip(plan.selected, books, strict=True))
    # all else: biases, header, padding
    assert planned < (tmp_path / "m.fewbits").stat().st_size < planned + 1200


def test_a_tied_model_comes_back_tied(tmp_path):
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.Embedding(50, 20), "b": nn.Linear(20, 50, bias=False)})
        model["b"].weight = model["a"].weight
        return model

    model = tied()
    fewbits.quantize(model, k=3)
    fewbits.save(model, tmp_path / "m.fewbits")
    fresh = fewbits.load(tmp_path / "m.fewbits", into=tied())
    assert same_state(fresh, model)
    assert fresh["a"].weight is fresh["b"].weight


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_what_is_not_clustered_can_be_rounded_to_half_the_bytes(tmp_path, narrow):
    state = {"weight": few(4, 30, 30), "bias": torch.randn(4000), "double": torch.randn(5).double()}
    path = tmp_path / "m.fewbits"
    fewbits.save(state, path)
    size = path.stat().st_size
    fewbits.save(state, path, dense_dtype=narrow)
    assert path.stat().st_size < size - 7900
    loaded = fewbits.load(path)
    assert equal(loaded["weight"], state["weight"])
    assert equal(loaded["bias"], state["bias"].to(narrow).float())
    assert equal(loaded["double"], state["double"].to(narrow).double())


def test_the_same_model_gives_the_same_bytes_in_any_number_of_threads(tmp_path):
    state = {f"{i}.weight": few(2 + i, 40, 50) for i in range(9)} | {"bias": torch.ones(9)}
    for threads in (1, 2, 3, 8):
        fewbits.save(state, tmp_path / f"{threads}", threads=threads)
    files = [(tmp_path / f"{threads}").read_bytes() for threads in (1, 2, 3, 8)]
    assert files.count(files[0]) == 4
    for threads in (1, 3):
        loaded = fewbits.load(tmp_path / "1", threads=threads)
        assert all(equal(loaded[name], tensor) for name, tensor in state.items())


def test_progress_sees_every_tensor(tmp_path):
    seen = []

    def progress(items, total):
        seen.append(total)
        return (seen.append(item) or item for item in items)

    state = {"a": few(2, 9, 9), "b": torch.ones(2)}
    fewbits.save(state, tmp_path / "m", progress=progress)
    assert (seen[0], [item[0] for item in seen[1:]]) == (2, ["a", "b"])
    seen.clear()
    fewbits.load(tmp_path / "m", progress=progress)
    assert seen == [2, "a", "b"]
    seen.clear()
    model = nn.ParameterDict({"a": torch.zeros(9, 9), "b": torch.zeros(2)})
    fewbits.load(tmp_path / "m", into=model, progress=progress)
    assert seen == [4, "a", "b", "a", "b"]
    assert equal(model["a"].detach(), state["a"])


def entropy(weight: Tensor) -> float:
    """Order-0 entropy in bits of all of a tensor's indices."""
    _, counts = weight.unique(return_counts=True)
    share = counts.double() / weight.numel()
    return float(-(share * share.log2()).sum()) * weight.numel()


@pytest.mark.parametrize("k", [2, 4, 16, 256])
def test_a_stream_without_structure_is_within_a_twentieth_of_a_percent_of_its_entropy(tmp_path, k):
    torch.manual_seed(k)
    edges = torch.linspace(-2.5, 2.5, k + 1)[1:-1]
    weight = torch.randn(k)[torch.bucketize(torch.randn(1000, 2000), edges)]
    fewbits.save({"weight": weight}, tmp_path / "m.fewbits")
    stored = (tmp_path / "m.fewbits").stat().st_size - 4 * k
    bound = entropy(weight) / 8
    assert bound < stored < 1.0005 * bound + 600  # 600: header of this one file


def test_channels_of_unlike_scales_go_below_the_order_0_entropy(tmp_path):
    scale = torch.logspace(-1, 0.5, 256)
    edges = torch.linspace(-2, 2, 15)
    weight = torch.bucketize(torch.randn(256, 1000) * scale[:, None], edges).float()
    fewbits.save({"weight": weight}, tmp_path / "m.fewbits")
    bound = sum(entropy(row) for row in weight) / 8  # each channel under its own frequencies
    stored = (tmp_path / "m.fewbits").stat().st_size
    assert bound < stored < 0.85 * entropy(weight) / 8
    assert stored < 1.05 * bound  # 16 classes stand for 256 channels
    assert equal(fewbits.load(tmp_path / "m.fewbits")["weight"], weight)


def test_zeros_cost_next_to_nothing(tmp_path):
    weight = torch.where(torch.rand(500, 1000) < 0.98, 0.0, few(15, 500, 1000))
    fewbits.save({"weight": weight}, tmp_path / "m.fewbits")
    assert (tmp_path / "m.fewbits").stat().st_size < 1.01 * entropy(weight) / 8 + 600


MEASURED = """
import resource, sys, torch, fewbits
torch.manual_seed(0)
values = torch.randn(16)
state = {str(i): values[torch.randint(16, (2048, 1024))] for i in range(24)}  # 8 MB each
fewbits.save({"0": state["0"]}, sys.argv[1])  # whatever the first call alone takes
model = torch.nn.ParameterDict({name: torch.ones(2048, 1024) for name in state})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fewbits.save(state, sys.argv[1], threads=1)
saved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fewbits.load(sys.argv[1], into=model, threads=1)
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((saved - before) / 1024, (loaded - saved) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is Linux's")
def test_saving_and_loading_need_memory_for_a_tensor_or_two_beyond_the_model(tmp_path):
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "m.fewbits")]
    saving, loading = map(float, subprocess.check_output(command, text=True).split())
    # MB; a tensor has 8, its indices 4, made twice, and the allocator keeps some; all 24 have 192
    assert saving < 96
    assert loading < 96


def test_a_packed_stream_has_a_whole_number_of_bits_for_each_weight(tmp_path):
    path = tmp_path / "m.fewbits"
    for k, rows in itertools.product([2, 3, 16, 200], [64, 1000]):
        fewbits.save({"weight": few(k, rows, 8)}, path, coder="packed")
        (layer,) = fewbits.summary(path).layers
        assert layer.bits_fixed == math.ceil(math.log2(k))
        assert 0 <= path.stat().st_size - layer.bytes_fixed < 600  # header and padding
