"""The compiled part of the build: everything else is in pyproject.toml.

Each extension is optional: without a C compiler the package installs all the same, and plain
NumPy or PyTorch code does the work more slowly, with the same results.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup

# -g0: debugging information would be a third of what is installed.
FLAGS = ["/O2"] if sys.platform == "win32" else ["-O3", "-std=c11", "-fno-math-errno", "-g0"]
# Neither symbols nor padding to whole pages.
LINKING = ["-s", "-Wl,-z,noseparate-code"] if sys.platform == "linux" else []


def extension(name: str, *sources: str) -> Extension:
    """Return an optional extension for the stable ABI, so that one wheel serves every Python."""
    return Extension(
        name,
        [f"src/fewbits/{source}" for source in sources],
        extra_compile_args=FLAGS,
        extra_link_args=LINKING,
        depends=[str(header) for header in Path("src/fewbits").glob("*/*.h")],
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        py_limited_api=True,
        optional=True,
    )


setup(
    ext_modules=[
        extension("fewbits._kernels._native", "_kernels/_native.c"),
        extension("fewbits._packed._native", "_packed/_native.c"),
        extension("fewbits._symbols._native", "_symbols/_native.c", "_symbols/_rans.c"),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
