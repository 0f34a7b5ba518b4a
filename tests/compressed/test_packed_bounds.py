"""Kernels on buffers that end where the memory of the process does: one byte too far is a crash.

Run as a script, so that the crash is that of another process.
"""

import ctypes
import itertools
import mmap
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbits._packed import _eager

try:
    from fewbits._packed import _cpu
except ImportError:
    _cpu = None

PROT_NONE, PROT_ALL = 0, 3
_kept = []


def fenced(values: Tensor, *, front: bool = False) -> Tensor:
    """A copy that ends, or begins, where a page lies that nobody may touch."""
    page, size = mmap.PAGESIZE, values.nbytes
    inner = max(1, -(-size // page)) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = page if front else page + inner - size
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=max(1, size), offset=offset)
    copy[:size] = values.contiguous().view(-1).view(torch.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for fence in (start, start + page + inner):
        assert protect(ctypes.c_void_p(fence), page, PROT_NONE) == 0
    _kept.append(memory)
    return copy[:size].view(values.dtype).view(values.shape)


def check(width: int, shape: tuple[int, ...], groups: int, *, front: bool) -> None:
    """Decode and multiply a fenced weight in every way there is, and compare with plain NumPy."""
    from fewbits import _symbols

    assert _cpu is not None
    k = 1 << width
    rows, columns = shape
    indices = np.random.default_rng(0).integers(k, size=rows * columns, dtype=np.uint16)
    packed = np.zeros(-(-len(indices) * width // 8), np.uint8)
    _symbols.pack(indices, width, packed)
    codebook = torch.randn(groups, k)
    of = torch.arange(rows)[:, None] // (rows // groups) * k
    dense = codebook.reshape(-1)[of + torch.from_numpy(indices.astype(np.int64)).view(shape)]
    data = fenced(torch.from_numpy(packed), front=front)
    book = fenced(codebook, front=front)
    assert torch.equal(_cpu.decode(data, book, shape, 0, (0, rows * columns)).view(shape), dense)
    for batch in (1, 3, 8, 16, 17, 40):
        inputs = torch.randn(batch, columns)
        found = _cpu.linear(fenced(inputs, front=front), data, book, rows, 0)
        torch.testing.assert_close(found, inputs @ dense.t(), atol=1e-3, rtol=1e-3)
    images = torch.randn(1, columns, 4, 5)
    how = (1, 1), (0, 0), (1, 1)
    found = _cpu.convolve(fenced(images, front=front), data, book, (*shape, 1, 1), 0, *how)
    expected = torch.conv2d(images, dense[:, :, None, None])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    if width <= 4 and columns * width % 8 == 0:
        for batch in (1, 3):
            inputs = fenced(torch.randn(batch, columns), front=front)
            arguments = inputs, data, book, rows, 0
            assert torch.equal(_cpu.linear_int8(*arguments), _eager.linear_int8(*arguments))
    out = np.empty(len(indices), np.uint16)
    _symbols.unpack(data.numpy(), width, out)
    assert np.array_equal(out, indices)


SHAPES = [(1, 1), (1, 7), (3, 8), (2, 31), (5, 33), (6, 64), (7, 65), (4, 130), (2, 515), (13, 72)]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for width, shape, front in itertools.product(range(1, 9), SHAPES, (False, True)):
        for groups in {1, shape[0]}:
            check(width, shape, groups, front=front)
    print("none crossed a fence")


@pytest.mark.skipif(_cpu is None, reason="built without a C compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="fences are made with Linux's mprotect")
def test_no_kernel_reads_outside_of_its_buffers():
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.strip() == "none crossed a fence"


if __name__ == "__main__":
    main()
