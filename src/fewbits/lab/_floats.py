"""The float networks that methods start from and are compared with, one training per seed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import _processes
from ._folder import fingerprint, held, load_state
from ._jobs import Jobs
from .config import Config
from .data import Augment, ImageData
from .models import build
from .training import Job, accuracy, reestimate

# The settings that decide a float network, and one that has trained on.
_FLOAT = (
    "data", "model", "width", "epochs", "batch_size", "optimizer", "lr", "weight_decay",
    "train_images", "image_size",
)  # fmt: skip
_CONTINUED = (*_FLOAT, "finetune_epochs", "finetune_lr")


def shared_folder(root: Path) -> Callable[[Config, bool], Path]:
    """Return where float networks lie that any config with the same float settings may use.

    Args:
        root: below which each distinct training has a folder.
    """

    def folder(config: Config, continued: bool) -> Path:
        values = asdict(config)
        decisive = {name: values[name] for name in (_CONTINUED if continued else _FLOAT)}
        return root / f"{config.model.rpartition(':')[2]}-{fingerprint(decisive)}"

    return folder


@dataclass(frozen=True)
class Floats:
    """Float networks by seed, trained when first asked for.

    Attributes:
        config: of the run.
        data: the images, on the device to train on.
        augment: how training images vary.
        device: that device.
        jobs: the run's.
        folder: where float networks lie, from the config and whether they have trained on; the
            run's own folder if not given. Processes that share it take turns.
        shard: as `Job` has it.
    """

    config: Config
    data: ImageData
    augment: Augment | None
    device: torch.device
    jobs: Jobs
    folder: Callable[[Config, bool], Path] | None = None
    shard: bool = False

    def get(self, seed: int, *, continued: bool) -> dict[str, Any]:
        """Return a seed's float network, trained if it is not there yet.

        Args:
            seed: the seed.
            continued: whether it has trained for as many epochs as every method: that one is what
                post-training methods quantize and what every accuracy is compared with.

        Returns:
            its "accuracy" in percent, "state" and "history".
        """
        name = f"float-continued-seed{seed}" if continued else f"float-seed{seed}"
        if self.folder is None:
            return self._get(self.jobs, name, seed, continued)
        jobs = Jobs(self.folder(self.config, continued), self.jobs.progress, metrics=False)
        with held(jobs.path(name), wait=True):
            jobs.sweep(name)
            return self._get(jobs, name, seed, continued)

    def _get(self, jobs: Jobs, name: str, seed: int, continued: bool) -> dict[str, Any]:
        done = jobs.finished(name)
        if done is None:
            model = self.fresh(seed)
            if continued:
                model.load_state_dict(self.get(seed, continued=False)["state"])
            job = self.job(name, model, seed, scratch=not continued)
            jobs.train(job)
            reestimate(model, self.data, self.config.batch_size, self.augment)
            found = {"accuracy": accuracy(model, self.data)}
            done = jobs.finish(name, model, job.history, found)
        state = _processes.in_first(lambda: load_state(jobs.model_path(name)))
        return done | {"state": state}

    def fresh(self, seed: int) -> nn.Module:
        """Return a network with random weights, the same for a seed."""
        torch.manual_seed(seed)
        config = self.config
        classes, shape = len(self.data.classes), self.data.shape
        model = build(config.model, classes=classes, shape=shape, width=config.width)
        return model.to(self.device)

    def job(self, name: str, model: nn.Module, seed: int, *, scratch: bool) -> Job:
        """Return a training of a network, from random weights or for the further epochs."""
        config = self.config
        return Job(
            name=name,
            model=model,
            data=self.data,
            augment=self.augment,
            epochs=config.epochs if scratch else config.finetune_epochs,
            batch_size=config.batch_size,
            lr=config.lr * (1.0 if scratch else config.finetune_lr),
            optimizer=config.optimizer,
            warmup=0.1 if scratch else 0.0,
            weight_decay=config.weight_decay,
            seed=seed,
            shard=self.shard,
        )
