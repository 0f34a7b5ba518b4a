"""The optimizers that a run may train with, by name."""

from collections.abc import Callable
from typing import Any

import torch

# Parameter groups and the learning rate of those that name none -> an optimizer.
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]] = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
}
