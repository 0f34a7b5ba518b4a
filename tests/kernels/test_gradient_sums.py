"""Sums of gradients by cluster, of every backend, against brute force in float64."""

import math

import pytest
import torch
from kernels.backends import COMPILED, using
from kernels.test_kernels import SIZES, TYPES, codebook_of, every_backend
from reference import brute

from fewbits import _kernels as kernels


@every_backend
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize(("groups", "members"), [(1, 1), (1, 7), (1, 40_205), (3, 501)])
def test_sums_of_gradients_are_those_of_brute_force(backend, k, dtype, groups, members):
    weight, values = torch.randn(2, groups, members).to(dtype)
    codebook = codebook_of(groups, k, dtype)
    member = torch.nn.functional.one_hot(brute.nearest(weight, codebook), k).double()
    expected = (member * values.double()[:, :, None]).sum(1)
    with using(backend) as some:
        counts, sums = some.sums_all([values], [weight], kernels.midpoints(codebook))
    assert torch.equal(counts, member.sum(1))
    # Of n numbers of size 1: float64, or float32 over some thousands where it is compiled.
    tolerance = 1e-6 if backend in COMPILED and dtype != torch.float64 else 1e-11
    torch.testing.assert_close(sums, expected, rtol=1e-11, atol=tolerance * members**0.5)


@every_backend
@pytest.mark.parametrize("k", [3, 4, 9, 40])
def test_a_gradient_that_is_not_finite_spoils_its_own_sum_alone(backend, k):
    weight = torch.linspace(-1, 1, 9_000)[None]
    boundaries = torch.linspace(-1, 1, k + 1)[None, 1:-1]
    for broken in (math.inf, math.nan):
        values = torch.ones_like(weight)
        values[0, -1] = broken
        with using(backend) as some:
            counts, sums = some.sums_all([values], [weight], boundaries)
        assert torch.equal(sums[:, :-1], counts[:, :-1])
        assert not sums[0, -1].isfinite()


@every_backend
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("k", [1, 4, 16, 40])
def test_gradients_of_many_weights_are_summed_as_of_each_alone(backend, k, dtype):
    shapes = [(1, 1), (3, 501), (1, 140_003), (1, 0), (2, 9_001), (70, 2_000)]
    many = kernels.Weights(torch.randn(shape).to(dtype) for shape in shapes)
    values = [weight.flip(1).contiguous() for weight in many]
    middle = kernels.midpoints(codebook_of(sum(map(len, many)), k, dtype))
    each = zip(values, many, middle.split([len(w) for w in many]), strict=True)
    with using(backend) as some:
        together = some.sums_all(values, many, middle)
        alone = [some.sums_all([v], [w], own) for v, w, own in each]
    for found, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.cat(parts))
