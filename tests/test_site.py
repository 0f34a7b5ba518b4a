"""The site builds from the pages without a warning, and its figures are what their data say."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_builds_without_a_warning(tmp_path: Path):
    for package in ("mkdocs", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first = (tmp_path / "index.html").read_text()
    assert "figures/accuracy.svg" in first
    assert "<math" in (tmp_path / "method" / "index.html").read_text()
    assert "codebook_lr" in (tmp_path / "reference" / "api" / "index.html").read_text()


def test_the_first_picture_is_drawn_from_the_results():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["figures"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    results = json.loads((ROOT / "docs" / "results" / "vgg16-short" / "results.json").read_text())
    drawn = (ROOT / "docs" / "figures" / "accuracy.svg").read_text()
    assert module.accuracy(results) + "\n" == drawn
