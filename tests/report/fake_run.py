"""Writes run folders with invented but plausible results, for the tests of the report."""

import json
import math
import random
from pathlib import Path
from typing import Any

OWN, PEERS = ("penalty", "proximal"), ("kmeans", "uniform", "core-ml")


def fake_row(rng: random.Random, method: str, k: int, seed: int) -> dict[str, Any]:
    loss = {"penalty": 0.3, "proximal": 0.25, "kmeans": 2.0, "uniform": 6.0}.get(method, 1.5)
    drop = loss * (8 / max(k, 2)) ** (2.0 if method in PEERS else 0.8) + rng.gauss(0, 0.1)
    reference = 98.6 + 0.1 * seed
    fixed = max(1, math.ceil(math.log2(k)))
    size = 2100 + 15_000 * fixed // 8
    return {
        "method": method,
        "k": k,
        "seed": seed,
        "float_accuracy": reference,
        "accuracy": max(10.0, reference - drop),
        "drop": reference - max(10.0, reference - drop),
        "hardening_gap": rng.uniform(0, 0.4) if method in OWN else None,
        "bits_fixed": fixed,
        "bits_entropy": math.log2(k) * rng.uniform(0.85, 0.97),
        "bytes": size,
        "ratio": 60_000 / size,
        "seconds": rng.uniform(8, 12) if method in OWN else rng.uniform(0.1, 0.6),
    }


def fake_layer(rng: random.Random, method: str, k: int, name: str) -> dict[str, Any]:
    width, bins, weights = 0.6, 60, 4000
    values = sorted(rng.uniform(-0.5, 0.5) for _ in range(k))
    stages = []
    for stage, spread in (("before", 0.18), ("during", 0.05), ("after", 0.0)):
        counts = [0] * bins
        for _ in range(weights // 4):
            near = rng.choice(values) if stage != "before" else 0.0
            at = (near + rng.gauss(0, spread) + width) / (2 * width) * bins
            counts[min(max(int(at), 0), bins - 1)] += 4
        if stage == "during" and method in PEERS:
            continue
        shown = [] if stage == "before" and method in OWN else values
        stages.append(
            {
                "stage": stage,
                "low": -width,
                "high": width,
                "counts": counts,
                "representatives": shown,
            }
        )
    shares = [rng.uniform(0.2, 1) for _ in values]
    return {
        "method": method,
        "k": k,
        "seed": 0,
        "name": name,
        "shape": [16, 10, 5, 5],
        "weights": weights,
        "stages": stages,
        "usage": [s / sum(shares) for s in shares],
        "distortion": rng.uniform(0.001, 0.02),
        "bits_entropy": math.log2(k) * 0.93,
        "dead": 2 if k == 16 else 0,
        "merged": 1 if k == 16 and method == "proximal" else 0,
    }


def fake_epochs(rng: random.Random, row: dict[str, Any], epochs: int) -> list[dict[str, Any]]:
    job = (
        f"{row['method']}-k{row['k']}-seed{row['seed']}" if row["k"] else f"float-seed{row['seed']}"
    )
    return [
        {
            "job": job,
            "method": row["method"],
            "k": row["k"],
            "seed": row["seed"],
            "epoch": epoch,
            "loss": 2.3 * math.exp(-epoch / 3) + rng.uniform(0.02, 0.05),
            "penalty": 0.1 / epoch,
            "train_accuracy": 100 - 60 * math.exp(-epoch / 2),
            "accuracy": row["accuracy"] - 50 * math.exp(-epoch / 2) + rng.gauss(0, 0.3),
            "hardening_gap": None if row["k"] is None else 20 * math.exp(-epoch / 3),
            "seconds": 0.8,
        }
        for epoch in range(1, epochs + 1)
    ]


def fake_run(
    folder: Path,
    *,
    methods: tuple[str, ...] = (*OWN, *PEERS),
    ks: tuple[int, ...] = (2, 4, 16),
    seeds: int = 3,
    layers: tuple[str, ...] = ("features.0.weight", "features.3.weight", "classifier.weight"),
    epochs: int = 12,
) -> list[dict[str, Any]]:
    """Write the three files of a run and return its rows."""
    rng = random.Random(7)
    rows = [fake_row(rng, m, k, s) for m in methods for k in ks for s in range(seeds)]
    details = {
        "command": "fewbits compare --data digits --model convnet --k 2 --k 4 --k 16",
        "config": {"epochs": epochs, "lr": 0.05, "strength": 0.02, "granularity": "layer"},
        "environment": {"python": "3.11.7", "torch": "2.13.0", "machine": "2 cores"},
        "data": {"name": "digits", "train": 1437, "test": 360, "classes": list("0123456789")},
        "model": {"name": "convnet", "parameters": 15000},
        "float_bytes": 60_000,
        "rows": [r | {"accuracy_before_reestimation": r["accuracy"] - 0.4} for r in rows],
        "layers": [fake_layer(rng, m, k, name) for m in methods for k in ks for name in layers],
    }
    float_rows = [{"method": "float", "k": None, "seed": s, "accuracy": 98.6} for s in range(seeds)]
    trained = [*float_rows, *(r for r in rows if r["method"] in OWN)]
    lines = [line for row in trained for line in fake_epochs(rng, row, epochs)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "details.json").write_text(json.dumps(details))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rows
