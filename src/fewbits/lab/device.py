"""Which device to train on."""

import torch

from .._errors import PlanError


def pick_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda"; auto takes CUDA where there is one.

    Raises:
        PlanError: if "cuda" is asked for and torch sees no CUDA device.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise PlanError("device is 'cuda', but torch sees no CUDA device. Use --device cpu.")
    return torch.device("cuda" if name != "cpu" and available else "cpu")
