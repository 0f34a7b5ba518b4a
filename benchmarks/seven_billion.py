"""Reckon what clustering adds to the training of a transformer of 7 billion parameters on 8 GPUs.

    python benchmarks/seven_billion.py    # write docs/results/seven-billion.md

Nothing of this size was run. Measured are the slopes on a CPU and what a snapped layer keeps for
the backward pass; the rest is arithmetic from inputs that stand in the page.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import fewbits

PAGE = Path(__file__).parents[1] / "docs" / "results" / "seven-billion.md"

# The transformer: layers, width, width between, and words, as in LLaMA 7B (arXiv:2302.13971).
LAYERS, WIDTH, BETWEEN, WORDS = 32, 4096, 11008, 32000
K, PROCESSES = 8, 8
# Of an H100 SXM, by its data sheet, and what a training reaches of it: assumed.
FLOPS, BANDWIDTH = 989e12, 3.35e12
USED_FLOPS, USED_BANDWIDTH = 0.4, 0.5
LINK = 450e9  # bytes a second and direction between GPUs of a machine, by the same data sheet
TOKENS = 16_384  # a GPU and step
# Measured on one thread of an AMD EPYC with AVX2 at K = 16: docs/results/performance.md.
PASSES_NS, KMEANS_NS = 1.15, 0.4270 / 45_088_768 * 1e9
# Bytes of the exchange of a step: docs/guide.md, "FSDP2"; a test of the library counts them.
PER_REPRESENTATIVE, PER_LAYER, PER_GRADIENT = 16, 24, 4


def matrices() -> list[int]:
    """Return the weights in each matrix."""
    block = 4 * [WIDTH * WIDTH] + 3 * [WIDTH * BETWEEN]
    return LAYERS * block + 2 * [WORDS * WIDTH]


def kept_by_snapping() -> float:
    """Measure the bytes a weight that the snapped forward keeps for the backward pass."""
    sizes = []
    for clustered in (False, True):
        model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
        if clustered:
            fewbits.Clustering(model, k=K)
        weights = {p.data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, weights=weights, kept=kept) -> torch.Tensor:
            if tensor.data_ptr() not in weights:
                kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(torch.randn(1, 512, requires_grad=True)).sum()
        sizes.append(sum(kept.values()))
        del loss
    return (sizes[1] - sizes[0]) / (2 * 512 * 512)


@dataclass(frozen=True)
class Reckoning:
    """All numbers of the page.

    Attributes:
        weights: in all matrices.
        count: matrices.
        kept: bytes a float32 weight that the snapped forward keeps.
    """

    weights: int
    count: int
    kept: float

    @property
    def step(self) -> float:
        """Seconds of a step without us: 6 operations a weight and token."""
        return 6 * self.weights * TOKENS / (USED_FLOPS * FLOPS)

    @property
    def sharding_bytes(self) -> float:
        """What a GPU sends in a step of FSDP2: weights twice and gradients once, bfloat16."""
        return 3 * 2 * self.weights * (PROCESSES - 1) / PROCESSES

    @property
    def exchange(self) -> int:
        """Bytes of our all-reduce in a step, without the snapped forward."""
        return self.count * (K * PER_REPRESENTATIVE + PER_LAYER)

    @property
    def gradients(self) -> int:
        """Bytes of the all-reduce of the codebooks' gradients, with the snapped forward."""
        return self.count * K * PER_GRADIENT

    @property
    def penalty(self) -> float:
        """Seconds of the penalty on a GPU's shard: two reads, and a gradient read and written."""
        return self.weights / PROCESSES * 16 / (USED_BANDWIDTH * BANDWIDTH)

    @property
    def snapping(self) -> float:
        """Seconds of the snapped forward on whole bfloat16 weights.

        A read and a write, twice where activations are computed anew; the codebook's gradient
        reads weight and gradient.
        """
        return self.weights * (2 * 4 + 4) / (USED_BANDWIDTH * BANDWIDTH)


def page(found: Reckoning) -> str:
    n, gb = found.weights, 1e9
    shard = n / PROCESSES
    host = 4 * n
    snapped = found.kept / 2 * n
    rows = [
        ("step without clustering", f"{found.step:.2f} s",
         f"6 · {n / 1e9:.2f}·10⁹ weights · {TOKENS:,} tokens a GPU"),
        ("penalty, on each GPU's shard", f"{1e3 * found.penalty:.0f} ms"
         f" ({100 * found.penalty / found.step:.1f}% of the step)",
         "16 bytes a weight: two passes read it, one reads and writes its gradient"),
        ("snapped forward, on whole weights", f"{1e3 * found.snapping:.0f} ms"
         f" ({100 * found.snapping / found.step:.1f}%)",
         "12 bytes a bfloat16 weight: snapped twice, gradient gathered by cluster once"),
        ("the same penalty on one CPU thread", f"{shard * PASSES_NS / 1e9:.1f} s",
         f"{PASSES_NS} ns a weight, measured with 16 values"),
        ("first codebooks, once", f"{n * KMEANS_NS / 1e9:.0f} s",
         f"{KMEANS_NS:.1f} ns a weight on one CPU thread, measured with 16; every process does it"),
        ("state without clustering, a GPU", f"{16 * shard / gb:.1f} GB",
         "16 bytes a weight: float32 weight, gradient and two moments of Adam, an eighth of each"),
        ("our state, a GPU", f"{found.count * K * 4 * 6 / 1e3:.0f} KB",
         f"{found.count} codebooks of {K}: value, gradient, two moments, usage, last look"),
        ("snapped weights until the backward pass, a GPU", f"{snapped / gb:.1f} GB",
         f"{found.kept / 2:.0f} bytes a bfloat16 weight of the whole network, measured on a small"
         " one; of one block with activation checkpointing"),
        ("traffic of FSDP2, a GPU and step", f"{found.sharding_bytes / gb:.0f} GB"
         f" ({1e3 * found.sharding_bytes / LINK:.0f} ms)",
         "bfloat16, weights twice, gradients once"),
        ("our all-reduce a step", f"{found.exchange / 1e3:.0f} KB",
         f"{PER_REPRESENTATIVE} bytes a representative and {PER_LAYER} a matrix"),
        ("with the snapped forward, another", f"{found.gradients / 1e3:.1f} KB",
         f"{PER_GRADIENT} bytes a representative"),
        ("memory of the host while attaching", f"{PROCESSES * host / gb:.0f} GB",
         f"{PROCESSES} processes with all weights in float32; half in bfloat16"),
        ("the matrices when hardened", f"{(n * 3 / 8 + found.count * K * 4) / gb:.2f} GB",
         f"3 bits a weight, against {2 * n / gb:.1f} GB in bfloat16"),
    ]  # fmt: skip
    return "\n".join(
        [
            "# Seven billion parameters on eight GPUs, on paper",
            "",
            f"A transformer of {LAYERS} layers of width {WIDTH}, {found.count} matrices with"
            f" {n:,} weights, all of them clustered at 3 bits with a codebook a matrix; FSDP2 over"
            f" {PROCESSES} GPUs, bfloat16 with float32 masters, AdamW. **None of this was run.**"
            " The slopes marked as measured are of a CPU; the GPUs' are a data sheet's"
            f" ({FLOPS / 1e12:.0f} TFLOP/s, {BANDWIDTH / 1e12:.2f} TB/s, {LINK / 1e9:.0f} GB/s"
            f" between GPUs) at an assumed {USED_FLOPS:.0%} of the arithmetic and"
            f" {USED_BANDWIDTH:.0%} of the bandwidth. Passes over weights are taken to be bound by"
            " memory on a GPU.",
            "",
            "```sh",
            "python benchmarks/seven_billion.py",
            "```",
            "",
            "| what | how much | from |",
            "|---|---:|---|",
            *(f"| {what} | {much} | {source} |" for what, much, source in rows),
            "",
            "Where it would break, in the order in which one would meet it:",
            "",
            "1. **Attaching.** Codebooks are initialized from whole weights before sharding, so"
            " each process holds the network in the host's memory first. Weights on the meta"
            " device have nothing to initialize codebooks from.",
            "2. **The snapped forward's memory.** A layer's snapped weights are a tensor of their"
            " own that the backward pass needs, and FSDP2 does not free it after the layer's"
            " forward pass. Checkpoint activations by block, which snaps again, or use the penalty"
            " or the proximal pull alone.",
            "3. **Three bits with one codebook a matrix.** What it does to a language model of"
            " this size has not been measured. Codebooks a channel multiply exchange and state by"
            f" some {WIDTH:,}: the all-reduce grows to"
            f" {found.exchange * WIDTH / 1e6:.0f} MB, still below a hundredth of FSDP2's traffic.",
            "4. **Many small exchanges.** All matrices with one K share one all-reduce. With a"
            " different K for every matrix there are as many as matrices, each of which waits for"
            " the slowest process.",
        ]
    ) + "\n"  # fmt: skip


def results() -> Reckoning:
    """Return what the page is made of."""
    sizes = matrices()
    return Reckoning(sum(sizes), len(sizes), kept_by_snapping())


def main() -> None:
    PAGE.write_text(page(results()))


if __name__ == "__main__":
    main()
