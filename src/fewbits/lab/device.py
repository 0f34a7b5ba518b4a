"""Which device to train on."""

import torch

from .. import _processes
from .._errors import PlanError


def pick_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda"; auto takes CUDA where there is one.

    Of several processes on a machine each takes the CUDA device of its own number.

    Raises:
        PlanError: if "cuda" is asked for and torch sees no CUDA device, or too few.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise PlanError("device is 'cuda', but torch sees no CUDA device. Use --device cpu.")
    if name == "cpu" or not available:
        return torch.device("cpu")
    if _processes.launched() == 1:
        return torch.device("cuda")
    number, devices = _processes.local_rank(), torch.cuda.device_count()
    if number >= devices:
        raise PlanError(
            f"this is process {number} of its machine, which has {devices} CUDA devices. Launch"
            f" {devices} processes, or use --device cpu."
        )
    return torch.device("cuda", number)
