"""Small data sets on disk: folders of images, and Parquet files in the Hugging Face schema."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def pixels(seed: int, height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    """(H, W, 3) or (H, W) uint8 noise."""
    shape = (height, width, 3) if channels == 3 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def class_folder(folder: Path, counts: dict[str, int], *, first: int = 0, **size: int) -> None:
    """Write `counts[name]` images per class; image number n of all has the pixels of seed n."""
    number = first
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i:03}.png").write_bytes(png(pixels(number, **size)))
            number += 1


def parquet(
    path: Path,
    images: Sequence[Any],
    labels: Sequence[Any],
    *,
    column: str = "img",
    struct: bool = True,
    names: Sequence[str] | None = None,
) -> None:
    """Write one Parquet file; with `names`, the classes' names stand in the schema's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": image, "path": None} for image in images] if struct else list(images)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    table = pa.table({column: pa.array(cells, kind), "label": pa.array(labels)})
    if names is not None:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}}
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    pq.write_table(table, path)
