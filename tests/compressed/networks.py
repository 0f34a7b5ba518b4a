"""Models of every kind of layer that can be compressed, and some that cannot."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fewbits


class Everything(nn.Module):
    """One of each; the embedding and the output layer share their weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 33, padding_idx=0)
        self.convolutions = nn.Sequential(
            nn.Conv1d(1, 8, 3, padding=1),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.ConvTranspose1d(8, 6, 3, stride=2),
            nn.Conv1d(6, 6, 3, groups=2),
        )
        self.recurrent = nn.LSTM(65, 8, batch_first=True)
        self.linear = nn.Linear(8, 33)
        self.output = nn.Linear(33, 50)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        values = self.embedding(tokens)[:, None]
        return self.output(self.linear(self.recurrent(self.convolutions(values))[0]))


def tokens(batch: int = 3) -> Tensor:
    return torch.randint(50, (batch,))


def quantized(model: nn.Module, **how) -> Any:
    """The model in evaluation mode with few values; 4 bits if not told otherwise."""
    fewbits.quantize(model, **how or {"bits": 4})
    return model.eval()


def both(model: nn.Module, **how) -> tuple[Any, Any]:
    """A model with few values, dense and compressed."""
    dense = quantized(model, **how)
    packed = copy.deepcopy(dense)
    fewbits.compressed.compress(packed)
    return dense, packed


def packed_weight(layer: Any) -> Any:
    return layer.get_submodule("packed_weight")
