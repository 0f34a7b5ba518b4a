"""A network that meets with a mishap at a step of its training: `--model mishaps:network`, Linux.

"MISHAP=NaN:3" makes the output of its third training step NaN; "MISHAP=out of memory:3" asks for
more memory there than the process may have, after limiting it to little more than it has.
"""

import os
import resource
from pathlib import Path

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Two linear layers for images of 8 × 8."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        self.head = nn.Linear(16, num_classes)
        self.kind, _, at = os.environ.get("MISHAP", "none:0").partition(":")
        self.left = int(at)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, or the mishap."""
        output = self.head(self.body(images))
        if self.training:
            self.left -= 1
            if self.left == 0 and self.kind == "NaN":
                output = output * float("nan")
            if self.left == 0 and self.kind == "out of memory":
                output = output + greedy(output)
        return output


def greedy(like: Tensor) -> Tensor:
    """Ask for a gigabyte, of which this process has a tenth left."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, resource.RLIM_INFINITY))
    return torch.zeros(250_000_000, dtype=like.dtype).sum()


def network(num_classes: int) -> nn.Module:
    """Return it, as `--model` wants it."""
    return Network(num_classes)
