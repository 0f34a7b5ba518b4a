"""The networks that the comparisons use, in their usual forms for small images."""

import torch
from torch import Tensor, nn

from ..._errors import PlanError

# Channels of VGG16's 13 convolutions; "M" halves height and width.
_VGG16 = (
    64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M",
)  # fmt: skip


def _channels(count: int, width: float) -> int:
    return max(1, round(count * width))


def _check_size(name: str, shape: tuple[int, int, int], least: int) -> None:
    if min(shape[1:]) < least:
        raise PlanError(
            f"{name} needs images of {least} x {least} pixels or more, not {shape[2]} x {shape[1]}."
            " Use convnet."
        )


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    """Return a 3 x 3 convolution with batch norm, which makes a bias superfluous."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def convnet(*, classes: int, shape: tuple[int, int, int], width: float = 1.0) -> nn.Module:
    """Return a small network of six convolutions with batch norm.

    At width 1 with 10 classes: 41,326 parameters for RGB images, 41,110 for gray ones, such as
    digits. Height and width are halved twice and then averaged.

    Args:
        classes: number of outputs.
        shape: channels, height and width of an image; 4 x 4 pixels or more.
        width: multiplies the channel counts.

    Raises:
        PlanError: if images are smaller.
    """
    _check_size("convnet", shape, 4)
    layers: list[nn.Module] = []
    inputs = shape[0]
    for stage, count in enumerate((12, 24, 48)):
        outputs = _channels(count, width)
        layers += [nn.MaxPool2d(2)] if stage else []
        layers += [*_block(inputs, outputs), *_block(outputs, outputs)]
        inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers)


def alexnet(*, classes: int, shape: tuple[int, int, int], width: float = 1.0) -> nn.Module:
    """Return AlexNet for small images: five convolutions, three linear layers, no batch norm.

    The first convolution has 3 x 3 pixels and stride 2 instead of 11 x 11 and stride 4. At width
    1 with 10 classes and RGB images: 23,272,266 parameters.

    Args:
        classes: number of outputs.
        shape: channels, height and width of an image; 16 x 16 pixels or more.
        width: multiplies the channel counts.

    Raises:
        PlanError: if images are smaller.
    """
    _check_size("alexnet", shape, 16)
    a, b, c, d = (_channels(count, width) for count in (64, 192, 384, 256))
    hidden = _channels(4096, width)
    network = nn.Sequential(
        nn.Conv2d(shape[0], a, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(a, b, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(b, c, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(c, d, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(d, d, 3, padding=1), nn.ReLU(inplace=True),
        nn.AdaptiveMaxPool2d(2), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(4 * d, hidden), nn.ReLU(inplace=True),
        nn.Dropout(0.5), nn.Linear(hidden, hidden), nn.ReLU(inplace=True),
        nn.Linear(hidden, classes),
    )  # fmt: skip
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            # Without batch norm torch's default start is too small for eight layers: it stays
            # at chance for epochs.
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None  # every layer above has one
            nn.init.zeros_(module.bias)
    return network


def vgg16(*, classes: int, shape: tuple[int, int, int], width: float = 1.0) -> nn.Module:
    """Return VGG16 with batch norm for small images: 13 convolutions and one linear layer.

    At width 1 with 10 classes and RGB images: 14,724,042 parameters.

    Args:
        classes: number of outputs.
        shape: channels, height and width of an image; 32 x 32 pixels or more.
        width: multiplies the channel counts.

    Raises:
        PlanError: if images are smaller.
    """
    _check_size("vgg16", shape, 32)
    layers: list[nn.Module] = []
    inputs = shape[0]
    for count in _VGG16:
        if isinstance(count, str):
            layers.append(nn.MaxPool2d(2))
            continue
        outputs = _channels(count, width)
        layers += _block(inputs, outputs)
        inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers)


class _Patches(nn.Module):
    """An image as a row of embedded patches, each with a learned position added."""

    def __init__(self, channels: int, size: int, count: int, width: int):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, size, stride=size)
        self.position = nn.Parameter(torch.randn(count, width) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(images).flatten(2).transpose(1, 2) + self.position


class _MeanOfPatches(nn.Module):
    def forward(self, patches: Tensor) -> Tensor:
        return patches.mean(1)


def vit(*, classes: int, shape: tuple[int, int, int], width: float = 1.0) -> nn.Module:
    """Return a small vision transformer: four blocks of four heads on patches, no batch norm.

    Patches have 2 x 2 pixels, or 4 x 4 in images of 16 x 16 and more. At width 1 with 10 classes:
    207,946 parameters for RGB images of 32 x 32 pixels, 202,058 for gray ones of 8 x 8.

    Args:
        classes: number of outputs.
        shape: channels, height and width of an image; 4 x 4 pixels or more, a multiple of the
            patch.
        width: multiplies the 64 channels; rounded to a multiple of 4.

    Raises:
        PlanError: if images are smaller, or not a multiple of the patch.
    """
    _check_size("vit", shape, 4)
    channels, height, across = shape
    size = 4 if min(height, across) >= 16 else 2
    if height % size or across % size:
        raise PlanError(
            f"vit cuts images into patches of {size} x {size} pixels, and {across} x {height} is"
            " no multiple of that. Use convnet, or other images (--image-size)."
        )
    wide = 4 * _channels(16, width)
    blocks = [
        nn.TransformerEncoderLayer(
            wide, 4, 4 * wide, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        for _ in range(4)
    ]
    patches = _Patches(channels, size, height // size * (across // size), wide)
    head = [nn.LayerNorm(wide), _MeanOfPatches(), nn.Linear(wide, classes)]
    return nn.Sequential(patches, *blocks, *head)
