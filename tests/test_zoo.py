"""Many architectures from end to end, as benchmarks/zoo.py takes them: those installed here."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

_spec = importlib.util.spec_from_file_location(
    "zoo", Path(__file__).parents[1] / "benchmarks" / "zoo.py"
)
assert _spec is not None and _spec.loader is not None
zoo = importlib.util.module_from_spec(_spec)
sys.modules["zoo"] = zoo  # dataclasses look their module up
_spec.loader.exec_module(zoo)


def test_every_architecture_is_clustered_trained_hardened_saved_and_loaded():
    for name, entry in zoo.entries().items():
        row = zoo.check(entry)
        assert row["tensors"] > 0 and 0 < row["clustered"] <= 1, name
