"""Draw the figures of the pages into docs/figures.

    OMP_NUM_THREADS=1 python benchmarks/figures.py

`accuracy.svg` is drawn from docs/results/vgg16-short/results.json. `gathering.svg`, which moves,
and `gathering-stages.svg` are drawn from a training that this program does: the README's network on
handwritten digits, seed 0, with the penalty at two bits; a few seconds.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fewbits
from fewbits import schedules
from fewbits.lab.data import batches, load
from fewbits.report import comparison

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
EPOCHS, BATCH, BINS, FRAMES = 20, 64, 90, 40
INK, MUTED, LINE, BACK = "#1f2430", "#5b6270", "#d5d8de", "#ffffff"
COLORS = {"kmeans": "#8a5a00", "penalty-snapped": "#1a5fb4"}
NAMES = {
    "kmeans": "quantized after training (k-means)",
    "penalty-snapped": "trained with fewbits (penalty-snapped)",
}
# Where a point's number stands: beside what else is there.
LABELS = {
    ("kmeans", 1.0): ("start", 14, 5),
    ("kmeans", 2.0): ("start", 12, 20),
    ("kmeans", 4.0): ("middle", 0, 26),
    ("penalty-snapped", 1.0): ("middle", 0, -22),
    ("penalty-snapped", 2.0): ("middle", 0, -16),
    ("penalty-snapped", 4.0): ("middle", 0, -14),
}


@dataclass
class Drawing:
    """An SVG as it is put together, on a white card that is legible on any page.

    Attributes:
        width: in pixels.
        height: in pixels.
        title: what a screen reader says.
        parts: its elements.
    """

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def add(self, element: str) -> None:
        """Add an element."""
        self.parts.append(element)

    def text(
        self, x: float, y: float, words: str, *, anchor: str = "middle", color: str = INK,
        size: int = 14,
    ) -> None:  # fmt: skip
        """Add a text."""
        self.add(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{color}"'
            f' font-size="{size}">{escape(words)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, color: str = LINE) -> None:
        """Add a line."""
        self.add(f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{color}"/>')

    def __str__(self) -> str:
        """Return the file's text."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}"'
            f' width="{self.width}" height="{self.height}" role="img"'
            ' font-family="system-ui, sans-serif">'
        )
        # On a phone the picture is shown at less than half its size.
        style = "<style>@media (max-width: 30rem) { text { font-size: 20px; } }</style>"
        card = f'<rect width="100%" height="100%" rx="8" fill="{BACK}"/>'
        return "\n".join(
            [head, f"<title>{escape(self.title)}</title>", style, card, *self.parts, "</svg>"]
        )


# -- accuracy over bits -----------------------------------------------------------------------


def accuracy(results: dict) -> str:
    """Return the picture of the first page from a data file's content."""
    entries = [e for e in comparison(results["rows"]) if e["method"] in COLORS]
    reference = {row["seed"]: row["float_accuracy"] for row in results["rows"]}
    top = sum(reference.values()) / len(reference)
    drawing = Drawing(
        720, 400,
        "Accuracy of VGG16 on CIFAR-10 over bits per weight. " + "; ".join(
            f"{e['bits_fixed']:g} bits, {e['method']}: {e['accuracy']:.1f}%" for e in entries
        ) + f"; float: {top:.1f}%.",
    )  # fmt: skip
    left, right, low, high = 70, 690, 46.0, 82.0

    def x(bits: float) -> float:
        return left + 60 + (right - left - 120) * (bits - 1) / 3

    def y(percent: float) -> float:
        return 320 - 250 * (percent - low) / (high - low)

    for percent in range(50, 81, 10):
        drawing.line(left, y(percent), right, y(percent))
        drawing.text(left - 8, y(percent) + 5, f"{percent}%", anchor="end", color=MUTED)
    drawing.add(f'<path d="M{left} {y(top):.1f}H{right}" stroke="{INK}" stroke-dasharray="6 4"/>')
    drawing.text(left + 400, y(top) - 8, f"float32: {top:.1f}%")
    for bits in (1, 2, 4):
        drawing.text(x(bits), 344, f"{bits} bit{'s' * (bits > 1)}", color=MUTED)
    for method, color in COLORS.items():
        own = sorted((e for e in entries if e["method"] == method), key=lambda e: e["bits_fixed"])
        points = " ".join(f"{x(e['bits_fixed']):.1f},{y(e['accuracy']):.1f}" for e in own)
        drawing.add(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="3"/>')
        for e in own:
            cx, cy, sd = x(e["bits_fixed"]), y(e["accuracy"]), e["accuracy_sd"] or 0
            span = f"M{cx:.1f} {y(e['accuracy'] - sd):.1f}V{y(e['accuracy'] + sd):.1f}"
            drawing.add(f'<path d="{span}" stroke="{color}" stroke-width="2"/>')
            drawing.add(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="6" fill="{color}"/>')
            anchor, dx, dy = LABELS[method, e["bits_fixed"]]
            drawing.text(cx + dx, cy + dy, f"{e['accuracy']:.1f}%", color=color, anchor=anchor)
    for number, (method, words) in enumerate(NAMES.items()):
        at = 369 + 22 * number
        drawing.add(f'<circle cx="{left + 10}" cy="{at - 5}" r="6" fill="{COLORS[method]}"/>')
        drawing.text(left + 24, at, words, anchor="start")
    drawing.text(
        left,
        30,
        "VGG16 (¼ width) on CIFAR-10: accuracy at few bits per weight",
        anchor="start",
        size=17,
    )
    return str(drawing)


# -- weights that gather ----------------------------------------------------------------------


@dataclass
class Frame:
    """Where a layer's weights are at a step.

    Attributes:
        step: of the optimizer.
        counts: (BINS,) weights in each bin of the range.
        codebook: the representatives.
    """

    step: int
    counts: list[int]
    codebook: list[float]


def training() -> tuple[list[Frame], float]:
    """Train and return the frames and the half-width of their range; the last is hardened."""
    torch.manual_seed(0)
    data = load("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    steps = EPOCHS * (len(data.train_labels) // BATCH + 1)
    ramp = schedules.cubic(0.0, 4.0, start=steps // 6, steps=int(0.75 * steps))
    pull = fewbits.Penalty(ramp)
    clustering = fewbits.Clustering(model, bits=2, pull=pull, snapped_forward=False)
    optimizer = torch.optim.SGD(clustering.param_groups(lr=0.02), momentum=0.9)
    weight = model.get_parameter("1.weight")
    span = float(3.5 * weight.detach().std())
    frames: list[Frame] = []
    step = 0

    def keep() -> None:
        counts = torch.histc(weight.detach(), BINS, -span, span)
        own = [p for name, p in model.named_parameters() if name == "1.weight_codebook"]
        book = own[0] if own else weight.unique()
        frames.append(Frame(step, counts.int().tolist(), book.detach().sort().values.tolist()))

    for epoch in range(EPOCHS):
        generator = torch.Generator().manual_seed(epoch)
        stream = batches(
            data.train_images, data.train_labels, BATCH, normalization=data.normalization,
            generator=generator,
        )  # fmt: skip
        for images, labels in stream:
            if step % (steps // FRAMES) == 0:
                keep()
            loss = cross_entropy(model(images), labels) + clustering.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clustering.step()
            step += 1
    keep()
    clustering.harden()
    keep()
    return frames, span


def silhouette(counts: Sequence[int], left: float, right: float, base: float, top: float) -> str:
    """Return a histogram as a path; the square root of counts, so that a single weight shows."""
    wide, most = (right - left) / len(counts), (sum(counts) / 3) ** 0.5
    path = [f"M{left:g} {base:g}"]
    for number, count in enumerate(counts):
        path.append(
            f"V{base - (base - top) * count**0.5 / most:.0f}H{left + wide * (number + 1):.0f}"
        )
    return "".join(path) + f"V{base:g}Z"


def gathering(frames: list[Frame], span: float) -> str:
    """Return the moving picture: twelve seconds, again and again."""
    drawing = Drawing(
        720, 320,
        "The weights of a layer during training. They begin as one broad heap and end as four"
        " narrow ones, each around a representative that has moved to its place.",
    )  # fmt: skip
    left, right, base, top = 30, 690, 240, 50

    def x(value: float) -> float:
        return left + (right - left) * (value + span) / (2 * span)

    shown = [frames[0]] * 2 + frames + [frames[-1]] * 6  # a rest at both ends
    timing = 'dur="12s" repeatCount="indefinite"'
    shapes = [silhouette(f.counts, left, right, base, top) for f in shown]
    drawing.text(left, 30, "Weights of a layer while it trains, 2 bits", anchor="start", size=17)
    drawing.add(
        f'<path d="{shapes[-1]}" fill="{COLORS["penalty-snapped"]}"><animate attributeName="d"'
        f' {timing} calcMode="discrete" values="{";".join(shapes)}"/></path>'
    )
    drawing.line(left, base, right, base, INK)
    for number in range(len(frames[0].codebook)):
        places = [f"{x(f.codebook[number]):.1f},0" for f in shown]
        drawing.add(
            f'<path d="M0 244l7 14h-14z" fill="#c01c28" transform="translate({places[-1]})">'
            '<animateTransform attributeName="transform" type="translate"'
            f' {timing} calcMode="discrete" values="{";".join(places)}"/></path>'
        )
    done = [f"{(right - left) * f.step / frames[-1].step:.0f}" for f in shown]
    drawing.add(f'<rect x="{left}" y="296" width="{right - left}" height="6" fill="{LINE}"/>')
    drawing.add(
        f'<rect x="{left}" y="296" width="{done[-1]}" height="6" fill="{MUTED}"><animate'
        f' attributeName="width" {timing} calcMode="discrete" values="{";".join(done)}"/></rect>'
    )
    drawing.text(left, 286, "▲ representatives", anchor="start", color="#c01c28")
    drawing.text(right, 286, "time →", anchor="end", color=MUTED)
    return str(drawing)


def stages(frames: list[Frame], span: float) -> str:
    """Return the same as four still pictures."""
    chosen = [frames[0], frames[len(frames) // 3], frames[-2], frames[-1]]
    drawing = Drawing(
        720, 250, "The same layer before, during and after training, and after hardening."
    )
    for number, frame in enumerate(chosen):
        left, right, base = 15 + 176 * number, 175 + 176 * number, 190
        shape = silhouette(frame.counts, left, right, base, 40)
        drawing.add(f'<path d="{shape}" fill="{COLORS["penalty-snapped"]}"/>')
        drawing.line(left, base, right, base, INK)
        for value in frame.codebook:
            at = left + (right - left) * (value + span) / (2 * span)
            drawing.add(f'<path d="M{at:.1f} 193l5 10h-10z" fill="#c01c28"/>')
        words = "hardened" if number == 3 else f"step {frame.step}"
        drawing.text((left + right) / 2, 230, words)
    return str(drawing)


def main() -> None:
    """Draw all."""
    FIGURES.mkdir(exist_ok=True)
    results = json.loads((ROOT / "docs" / "results" / "vgg16-short" / "results.json").read_text())
    torch.set_num_threads(1)
    frames, span = training()
    drawn = {
        "accuracy": accuracy(results),
        "gathering": gathering(frames, span),
        "gathering-stages": stages(frames, span),
    }
    for name, text in drawn.items():
        (FIGURES / f"{name}.svg").write_text(text + "\n")


if __name__ == "__main__":
    main()
