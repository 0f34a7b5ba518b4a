"""The Triton kernels without a GPU: in Triton's interpreter, and compiled for one.

The interpreter runs what the kernels say and hides what a compiler would refuse: shapes, types and
pointers. So each variant is also compiled to machine code, as far as one gets without a device.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="no Triton: pip install 'fewbits[triton]'")

# Operation, power, type of the weights, of the other, K rounded up, and a tile's rows and columns.
SUMS = [
    ("MEASURE", 2, "float32", "float32", 16, 1, 1024),
    ("MEASURE", 1, "bfloat16", "bfloat16", 16, 4, 256),
    ("MEASURE", 2, "float16", "float16", 1, 32, 32),
    ("MEASURE", 2, "bfloat16", "bfloat16", 256, 1, 1024),
    ("CLUSTER_SUMS", 2, "bfloat16", "float32", 64, 1, 1024),
    ("MOVE", 2, "float16", "float16", 4, 8, 128),
    ("MOVE", 1, "float32", "float32", 128, 1, 1024),
    ("MOMENTS", 1, "float16", "float16", 1, 1, 1024),
]
APPLIED = [
    ("ASSIGN", 1, "float32", "uint8", 16, 1, 1024),
    ("ASSIGN", 1, "bfloat16", "int32", 512, 1, 1024),
    ("SNAP", 1, "bfloat16", "bfloat16", 65536, 1, 1024),
    ("PULL", 2, "float32", "float32", 16, 1, 1024),
    ("PULL", 1, "bfloat16", "bfloat16", 32, 8, 128),
    ("MOVE", 2, "bfloat16", "bfloat16", 256, 1, 1024),
]
TABLE = {"table": "*i64", "levels": "i32"}
SEARCH = {"codebook": "*fp32", "boundaries": "*fp32", "k": "i32", "stride": "i32", "others": "*i64"}


def run(code_or_file: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *code_or_file],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@needs_triton
def test_the_kernels_compute_the_right_numbers_in_the_interpreter():
    tests = Path(__file__).with_name("interpreted.py")
    finished = run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)], TRITON_INTERPRET="1"
    )
    assert finished.returncode == 0, finished.stdout[-6_000:]


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compile a kernel for an H100 with the launch's own options; return its PTX."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from fewbits._kernels import _triton

    def compile_one(kernel, signature, **constants) -> str:
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={name: signature.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=_triton.OPTIONS)
        assert result.asm["cubin"], "ptxas made machine code of it"
        return result.asm["ptx"]

    return compile_one


@needs_triton
@pytest.mark.parametrize(
    ("case", "aligned"),
    [(case, True) for case in (*SUMS, *APPLIED)] + [(SUMS[0], False), (APPLIED[4], False)],
    ids=lambda value: "-".join(map(str, value[:5])) if isinstance(value, tuple) else str(value),
)
def test_every_variant_compiles_for_a_gpu_without_atomics(compiled, case, aligned):
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    from fewbits._kernels import _triton_passes as passes

    operation, power, weight, other, k, rows, columns = case
    if case in SUMS:
        kernel, own = passes.sums, {"amounts": "*fp64", "results": "*fp64", "partial": "*fp64"}
    else:
        kernel, own = passes.apply, {"amounts": "*fp64"}
    ptx = compiled(
        kernel,
        TABLE | SEARCH | own | {"weights": "i32"},
        OPERATION=getattr(passes, operation),
        POWER=power,
        TYPE=getattr(tl, weight),
        OTHER_TYPE=getattr(tl, other),
        K=k,
        ROWS=rows,
        COLUMNS=columns,
        ALIGNED=aligned,
    )
    assert not re.search(r"\b(atom|red)\.", ptx), "the order of sums is fixed"
    assert ".ftz" not in ptx, "denormal numbers are kept"
    # 16 bytes a load: each of 32 lanes reads all its weights so, or none.
    wide = len(re.findall(r"ld\.global\.v4\.b32", ptx))
    assert wide * 16 >= aligned * rows * columns * (4 if weight == "float32" else 2) // 32
    assert aligned or not wide


@needs_triton
def test_the_small_kernels_compile_for_a_gpu_without_atomics(compiled):
    from fewbits._kernels import _triton_passes as passes

    results = {"partial": "*fp64", "results": "*fp64", "weights": "i32"}
    adding = compiled(passes.combine, TABLE | results | {"runs": "i32"})
    assert not re.search(r"\b(atom|red)\.", adding)
    compiled(passes.midpoints, {"codebook": "*fp32", "boundaries": "*fp32", "size": "i32"})


@needs_triton
@pytest.mark.parametrize(("told", "expected"), [("", "_triton"), ("1", "_eager")])
def test_triton_is_loaded_for_the_first_weight_on_a_gpu_and_no_sooner(told, expected):
    code = (
        "import sys, torch; from fewbits import _kernels as kernels\n"
        "kernels.snap(torch.ones(1, 2), torch.ones(1, 1), torch.ones(1, 0))\n"
        "print('triton' in sys.modules, kernels.for_cuda().__name__)"
    )
    assert run(["-c", code], FEWBITS_NO_NATIVE=told).stdout.split() == [
        "False",
        f"fewbits._kernels.{expected}",
    ]


def test_without_triton_plain_torch_is_chosen_for_a_gpu():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from fewbits import _kernels as kernels; print(kernels.for_cuda().__name__)"
    )
    assert run(["-c", code]).stdout.split() == ["fewbits._kernels._eager"]
