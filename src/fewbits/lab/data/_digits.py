"""scikit-learn's handwritten digits: 1,797 images of 8 x 8, shipped inside that package."""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from ..._errors import FewbitsError
from ._images import ImageData, hold_out


def load_digits() -> ImageData:
    """Return the digits with a fifth of each class held out.

    Raises:
        FewbitsError: if scikit-learn is not installed.
    """
    table = _table()
    # Pixels are whole numbers 0 … 16: 15 a step keeps them whole and fits a byte.
    images = torch.from_numpy(table[:, :64] * 15).to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.from_numpy(table[:, 64]).long()
    train, test = hold_out(images, labels, share=0.2)
    return ImageData(
        name="digits",
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        classes=tuple(str(digit) for digit in range(10)),
        flips=False,
    )


def _table() -> np.ndarray:
    """Return (1797, 65) pixels and label, read from the package's file without importing it.

    Importing it takes longer than a training on these images.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise FewbitsError("digits needs scikit-learn: pip install 'fewbits[cli]'")
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.exists():
        return np.loadtxt(path, delimiter=",")
    from sklearn import datasets

    pixels, target = datasets.load_digits(return_X_y=True)
    return np.column_stack([pixels, np.asarray(target)])
