"""Files that are whole or not there."""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from .._errors import FileError

# Ends the name of a file that is being written; a kill can leave one behind, beside the target.
TEMPORARY = ".tmp"


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
    check_path(path)
    # A name of its own for every writer: two that write the same file must not mix.
    writer = f"{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{writer}{TEMPORARY}")
    try:
        if path.is_dir():
            raise FileError(f"{path}: is a folder. Give the name of a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
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


def check_path(path: Path) -> None:
    """Refuse what cannot be the name of a file on any system.

    Raises:
        FileError: if it is empty or holds a character that no file name can have.
    """
    try:
        if path.name and b"\0" not in os.fsencode(path):
            return
    except UnicodeEncodeError:
        pass
    raise FileError(f"{str(path)!r} is no name of a file.")


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power failure, where the system lets folders be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
