"""What a model holds: distinct values, entropy and bytes, read off the weights alone."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _symbols
from ._checkpoint import opened
from ._codebook import distortion_of
from ._html import table
from ._indexed import Indexed, indexed
from ._plan import Plan, unwrapped


@dataclass(frozen=True)
class LayerSummary:
    """One weight of a `Summary`.

    Attributes:
        name: the parameter's name.
        shape: its shape.
        weights: number of weights.
        codebooks: number of codebooks (1, or one per channel or group).
        distinct: most distinct values under one codebook.
        bits_fixed: bits per weight of a fixed-width index.
        bits_entropy: bits per weight of an ideal entropy-coded index.
        distortion: mean squared difference to the reference over its mean square; None without
            a reference.
        bytes_fixed: bytes of the packed indices and the codebooks.
        bytes_entropy: the same with ideally coded indices.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    codebooks: int
    distinct: int
    bits_fixed: float
    bits_entropy: float
    distortion: float | None
    bytes_fixed: int
    bytes_entropy: int


@dataclass(frozen=True)
class Summary:
    """What a model holds; print it as a table, or take `rows()` into a DataFrame.

    Attributes:
        layers: the weights with few distinct values.
        other_bytes: bytes of everything else in the state dict, stored as it is.
        float_bytes: bytes of the state dict with every floating-point tensor in float32.
    """

    layers: tuple[LayerSummary, ...]
    other_bytes: int
    float_bytes: int

    @property
    def weights(self) -> int:
        """Number of weights in `layers`."""
        return sum(row.weights for row in self.layers)

    @property
    def bits_fixed(self) -> float:
        """Bits per weight at fixed width, over all of `layers`."""
        return self._mean([row.bits_fixed for row in self.layers])

    @property
    def bits_entropy(self) -> float:
        """Bits per weight at the entropy of the indices, over all of `layers`."""
        return self._mean([row.bits_entropy for row in self.layers])

    @property
    def bytes_fixed(self) -> int:
        """Bytes of the whole model: packed indices, codebooks and everything else."""
        return self.other_bytes + sum(row.bytes_fixed for row in self.layers)

    @property
    def bytes_entropy(self) -> int:
        """Bytes of the whole model with ideally coded indices: the bound, not a file."""
        return self.other_bytes + sum(row.bytes_entropy for row in self.layers)

    @property
    def ratio(self) -> float:
        """`float_bytes` over `bytes_fixed`."""
        return self.float_bytes / self.bytes_fixed if self.bytes_fixed else math.nan

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict per layer, keyed by the attributes of `LayerSummary`."""
        return [asdict(row) for row in self.layers]

    def __str__(self) -> str:
        """Return the summary as a table."""
        lines = [
            f"{'weight':32} {'shape':>16} {'values':>7} {'fixed':>6} {'entropy':>8}"
            f" {'distortion':>11} {'bytes':>11}"
        ]
        for r in self.layers:
            shape = "x".join(map(str, r.shape))
            distortion = "" if r.distortion is None else f"{r.distortion:.2e}"
            lines.append(
                f"{r.name:32} {shape:>16} {r.distinct:7,} {r.bits_fixed:6.2f}"
                f" {r.bits_entropy:8.3f} {distortion:>11} {r.bytes_fixed:11,}"
            )
        return "\n".join([*lines, *self._totals()])

    def _repr_html_(self) -> str:
        """Return the summary as Jupyter shows it."""
        head = ("weight", "shape", "values", "fixed", "entropy", "distortion", "bytes")
        rows = [
            (
                r.name, "x".join(map(str, r.shape)), f"{r.distinct:,}", f"{r.bits_fixed:.2f}",
                f"{r.bits_entropy:.3f}", "" if r.distortion is None else f"{r.distortion:.2e}",
                f"{r.bytes_fixed:,}",
            )
            for r in self.layers
        ]  # fmt: skip
        return table(head, rows, self._totals())

    def _totals(self) -> list[str]:
        return [
            f"everything else: {self.other_bytes:,} bytes",
            f"whole model: {self.bytes_fixed:,} bytes, {self.ratio:.1f} times smaller than float32;"
            f" {self.weights:,} weights at {self.bits_fixed:.2f} bits fixed,"
            f" {self.bits_entropy:.3f} entropy",
        ]

    def _mean(self, values: list[float]) -> float:
        if not self.weights:
            return math.nan
        total = sum(v * row.weights for v, row in zip(values, self.layers, strict=True))
        return total / self.weights


def summary(
    model: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    reference: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
) -> Summary:
    """Say what a model holds, whoever made its values few.

    A tensor of two or more dimensions counts as clustered where codebook and packed indices take
    less room than the tensor itself. One codebook per tensor is tried, and one per channel or per
    group of neighbouring channels along the first two axes; with a plan, its groups are taken.

    Args:
        model: a module, a state dict, or the path of a fewbits or safetensors file.
        plan: what the weights were clustered by.
        reference: the same before it was clustered, for the distortion.

    Returns:
        The summary; nothing is changed.

    Raises:
        FileError: if a file cannot be read.
    """
    state = _state(model)
    before = _state(reference) if reference is not None else {}
    groups = {p.name: (p.groups, p.axis) for p in plan.selected} if plan else {}
    layers, seen, other, full = [], set(), 0, 0
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        readable = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)
        if readable and tensor.numel():
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if key in seen:
                continue  # tied: stored once
            seen.add(key)
        full += tensor.numel() * 4 if tensor.is_floating_point() else size
        row = None
        if readable and tensor.is_floating_point() and tensor.dim() >= 2 and tensor.numel():
            found = indexed(tensor, groups.get(name))
            row = None if found is None else _layer(name, tensor, found, before.get(name))
        if row is None or (row.bytes_fixed >= size and name not in groups):
            other += size
        else:
            layers.append(row)
    return Summary(tuple(layers), other, full)


def _state(
    model: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str],
) -> Mapping[str, Tensor]:
    if isinstance(model, (str, os.PathLike)):
        with opened(Path(model)) as checkpoint:
            tensors = {row.name: checkpoint.tensor(row.name) for row in checkpoint.stored}
            return tensors | {alias: tensors[name] for alias, name in checkpoint.tied.items()}
    if not isinstance(model, nn.Module):
        return model
    return {k: v for k, v in unwrapped(model).state_dict().items() if isinstance(v, Tensor)}


def _layer(name: str, tensor: Tensor, found: Indexed, before: Tensor | None) -> LayerSummary:
    groups, k = found.codebook.shape
    outer, _, run = found.layout()
    table = np.zeros(groups * k, np.int64)
    which = np.arange(groups, dtype=np.int32)
    maps = np.zeros(outer, np.int32), which, np.zeros(run, np.int32)
    _symbols.histogram(found.indices, maps, (1, groups, 1), table)
    counts = table.reshape(groups, k)
    total = counts.sum(axis=1, keepdims=True)
    there = counts > 0
    share = (counts / total)[there]
    entropy = float((counts[there] * -np.log2(share)).sum())
    books = int(found.sizes.sum()) * tensor.element_size()
    distortion = None
    if before is not None and before.shape == tensor.shape:
        distortion = distortion_of(before.detach(), tensor.detach().to(before))
    return LayerSummary(
        name=name,
        shape=tuple(tensor.shape),
        weights=tensor.numel(),
        codebooks=groups,
        distinct=k,
        bits_fixed=float(found.width),
        bits_entropy=max(entropy, 0.0) / tensor.numel(),
        distortion=distortion,
        bytes_fixed=math.ceil(found.width * tensor.numel() / 8) + books,
        bytes_entropy=math.ceil(entropy / 8) + books,
    )
