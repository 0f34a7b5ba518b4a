"""The largest tensor that one training step makes, watched at every operation torch runs."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fewbits
from fewbits.regularizers import Nearest, Periodic, RateAware, SoftMin

K = 4096
PIECE = 1 << 20  # elements that a regularizer which compares all may take at a time


class Largest(TorchDispatchMode):
    """Notes the most elements any result of any operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("pull", [fewbits.Penalty(), fewbits.Proximal()], ids=str)
@pytest.mark.parametrize(("regularizer", "size", "most"), [
    (Nearest(), 512, 2 * 512**2),
    (RateAware(), 512, 2 * 512**2),
    (Periodic(), 512, 2 * 512**2),
    (SoftMin(), 128, PIECE),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_no_tensor_of_weights_times_representatives_is_made(regularizer, size, most, pull):
    layer = nn.Linear(size, size, bias=False)
    clustering = fewbits.Clustering(layer, k=K, regularizer=regularizer, pull=pull)
    inputs = torch.randn(2, size)
    with Largest() as largest:
        (layer(inputs).square().mean() + clustering.loss()).backward()
        clustering.step()
        clustering.gap()
        clustering.harden()
    assert size**2 <= largest.elements <= most < size**2 * K / 16


@pytest.mark.parametrize("init", ["kmeans", "quantile", "uniform"])
def test_attaching_makes_none_either(init):
    layer = nn.Linear(512, 512, bias=False)
    with Largest() as largest:
        fewbits.Clustering(layer, k=K, init=init)
    assert largest.elements <= 2 * 512**2


@pytest.mark.parametrize("k", [4, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_penalty_makes_no_copy_of_the_weights_or_their_gradient(k, dtype):
    layer = nn.Linear(512, 1024, bias=False, dtype=dtype)
    clustering = fewbits.Clustering(layer, k=k, snapped_forward=False)
    layer.weight.grad = torch.zeros_like(layer.weight)  # as a step's own backward pass leaves it
    with Largest() as largest:
        clustering.loss().backward()
    assert largest.elements <= layer.weight.numel()
    fresh = Fresh(layer.weight.numel())
    with fresh:
        clustering.loss().backward()
    assert fresh.made == 0, "no new tensor of the weight's size, only views of it"


class Fresh(TorchDispatchMode):
    """Counts the results of at least `size` elements that lie in memory not seen before."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() >= self.size:
                self.made += leaf.untyped_storage().data_ptr() not in known
        return result
