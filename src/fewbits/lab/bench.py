"""What the pull costs on this machine: steps in turn, passes over the weights, attaching.

Times on a shared machine wander, so whatever is compared is measured in turn, in pairs; a figure
is the median of the ratios within pairs, with the quartiles. On one thread, seconds are the
processor's.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .._clustering import Clustering
from .._codebook import initial_codebook
from .._errors import FewbitsError
from .._kernels import COMPILED, kernels, midpoints, snap_all, sums_all
from .._plan import plan as make_plan
from .._pull import Proximal
from .methods import METHODS, Recipe
from .models import build
from .peers import Peer

Row = dict[str, Any]

VARIANTS: dict[str, Callable[[nn.Module, int], Clustering]] = {
    "penalty": lambda model, k: Clustering(model, k=k, snapped_forward=False),
    "penalty, snapped forward": lambda model, k: Clustering(model, k=k),
    "proximal": lambda model, k: Clustering(model, k=k, pull=Proximal(), snapped_forward=False),
}


PEERS = {"parq": "torchao", "dkm": "coremltools", "lsq": "plain torch"}


class Stepper:
    """A network with its optimizer, and perhaps what clusters it, that takes one step at a time."""

    def __init__(self, model: nn.Module, clustering: Clustering | Peer | None):
        """Take SGD with momentum for the model's parameters and the codebooks."""
        self.model: nn.Module = model
        self.clustering: Clustering | Peer | None = clustering
        groups: Any = model.parameters()
        if clustering:
            groups = clustering.param_groups(lr=0.01, weight_decay=0.0)
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        self.optimizer: torch.optim.Optimizer = (
            clustering.wrapped(optimizer) if isinstance(clustering, Peer) else optimizer
        )

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Take a training step."""
        loss = cross_entropy(self.model(images), labels)
        if self.clustering:
            loss = loss + self.clustering.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.clustering:
            self.clustering.step()


def _seconds(work: Callable[[], object]) -> float:
    # On one thread the processor's seconds, in which other programs have no part.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    work()
    return clock() - began


def in_turn(one: Callable[[], object], other: Callable[[], object], pairs: int) -> Row:
    """Return the median ratio of the second to the first, quartiles, and the median seconds."""
    for work in (one, other):
        work()  # the first time allocates
    times = [(_seconds(one), _seconds(other)) for _ in range(pairs)]
    low, ratio, high = statistics.quantiles([b / a for a, b in times], n=4, method="inclusive")
    return {
        "ratio": ratio,
        "low": low,
        "high": high,
        "seconds": statistics.median(b for _, b in times),
    }


def _task(model: str, batch: int, width: float) -> tuple[Callable[[], nn.Module], Tensor, Tensor]:
    """Return what builds the network, always the same, with random 32 x 32 images and labels."""

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return build(model, classes=10, shape=(3, 32, 32), width=width)

    return fresh, torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


def steps(
    model: str, batch: int, sizes: Iterable[int], pairs: int, width: float = 1.0
) -> list[Row]:
    """Measure training steps with clustering over plain ones, on random 32 x 32 images.

    Args:
        model: a network by name.
        batch: images in a step.
        sizes: the numbers of values K.
        pairs: how many pairs of steps; at least 2.
        width: multiplies the channel counts.

    Returns:
        a row for each variant and K: what, k, ratio, low, high, seconds.
    """
    fresh, images, labels = _task(model, batch, width)
    return _variants(fresh, images, labels, sizes, pairs, _about(model, batch, width))


def _about(model: str, batch: int, width: float) -> str:
    return f"{model}{'' if width == 1 else f' at width {width:g}'}, batch {batch}"


def many_layers(batch: int, sizes: Iterable[int], pairs: int) -> list[Row]:
    """Measure steps of a network of 150 linear layers of 64 x 64, as `steps` does of one.

    Args:
        batch: inputs in a step.
        sizes: the numbers of values K.
        pairs: how many pairs of steps; at least 2.

    Returns:
        rows as those of `steps`.
    """

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(150)))

    inputs, labels = torch.randn(batch, 64), torch.randint(64, (batch,))
    return _variants(fresh, inputs, labels, sizes, pairs, f"150 layers, batch {batch}")


def _variants(
    fresh: Callable[[], nn.Module],
    inputs: Tensor,
    labels: Tensor,
    sizes: Iterable[int],
    pairs: int,
    what: str,
) -> list[Row]:
    plain = Stepper(fresh(), None)
    rows = []
    for name, attach in VARIANTS.items():
        for k in sizes:
            network = fresh()
            clustered = Stepper(network, attach(network, k))
            figures = in_turn(
                lambda: plain.step(inputs, labels),
                lambda clustered=clustered: clustered.step(inputs, labels),
                pairs,
            )
            rows.append({"what": f"{name}, {what}", "k": k, **figures})
    return rows


def peers(
    model: str,
    batch: int,
    k: int,
    pairs: int,
    width: float = 1.0,
    names: Iterable[str] = PEERS,
) -> list[Row]:
    """Measure training steps with the methods of others, and with ours, over plain ones.

    Args:
        model: a network by name.
        batch: images in a step.
        k: number of values, a power of two.
        pairs: how many pairs of steps; at least 2.
        width: multiplies the channel counts.
        names: of peers, from `PEERS`; one whose package is not installed has a row that says so.

    Returns:
        a row for each: what, k, ratio, low, high, seconds, first (seconds of the first step).
    """
    fresh, images, labels = _task(model, batch, width)
    plain = Stepper(fresh(), None)
    rows = []
    for name in ("penalty", *names):
        network = fresh()
        plan = make_plan(network, k=k)
        where = f" ({PEERS[name]})" if name in PEERS else ""
        about: Row = {"what": f"{name}{where}, {_about(model, batch, width)}", "k": k}
        try:
            METHODS[name].check(plan)
            attach = METHODS[name].attach
            assert attach is not None  # all of these train
            # Long enough that a schedule is always at its beginning; torchao's does its work then.
            stepper = Stepper(network, attach(network, Recipe(plan, 10_000)))
        except FewbitsError as error:
            rows.append(about | {"what": f"{about['what']}: {error}"})
            continue
        first = _seconds(lambda stepper=stepper: stepper.step(images, labels))
        figures = in_turn(
            lambda: plain.step(images, labels),
            lambda stepper=stepper: stepper.step(images, labels),
            pairs,
        )
        rows.append(about | figures | {"first": first})
    return rows


def naive_penalty(weight: Tensor, gradient: Tensor, codebook: Tensor) -> None:
    """Search, gather, add and scatter, as one writes it in plain torch without thinking of passes.

    Args:
        weight: (1, n).
        gradient: (1, n), to which the penalty's gradient is added.
        codebook: (1, K) ascending.
    """
    middle = (codebook[0, 1:] + codebook[0, :-1]) / 2
    indices = torch.bucketize(weight, middle)
    distance = weight - codebook[0][indices]
    distance.square().mean()
    torch.zeros_like(codebook[0]).scatter_add_(0, indices[0], distance[0])
    torch.bincount(indices[0], minlength=codebook.shape[1])
    gradient += distance * 1e-9


def passes(weights: int, sizes: Iterable[int], pairs: int) -> list[Row]:
    """Measure the penalty's value, sums and gradient over one read and write of the tensor.

    The write is in place, which is the cheapest there is: the first row has what it takes to read
    one tensor and write another.

    Args:
        weights: how many, float32.
        sizes: the numbers of values K.
        pairs: how many pairs; at least 2.

    Returns:
        a row for copying, and one for each backend and K: what, k, ratio to a read and write, low,
        high, seconds, ns (nanoseconds a weight).
    """
    torch.manual_seed(0)
    weight, gradient = torch.randn(1, weights) * 0.05, torch.zeros(1, weights)
    factor = torch.tensor([1e-9], dtype=torch.float64)
    copied = torch.zeros_like(weight)
    codebooks = {k: initial_codebook(weight, k, "quantile") for k in sizes}

    def penalty(backend: Any, codebook: Tensor) -> None:
        backend.measure_all([weight], codebook, None, 2)
        backend.pull_all([gradient], [weight], codebook, None, 2, factor)

    works: list[tuple[Row, Callable[[], object]]] = [
        ({"what": "copying"}, lambda: copied.copy_(weight))
    ]
    for name, backend in kernels().items():
        for k, codebook in codebooks.items():
            works.append(
                ({"what": f"penalty, {name}", "k": k}, partial(penalty, backend, codebook))
            )
    for k, codebook in codebooks.items():
        about = {"what": "penalty, bucketize and scatter", "k": k}
        works.append((about, partial(naive_penalty, weight, gradient, codebook)))
    return _over_one_pass(gradient, works, pairs)


def snapped(weights: int, sizes: Iterable[int], pairs: int) -> list[Row]:
    """Measure the passes of the snapped forward over one read and write of the tensor.

    Args:
        weights: how many, float32.
        sizes: the numbers of values K.
        pairs: how many pairs; at least 2.

    Returns:
        two rows for each K, for snapping weights and for summing their gradients by cluster, as
        those of `passes`.
    """
    torch.manual_seed(0)
    weight, gradient = torch.randn(1, weights) * 0.05, torch.randn(1, weights)
    out = torch.zeros_like(weight)
    works: list[tuple[Row, Callable[[], object]]] = []
    for k in sizes:
        codebook = initial_codebook(weight, k, "quantile")
        boundaries = midpoints(codebook)
        snapping = partial(snap_all, [out], [weight], codebook, boundaries)
        sums = partial(sums_all, [gradient], [weight], boundaries)
        works.append(({"what": "snapping", "k": k}, snapping))
        works.append(({"what": "sums of gradients", "k": k}, sums))
    return _over_one_pass(gradient, works, pairs)


def _over_one_pass(
    tensor: Tensor, works: Iterable[tuple[Row, Callable[[], object]]], pairs: int
) -> list[Row]:
    """Measure works over reading and writing a tensor once, in place; see `passes`."""

    def once() -> None:
        tensor.mul_(0.5)

    rows = [about | in_turn(once, work, pairs) for about, work in works]
    return [row | {"ns": row["seconds"] / tensor.numel() * 1e9} for row in rows]


def attaching(weights: int, sizes: Iterable[int]) -> list[Row]:
    """Measure initial codebooks by k-means.

    Args:
        weights: how many, float32.
        sizes: the numbers of values K.

    Returns:
        a row for each K: what, k, seconds.
    """
    torch.manual_seed(0)
    weight = torch.randn(1, weights)
    return [
        {
            "what": f"k-means of {weights:,} weights",
            "k": k,
            "seconds": _seconds(lambda k=k: initial_codebook(weight, k, "kmeans")),
        }
        for k in sizes
    ]


def environment() -> Row:
    """Return what the figures depend on: threads, versions, and whether kernels are compiled."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compiled": COMPILED,
    }


def markdown(rows: Iterable[Row]) -> str:
    """Return rows as a Markdown table; a column that no row fills is left out."""
    rows = list(rows)
    columns = {
        "what": ("", "{}"),
        "k": ("K", "{}"),
        "ratio": ("ratio", "{:.3f}"),
        "low": ("lower quartile", "{:.3f}"),
        "high": ("upper quartile", "{:.3f}"),
        "seconds": ("seconds", "{:.4f}"),
        "ns": ("ns a weight", "{:.2f}"),
        "first": ("first step, seconds", "{:.2f}"),
    }
    columns = {c: head for c, head in columns.items() if any(c in row for row in rows)}
    lines = [
        "| " + " | ".join(head for head, _ in columns.values()) + " |",
        "|" + "|".join("---" if c == "what" else "---:" for c in columns) + "|",
    ]
    for row in rows:
        cells = [form.format(row[c]) if c in row else "" for c, (_, form) in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
