"""The operators of packed layers as PyTorch wants them: schema, fake results, gradients, tracing.

The two of snapped training are in test_pull.py.
"""

from typing import Any

import pytest
import torch
from compressed.networks import packed_weight, quantized
from torch import nn

import fewbits


def arguments(name: str, granularity: Any) -> tuple[Any, ...]:
    """What a packed layer gives its operator."""
    layers = {"convolve": nn.Conv2d(3, 6, (3, 2)), "take": nn.Embedding(12, 20)}
    model = nn.Sequential(layers.get(name, nn.Linear(16, 6)))
    quantized(model, plan=fewbits.plan(model, k=5, granularity=granularity))
    fewbits.compressed.compress(model)
    weight = packed_weight(model[0])
    indices, codebook = weight.indices, weight.codebook
    inputs = torch.randn(2, 4, 16, requires_grad=True)
    images = torch.randn(2, 3, 6, 7, requires_grad=True)
    trained = codebook.clone().requires_grad_()
    return {
        "decode": (indices, trained, weight.shape, weight.axis),
        "decode_gradient": (torch.randn(weight.shape), indices, codebook, weight.axis),
        "linear": (inputs, indices, codebook, 6, weight.axis),
        "linear_int8": (inputs, indices, codebook, 6, weight.axis),
        "convolve": (images, indices, codebook, weight.shape, weight.axis, [2, 1], [1, 0], [1, 2]),
        "take": (torch.tensor([[3, 0], [11, 3]]), indices, codebook, weight.shape, weight.axis),
    }[name]


OPERATORS = ["convolve", "decode", "decode_gradient", "linear", "linear_int8", "take"]


def test_these_are_all_of_them():
    import fewbits._snapped  # noqa: F401  # defines its own

    found = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fewbits::")}
    elsewhere = ["snap", "snap_codebook_gradient"]
    assert found == {f"fewbits::{name}" for name in OPERATORS + elsewhere}


# torch 2.14's own check looks at the gradient of what it has made of its inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_keeps_pytorchs_rules(name, granularity):
    given = arguments(name, granularity)
    operator = getattr(torch.ops.fewbits, name).default
    torch.library.opcheck(operator, given)
    # A fake result has the layout of the real one as well.
    real = operator(*given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = operator(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_the_gradient_of_a_convolution_is_the_dense_ones():
    images, *given = arguments("convolve", "channel")
    weight = torch.ops.fewbits.decode(*given[:4])
    other = images.detach().clone().requires_grad_()
    torch.ops.fewbits.convolve(images, *given).square().sum().backward()
    torch.conv2d(other, weight, None, *given[4:]).square().sum().backward()
    torch.testing.assert_close(images.grad, other.grad, rtol=1e-4, atol=1e-4)
