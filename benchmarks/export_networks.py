"""The hardened networks that export.py and runtimes.py read, trained briefly; K = 16, seed 0.

    python benchmarks/export_networks.py --cifar10 FOLDER    # a folder with CIFAR-10 as Parquet

Writes runs/export/NAME/torch.pt, the module, and images.pt, 1,000 images and their labels.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fewbits
from fewbits.lab import data as lab_data
from fewbits.lab.models import build

K = 16
CHECKED = 1000
FOLDER = Path("runs/export")


class Transformer(nn.Module):
    """Rows of pixels as words of a transformer encoder."""

    def __init__(self, row: int, classes: int, width: int = 256):
        super().__init__()
        self.words = nn.Linear(row, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(images.permute(0, 2, 1, 3).flatten(2))).mean(1))


# Name: data, steps, and the network for images of a shape.
NETWORKS: dict[str, tuple[str, int, Callable[[tuple[int, int, int]], nn.Module]]] = {
    "convnet": ("digits", 100, lambda shape: build("convnet", classes=10, shape=shape)),
    "transformer": ("digits", 30, lambda shape: Transformer(shape[-1], 10)),
    "resnet18": (
        "cifar10", 60, lambda shape: build("torchvision:resnet18", classes=10, shape=shape)
    ),
    "vgg16": ("cifar10", 10, lambda shape: build("vgg16", classes=10, shape=shape)),
}  # fmt: skip


def trained(model: nn.Module, data: lab_data.ImageData, steps: int) -> nn.Module:
    """Cluster and train a network for some steps, and harden it."""
    clustering = fewbits.Clustering(model, k=K)
    optimizer = torch.optim.SGD(clustering.param_groups(lr=0.02), momentum=0.9)
    done = 0
    while done < steps:
        generator = torch.Generator().manual_seed(done)
        for images, labels in lab_data.batches(
            data.train_images, data.train_labels, 64, normalization=data.normalization,
            generator=generator,
        ):  # fmt: skip
            loss = nn.functional.cross_entropy(model(images), labels) + clustering.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clustering.step()
            done += 1
            if done == steps:
                break
    clustering.harden()
    return model.eval()


def checked(data: lab_data.ImageData) -> tuple[Tensor, Tensor]:
    """The images that are compared, as a network sees them, and their labels.

    The first held-out ones; where fewer are held out, some that it was trained on make up the rest.
    """
    mean, std = (t[:, None, None] for t in data.normalization)
    images = torch.cat([data.test_images[:CHECKED], data.train_images[:CHECKED]])[:CHECKED]
    labels = torch.cat([data.test_labels[:CHECKED], data.train_labels[:CHECKED]])[:CHECKED]
    return (images.float() - mean) / std, labels


def read(name: str, folder: Path = FOLDER) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, its images and labels."""
    at = folder / name
    if not at.exists():
        raise SystemExit(f"{at} is not there: run benchmarks/export_networks.py first")
    model = torch.load(at / "torch.pt", weights_only=False)
    return model, *torch.load(at / "images.pt")


def main() -> None:
    """Train the networks and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cifar10", default="cifar10", help="data of resnet18 and vgg16")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="which ones")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    for name in options.networks:
        source, steps, make = NETWORKS[name]
        data = lab_data.load(options.cifar10 if source == "cifar10" else source)
        torch.manual_seed(0)
        model = trained(make(data.shape), data, steps)
        images, labels = checked(data)
        with torch.no_grad():
            outputs = torch.cat([model(part) for part in images.split(100)])
        accuracy = float((outputs.argmax(1) == labels).double().mean())
        (options.out / name).mkdir(parents=True, exist_ok=True)
        torch.save(model, options.out / name / "torch.pt")
        torch.save((images, labels), options.out / name / "images.pt")
        print(f"{name}: {accuracy:.1%} of {len(labels):,} images right", flush=True)


if __name__ == "__main__":
    # Under the name that others import it by, so that the saved networks are found again.
    import export_networks

    export_networks.main()
