"""A compressed model against the same model with dense weights, and what can be done with it."""

import copy
import io

import pytest
import torch
from compressed.networks import Everything, both, packed_weight, quantized, tokens
from helpers import compiled, gradient, same_state
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits import CodebookError, compressed
from fewbits._packed import spared

LAYERS = {
    "linear": (lambda: nn.Linear(24, 10), (5, 24)),
    "embedding": (lambda: nn.Embedding(20, 13), None),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding_mode="circular", padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2, padding=1), (2, 2, 4, 5, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 9)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 6)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 5, 2), (2, 2, 4, 5, 6)),
}


def inputs_for(name: str) -> torch.Tensor:
    shape = LAYERS[name][1]
    return torch.randint(20, (3, 4)) if shape is None else torch.randn(shape)


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    # Sums of at most a few hundred float32 products, in another order.
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_a_compressed_layer_computes_what_the_dense_one_does(name, granularity):
    model = nn.Sequential(LAYERS[name][0]())
    plan = fewbits.plan(model, k=3, granularity=granularity)
    dense, packed = both(model, plan=plan)
    inputs = inputs_for(name)
    assert compressed.memory(packed).layers, compressed.memory(packed)
    assert isinstance(packed[0], type(dense[0]))
    close(packed(inputs), dense(inputs))
    assert torch.equal(packed[0].weight, dense[0].weight)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "embedding"])
def test_gradients_reach_the_inputs(name):
    dense, packed = both(nn.Sequential(LAYERS[name][0]()), k=3)
    first, second = (inputs_for(name).requires_grad_() for _ in range(2))
    second.data.copy_(first.data)
    for model, inputs in ((dense, first), (packed, second)):
        model(inputs).square().sum().backward()
    close(gradient(second), gradient(first))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_reach_a_codebook_that_asks_for_them(name):
    dense, packed = both(nn.Sequential(LAYERS[name][0]()), k=3)
    codebook = packed_weight(packed[0]).codebook.requires_grad_()
    inputs = inputs_for(name)
    for model in (dense, packed):
        model(inputs).square().sum().backward()
    weight = dense[0].weight
    expected = [gradient(weight)[weight == value].sum() for value in codebook.detach()[0]]
    close(gradient(codebook)[0], torch.stack(expected))


def test_a_whole_model_agrees_and_says_what_stayed_dense():
    dense, packed = both(Everything())
    some = tokens()
    close(packed(some), dense(some))
    memory = compressed.memory(packed)
    assert set(memory.dense) == {"recurrent.weight_ih_l0", "recurrent.weight_hh_l0"}
    assert "LSTM has no compressed form" in str(memory)
    assert "4 bits" in repr(packed) and "CompressedLinear" in repr(packed)


def test_tied_weights_share_one_set_of_indices_through_moves():
    model = both(Everything())[1]
    for step in (lambda m: m, lambda m: m.half().float(), copy.deepcopy, lambda m: m.to("meta")):
        model = step(model)
        first, second = packed_weight(model.embedding), packed_weight(model.output)
        assert first.indices is second.indices and first.codebook is second.codebook
    row = compressed.memory(model).layers[0]
    assert (row.name, row.aliases) == ("embedding.weight", ("output.weight",))


def test_no_dense_weight_is_left_or_kept():
    dense, packed = both(nn.Sequential(nn.Linear(512, 300), nn.Conv1d(300, 64, 3)))
    packed[0](torch.randn(2, 512))
    packed[1](torch.randn(2, 300, 5))
    memory = compressed.memory(packed)
    held = {id(t): t for t in (*packed.buffers(), *packed.parameters())}
    fixed = sum(row.bytes_fixed for row in fewbits.summary(dense).layers)
    biases = 4 * (300 + 64)
    assert sum(t.nbytes for t in held.values()) - biases == sum(row.bytes for row in memory.layers)
    assert fixed == sum(row.bytes for row in memory.layers)
    assert memory.bytes == fixed + biases
    assert memory.bytes_dense == sum(p.nbytes for p in dense.parameters())


def test_decompress_gives_the_model_back():
    dense, packed = both(Everything())
    compressed.decompress(packed)
    assert same_state(packed, dense)
    assert packed.output.weight is packed.embedding.weight
    assert [type(m) for m in packed.modules()] == [type(m) for m in dense.modules()]


def test_compress_twice_changes_nothing():
    packed = both(Everything())[1]
    before = packed.state_dict()
    assert compressed.compress(packed) == compressed.memory(packed)
    assert packed.state_dict().keys() == before.keys()


def test_state_dict_goes_into_another_compressed_model():
    dense, packed = both(Everything())
    other = both(Everything())[1]
    other.load_state_dict(packed.state_dict())
    some = tokens()
    assert torch.equal(other(some), packed(some))


def test_pickle_and_deepcopy_keep_the_model():
    packed = both(Everything())[1]
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    some = tokens()
    for other in (torch.load(buffer, weights_only=False), copy.deepcopy(packed)):
        assert torch.equal(other(some), packed(some))
        assert packed_weight(other.embedding) is packed_weight(other.output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_type_is_that_of_codebook_and_activations(dtype):
    dense, packed = both(nn.Sequential(nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 7)))
    dense, packed = dense.to(dtype), packed.to(dtype)
    weight = packed_weight(packed[0])
    assert weight.codebook.dtype == dtype and weight.indices.dtype == torch.uint8
    assert torch.equal(packed[0].weight, dense[0].weight)
    inputs = torch.randn(4, 24, dtype=dtype)
    # A bfloat16 has 8 bits; sums are rounded once at the end in both.
    torch.testing.assert_close(packed(inputs), dense(inputs), rtol=2e-2, atol=2e-2)


def test_autocast_gives_the_type_that_dense_layers_give():
    dense, packed = both(nn.Sequential(nn.Linear(24, 10), nn.Linear(10, 7)))
    inputs = torch.randn(4, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, result = dense(inputs), packed(inputs)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


def test_compiled_without_a_graph_break():
    dense, packed = both(nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(40, 10)))
    inputs = torch.randn(2, 4, 7)
    assert torch._dynamo.explain(packed)(inputs).graph_break_count == 0
    close(compiled(packed)(inputs), dense(inputs))
    _, convolution = both(nn.Sequential(nn.Conv2d(4, 8, 3)))
    assert torch._dynamo.explain(convolution)(torch.randn(2, 4, 7, 7)).graph_break_count == 0


def test_compiled_gradient_reaches_the_inputs():
    dense, packed = both(nn.Sequential(nn.Linear(24, 10)))
    first = torch.randn(5, 24, requires_grad=True)
    second = first.detach().clone().requires_grad_()
    dense(first).sum().backward()
    compiled(packed)(second).sum().backward()
    close(gradient(second), gradient(first))


def test_attention_and_encoder_layers_work():
    torch.manual_seed(1)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    dense, packed = both(encoder)
    inputs = torch.randn(2, 5, 16)
    close(packed(inputs), dense(inputs))
    names = {row.name for row in compressed.memory(packed).layers}
    assert names == {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight",
                     "linear2.weight"}  # fmt: skip
    assert not compressed.memory(packed).dense


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_attention_projects_its_inputs_from_the_indices(options, fused, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: fused)
    torch.manual_seed(1)
    dense, packed = both(nn.MultiheadAttention(8, 2, **options).eval())
    fewbits.save(dense, tmp_path / "m.fewbits")
    with torch.device("meta"):
        empty = nn.MultiheadAttention(8, 2, **options).eval()
    loaded = fewbits.load(tmp_path / "m.fewbits", into=empty, mode="compressed")
    query, key = torch.randn(2, 5, 3, 8)
    for model in (packed, loaded):
        assert [row.name for row in compressed.memory(model).layers] == [
            "in_proj_weight", "out_proj.weight"
        ]  # fmt: skip
        for other in (query, key):
            with torch.no_grad():
                close(model(query, other, other)[0], dense(query, other, other)[0])
    compressed.decompress(packed)
    assert type(packed) is nn.MultiheadAttention and same_state(packed, dense)


def test_attention_with_projections_of_their_own_keeps_them_dense():
    dense, packed = both(nn.MultiheadAttention(8, 2, kdim=6))
    memory, (query, key) = compressed.memory(packed), (torch.randn(5, 3, 8), torch.randn(5, 3, 6))
    assert [row.name for row in memory.layers] == ["out_proj.weight"]
    assert list(memory.dense) == ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    close(packed(query, key, query)[0], dense(query, key, query)[0])


def test_a_lone_layer_is_compressed_in_place():
    layer = quantized(nn.Linear(24, 10))
    same = layer
    compressed.compress(layer)
    assert same is layer and packed_weight(layer) and "weight" not in dict(layer.named_parameters())


def test_weights_of_many_values_stay_dense_beside_packed_ones():
    model = nn.Sequential(nn.Linear(24, 10), nn.Linear(10, 7))
    fewbits.quantize(model, plan=fewbits.plan(model, bits=2, overrides={"1": None}))
    memory = compressed.compress(model)
    assert [row.name for row in memory.layers] == ["0.weight"]
    assert "not few enough" in memory.dense["1.weight"]


def test_an_embedding_with_max_norm_stays_dense():
    model = nn.Sequential(nn.Embedding(20, 13, max_norm=1.0), nn.Linear(13, 20))
    memory = compressed.compress(quantized(model, k=3))
    assert "max_norm" in memory.dense["0.weight"]


def test_a_model_with_codebooks_attached_is_refused_untouched():
    model = nn.Sequential(nn.Linear(24, 10))
    clustering = fewbits.Clustering(model, bits=2)
    with pytest.raises(CodebookError, match=r"not hardened: 0.weight.*harden\(\)"):
        compressed.compress(model)
    clustering.harden()
    assert compressed.compress(model).layers


def test_a_model_without_few_values_is_refused_with_their_number():
    model = nn.Sequential(nn.Linear(24, 10))
    with pytest.raises(CodebookError, match="0.weight has 240 distinct values in 240 weights"):
        compressed.compress(model)
    with pytest.raises(CodebookError, match="LSTM has no compressed form"):
        compressed.compress(nn.LSTM(4, 4))


class Small(nn.Sequential):
    """Two convolutions of 144 bytes each before a layer of many weights."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3, padding=1, groups=2), nn.Flatten(1),
            nn.Linear(128, 256),
        )  # fmt: skip


@pytest.mark.parametrize("how", ["compress", "load", "load on meta"])
def test_the_smallest_convolutions_stay_dense_up_to_a_hundredth(tmp_path, how):
    dense = quantized(Small())
    first = dense[0].weight
    packed = copy.deepcopy(dense)
    if how == "compress":
        first = packed[0].weight
        compressed.compress(packed)
        assert packed[0].weight is first
    else:
        fewbits.save(dense, tmp_path / "f")
        with torch.device("meta" if how.endswith("meta") else "cpu"):
            packed = Small()
        fewbits.load(tmp_path / "f", into=packed, mode="compressed")
    assert torch.equal(packed.get_parameter("0.weight"), first)
    memory = compressed.memory(packed)
    # Both together would be above a hundredth of 16,612 bytes.
    assert [row.name for row in memory.layers] == ["1.weight", "3.weight"]
    assert memory.dense == {"0.weight": "a convolution so small is faster dense"}
    inputs = torch.randn(2, 1, 10, 10)
    close(packed(inputs), dense(inputs))
    assert compressed.compress(packed) == memory
    compressed.decompress(packed)
    assert same_state(packed, dense)


@given(st.lists(st.integers(1, 400), max_size=8), st.integers(0, 40_000))
def test_what_is_spared_is_the_smallest_and_a_hundredth(sizes, packed):
    named = {str(at): size for at, size in enumerate(sizes)}
    chosen = spared(named, packed)
    some, rest = [named[n] for n in chosen], [named[n] for n in named.keys() - chosen]
    assert 100 * sum(some) <= packed
    if rest:
        assert max(some, default=0) <= min(rest)
        assert 100 * (sum(some) + min(rest)) > packed
