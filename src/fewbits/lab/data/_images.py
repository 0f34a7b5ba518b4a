"""Image data sets in memory, batches of them, and how training images vary."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# Wraps an iterable whose length is known, for a progress bar.
Each = Callable[[Iterable[Any], int], Iterable[Any]]

# Shuffles held-out splits and subsets: data on disk is often sorted by class.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class ImageData:
    """A training and a held-out set of images of one size.

    Attributes:
        name: for people.
        train_images: (N, C, H, W) uint8.
        train_labels: (N,) int64, 0 … number of classes - 1.
        test_images: (M, C, H, W) uint8, held out.
        test_labels: (M,) int64.
        classes: the classes' names.
        flips: whether a mirrored image is as good an example (not so for digits).
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    flips: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> "ImageData":
        """Return the same data on `device`."""
        tensors = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    def subset(self, train: int) -> "ImageData":
        """Return the data with `train` training images at most, always the same ones."""
        if train >= len(self.train_labels):
            return self
        generator = torch.Generator().manual_seed(_SPLIT_SEED)
        chosen = torch.randperm(len(self.train_labels), generator=generator)[:train].sort().values
        chosen = chosen.to(self.train_labels.device)
        return replace(
            self, train_images=self.train_images[chosen], train_labels=self.train_labels[chosen]
        )

    @cached_property
    def normalization(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the training images.

        Two (C,) float32 tensors, in units of the uint8 pixel values. The deviation is 1 where a
        channel is constant.
        """
        pixels = torch.arange(256, dtype=torch.float64)
        rows = []
        for channel in self.train_images.unbind(1):
            # A histogram of bytes is exact and takes no float copy of the images.
            share = (
                torch.bincount(channel.flatten(), minlength=256).double().cpu() / channel.numel()
            )
            mean = (share * pixels).sum()
            variance = (share * (pixels - mean).square()).sum()
            rows.append(torch.stack([mean, variance.sqrt() if variance > 0 else mean.new_ones(())]))
        mean, std = torch.stack(rows).float().unbind(1)
        return mean.to(self.train_images.device), std.to(self.train_images.device)


def hold_out(images: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Choose a held-out set with the same share of every class, always the same one.

    Args:
        images: (N, …).
        labels: (N,) int64.
        share: of each class, 0 … 1; at least one image of a class with two or more.

    Returns:
        Indices of the training and of the held-out images, ascending.
    """
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    held = torch.zeros(len(images), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(share * len(members))) if len(members) > 1 else 0
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


@dataclass(frozen=True)
class Augment:
    """Random shifts and mirror images, for a whole batch at once.

    Attributes:
        padding: shift by up to this many pixels in each direction; what comes in is black.
        flip: mirror half of the images left to right.
    """

    padding: int
    flip: bool

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return varied copies of (B, C, H, W) uint8 images; the CPU generator decides all."""
        count, _, height, width = images.shape
        if self.padding:
            p = self.padding
            shifts = torch.randint(2 * p + 1, (2, count), generator=generator).to(images.device)
            padded = torch.nn.functional.pad(images, [p] * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view of every crop
            every = torch.arange(count, device=images.device)
            images = windows[every, :, shifts[0], shifts[1]]
        if self.flip:
            mirrored = torch.rand(count, generator=generator).to(images.device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images


def default_augment(data: ImageData) -> Augment:
    """Return shifts of an eighth of the image's width, with mirror images where they make sense."""
    return Augment(padding=max(1, data.shape[2] // 8), flip=data.flips)


def batches(
    images: Tensor,
    labels: Tensor,
    size: int,
    *,
    normalization: tuple[Tensor, Tensor],
    generator: torch.Generator | None = None,
    augment: Augment | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalized batches.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        size: images per batch.
        normalization: (C,) mean and standard deviation in pixel values.
        generator: a CPU generator that shuffles and augments; without one, all images in order.
            With one, a last batch of a single image is left out: batch norm cannot train on it.
        augment: how images vary; needs a generator.

    Yields:
        (B, C, H, W) float32 and (B,) int64, on the device of `images`.
    """
    mean, std = (t[:, None, None] for t in normalization)
    if generator is None:
        order = None
        starts = range(0, len(images), size)
    else:
        order = torch.randperm(len(images), generator=generator).to(images.device)
        starts = range(0, len(images) - 1, size)
    for start in starts:
        chosen = slice(start, start + size) if order is None else order[start : start + size]
        part = images[chosen]
        if augment is not None and generator is not None:
            part = augment(part, generator)
        yield (part.float() - mean) / std, labels[chosen]
