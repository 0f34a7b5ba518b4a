"""What an export wrote and how it compared: the frozen result, printed as a table."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ExportedWeight:
    """How one clustered weight was stored.

    Attributes:
        name: the parameter's name.
        shape: its shape.
        k: most distinct values under one codebook.
        codebooks: number of codebooks.
        stored: in words.
        bytes: bytes of its indices and codebooks in the export, or of its dense values.
        packed_bytes: bytes of packed indices of the fewest whole bits, and codebooks.
    """

    name: str
    shape: tuple[int, ...]
    k: int
    codebooks: int
    stored: str
    bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class Exported:
    """What an export wrote; print it as a table, or take `rows()` into a DataFrame.

    Attributes:
        target: "onnx", "openvino", …
        path: the file or folder.
        runtime: the runtime that read and ran it again, with its version.
        bytes: of the file, or of all files in the folder.
        dense_bytes: of the model's state dict as it is.
        weights: the weights of few values, each tensor once.
        examples: how many examples were compared; 0 where the runtime cannot run here.
        difference: largest difference of an output to PyTorch's, over the largest output; None
            where nothing was run.
        agreement: share of examples with the same largest output; None where outputs are not
            one row per example, or nothing was run.
        notes: what else a user should know.
    """

    target: str
    path: Path
    runtime: str
    bytes: int
    dense_bytes: int
    weights: tuple[ExportedWeight, ...]
    examples: int
    difference: float | None
    agreement: float | None
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """`dense_bytes` over `bytes`."""
        return self.dense_bytes / self.bytes

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict per weight, keyed by the attributes of `ExportedWeight`."""
        return [asdict(row) for row in self.weights]

    def __str__(self) -> str:
        """Return the result as a table."""
        lines = [f"{'weight':32} {'shape':>16} {'values':>7} {'bytes':>11}  stored as"]
        for r in self.weights:
            shape = "x".join(map(str, r.shape))
            lines.append(f"{r.name:32} {shape:>16} {r.k:7,} {r.bytes:11,}  {r.stored}")
        lines.append(
            f"{self.path}: {self.bytes:,} bytes, {self.ratio:.1f} times smaller than the"
            f" {self.dense_bytes:,} of the state dict"
        )
        if self.difference is None:
            lines.append(f"read again by {self.runtime}; not run")
        else:
            same = "" if self.agreement is None else f", same top-1 in {self.agreement:.2%}"
            lines.append(
                f"run by {self.runtime} on {self.examples:,} examples: largest difference"
                f" {self.difference:.1e} of the largest output{same}"
            )
        return "\n".join([*lines, *self.notes])
