"""The Triton kernels on a real GPU against plain torch in float64 arithmetic on the CPU."""

import pytest
import torch
from kernels.test_kernels import codebook_of
from kernels.triton_cases import CASES, TYPES, assert_measured, numbers

from fewbits import _kernels as kernels
from fewbits._kernels import _eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

LARGE = [
    (1, 3_000_017, 16),
    (1, 1_000_000, 300),
    (512, 4_608, 16),
    (1_000, 27, 4),
    (1, 9_000, 4_000),
]
every_case = pytest.mark.parametrize(("groups", "members", "k"), [*CASES, *LARGE])
every_type = pytest.mark.parametrize("dtype", TYPES)


def pair(groups, members, k, dtype):
    return torch.randn(groups, members).to(dtype), codebook_of(groups, k, dtype)


@every_type
@every_case
def test_indices_and_snapped_weights_are_equal(groups, members, k, dtype):
    weight, codebook = pair(groups, members, k, dtype)
    boundaries = _eager.midpoints(codebook)
    found = kernels.assign(weight.cuda(), boundaries.cuda())
    assert torch.equal(found.cpu(), _eager.assign(weight, boundaries))
    snapped = kernels.snap(weight.cuda(), codebook.cuda(), boundaries.cuda())
    assert torch.equal(snapped.cpu(), _eager.snap(weight, codebook, boundaries))


@every_type
@every_case
def test_one_pass_measures_what_float64_sums(groups, members, k, dtype):
    weight, codebook = pair(groups, members, k, dtype)
    for power in (1, 2):
        found = kernels.measure_all([weight.cuda()], codebook.cuda(), None, power)
        again = kernels.measure_all([weight.cuda()], codebook.cuda(), None, power)
        assert all(map(torch.equal, found, again)), "the same bits each time"
        total, spread, counts, sums = (tensor.cpu() for tensor in found)
        expected = _eager.measure_all([weight], codebook, None, power)
        # Float32 within a tile of 1,024, as in `interpreted.py`.
        torch.testing.assert_close(total, expected[0], rtol=3e-6, atol=0)
        torch.testing.assert_close(spread, expected[1], rtol=6e-6, atol=0)
        assert torch.equal(counts, expected[2])
        assert ((sums - expected[3]).abs() <= 3e-6 * total + 1e-30).all()
        if groups * members * k < 1e7:
            assert_measured((total[0], spread[0], counts, sums), weight, codebook, power)


@every_type
@every_case
def test_pull_and_move_write_what_plain_torch_does(groups, members, k, dtype):
    weight, codebook = pair(groups, members, k, dtype)
    # Products are rounded before they are added, on both; a bfloat16 may fall to either side.
    tolerance = 2 * torch.finfo(dtype).eps
    for power in (1, 2):
        out = torch.randn(groups, members).to(dtype)
        on_gpu = out.cuda()
        kernels.pull_all(
            [on_gpu], [weight.cuda()], codebook.cuda(), None, power, numbers(0.3).cuda()
        )
        _eager.pull_all([out], [weight], codebook, None, power, numbers(0.3))
        torch.testing.assert_close(on_gpu.cpu(), out, rtol=tolerance, atol=tolerance)
        moved, expected = weight.cuda(), weight.clone()
        version = moved._version
        counts, left = kernels.move_all([moved], codebook.cuda(), None, power, numbers(0.2).cuda())
        more = _eager.move_all([expected], codebook, None, power, numbers(0.2))
        torch.testing.assert_close(moved.cpu(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(counts.cpu(), more[0]) and moved._version > version
        assert ((left.cpu() - more[1]).abs() <= 2**-21 * (1 + more[0])).all()


@every_type
def test_the_standard_deviation_is_that_of_float64(dtype):
    weight = (torch.randn(3, 300_011) * 1e-2 + 5).to(dtype)
    weight[0, 0] = -300.0
    found = kernels.std(weight.cuda()).cpu().double()
    torch.testing.assert_close(found, weight.double().std(correction=0), rtol=1e-6, atol=0)


def test_many_weights_in_one_call_are_each_as_alone():
    shapes = [(1, 70_000), (40, 9), (1, 33), (2, 600), (6, 32)] * 30
    weights = [torch.randn(shape, device="cuda") for shape in shapes]
    codebook = torch.randn(sum(map(len, weights)), 16, device="cuda").sort(1).values
    together = kernels.measure_all(weights, codebook, None, 2)
    row = 0
    for i, weight in enumerate(weights):
        rows = slice(row, row + len(weight))
        alone = kernels.measure_all([weight], codebook[rows], None, 2)
        assert together[0][i] == alone[0][0] and together[1][i] == alone[1][0]
        assert torch.equal(together[2][rows], alone[2])
        assert torch.equal(together[3][rows], alone[3])
        row += len(weight)


def test_weights_beyond_the_reach_of_32_bits_are_found():
    if torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("needs 8 GB of free GPU memory")
    weight = torch.zeros(1, 2**31 + 5, dtype=torch.bfloat16, device="cuda")
    weight[0, -3:] = 1.0
    found = kernels.assign(weight, torch.tensor([[0.5]], device="cuda"))
    assert found.sum() == 3 and found[0, -3:].tolist() == [1, 1, 1]
    counts, _ = kernels.cluster_sums(weight, weight, torch.tensor([[0.5]], device="cuda"))
    assert counts.tolist() == [[2**31 + 2, 3]]
