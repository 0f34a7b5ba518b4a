"""Weights sharded by FSDP2 (`fully_shard`): what each process holds, and sums over all of them.

Processes exchange sums by cluster and counts, never weights. Codebooks stay whole on every process:
they are kept out of sharding by `ignored_params`, and since all processes do the same with the same
sums they stay equal.
"""

import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._errors import PlanError
from ._kernels import Measures, Weights, measure_all, move_all, pull_all


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def show_shards(model: nn.Module) -> None:
    """In place: make every FSDP2 module of a model hold its shards, not whole weights."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def check_sharding(name: str, weight: Any, groups: int, axis: int) -> None:
    """Raise a `PlanError` where a sharded weight is laid out in a way that is not supported.

    Args:
        name: of the weight.
        weight: a DTensor.
        groups: G of its codebooks.
        axis: its channel axis.
    """
    from torch.distributed.tensor import Replicate, Shard

    split = [p for p in weight.placements if not isinstance(p, Replicate)]
    # Exactly this class: its children interleave what they cut.
    if len(split) > 1 or any(type(p) is not Shard for p in split):
        raise PlanError(
            f"{name}: sharded as {tuple(weight.placements)}. Clustering needs at most one Shard,"
            " the rest Replicate, as fully_shard makes it on meshes of one or two dimensions."
        )
    if not local(weight).is_contiguous():
        raise PlanError(f"{name}: its shard is not contiguous. Shard contiguous weights.")
    if groups > 1 and axis != 0:
        raise PlanError(
            f"{name}: codebooks along axis {axis} of a sharded weight are not supported."
            " Plan it with granularity='layer'."
        )


def local(weight: Any) -> Tensor:
    """Return this process's part of a DTensor, sharing its memory."""
    return weight.detach().to_local()


def parts(weight: Any, groups: int) -> list[tuple[Tensor, slice]]:
    """Return what this process holds of a weight with codebooks along its first axis.

    A shard may begin or end within a group of rows: then that group's rows are a part of their
    own.

    Args:
        weight: a DTensor that passed `check_sharding`.
        groups: G.

    Returns:
        (g, n) views and the groups that their rows belong to, in order; together the shard.
    """
    own = local(weight)
    dim, index, count = _shard_of(weight)
    if groups == 1 or dim != 0:
        return [(own.reshape(groups, own.numel() // groups), slice(0, groups))]
    height = weight.shape[0] // groups
    first = min(weight.shape[0], index * -(-weight.shape[0] // count))
    last = first + len(own)
    cuts = sorted({first, last, *_clamp(first, last, height)})
    return [
        (
            own[a - first : b - first].reshape(max(1, (b - a) // height), -1),
            slice(a // height, a // height + max(1, (b - a) // height)),
        )
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]


def _clamp(first: int, last: int, height: int) -> list[int]:
    """Return where whole groups begin and end between two rows, if there are any."""
    begin, end = -(-first // height) * height, last // height * height
    # Within one group there is nothing to cut, but at one boundary there may be two parts.
    return [begin, end] if begin <= end else []


def _shard_of(weight: Any) -> tuple[int | None, int, int]:
    """Return the dimension that is cut, which shard this is, and of how many."""
    for axis, placement in enumerate(weight.placements):
        if placement.is_shard():
            mesh = weight.device_mesh
            return placement.dim, mesh.get_local_rank(axis), mesh.size(axis)
    return None, 0, 1


def process_group(weight: Any) -> Any:
    """Return the processes over which a DTensor is cut; None where each holds all of it."""
    for axis, placement in enumerate(weight.placements):
        if placement.is_shard():
            return weight.device_mesh.get_group(axis)
    return None


def all_processes(weight: Any) -> list[Any]:
    """Return the groups that together are all processes of a DTensor's mesh."""
    mesh = weight.device_mesh
    return [mesh.get_group(axis) for axis in range(mesh.ndim)]


def add_up(
    tensors: Sequence[Tensor], group: Any, how: Literal["sum", "max"] = "sum"
) -> list[Tensor]:
    """Return the tensors' sums over all processes, by one exchange.

    Args:
        tensors: of one type and device, of the same shapes on every process.
        group: the processes; None leaves the tensors as they are.
        how: "max" for the largest instead.
    """
    if group is None:
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist = torch.distributed
    dist.all_reduce(flat, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group=group)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]


class Sharding:
    """Where the parts of L sharded weights belong among the R rows of their codebooks."""

    def __init__(self, weights: Sequence[Any], groups: Sequence[int]):
        self.weights, self.groups = list(weights), list(groups)
        self.group = process_group(weights[0])
        self.everyone = all_processes(weights[0])
        device = weights[0].device
        layers, rows, first = [], [], 0
        for i, (weight, count) in enumerate(zip(weights, groups, strict=True)):
            for _, own in parts(weight, count):
                layers.append(i)
                rows.append(torch.arange(first + own.start, first + own.stop))
            first += count
        self.layer_of = torch.tensor(layers, dtype=torch.long, device=device)
        self.row_of = torch.cat([torch.zeros(0, dtype=torch.long), *rows]).to(device)
        firsts = torch.tensor([0, *groups[:-1]], device=device).cumsum(0)
        self._first, self._rows = firsts, first

    def views(self, tensors: Sequence[Any] | None = None) -> Weights:
        """Return the parts of the weights, or of what is sharded as they are."""
        tensors = self.weights if tensors is None else tensors
        pairs = zip(tensors, self.groups, strict=True)
        return Weights(view for tensor, count in pairs for view, _ in parts(tensor, count))

    def measure(self, codebook: Tensor, power: int) -> Measures:
        """Return what `measure_all` gives for the whole weights; one exchange.

        Args:
            codebook: (R, K) ascending.
            power: 1 or 2.
        """
        views, own = self.views(), codebook[self.row_of]
        totals, spreads, counts, sums = measure_all(views, own, None, power)
        sizes = totals.new_tensor([view.numel() for view in views])
        if power == 2:
            of_row = (own * counts + sums).sum(1)
            rows = sizes.new_tensor([len(view) for view in views]).long()
            part = torch.arange(len(views), device=rows.device).repeat_interleave(rows)
            sum_of = torch.zeros_like(sizes).index_add_(0, part, of_row)
        else:
            sum_of = torch.stack([v.sum(dtype=torch.float64) for v in views] or [sizes.sum()])
            sum_of = sum_of[: len(views)]
        # Around a number that all processes know, and near the weights, so that little cancels.
        shift = codebook[self._first, (codebook.shape[1] - 1) // 2].double()
        moved = sum_of - sizes * shift[self.layer_of]
        squares = spreads + moved.square() / sizes.clamp(min=1)
        by_layer = [self._by_layer(some) for some in (totals, moved, squares)]
        totals, moved, squares, counts, sums = add_up(
            [*by_layer, self._by_row(counts), self._by_row(sums)], self.group
        )
        size = totals.new_tensor([weight.numel() for weight in self.weights])
        spreads = squares - moved.square() / size.clamp(min=1)
        # Of equal weights a rounding error is left, 1e-16 of the squares.
        return totals, spreads.masked_fill(spreads < 1e-13 * squares, 0.0), counts, sums

    def move(self, codebook: Tensor, power: int, amounts: Tensor) -> tuple[Tensor, Tensor]:
        """In place: as `move_all` for the whole weights; one exchange."""
        own = codebook[self.row_of]
        counts, left = move_all(self.views(), own, None, power, amounts[self.layer_of])
        counts, left = add_up([self._by_row(counts), self._by_row(left)], self.group)
        return counts, left

    def pull(self, codebook: Tensor, power: int, factors: Tensor) -> None:
        """In place: add the penalty's gradient to the weights' `.grad`."""
        for weight in self.weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        outs = self.views([weight.grad for weight in self.weights])
        own = codebook[self.row_of]
        pull_all(outs, self.views(), own, None, power, factors[self.layer_of])

    def _by_layer(self, values: Tensor) -> Tensor:
        return values.new_zeros(len(self.weights)).index_add_(0, self.layer_of, values)

    def _by_row(self, values: Tensor) -> Tensor:
        return values.new_zeros(self._rows, values.shape[1]).index_add_(0, self.row_of, values)


def mean_gradients(parameters: Sequence[nn.Parameter], groups: Sequence[Any]) -> None:
    """In place: replace gradients by their means over all processes, by one exchange a group."""
    found = [p.grad for p in parameters if p.grad is not None]
    for group in groups if found else ():
        size = torch.distributed.get_world_size(group)
        for gradient, total in zip(found, add_up(found, group), strict=True):
            gradient.copy_(total / size)
