"""Convolutions that stay dense in a compressed model, because they are so small."""

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd

# Of the bytes of all packed weights.
MOST_SPARED = 0.01


def is_convolution(layer: nn.Module) -> bool:
    """Whether a layer decodes its weight for each call where it is packed."""
    return isinstance(layer, _ConvNd)


def spared(convolutions: Mapping[str, int], packed: int) -> set[str]:
    """Choose the convolutions that stay dense: the smallest, a hundredth of the bytes at most.

    Decoding a weight takes some calls, however few weights there are. Where they are very few,
    as in the first layer of most networks for images, that is longer than the convolution.

    Args:
        convolutions: the bytes of the dense weight, by name.
        packed: bytes of all packed weights, those of these convolutions included.

    Returns:
        Names.
    """
    chosen, left = set(), MOST_SPARED * packed
    for name in sorted(convolutions, key=lambda name: (convolutions[name], name)):
        left -= convolutions[name]
        if left < 0:
            break
        chosen.add(name)
    return chosen
