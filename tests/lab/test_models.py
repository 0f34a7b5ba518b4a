"""Networks by name: the sizes that their docstrings state, and what cannot be built."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from fewbits._errors import FewbitsError, PlanError
from fewbits.lab.models import _networks, build, parameter_count

RGB, GRAY = (3, 32, 32), (1, 8, 8)
OURS = ["convnet", "alexnet", "vgg16"]


def stated(name: str) -> list[int]:
    """Every parameter count in the docstring of one of our networks."""
    text = getattr(_networks, name).__doc__
    return [int(found.replace(",", "")) for found in re.findall(r"\d+(?:,\d{3})+", text)]


@pytest.mark.parametrize(
    ("name", "shape", "position"),
    [
        ("convnet", RGB, 0),
        ("convnet", GRAY, 1),
        ("alexnet", RGB, 0),
        ("vgg16", RGB, 0),
        ("vit", RGB, 0),
        ("vit", GRAY, 1),
    ],
)
def test_the_parameter_count_is_the_stated_one(name, shape, position):
    model = build(name, classes=10, shape=shape)
    assert parameter_count(model) == stated(name)[position]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("width", [0.01, 0.25, 1.5])
def test_every_width_maps_images_to_classes_and_scales_the_channels(name: str, width: float):
    model = build(name, classes=7, shape=RGB, width=width)
    assert model(torch.zeros(2, *RGB)).shape == (2, 7)
    full = build(name, classes=7, shape=RGB)
    for ours, wide in zip(model.modules(), full.modules(), strict=True):
        if isinstance(ours, nn.Conv2d) and isinstance(wide, nn.Conv2d):
            assert ours.out_channels == max(1, round(width * wide.out_channels))


@pytest.mark.parametrize(("name", "least"), [("convnet", 4), ("alexnet", 16), ("vgg16", 32)])
def test_the_least_image_works_and_a_smaller_one_is_refused(name: str, least: int):
    model = build(name, classes=3, shape=(1, least, least + 5), width=0.1)
    assert model.eval()(torch.zeros(1, 1, least, least + 5)).shape == (1, 3)
    size = rf"{least} x {least} pixels or more, not 50 x {least - 1}\. Use convnet"
    with pytest.raises(PlanError, match=f"{name} needs images of {size}"):
        build(name, classes=3, shape=(1, least - 1, 50), width=0.1)


@pytest.mark.parametrize(("width", "channels"), [(0.01, 4), (0.5, 32), (1.0, 64), (1.1, 72)])
def test_the_transformer_has_channels_for_its_four_heads(width: float, channels: int):
    model = build("vit", classes=7, shape=(1, 20, 32), width=width)
    assert model(torch.zeros(2, 1, 20, 32)).shape == (2, 7)
    assert {m.in_features for m in model.modules() if isinstance(m, nn.Linear)} == {
        channels,
        4 * channels,
    }


def test_the_transformer_sees_where_a_patch_is():
    model = build("vit", classes=3, shape=GRAY).eval()
    image = torch.zeros(1, *GRAY)
    image[..., :2, :2] = 1
    assert not torch.allclose(model(image), model(image.roll(4, dims=-1)), atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 18, 32), (1, 8, 9)])
def test_the_transformer_refuses_images_that_are_no_multiple_of_the_patch(shape):
    with pytest.raises(PlanError, match=rf"{shape[2]} x {shape[1]} is no multiple .*--image-size"):
        build("vit", classes=3, shape=shape)


def test_the_generator_decides_the_weights():
    first, second, third = (_seeded(seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["0.weight"], third["0.weight"])


def _seeded(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build("convnet", classes=10, shape=GRAY).state_dict()


@pytest.mark.parametrize(
    ("name", "hint"), [("convnt", "convnet"), ("alexnet2", "alexnet"), ("vgg", "vgg16")]
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, hint: str):
    with pytest.raises(PlanError, match=f"no model '{name}'. Did you mean '{hint}'"):
        build(name, classes=10, shape=RGB)


@pytest.mark.parametrize(
    ("package", "extra"), [("torchvision", "vision"), ("timm", "timm")]
)  # fmt: skip
def test_a_package_that_is_not_installed_is_named_with_its_pip_line(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself does for "not there"
    with pytest.raises(FewbitsError, match=rf"pip install 'fewbits\[{extra}\]'"):
        build(f"{package}:resnet18", classes=10, shape=RGB)


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="needs torchvision")
def test_a_torchvision_network_takes_our_classes():
    model = build("torchvision:resnet18", classes=7, shape=RGB)
    assert model.eval()(torch.zeros(1, *RGB)).shape == (1, 7)
    with pytest.raises(PlanError, match="no model 'resnet19'. Did you mean 'resnet18'"):
        build("torchvision:resnet19", classes=7, shape=RGB)
    with pytest.raises(PlanError, match="cannot take 1 x 8 x 8 images"):
        build("torchvision:resnet18", classes=10, shape=GRAY)


@pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs timm")
def test_a_timm_network_takes_our_classes_and_channels():
    model = build("timm:resnet18", classes=7, shape=(1, 32, 32))
    assert model.eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 7)


# -- the user's own -------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn

class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))

def sized(depth=1, num_classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

def by_keyword(**settings):
    return sized(**settings)

def normed():
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))

def no_module():
    return "a network"

def fails():
    raise RuntimeError("no weights\\nat all")

class Pair(Plain):
    def forward(self, x):
        return super().forward(x), x

value = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in the current folder, which is not on the path yet."""
    (tmp_path / "own_networks.py").write_text(OWN)
    (tmp_path / "broken_networks.py").write_text("def network(:\n")
    (tmp_path / "failing_networks.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield "own_networks"
    sys.modules.pop("own_networks", None)


@pytest.mark.parametrize(("factory", "classes"), [("Plain", 10), ("sized", 4), ("by_keyword", 5)])
def test_a_factory_of_the_users_own_is_told_the_classes_if_it_takes_them(own, factory, classes):
    model = build(f"{own}:{factory}", classes=classes, shape=GRAY)
    assert model(torch.zeros(2, *GRAY)).shape == (2, classes)
    assert model.training


def test_trying_a_network_on_images_leaves_it_as_it_was_made(own):
    model = build(f"{own}:normed", classes=10, shape=GRAY)
    state = model.state_dict()
    assert state["0.num_batches_tracked"] == 0
    assert state["0.running_var"].tolist() == [1.0]
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_networks:no_module", "returned str, not a torch module"),
        ("own_networks:plain", r"has no such function or class\. Did you mean 'Plain'\?"),
        ("own_networks:value", "own_networks has no such function or class"),
        ("own_networks:fails", r"own_networks:fails: RuntimeError: no weights\."),
        ("own_network:Plain", "cannot be imported: ModuleNotFoundError: .*Run from the folder"),
        ("broken_networks:network", "cannot be imported: SyntaxError"),
        ("failing_networks:network", "cannot be imported: ZeroDivisionError: division by zero"),
        (":network", "cannot be imported: ValueError: Empty module name"),
        ("own_networks:", "there is no model 'own_networks:'"),
        ("own_networks:Pair", r"puts out tuple for 2 images, not \[2, 10\]: one number per class"),
    ],
)
def test_what_cannot_be_a_network_is_refused_in_one_line(own: str, name: str, message: str):
    with pytest.raises(PlanError, match=message) as caught:
        build(name, classes=10, shape=GRAY)
    assert "\n" not in str(caught.value)


def test_a_network_for_other_images_or_classes_is_refused(own: str):
    with pytest.raises(PlanError, match=r"Plain cannot take 3 x 32 x 32 images \(channels, height"):
        build(f"{own}:Plain", classes=10, shape=RGB)
    with pytest.raises(PlanError, match=r"Plain puts out \[2, 10\] for 2 images, not \[2, 7\]"):
        build(f"{own}:Plain", classes=7, shape=GRAY)


def test_a_width_for_a_network_without_one_is_refused(own: str):
    with pytest.raises(
        PlanError, match=r"width is 0\.5: only convnet, alexnet, vgg16, vit have one"
    ):
        build(f"{own}:Plain", classes=10, shape=GRAY, width=0.5)
