"""Networks whose weights lie on few values, of every kind of layer an export must carry."""

import torch
from torch import Tensor, nn

import fewbits


class Block(nn.Module):
    """Two convolutions with a shortcut, as in a ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(self.norm1(self.first(x)).relu()))
        return (y + self.shortcut(x)).relu()


def resnet(channels: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), Block(channels, channels, 1),
        Block(channels, 2 * channels, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2 * channels, 10),
    )  # fmt: skip


class Language(nn.Module):
    """A transformer whose output layer is its embedding: one tensor, two operations."""

    def __init__(self, words: int = 40, width: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x))[:, -1])


class Signals(nn.Module):
    """1-D and transposed convolutions and an LSTM."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1)
        self.lstm = nn.LSTM(6, 12, batch_first=True)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.conv(x).relu()).transpose(1, 2)
        return self.out(self.lstm(y)[0][:, -1])


class Odd(nn.Linear):
    """With an operator that no target has."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.special.bessel_j0(input))


class Fixed(nn.Linear):
    """For four examples, never more or less."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.view(4, 97))


@torch.no_grad()
def snap_all(model: nn.Module, k: int) -> nn.Module:
    """In place: put every weight of two or more axes on k values, whatever its layer."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            flat = parameter.reshape(-1)
            values = flat.quantile((torch.arange(k) + 0.5) / k).to(flat)
            parameter.copy_(values[(flat[:, None] - values).abs().argmin(1)].view_as(parameter))
    return model.eval()


def quantized(model: nn.Module, k: int, **how) -> nn.Module:
    plan = fewbits.plan(model, k=k, **how)
    fewbits.quantize(model, plan=plan)
    return model.eval()


# What the tests of several targets export: how to make it, and example inputs.
NETWORKS = {
    "resnet": (lambda: quantized(resnet(), 4, granularity="channel"), torch.randn(4, 1, 8, 8)),
    "transformer": (lambda: quantized(Language(), 5), torch.randint(0, 40, (5, 7))),
    "signals": (lambda: snap_all(Signals(), 3), torch.randn(3, 3, 10)),
}
