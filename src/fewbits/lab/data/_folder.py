"""A folder of images sorted by class, or of Parquet files in the Hugging Face image schema."""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..._errors import FewbitsError, FileError, did_you_mean
from ._cifar10 import cache_folder
from ._images import Each, ImageData, hold_out

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_TEST_NAMES = ("test", "validation", "valid", "val", "dev")  # the first that is there is used
_SPLIT_NAME = re.compile(rf"(train|{'|'.join(_TEST_NAMES)})(?![a-z])")
_HELD_OUT = 0.2
# Part of a cached file's name: raise it when decoding changes.
_DECODING = 1


@dataclass(frozen=True)
class _Split:
    """Where the images of one split are, not read yet.

    Attributes:
        places: what to call each image in a message.
        read: returns the encoded bytes of image i.
        labels: one number each, not checked yet.
        files: where all of it comes from.
    """

    places: Sequence[str]
    read: Callable[[int], bytes]
    labels: list[int]
    files: Sequence[Path]


def load_folder(folder: Path, image_size: int = 0, progress: Each | None = None) -> ImageData:
    """Return the images below a folder, decoded once and cached.

    Either Parquet files with a column `img` or `image` (bytes, or a struct with bytes) and a
    column `label`; their names, or those of the folders they are in, begin with "train" and
    "test". Or one folder of images per class, itself in folders "train" and "test" if they exist.
    "validation", "valid", "val" or "dev" will do where there is no "test". Without a held-out
    part a fifth of each class is held out, always the same.

    Args:
        folder: where.
        image_size: scale the shorter side to this and cut out the centre; 0 leaves images alone.
        progress: wraps the loop over images.

    Returns:
        The data. RGB, or one channel where every image is gray.

    Raises:
        FileError: if there is no image, one cannot be read or has another size, or a label is
            out of range; with the file and the row. If nothing can be held out.
    """
    files = sorted(folder.rglob("*.parquet"))
    parts, classes = _parquet(folder, files) if files else _by_class(folder)
    _check_labels(folder, parts, classes)
    decoded = {
        name: _decoded(folder, name, part, image_size, progress) for name, part in parts.items()
    }
    labels = {name: torch.tensor(part.labels, dtype=torch.long) for name, part in parts.items()}
    train, train_labels = decoded["train"], labels["train"]
    if "test" in parts:
        test, test_labels = decoded["test"], labels["test"]
        if train.shape[2:] != test.shape[2:]:
            sizes = [f"{t.shape[3]} x {t.shape[2]}" for t in (train, test)]
            raise FileError(
                f"{folder}: training images are {sizes[0]}, held-out ones {sizes[1]}."
                " Give --image-size."
            )
    else:
        kept, held = hold_out(train, train_labels, _HELD_OUT)
        test, test_labels = train[held], train_labels[held]
        train, train_labels = train[kept], train_labels[kept]
    if not len(test):
        raise FileError(
            f"{folder}: no image can be held out. Give two or more of a class, or a folder test."
        )
    if _gray(train) and _gray(test):
        train, test = train[:, :1].contiguous(), test[:, :1].contiguous()
    return ImageData(folder.resolve().name, train, train_labels, test, test_labels, classes)


def _gray(images: Tensor) -> bool:
    return all(torch.equal(images[:, 0], images[:, c]) for c in (1, 2))


def _check_labels(folder: Path, parts: dict[str, _Split], classes: tuple[str, ...]) -> None:
    for part in parts.values():
        for place, label in zip(part.places, part.labels, strict=True):
            if not 0 <= label < len(classes):
                raise FileError(
                    f"{place}: label {label} is out of range; {folder} has {len(classes)} classes,"
                    f" 0 to {len(classes) - 1}. Correct the row."
                )


# -- folders of classes ---------------------------------------------------------------------------


def _by_class(folder: Path) -> tuple[dict[str, _Split], tuple[str, ...]]:
    inner = {f.name.lower(): f for f in sorted(folder.iterdir()) if f.is_dir()}
    train = inner.get("train", folder)
    test = next((inner[name] for name in _TEST_NAMES if name in inner), None)
    classes = tuple(f.name for f in _class_folders(train))
    if not classes:
        raise FileError(
            f"{folder}: no images. Give a folder of Parquet files, or one with a folder of images"
            f" ({', '.join(sorted(_SUFFIXES))}) per class."
        )
    if train is folder:
        return {"train": _class_split(folder, classes)}, classes
    parts = {"train": _class_split(train, classes)}
    if test is not None:
        for f in _class_folders(test):
            if f.name not in classes:
                near = did_you_mean(f.name, classes)
                raise FileError(f"{f}: no such class among the training images.{near}")
        parts["test"] = _class_split(test, classes)
        if not parts["test"].labels:
            raise FileError(f"{test}: no images. Remove the folder to hold out a fifth of {train}.")
    return parts, classes


def _class_folders(folder: Path) -> list[Path]:
    found = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    return [f for f in found if _images_in(f)]


def _images_in(folder: Path) -> list[Path]:
    found = (f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file())
    return sorted(f for f in found if not f.name.startswith("."))


def _class_split(folder: Path, classes: tuple[str, ...]) -> _Split:
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = _images_in(folder / name) if (folder / name).is_dir() else []
        paths += found
        labels += [label] * len(found)
    return _Split([str(p) for p in paths], lambda i: paths[i].read_bytes(), labels, paths)


# -- Parquet --------------------------------------------------------------------------------------


def _parquet(folder: Path, files: list[Path]) -> tuple[dict[str, _Split], tuple[str, ...]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise FewbitsError("Parquet files need pyarrow: pip install 'fewbits[cli]'") from error
    tables: dict[str, list] = {}
    names: tuple[str, ...] | None = None
    for path, split in _splits(folder, files):
        try:
            schema = pq.read_schema(path)
            image = next((c for c in ("img", "image") if c in schema.names), None)
            if image is None or "label" not in schema.names:
                raise FileError(
                    f"{path}: columns are {', '.join(schema.names)}. It needs img or image, and"
                    " label."
                )
            table = pq.read_table(path, columns=[image, "label"]).rename_columns(["image", "label"])
        except (OSError, pa.ArrowException) as error:
            raise FileError(f"{path}: cannot be read as Parquet ({_first_line(error)}).") from error
        names = names or _label_names(schema.metadata)
        tables.setdefault(split, []).append((path, table))
    parts = {split: _table_split(found) for split, found in tables.items()}
    for split, found in tables.items():
        if not parts[split].labels:
            raise FileError(f"{found[0][0]}: no rows. Remove the file or fill it.")
    if names is None:  # the training labels say; more classes than images would be a mistake
        labels = parts["train"].labels
        count = max(1, min(max(labels) + 1, len(labels)))
        names = tuple(str(label) for label in range(count))
    return parts, names


def _splits(folder: Path, files: list[Path]) -> list[tuple[Path, str]]:
    """Return the files that are used, each with "train" or "test"."""
    named = []
    for path in files:
        words = (path.stem, *reversed(path.relative_to(folder).parts[:-1]))
        found = (match[1] for word in words if (match := _SPLIT_NAME.match(word.lower())))
        named.append((path, next(found, "train")))
    present = {name for _, name in named}
    if "train" not in present:
        raise FileError(f"{folder}: no Parquet file is named train….parquet. Rename one.")
    test = next((name for name in _TEST_NAMES if name in present), "test")
    part = {"train": "train", test: "test"}
    return [(path, part[name]) for path, name in named if name in part]


def _label_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """Return the class names in the schema's Hugging Face metadata, if there are any."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _table_split(found: list) -> _Split:
    places: list[str] = []
    labels: list[int] = []
    cells: list = []
    for path, table in found:
        here = [f"{path}, row {row}" for row in range(len(table))]
        for place, label in zip(here, table["label"].to_pylist(), strict=True):
            if isinstance(label, bool) or not isinstance(label, int):
                raise FileError(f"{place}: label is {label!r}. Give a whole number.")
            labels.append(label)
        places += here
        for chunk in table["image"].chunks:
            cells += [(chunk, row) for row in range(len(chunk))]

    def read(i: int) -> bytes:
        chunk, row = cells[i]
        value = chunk[row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise FileError(f"{places[i]}: holds no image bytes. Embed the images in the file.")
        return value

    return _Split(places, read, labels, [path for path, _ in found])


# -- decoding -------------------------------------------------------------------------------------


def _decoded(
    folder: Path, name: str, part: _Split, image_size: int, progress: Each | None
) -> Tensor:
    """Return (N, 3, H, W) uint8, from the cache where these very files were decoded before."""
    place = hashlib.sha256(f"{folder.resolve()} {name} {image_size}".encode()).hexdigest()[:24]
    cached = cache_folder() / f"images-{_DECODING}-{place}.safetensors"
    stamp = _stamp(part.files)
    try:
        with safe_open(cached, "pt") as file:
            if (file.metadata() or {}).get("stamp") == stamp:
                return file.get_tensor("images")
    except (OSError, SafetensorError):
        pass  # not there yet, or damaged: it is made anew
    images = _decode(part, image_size, progress)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_name(f".{cached.name}.{os.getpid()}.tmp")
        save_file({"images": images}, temporary, metadata={"stamp": stamp})
        os.replace(temporary, cached)
    except (OSError, SafetensorError):
        pass  # a cache that cannot be written costs time, nothing else
    return images


def _stamp(files: Sequence[Path]) -> str:
    """Return text that changes when one of the files does."""
    rows = []
    for path in files:
        stat = path.stat()
        rows.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _decode(part: _Split, image_size: int, progress: Each | None) -> Tensor:
    indices = range(len(part.labels))
    images: Tensor | None = None
    pool = ThreadPoolExecutor()  # decoding releases the interpreter's lock
    try:
        decoded: Iterator[Tensor] = pool.map(lambda i: _decode_one(part, i, image_size), indices)
        rows = progress(decoded, len(indices)) if progress else decoded
        for i, image in enumerate(rows):
            if images is None:
                images = torch.empty((len(indices), *image.shape), dtype=torch.uint8)
            if image.shape != images.shape[1:]:
                sizes = [f"{s[2]} x {s[1]}" for s in (image.shape, images.shape[1:])]
                raise FileError(
                    f"{part.places[i]}: is {sizes[0]} pixels, the first image {sizes[1]}."
                    " Give --image-size to bring all to one size."
                )
            images[i] = image
    finally:  # after an error or Ctrl-C nothing that waits is begun
        pool.shutdown(cancel_futures=True)
    assert images is not None  # the caller refuses an empty split
    return images


def _decode_one(part: _Split, i: int, image_size: int) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(part.read(i))) as file:
            if file.mode.startswith(("I", "F")):  # Pillow would clip them to white
                raise FileError(
                    f"{part.places[i]}: its pixels have more than 8 bits. Convert it to 8."
                )
            image = ImageOps.exif_transpose(file).convert("RGB")
            if image_size:
                image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    except FileError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise FileError(
            f"{part.places[i]}: cannot be read as an image ({_first_line(error)}). Remove it."
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
