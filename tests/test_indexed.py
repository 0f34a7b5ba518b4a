"""Codebooks and indices found in a tensor, against a search over all groupings by brute force."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewbits._indexed import bits_of, indexed

DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.bool,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64,
]  # fmt: skip


def rebuilt(tensor: Tensor, groups: tuple[int, int] | None = None) -> Tensor:
    """The tensor's bits again, from its codebooks and indices one element at a time."""
    found = indexed(tensor, groups)
    assert found is not None
    outer, count, run = found.layout()
    view = torch.from_numpy(found.indices.astype("int64")).view(outer, count, run)
    books = torch.from_numpy(found.codebook.astype("uint64").view("int64"))
    return torch.stack([books[g][view[:, g]] for g in range(count)], dim=1).reshape(-1)


def bits(tensor: Tensor) -> Tensor:
    return torch.from_numpy(bits_of(tensor).astype("uint64").view("int64"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codebook_and_indices_give_every_bit_back(dtype):
    values = (
        torch.tensor([0.0, 1.0, -3.0, 2.0, 5.0]).abs()
        if not dtype.is_signed
        else torch.tensor([0.0, 1.0, -3.0, 2.0, -1.0])
    )
    tensor = values[torch.randint(5, (6, 7))].to(dtype)
    assert torch.equal(rebuilt(tensor), bits(tensor))


def test_signed_zeros_and_every_nan_are_values_of_their_own():
    nan = torch.tensor([0x7FC00000, 0x7FC00001, -0x400000, -(2**31), 0], dtype=torch.int32)
    tensor = nan.view(torch.float32)[torch.randint(5, (20, 20))]
    found = indexed(tensor)
    assert found is not None
    assert found.codebook.shape == (1, 5)
    assert torch.equal(rebuilt(tensor), bits(tensor))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30))
def test_a_codebook_ascends(numbers):
    found = indexed(torch.tensor(numbers, dtype=torch.float32))
    assert found is not None
    values = torch.from_numpy(found.codebook.view("float32"))[0]
    assert torch.equal(values, values.sort().values)
    assert len({str(v) for v in values.tolist()}) == len(values)  # -0.0 is not 0.0


@pytest.mark.parametrize("make", [Tensor.t, lambda t: t[::2], lambda t: t[:, 1:]])
def test_indices_are_in_row_major_order_whatever_the_strides_are(make):
    tensor = make(torch.randint(5, (9, 8)).float())
    assert torch.equal(rebuilt(tensor), bits(tensor.contiguous()))


def test_channels_last_is_indexed_by_position_not_by_memory():
    tensor = torch.randint(3, (4, 5, 3, 3)).float()
    last = tensor.contiguous(memory_format=torch.channels_last)
    assert torch.equal(rebuilt(last), bits(tensor))


def room(tensor: Tensor, axis: int, groups: int) -> int:
    """Bytes at a fixed width with one codebook per group, by counting distinct values."""
    view = tensor.movedim(axis, 0).reshape(groups, -1)
    most = max(len(row.unique()) for row in view)
    return math.ceil(tensor.numel() * (most - 1).bit_length() / 8) + groups * most * 4


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("channels_per_group", [1, 2, 4, 12])
def test_the_grouping_that_takes_least_room_is_found(axis, channels_per_group):
    shape = [6, 7]
    shape[axis] = 12
    tensor = torch.empty(*shape, 40)
    for start in range(0, 12, channels_per_group):
        size = [*tensor.shape]
        size[axis] = channels_per_group
        values = torch.randn(4)
        tensor.narrow(axis, start, channels_per_group).copy_(values[torch.randint(4, size)])
    found = indexed(tensor)
    assert found is not None
    least = min(
        room(tensor, a, g) for a in (0, 1) for g in range(1, 13) if tensor.shape[a] % g == 0
    )
    assert found.bytes_fixed == room(tensor, found.axis, len(found.codebook)) == least
    assert torch.equal(rebuilt(tensor), bits(tensor))


def test_channels_of_few_values_are_found_where_the_whole_has_too_many():
    tensor = torch.randn(2048, 64)[:, torch.randint(64, (256,))]  # 131,072 values in all
    found = indexed(tensor)
    assert found is not None
    assert found.codebook.shape[0] == 2048
    assert torch.equal(rebuilt(tensor), bits(tensor))


@pytest.mark.parametrize("count", [65_536, 65_537])
def test_65536_values_are_indexed_and_one_more_is_not(count):
    found = indexed(torch.arange(count).float())
    assert (found is not None) == (count == 65_536)


def test_weights_without_structure_have_no_grouping():
    assert indexed(torch.randn(300, 300)) is None
    assert indexed(torch.empty(0, 3)) is None


def test_given_groups_are_taken():
    tensor = torch.randint(3, (8, 6)).float()
    found = indexed(tensor, (2, 1))
    assert found is not None
    assert (found.codebook.shape[0], found.axis) == (2, 1)
    assert torch.equal(rebuilt(tensor, (2, 1)), bits(tensor))
