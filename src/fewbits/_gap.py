"""What hardening would change, as data."""

from dataclasses import dataclass

import torch

from ._attach import Attached
from ._html import table
from ._kernels import snap

# A weight nearer to its representative than this share of the layer's standard deviation is
# there: the proximal step leaves arrived weights exact, the rest is rounding.
ARRIVED = 1e-6
# Representatives closer than this share of the standard deviation count as merged.
MERGED = 1e-3


@dataclass(frozen=True)
class LayerGap:
    """One layer of a `Gap`.

    Attributes:
        name: the weight's name.
        weights: number of weights.
        moving: how many of them snapping would move.
        distortion: mean squared snap error over mean squared weight.
        usage: share of the weights on each representative, by rising value; all codebooks' one
            after the other.
        dead: representatives nobody uses.
        merged: representatives that (nearly) equal a neighbour.
        unmoved: whether no representative moved between the last two looks, 50 steps apart: it
            gets no gradient, or the optimizer does not have it.
    """

    name: str
    weights: int
    moving: int
    distortion: float
    usage: tuple[float, ...]
    dead: int
    merged: int
    unmoved: bool


@dataclass(frozen=True)
class Gap:
    """What hardening now would move, and the health of the codebooks; print it to read it.

    Attributes:
        layers: one row per clustered weight.
        step: steps taken when it was measured.
    """

    layers: tuple[LayerGap, ...]
    step: int

    @property
    def moving(self) -> float:
        """Share of all clustered weights that snapping would move, 0 … 1."""
        return sum(row.moving for row in self.layers) / sum(row.weights for row in self.layers)

    @property
    def distortion(self) -> float:
        """Distortion averaged over all clustered weights."""
        total = sum(row.weights for row in self.layers)
        return sum(row.distortion * row.weights for row in self.layers) / total

    def __str__(self) -> str:
        """Return the gap as a table."""
        lines = [f"{'weight':32} {'moving':>8} {'distortion':>11} {'dead':>5} {'merged':>7}"]
        for row in self.layers:
            note = "  unmoved" if row.unmoved else ""
            lines.append(
                f"{row.name:32} {row.moving / row.weights:8.1%} {row.distortion:11.2e}"
                f" {row.dead:5} {row.merged:7}{note}"
            )
        lines.append(f"{'all':32} {self.moving:8.1%} {self.distortion:11.2e}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the gap as Jupyter shows it."""
        rows = [
            (
                row.name, f"{row.moving / row.weights:.1%}", f"{row.distortion:.2e}",
                str(row.dead), str(row.merged), "unmoved" if row.unmoved else "",
            )
            for row in self.layers
        ]  # fmt: skip
        rows.append(("all", f"{self.moving:.1%}", f"{self.distortion:.2e}", "", "", ""))
        return table(("weight", "moving", "distortion", "dead", "merged", ""), rows)


def layer_gap(layer: Attached) -> LayerGap:
    """Measure one layer, all of its parts together where it is sharded."""
    codebook, boundaries = layer.rows()[0], layer.boundaries()
    pairs = [(v, snap(v, codebook[rows], boundaries[rows])) for v, rows in layer.parts()]
    std, counts = layer.std(), layer.counts()
    sums = torch.zeros(3, dtype=torch.float64, device=codebook.device)
    for weight, snapped in pairs:
        moving = ((weight - snapped).abs() > ARRIVED * std).sum()
        error = (weight - snapped).double().square().sum()
        sums += torch.stack([moving.double(), error, weight.double().square().sum()])
    moving, error, power = layer.add_up(sums).tolist()
    close = codebook.diff(dim=1) <= MERGED * std.to(codebook)
    return LayerGap(
        name=layer.name,
        weights=layer.weight.numel(),
        moving=int(moving),
        distortion=error / power if power > 0 else 0.0,
        usage=tuple((counts / counts.sum()).flatten().tolist()),
        dead=int((counts == 0).sum()),
        merged=int(close.sum()),
        unmoved=layer.unmoved,
    )
