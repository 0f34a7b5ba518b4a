"""Several methods, numbers of values and seeds, from one float training per seed."""

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import _processes
from .._allocate import allocate, planned_bytes
from .._errors import PlanError
from .._file import save
from .._finetune import finetune_codebooks
from .._plan import Plan
from .._plan import plan as make_plan
from .._quantize import quantize
from .._summary import summary
from ._floats import Floats
from ._folder import sweep, write_json
from ._jobs import Jobs
from ._layers import Stage, describe, histograms
from ._shard import check as check_shard
from .config import Config
from .data import Augment, ImageData, default_augment
from .methods import METHODS, Method, Recipe
from .models import parameter_count
from .progress import Progress
from .training import (
    accuracy,
    reestimate,
    reestimated_accuracy,
    steps_per_epoch,
    training_batches,
)

# The keys of a row, in order: what `--json` prints and rows.json holds, nothing else.
ROW_KEYS = (
    "method", "k", "seed", "float_accuracy", "accuracy", "drop", "hardening_gap", "bits_fixed",
    "bits_entropy", "bytes", "ratio", "file_bytes", "seconds",
)  # fmt: skip

# Training images on which each layer's sensitivity is measured.
ALLOCATION_IMAGES = 1024

# Step of codebook fine-tuning, in standard deviations of the weight, falling along a cosine.
FINETUNE_STEP = 2e-3


@dataclass
class _Outcome:
    """A method's network, measured: what a row and the report are made of."""

    model: nn.Module
    plan: Plan
    unsnapped: dict[str, Tensor]  # the weights before they were snapped, for the distortion
    stages: dict[str, dict[str, Stage]]
    history: list[dict[str, Any]] = field(default_factory=list)
    accuracy_before_hardening: float | None = None
    accuracy_before_reestimation: float = math.nan
    seconds: float = 0.0


@dataclass
class Comparison:
    """A comparison in its folder; a job that is finished there is not done again.

    Attributes:
        config: what to do.
        folder: where; made by the caller.
        data: the images, on the device to train on.
        device: that device.
        progress: told what happens.
        floats: where float networks lie, as `Floats` takes it; in the run's folder if not given.
        shard: whether each of several processes holds a part of every weight only.
    """

    config: Config
    folder: Path
    data: ImageData
    device: torch.device
    progress: Progress
    floats: Callable[[Config, bool], Path] | None = None
    shard: bool = False

    def __post_init__(self) -> None:
        """Take the subset that the config asks for."""
        if self.config.train_images:
            self.data = self.data.subset(train=self.config.train_images)
        self.augment: Augment = default_augment(self.data)
        self.jobs: Jobs = Jobs(self.folder, self.progress)
        self.float: Floats = Floats(
            self.config, self.data, self.augment, self.device, self.jobs, self.floats, self.shard
        )

    def check(self) -> None:
        """Refuse a model or a rule that cannot be, before any training and any file.

        Raises:
            PlanError: with the reason; in every process, if one has another config or other data.
            FewbitsError: if a method's package is not installed.
        """
        labels = (self.data.train_labels, self.data.test_labels)
        about = {"data": [[len(some), int(some.sum())] for some in labels], "shard": self.shard}
        _processes.check_same("config", asdict(self.config) | about)
        if self.shard:
            check_shard(self.config)
        if not steps_per_epoch(self.data, self.config.batch_size):
            raise PlanError(f"{self.data.name}: one training image makes no batch. Give more.")
        model = self.float.fresh(self.config.seeds[0])
        for k in self.config.k:
            plan = self._plan(model, k)
            for method in self.config.methods:
                METHODS[method].check(plan)

    def run(self, command: str) -> list[dict[str, Any]]:
        """Do every job that is not finished; write rows.json and details.json after each.

        Args:
            command: the command line, for the report.

        Returns:
            One row per method, k and seed, with the keys of `ROW_KEYS`.
        """
        _processes.in_first(lambda: sweep(self.folder))
        results: list[dict[str, Any]] = []
        for seed in self.config.seeds:
            for method in self.config.methods:
                for k in self.config.k:
                    results.append(self.cell(method, k, seed))
                    _processes.in_first(lambda: self._write(results, command))
        return [_public(result["row"]) for result in results]

    # -- one method, k and seed -----------------------------------------------------------------

    def cell(self, method: str, k: int, seed: int) -> dict[str, Any]:
        """Do one method at one K with one seed, unless it is finished.

        Returns:
            its "row", "layers", "float_bytes" and "history".
        """
        name = f"{method}-k{k}-seed{seed}"
        done = self.jobs.finished(name)
        if done is not None:
            return done
        reference = self.float.get(seed, continued=True)["accuracy"]
        outcome = self._carry_out(METHODS[method], name, k, seed)
        found = summary(outcome.model, plan=outcome.plan)
        now = accuracy(outcome.model, self.data)
        before = outcome.accuracy_before_hardening
        row = {
            "method": method,
            "k": k,
            "seed": seed,
            "float_accuracy": round(reference, 4),
            "accuracy": round(now, 4),
            "drop": round(reference - now, 4),
            "hardening_gap": None if before is None else round(before - now, 4),
            "bits_fixed": round(found.bits_fixed, 4),
            "bits_entropy": round(found.bits_entropy, 4),
            "bytes": found.bytes_fixed,
            "ratio": round(found.ratio, 4),
            "file_bytes": self._save(name, outcome.model) if found.layers else None,
            "seconds": round(outcome.seconds, 2),
            "accuracy_before_reestimation": round(outcome.accuracy_before_reestimation, 4),
        }
        entropy = {layer.name: layer.bits_entropy for layer in found.layers}
        layers = describe(outcome.model, outcome.plan, outcome.stages, outcome.unsnapped, entropy)
        layers = [{"method": method, "k": k, "seed": seed} | layer for layer in layers]
        result = {"row": row, "layers": layers, "float_bytes": found.float_bytes}
        return self.jobs.finish(name, outcome.model, outcome.history, result)

    def _save(self, name: str, model: nn.Module) -> int:
        """Save the model file and return its bytes."""
        path = self.jobs.model_path(name).with_suffix(".fewbits")

        def write() -> int:
            save(model, path)
            return path.stat().st_size

        return _processes.in_first(write)

    def _carry_out(self, method: Method, name: str, k: int, seed: int) -> _Outcome:
        """Train or quantize, re-estimate batch norm, and keep what was seen on the way."""
        model = self.float.fresh(seed)
        if method.start != "scratch":
            model.load_state_dict(
                self.float.get(seed, continued=method.start == "continued")["state"]
            )
        plan = self._allocated(model, k, seed)
        outcome = _Outcome(model, plan, _state(model), {"before": histograms(model, plan)})
        began = time.monotonic()
        if method.attach is not None:
            self._train_clustered(method, name, seed, outcome)
        elif method.post_training is not None:
            quantize(model, plan=plan, method=method.post_training, rate=self.config.rate)
            if method.finetune:
                self._finetune(outcome, seed)
            outcome.seconds = time.monotonic() - began
        outcome.accuracy_before_reestimation = accuracy(model, self.data)
        reestimate(model, self.data, self.config.batch_size, self.augment)
        outcome.stages["after"] = histograms(model, plan)
        return outcome

    def _train_clustered(self, method: Method, name: str, seed: int, outcome: _Outcome) -> None:
        assert method.attach is not None  # what the caller chose it by
        config = self.config
        job = self.float.job(name, outcome.model, seed, scratch=method.scratch)
        if method.scratch:
            job.epochs += config.finetune_epochs
        steps = job.epochs * steps_per_epoch(self.data, config.batch_size)
        recipe = Recipe(outcome.plan, steps, config.regularizer, config.strength, config.rate)
        job.codebook_lr = config.codebook_lr or None
        job.clustering = method.attach(outcome.model, recipe)
        outcome.stages["before"] = histograms(outcome.model, outcome.plan)  # with the codebooks
        self.jobs.train(job, during=lambda model: histograms(model, outcome.plan))
        during = [epoch["during"] for epoch in job.history if "during" in epoch]
        outcome.stages |= {"during": during[0]} if during else {}
        outcome.history = [{k: v for k, v in h.items() if k != "during"} for h in job.history]
        outcome.seconds = sum(epoch["seconds"] for epoch in job.history)
        outcome.accuracy_before_hardening = reestimated_accuracy(
            outcome.model, self.data, config.batch_size, self.augment
        )
        outcome.unsnapped = _state(outcome.model)
        job.clustering.harden()

    def _finetune(self, outcome: _Outcome, seed: int) -> None:
        outcome.model.train()
        epochs = self.config.finetune_epochs
        for epoch in range(epochs):
            stream = training_batches(
                self.data, self.config.batch_size, self.augment, _epoch_seed(seed, epoch)
            )
            step = FINETUNE_STEP * (1 + math.cos(math.pi * epoch / epochs)) / 2
            finetune_codebooks(outcome.model, stream, cross_entropy, lr=step, plan=outcome.plan)
        outcome.model.eval()

    # -- parts -----------------------------------------------------------------------------

    def _plan(self, model: nn.Module, k: int) -> Plan:
        return make_plan(model, k=k, **self.config.plan_settings())

    def _allocated(self, model: nn.Module, k: int, seed: int) -> Plan:
        """Return the plan for `model`, its numbers of values as the config allocates them."""
        plan = self._plan(model, k)
        if self.config.allocation == "even":
            return plan
        trained = self.float.fresh(seed)
        trained.load_state_dict(self.float.get(seed, continued=True)["state"])
        some = self.data.subset(train=ALLOCATION_IMAGES)
        stream = training_batches(some, ALLOCATION_IMAGES // 4, None, seed)
        size = planned_bytes(trained, plan)
        return allocate(trained, stream, cross_entropy, size_bytes=size, plan=plan)

    def _write(self, results: list[dict[str, Any]], command: str) -> None:
        rows = [result["row"] for result in results]
        write_json(self.folder / "rows.json", [_public(row) for row in rows])
        first = self.config.seeds[0]
        details = {
            "command": command,
            "config": asdict(self.config),
            "methods": {method: METHODS[method].about for method in self.config.methods},
            "environment": environment(self.device),
            "data": {
                "name": self.data.name,
                "train": len(self.data.train_labels),
                "test": len(self.data.test_labels),
                "classes": list(self.data.classes),
            },
            "model": {
                "name": self.config.model,
                "parameters": parameter_count(self.float.fresh(first)),
            },
            "float_bytes": results[0]["float_bytes"],
            "rows": rows,
            "layers": [x for r in results for x in r["layers"] if x["seed"] == first],
        }
        write_json(self.folder / "details.json", details)


def _epoch_seed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()  # in which a peer's modules keep more than tensors
    return {name: t.detach().clone() for name, t in state.items() if isinstance(t, Tensor)}


def _public(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ROW_KEYS}


def environment(device: torch.device) -> dict[str, str]:
    """Return what the figures depend on: versions, processor, threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "fewbits": version("fewbits"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": name,
        "threads": str(torch.get_num_threads()),
        "processors": str(os.cpu_count()),
        "processes": str(_processes.count()),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "CPU"
