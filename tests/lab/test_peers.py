"""LSQ against the paper's pseudo-code under float64 autograd; every peer in a training."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fewbits
from fewbits._errors import FewbitsError, FileError, PlanError
from fewbits.lab.compare import Comparison
from fewbits.lab.config import Config
from fewbits.lab.data import ImageData
from fewbits.lab.methods import METHODS, Recipe
from fewbits.lab.peers import lsq
from fewbits.lab.progress import Progress
from fewbits.lab.training import Job, reestimated_accuracy

# -- LSQ ------------------------------------------------------------------------------------------


def reference(weight: Tensor, step: Tensor, k: int) -> Tensor:
    """One step for all of `weight`, with gradients as the paper's appendix writes them down."""
    low, high = {2: (-1, 1), 3: (-1, 1), 4: (-2, 1), 5: (-2, 2), 6: (-3, 2), 16: (-8, 7)}[k]
    scale = 1 / math.sqrt(weight.numel() * high)
    scaled = (step - step * scale).detach() + step * scale  # its value, a share of its gradient
    inside = torch.clamp(weight / scaled, low, high)
    level = torch.where(inside < 0, -0.5, 0.5) if k == 2 else torch.round(inside)
    rounded = (level - inside).detach() + inside  # rounding passes the gradient
    if k == 2:  # the outer half of a half's range is clipped on to the level
        outside = inside.detach().abs() == 1
        rounded = torch.where(outside, level.double(), rounded)
    return rounded * scaled


@given(
    k=st.sampled_from([2, 3, 4, 5, 6, 16]),
    step=st.floats(0.05, 2.0),
    seed=st.integers(0, 2**16),
)
def test_lsq_is_the_papers_in_value_and_gradients(k: int, step: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, generator=generator, dtype=torch.float64).requires_grad_()
    gradient = torch.randn(40, generator=generator, dtype=torch.float64)
    learned = torch.tensor(step, dtype=torch.float64, requires_grad=True)
    wanted = reference(weight, learned, k)
    to_weight, to_step = torch.autograd.grad(wanted, (weight, learned), gradient)

    row, column = weight.detach()[None], learned.detach().reshape(1, 1)
    # float64: the reference subtracts and adds again, which rounds
    torch.testing.assert_close(lsq.snap(row, column, k)[0], wanted.detach(), rtol=0, atol=1e-12)
    ours = lsq.gradients(gradient[None], row, column, k)
    torch.testing.assert_close(ours[0][0], to_weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours[1][0, 0], to_step, rtol=1e-9, atol=1e-12)


def test_lsq_has_its_levels_and_its_first_step():
    weight = torch.linspace(-9, 9, 1001, dtype=torch.float64)[None]
    one = torch.ones(1, 1, dtype=torch.float64)
    found = {k: lsq.snap(weight, one, k).unique().tolist() for k in (2, 3, 4, 5, 16)}
    assert found[2] == [-0.5, 0.5]
    assert found[3] == [-1, 0, 1]
    assert found[4] == [-2, -1, 0, 1]
    assert found[5] == [-2, -1, 0, 1, 2]
    assert found[16] == list(range(-8, 8))
    mean = float(weight.abs().mean())
    for k, high in ((2, 1), (4, 1), (16, 7)):
        assert float(lsq.first_step(weight, k)) == pytest.approx(2 * mean / math.sqrt(high))


def test_lsq_steps_the_latent_weight_as_autograd_would():
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False).double()
    latent = layer.weight.detach().clone().requires_grad_()
    inputs = torch.randn(8, 6, dtype=torch.float64)
    peer = lsq.Lsq(layer, fewbits.plan(layer, k=4))
    optimizer = torch.optim.SGD(peer.param_groups(lr=0.1, weight_decay=0.1), momentum=0.9)
    optimizer = peer.wrapped(optimizer)

    step = (2 * latent.detach().abs().mean()).requires_grad_()
    groups = [{"params": [latent], "weight_decay": 0.1}, {"params": [step]}]
    wanted = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for _ in range(5):
        for one, output in (
            (optimizer, layer(inputs)),
            (wanted, inputs @ reference(latent, step, 4).T),
        ):
            one.zero_grad()
            output.square().mean().backward()
            one.step()
        snapped = reference(latent, step, 4).detach()
        # float64, after up to five steps
        torch.testing.assert_close(layer.weight.detach(), snapped, rtol=1e-9, atol=1e-9)
    assert not torch.equal(latent.detach(), layer.weight.detach())


def test_lsq_gives_each_channel_its_own_step():
    torch.manual_seed(0)
    layer = nn.Linear(30, 3)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([[1.0], [10.0], [100.0]]))
    before = layer.weight.detach().clone()
    lsq.Lsq(layer, fewbits.plan(layer, k=4, granularity="channel"))
    for row, was in zip(layer.weight.detach(), before, strict=True):
        assert torch.equal(row, lsq.snap(was[None], lsq.first_step(was[None], 4), 4)[0])


# -- all of them ----------------------------------------------------------------------------------

needs = {"lsq": None, "dkm": "coremltools", "parq": "torchao"}


def there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


PEERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            package is not None and not there(package),
            reason=f"{package} is not installed: pip install 'fewbits[peers]'",
        ),
    )
    for name, package in needs.items()
]
peers = pytest.mark.parametrize("name", PEERS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 12),
        nn.ReLU(),
        nn.Linear(12, 2),
    )


def job(name: str, model: nn.Module, k: int = 4, epochs: int = 4) -> Job:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 1, 4, 4), dtype=torch.uint8, generator=generator)
    labels = (images[:, 0, 0, 0] > 127).long()
    data = ImageData("made", images, labels, images[:20], labels[:20], ("a", "b"))
    attach = METHODS[name].attach
    assert attach is not None
    plan = fewbits.plan(model, k=k)
    METHODS[name].check(plan)
    settings: dict[str, Any] = {
        "name": name, "augment": None, "batch_size": 20, "lr": 0.05, "weight_decay": 1e-3, "seed": 3
    }  # fmt: skip
    clustering = attach(model, Recipe(plan, steps=3 * epochs))
    return Job(model=model, data=data, epochs=epochs, clustering=clustering, **settings)


def hardened(one: Job) -> nn.Module:
    assert one.clustering is not None
    one.clustering.harden()
    return one.model


def without_seconds(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in history]


class Stop(Progress):
    """Ends a training after its second epoch, as Ctrl-C would."""

    def epoch(self, job: str, history: list[dict[str, Any]]) -> None:
        if len(history) == 2:
            raise KeyboardInterrupt


@peers
@pytest.mark.parametrize("k", [2, 4, 16])
def test_a_peer_learns_and_leaves_a_plain_model_on_few_values(name: str, k: int, tmp_path: Path):
    plain = network()
    before = plain.state_dict()
    # 21 steps: PARQ's values are updated in the last, and then weights are a rounding off them
    one = job(name, network(), k, epochs=7)
    one.run(tmp_path / "checkpoint.pt", progress=Progress())
    assert one.history[-1]["loss"] < one.history[0]["loss"]
    model = hardened(one)
    assert str(model) == str(plain)  # the classes of all layers, and nothing beside them
    for module, was in zip(model.modules(), plain.modules(), strict=True):
        assert vars(module).keys() == vars(was).keys()
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert list(model.state_dict()) == list(before)
    for row in fewbits.plan(model, k=k).selected:
        values = model.get_parameter(row.name).detach()
        assert 1 < len(values.unique()) <= k
        assert not torch.equal(values, before[row.name])
    # what the last epoch has measured as snapped is what there is now
    measured = one.history[-1]["accuracy"] - one.history[-1]["hardening_gap"]
    assert reestimated_accuracy(model, one.data, one.batch_size, None) == pytest.approx(measured)


@peers
def test_a_peer_resumes_bit_for_bit(name: str, tmp_path: Path):
    whole, stopped, resumed = (job(name, network()) for _ in range(3))
    whole.run(tmp_path / "whole.pt", progress=Progress())
    with pytest.raises(KeyboardInterrupt):
        stopped.run(tmp_path / "stopped.pt", progress=Stop())
    resumed.run(tmp_path / "stopped.pt", progress=Progress())
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    wanted = hardened(whole).state_dict()
    for key, tensor in hardened(resumed).state_dict().items():
        assert torch.equal(tensor, wanted[key]), key


@peers
def test_a_peer_refuses_the_checkpoint_of_another_plan(name: str, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        job(name, network()).run(tmp_path / "checkpoint.pt", progress=Stop())
    with pytest.raises((PlanError, FileError), match="another plan"):
        job(name, network(), k=2).run(tmp_path / "checkpoint.pt", progress=Progress())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lsq", {"k": 1}, r"0\.weight: lsq with k = 1\. Give 2 or more"),
        ("dkm", {"k": 3}, r"0\.weight: dkm with k = 3\. It has k = 2, 4, 8, 16, 64, 256;"),
        ("parq", {"k": 5}, r"0\.weight: parq with k = 5\. It has k = 2, 3, 4, 8, .*, 256;"),
        ("dkm", {"k": 4, "granularity": "channel"}, r"0\.weight: dkm with 6 codebooks"),
        ("parq", {"k": 4, "granularity": "channel"}, r"0\.weight: parq with 6 codebooks"),
    ],
)
def test_a_plan_that_a_peer_has_no_values_for_is_refused(
    name: str, settings: dict[str, Any], message: str
):
    with pytest.raises(PlanError, match=message):
        METHODS[name].check(fewbits.plan(network(), **settings))


def test_dkm_refuses_layers_that_its_package_would_leave_alone():
    tied = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 9))
    tied[1].weight = tied[0].weight
    for model, what in (
        (tied, r"0\.weight: dkm clusters no weight that is tied to 1\.weight"),
        (nn.Sequential(nn.ConvTranspose2d(2, 3, 3)), r"0\.weight: .* that is ConvTranspose2d"),
    ):
        with pytest.raises(PlanError, match=what):
            METHODS["dkm"].check(fewbits.plan(model, k=4))


@pytest.mark.parametrize(
    ("name", "module"),
    [("dkm", "coremltools.optimize.torch.palettization"), ("parq", "torchao.prototype.parq")],
)
def test_a_package_that_is_not_there_is_named_before_any_training(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    images, labels = torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.arange(20) % 2
    data = ImageData("made", images, labels, images, labels, ("a", "b"))
    config = Config(methods=("kmeans", name))
    comparison = Comparison(config, tmp_path, data, torch.device("cpu"), Progress())
    with pytest.raises(FewbitsError, match=r"is not here .*: pip install 'fewbits\[peers\]'"):
        comparison.check()
    assert not list(tmp_path.iterdir())


def test_peers_say_nothing_and_make_rows(tmp_path: Path):
    names = [name for name, package in needs.items() if package is None or there(package)]
    words = (
        "compare --data digits --train-images 100 --batch-size 50 --width 0.1 --epochs 1"
        f" --finetune-epochs 1 --bits 1 --methods {','.join(names)} --json --quiet --out run"
    ).split()
    command = [sys.executable, "-m", "fewbits", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for row, name in zip(json.loads(done.stdout), names, strict=True):
        assert row["method"] == name
        assert row["bits_fixed"] == 1.0
        assert row["seconds"] > 0
        assert (tmp_path / "run" / "models" / f"{name}-k2-seed0.fewbits").exists()
