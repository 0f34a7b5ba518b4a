"""CIFAR-10 as its authors publish it for C programs: fixed-length records, nothing to execute."""

import hashlib
import http.client
import os
import tarfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch

from ..._errors import FileError
from ._images import Each, ImageData

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_TEST = "test_batch.bin"
_RECORD = 1 + 3 * 32 * 32  # a label, then red, green and blue planes
_CHUNK = 1 << 20


def cache_folder() -> Path:
    """Return where downloads and decoded images are kept: $FEWBITS_CACHE or the user's cache."""
    given = os.environ.get("FEWBITS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbits"


def load_cifar10(progress: Each | None = None) -> ImageData:
    """Return CIFAR-10, downloaded into the cache the first time (170 MB).

    Raises:
        FileError: if it cannot be downloaded or is not what it should be.
    """
    archive = download(URL, SHA256, cache_folder() / "cifar-10-binary.tar.gz", progress)
    return read_archive(archive)


def download(url: str, sha256: str, target: Path, progress: Each | None = None) -> Path:
    """Download a file unless it is there; an interrupted download goes on where it stopped.

    Args:
        url: from where.
        sha256: what its content must hash to, in hexadecimal.
        target: where to; "<target>.part" holds what has arrived so far.
        progress: wraps the loop over chunks of 1 MiB.

    Returns:
        `target`.

    Raises:
        FileError: if the server cannot be reached, the disk is full, or the content is wrong.
    """
    if target.exists():
        return target
    part = target.with_name(target.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, progress)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise FileError(
            f"{url}: cannot be downloaded to {part} ({reason}). What has arrived is kept: run"
            " again to go on, or give --data a folder that has the images."
        ) from error
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        part.unlink()
        raise FileError(
            f"{url}: the download's SHA-256 is {found}, not {sha256}; it was deleted. Run again."
        )
    os.replace(part, target)
    return target


def _fetch(url: str, part: Path, progress: Each | None) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing left to send: the part is whole, its hash decides
            return
        raise
    with response:
        if response.status != 206:  # the server sends it all again
            have = 0
        length = int(response.headers.get("Content-Length") or 0)
        with open(part, "r+b" if have else "wb") as file:
            file.seek(have)
            chunks = iter(lambda: response.read(_CHUNK), b"")
            for chunk in progress(chunks, -(-length // _CHUNK)) if progress else chunks:
                file.write(chunk)
            if file.tell() < have + length:
                raise OSError("the connection ended early")


def read_archive(path: Path) -> ImageData:
    """Return the images in the archive; nothing is unpacked to disk.

    Raises:
        FileError: if it is no such archive or its records are damaged.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            members = {Path(member.name).name: member for member in archive if member.isfile()}
            found = {}
            for name in (*_TRAIN, _TEST):
                file = archive.extractfile(members[name])
                found[name] = file.read() if file else b""
    except (OSError, EOFError, zlib.error, tarfile.TarError, KeyError) as error:
        raise FileError(
            f"{path}: is no CIFAR-10 archive ({error}). Delete it to download it."
        ) from error
    records = {name: _records(path, name, data) for name, data in found.items()}
    train = torch.cat([records[name] for name in _TRAIN])
    parts = [
        (rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()) for rows in (train, records[_TEST])
    ]
    (train_images, train_labels), (test_images, test_labels) = parts
    return ImageData("CIFAR-10", train_images, train_labels, test_images, test_labels, CLASSES)


def _records(path: Path, name: str, data: bytes) -> torch.Tensor:
    if not data or len(data) % _RECORD:
        raise FileError(
            f"{path}: {name} has {len(data):,} bytes, no multiple of {_RECORD:,}. Delete it to"
            " download it."
        )
    rows = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(-1, _RECORD)
    if int(rows[:, 0].max()) >= len(CLASSES):
        raise FileError(
            f"{path}: {name} has the label {int(rows[:, 0].max())}, above 9. Delete it."
        )
    return rows
