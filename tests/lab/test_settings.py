"""Settings of a run that reach one method and no other."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.lab.compare import Comparison
from fewbits.lab.config import Config
from fewbits.lab.data import load
from fewbits.lab.progress import Progress

SMALL: dict[str, Any] = {
    "train_images": 200, "batch_size": 50, "width": 0.25, "epochs": 2, "finetune_epochs": 2,
    "k": (8,),
}  # fmt: skip


def rows(folder: Path, **settings: Any) -> dict[str, dict[str, Any]]:
    """What each method of a small comparison found, by its name, without times."""
    config = Config(**(SMALL | settings))
    folder.mkdir()
    found = Comparison(config, folder, load("digits"), torch.device("cpu"), Progress()).run("")
    return {row["method"]: {k: v for k, v in row.items() if k != "seconds"} for row in found}


def representatives(folder: Path, **settings: Any) -> torch.Tensor:
    """The first layer's values after training with a snapped forward pass."""
    from safetensors.torch import load_file

    rows(folder, methods=("penalty-snapped",), **settings)
    state = load_file(folder / "models" / "penalty-snapped-k8-seed0.safetensors")
    return state["0.weight"].unique()


def test_a_rate_takes_bits_from_what_is_rate_aware_and_from_nothing_else(tmp_path: Path):
    methods = ("kmeans", "entropy", "penalty-snapped")
    settings = {"methods": methods, "regularizer": "rate-aware"}
    low = rows(tmp_path / "low", rate=0.0, **settings)
    high = rows(tmp_path / "high", rate=0.3, **settings)
    assert high["kmeans"] == low["kmeans"]
    assert high["entropy"]["bits_entropy"] < 0.8 * low["entropy"]["bits_entropy"]
    ours = "penalty-snapped"  # in eight steps it only begins to
    assert high[ours]["bits_entropy"] < low[ours]["bits_entropy"] - 0.05


@pytest.mark.parametrize("method", ["lsq", "kmeans-finetuned"])
def test_the_rate_of_our_representatives_is_not_that_of_other_methods(tmp_path: Path, method: str):
    slow = rows(tmp_path / "slow", methods=(method,), codebook_lr=1e-9)
    assert slow == rows(tmp_path / "fast", methods=(method,), codebook_lr=0.1)


def test_representatives_learn_as_fast_as_one_asks(tmp_path: Path):
    still = representatives(tmp_path / "still", codebook_lr=1e-12, strength=0.0)
    start = representatives(tmp_path / "start", codebook_lr=1e-12, strength=0.0, finetune_lr=1e-9)
    moved = representatives(tmp_path / "moved", codebook_lr=0.002, strength=0.0)
    own = representatives(tmp_path / "own", strength=0.0)
    assert torch.allclose(still, start, rtol=1e-4)
    assert not torch.allclose(moved, start, rtol=1e-2)
    assert torch.equal(
        own, moved
    )  # 0.002 is what the clustering chooses where weights learn faster
