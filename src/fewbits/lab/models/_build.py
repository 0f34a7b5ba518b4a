"""From a name to a network."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable

import torch
from torch import nn

from ..._errors import FewbitsError, PlanError, did_you_mean
from ._networks import alexnet, convnet, vgg16, vit

_OURS: dict[str, Callable[..., nn.Module]] = {
    "convnet": convnet,
    "alexnet": alexnet,
    "vgg16": vgg16,
    "vit": vit,
}


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def build(name: str, *, classes: int, shape: tuple[int, int, int], width: float = 1.0) -> nn.Module:
    """Return a freshly initialized network.

    Args:
        name: "convnet", "alexnet", "vgg16", "vit", "torchvision:NAME", "timm:NAME", or
            "package.module:factory" for a function or class of the user's own, called with
            `num_classes=` if it takes that, else with nothing.
        classes: number of outputs.
        shape: channels, height and width of an image.
        width: multiplies the channel counts of our own networks.

    Returns:
        The network, on the CPU.

    Raises:
        PlanError: if there is no such network, or it cannot take such images.
        FewbitsError: if the package it is in is not installed.
    """
    if name in _OURS:
        return _OURS[name](classes=classes, shape=shape, width=width)
    if width != 1.0:
        raise PlanError(f"width is {width}: only {', '.join(_OURS)} have one. Leave it out.")
    source, colon, rest = name.partition(":")
    if not colon or not rest:
        raise PlanError(
            f"there is no model {name!r}.{did_you_mean(name, _OURS)} Give one of"
            f" {', '.join(_OURS)}, torchvision:NAME, timm:NAME or package.module:factory."
        )
    if source == "torchvision":
        model = _torchvision(rest, classes)
    elif source == "timm":
        model = _timm(rest, classes, shape[0])
    else:
        model = _users_own(source, rest, classes)
    _check_fit(name, model, classes, shape)
    return model


@torch.no_grad()
def _check_fit(name: str, model: nn.Module, classes: int, shape: tuple[int, int, int]) -> None:
    """Refuse a network of somebody else's that does not map such images to such classes."""
    images = f"{shape[0]} x {shape[1]} x {shape[2]} images (channels, height, width)"
    training = model.training
    try:
        output = model.eval()(torch.zeros(2, *shape))
    except Exception as error:  # whatever a network raises on images it was not made for
        raise PlanError(
            f"model {name} cannot take {images}: {_first_line(error)}. Choose another model, or"
            " other images (--image-size)."
        ) from error
    model.train(training)
    if not isinstance(output, torch.Tensor) or output.shape != (2, classes):
        found = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise PlanError(
            f"model {name} puts out {found} for 2 images, not [2, {classes}]: one number per class."
        )


def _torchvision(name: str, classes: int) -> nn.Module:
    try:
        from torchvision import models  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise FewbitsError("torchvision models need: pip install 'fewbits[vision]'") from error
    known = models.list_models(module=models)
    if name not in known:
        raise PlanError(f"torchvision has no model {name!r}.{did_you_mean(name, known)}")
    return models.get_model(name, weights=None, num_classes=classes)


def _timm(name: str, classes: int, channels: int) -> nn.Module:
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise FewbitsError("timm models need: pip install 'fewbits[timm]'") from error
    if not timm.is_model(name):
        raise PlanError(f"timm has no model {name!r}.{did_you_mean(name, timm.list_models())}")
    return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)


def _users_own(module_name: str, attribute: str, classes: int) -> nn.Module:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's file lies here
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it runs
        raise PlanError(
            f"model {module_name}:{attribute}: cannot be imported: {_first_line(error)}. Run from"
            " the folder that has the module."
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise PlanError(
            f"model {module_name}:{attribute}: {module_name} has no such function or class."
            f"{did_you_mean(attribute, vars(module))}"
        )
    try:
        takes = inspect.signature(factory).parameters
        any_keyword = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        model = factory(num_classes=classes) if "num_classes" in takes or any_keyword else factory()
    except Exception as error:  # whatever the user's function raises
        raise PlanError(f"model {module_name}:{attribute}: {_first_line(error)}.") from error
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise PlanError(f"model {module_name}:{attribute}: returned {kind}, not a torch module.")
    return model


def _first_line(error: Exception) -> str:
    kind = type(error).__name__
    return f"{kind}: {str(error).splitlines()[0]}" if str(error) else kind
