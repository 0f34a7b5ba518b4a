"""The compiled kernels against themselves: the same bits on every processor and thread count."""

import os
import subprocess
import sys

import pytest
import torch
from kernels.backends import COMPILED, using

from fewbits import _kernels as kernels

needs_compiler = pytest.mark.skipif(not COMPILED, reason="built without a C compiler")


def results(backend, threads, k, dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(1, 700_003).to(dtype)
    rows = torch.randn(37, 9_001).to(dtype)
    found, tenth = [], torch.tensor([0.1], dtype=torch.float64)
    torch.set_num_threads(threads)
    with using(backend) as some:
        for view in (weight, rows):
            codebook = torch.randn(len(view), k).sort(1).values
            for power in (1, 2):
                found += some.measure_all([view], codebook, None, power)
            found += some.cluster_sums(view, view, kernels.midpoints(codebook))
            values = view.flip(1).contiguous()
            found += some.sums_all([values], [view], kernels.midpoints(codebook))
            out = torch.ones_like(view)
            some.pull_all([out], [view], codebook, None, 2, tenth)
            moved = view.clone()
            some.move_all([moved], codebook, None, 1, tenth)
            found += [out, moved, some.std(view)]
    return found


@needs_compiler
@pytest.mark.parametrize("k", [1, 5, 16, 40, 3000])
def test_the_number_of_threads_shows_in_no_bit(k):
    alone = results("compiled", 1, k)
    for threads in (2, 5):
        assert all(map(torch.equal, alone, results("compiled", threads, k)))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("k", [1, 5, 16, 40, 3000])
def test_processors_with_and_without_avx2_give_the_same_bits(k, dtype):
    fast, portable = (results(name, 1, k, dtype) for name in COMPILED)
    assert all(map(torch.equal, fast, portable))


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_starts_threads_of_its_own():
    # In an interpreter of its own: pytest's has threads that may not be forked.
    code = (
        "import os, torch; from fewbits import _kernels as kernels\n"
        "torch.set_num_threads(2); weight = torch.randn(1, 500_000)\n"
        "read = lambda: kernels.cluster_sums(weight, weight, torch.zeros(1, 1))[0].tolist()\n"
        "before = read(); child = os.fork()\n"
        "if not child: os._exit(read() != before)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert output.stdout.split() == [b"0"], output.stderr


def test_without_native_code_the_plain_kernels_are_used():
    code = "from fewbits import _kernels as k; print(k.COMPILED, k.measure_all.__module__)"
    environment = os.environ | {"FEWBITS_NO_NATIVE": "1"}
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert output.split() == ["False", "fewbits._kernels._eager"]
