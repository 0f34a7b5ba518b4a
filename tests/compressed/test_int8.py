"""Eight-bit activations against the same arithmetic in float64, and what they are refused for."""

import copy

import pytest
import torch
from compressed.networks import both, quantized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fewbits
from fewbits import PlanError, compressed


def rounded(values: Tensor) -> Tensor:
    """Rows on 255 levels, in float64."""
    step = values.abs().amax(dim=1, keepdim=True).double() / 127
    return (values.double() / step).round() * step


def int8(layer: nn.Linear, **how) -> tuple[nn.Linear, nn.Linear]:
    dense = quantized(layer, **how)
    packed = copy.deepcopy(dense)
    compressed.compress(packed, activations="int8")
    return dense, packed


@settings(max_examples=40)
@given(rows=st.sampled_from([6, 24]), columns=st.sampled_from([64, 200, 264]),
       k=st.sampled_from([2, 3, 4, 7, 8, 12, 16]), batch=st.integers(0, 9),
       granularity=st.sampled_from(["layer", "channel"]))  # fmt: skip
def test_only_inputs_and_representatives_are_rounded(rows, columns, k, batch, granularity):
    layer = nn.Linear(columns, rows)
    dense, packed = int8(layer, plan=fewbits.plan(layer, k=k, granularity=granularity))
    inputs = torch.randn(batch, columns)
    weight = dense.weight.detach()
    books = weight.view(1, -1) if granularity == "layer" else weight
    expected = rounded(inputs) @ rounded(books).view_as(weight).t() + dense.bias.double()
    # The sums are exact; a level may differ where float32 and float64 round a tie differently.
    levels = 2 * inputs.abs().amax(1, keepdim=True) / 127 * dense.weight.abs().max()
    result = packed(inputs)
    assert result.shape == expected.shape and result.dtype == torch.float32
    assert ((result - expected).abs() <= levels + 1e-4).all()
    off = (result - expected).abs() > 1e-4
    assert off.float().mean() < 0.05 if batch else not len(off)


def test_normal_inputs_are_off_by_about_one_percent():
    dense, packed = int8(nn.Linear(1024, 256, bias=False), bits=4)
    inputs = torch.randn(64, 1024)
    error = (packed(inputs) - dense(inputs)).norm() / dense(inputs).norm()
    # Uniform rounding to steps of max / 127 of normal inputs (max near 3.5) and of the codebook.
    assert 0.002 < error < 0.02


def test_an_input_that_is_not_finite_does_not_become_a_number():
    packed = int8(nn.Linear(64, 8))[1]
    inputs = torch.ones(3, 64)
    inputs[0, 5], inputs[1, 7] = torch.inf, torch.nan
    result = packed(inputs)
    assert result[:2].isnan().all() and result[2].isfinite().all()


def test_zeros_give_the_bias():
    packed = int8(nn.Linear(64, 8))[1]
    assert torch.equal(packed(torch.zeros(2, 3, 64)), packed.bias.expand(2, 3, 8))


def test_the_gradient_is_that_of_floats():
    dense, packed = int8(nn.Linear(64, 8))
    first = torch.randn(5, 64, requires_grad=True)
    second = first.detach().clone().requires_grad_()
    dense(first).sum().backward()
    packed(second).sum().backward()
    torch.testing.assert_close(second.grad, first.grad)


def test_layers_that_cannot_compute_in_floats_and_say_so():
    model = nn.Sequential(
        nn.Conv1d(8, 16, 3), nn.Linear(64, 63), nn.Linear(63, 64), nn.Linear(64, 64)
    )
    plan = fewbits.plan(model, k=8, overrides={"3": {"k": 17}})
    memory = compressed.compress(quantized(model, plan=plan), activations="int8")
    assert memory.floats == {
        "0.weight": "CompressedConv1d has no int8 form",
        "2.weight": "rows of 63 inputs at 3 bits do not end with a byte",
        "3.weight": "5 bits; int8 is for 1 to 4",
    }
    assert "0.weight                         computes in floats: Compr" in str(memory)
    assert repr(model).count("activations=int8") == 1
    columns = nn.Linear(64, 32)
    values = torch.randn(64, 2)[:, torch.randint(2, (32,))].t()  # two values for each input
    columns.weight.data.copy_(values)
    with pytest.raises(PlanError, match="the model: its codebooks run along the inputs. Leave"):
        compressed.compress(columns, activations="int8")


def test_a_model_can_change_its_mind():
    dense, packed = both(nn.Sequential(nn.Linear(64, 32)))
    inputs = torch.randn(2, 64)
    exact = packed(inputs)
    compressed.compress(packed, activations="int8")
    assert not torch.equal(packed(inputs), exact)
    compressed.compress(packed)
    assert torch.equal(packed(inputs), exact)


def test_unknown_activations_are_refused_with_the_nearest():
    with pytest.raises(PlanError, match="activations is 'int'. Did you mean 'int8'?"):
        compressed.compress(nn.Linear(4, 4), activations="int")  # pyright: ignore


def test_a_layer_that_decompresses_forgets_its_activations():
    packed = int8(nn.Linear(64, 8))[1]
    compressed.decompress(packed)
    assert type(packed) is nn.Linear and not hasattr(packed, "activations")
