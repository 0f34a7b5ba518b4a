"""scikit-learn's handwritten digits: 1,797 images of 8 x 8, shipped inside that package."""

import torch

from ..._errors import FewbitsError
from ._images import ImageData, hold_out


def load_digits() -> ImageData:
    """Return the digits with a fifth of each class held out.

    Raises:
        FewbitsError: if scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise FewbitsError("digits needs scikit-learn: pip install 'fewbits[cli]'") from error
    pixels, target = datasets.load_digits(return_X_y=True)
    # Pixels are whole numbers 0 … 16: 15 a step keeps them whole and fits a byte.
    images = torch.from_numpy(pixels * 15).to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.from_numpy(target).long()
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
