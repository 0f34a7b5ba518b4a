"""Files that are whole or not there."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from .._errors import FileError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file by way of a temporary one beside it, so that it is whole or not there.

    Args:
        path: where to; missing folders are made.
        data: the bytes.

    Raises:
        FileError: if it cannot be written; nothing is left behind.
    """
    fill_atomically(path, lambda file: file.write(data))


def fill_atomically(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Write a file as `write_atomically` does, by a function that fills the open file.

    Args:
        path: where to; missing folders are made.
        fill: called with the temporary file, open for writing.

    Raises:
        FileError: if it cannot be written. Whatever is raised, an earlier file stays as it was.
    """
    if path.is_dir():
        raise FileError(f"{path}: is a folder. Give the name of a file.")
    # One name per file: what a kill leaves behind is replaced the next time.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise FileError(
            f"{path}: cannot be written ({error.strerror or error})."
            " Free space or choose another folder."
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power failure, where the system lets folders be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
