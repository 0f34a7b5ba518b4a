"""Images as one uint8 tensor in memory, from the package, a download or a folder."""

from pathlib import Path

from ..._errors import FileError
from ._cifar10 import load_cifar10
from ._digits import load_digits
from ._folder import load_folder
from ._images import Augment as Augment
from ._images import Each
from ._images import ImageData as ImageData
from ._images import batches as batches
from ._images import default_augment as default_augment


def load(name: str, *, image_size: int = 0, progress: Each | None = None) -> ImageData:
    """Load "digits", "cifar10", or a folder of images or Parquet files.

    Args:
        name: which.
        image_size: for a folder whose images differ in size: scale the shorter side to this many
            pixels and cut out the centre; 0 takes images as they are.
        progress: wraps long loops, for a progress bar.

    Returns:
        The images, on the CPU.

    Raises:
        FileError: if there is no such data, or it cannot be read.
    """
    if name == "digits":
        return load_digits()
    if name == "cifar10":
        return load_cifar10(progress)
    folder = Path(name)
    if not folder.is_dir():
        raise FileError(f"{name}: no such data. Give digits, cifar10, or a folder that exists.")
    return load_folder(folder, image_size, progress)
