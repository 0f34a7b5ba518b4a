import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Deadlines measure the machine; derandomized examples are the same on every run.
settings.register_profile("fewbits", deadline=None, derandomize=True)
settings.load_profile("fewbits")


@pytest.fixture(autouse=True)
def fixed_numerics():
    """One thread and one seed, so that every test gives the same bits wherever it runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not sys.platform.startswith("linux") or os.getuid() != 0:
        pytest.skip("only root on Linux can mount a file system")
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
