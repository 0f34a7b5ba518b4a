"""Training steps, evaluation, and one job: a training that can be stopped and resumed anywhere."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _processes
from .._clustering import Clustering
from .._errors import CodebookError, FileError
from .._finetune import reestimate_batch_norm
from ._folder import load_checkpoint, save_checkpoint
from ._optimizers import OPTIMIZERS
from ._parallel import one_batch, parallel, shared_loss
from ._shard import load_model, load_optimizer, sharded, whole
from .data import Augment, ImageData, batches
from .peers import Peer
from .progress import Progress

# Training images used to re-estimate batch-norm statistics, and per batch in evaluation.
REESTIMATION_IMAGES = 4096
EVALUATION_BATCH = 512


def training_batches(
    data: ImageData, size: int, augment: Augment | None, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of shuffled, augmented, normalized batches; the seed fixes all of it."""
    generator = torch.Generator().manual_seed(seed)
    return batches(
        data.train_images,
        data.train_labels,
        size,
        normalization=data.normalization,
        generator=generator,
        augment=augment,
    )


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData) -> float:
    """Return the share of held-out images classified right, in percent.

    Each process looks at its share of every batch.
    """
    training = model.training
    model.eval()
    right = 0
    for images, labels in batches(
        data.test_images,
        data.test_labels,
        EVALUATION_BATCH,
        normalization=data.normalization,
    ):
        images, labels = _processes.share(images), _processes.share(labels)
        right += int((model(images).argmax(1) == labels).sum())
    model.train(training)
    return 100 * _processes.add_up(right)[0] / len(data.test_labels)


def reestimate(model: nn.Module, data: ImageData, size: int, augment: Augment | None) -> None:
    """In place: re-estimate batch-norm statistics on augmented training images."""
    some = data.subset(train=REESTIMATION_IMAGES)
    stream = batches(
        some.train_images,
        some.train_labels,
        size,
        normalization=data.normalization,  # as in training, not that of the few images
        generator=torch.Generator().manual_seed(0),
        augment=augment,
    )
    reestimate_batch_norm(model, stream)


def reestimated_accuracy(
    model: nn.Module, data: ImageData, size: int, augment: Augment | None
) -> float:
    """Return the accuracy after batch-norm statistics are re-estimated; changes nothing."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        reestimate(model, data, size, augment)
        return accuracy(model, data)
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


@dataclass
class Job:
    """One training: a model, its optimizer, perhaps a clustering, over some epochs.

    Attributes:
        name: what it is called in metrics and folders, such as "penalty-k4-seed0".
        model: trained in place.
        data: the images.
        augment: how training images vary.
        epochs: how many.
        batch_size: images per step.
        lr: peak learning rate.
        weight_decay: of the weights.
        seed: fixes the order and augmentation of the images and dropout.
        clustering: what pulls the weights, ours or a peer's, or nothing for a float network.
        codebook_lr: peak learning rate of our representatives; None leaves it to the clustering.
        optimizer: a name in `OPTIMIZERS`.
        warmup: share of the steps in which the learning rate rises from 0.
        shard: whether each of several processes holds a part of every weight only.
        history: one dict of metrics per finished epoch.
    """

    name: str
    model: nn.Module
    data: ImageData
    augment: Augment | None
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    clustering: Clustering | Peer | None = None
    codebook_lr: float | None = None
    optimizer: str = "sgd"
    warmup: float = 0.0
    shard: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return steps_per_epoch(self.data, self.batch_size)

    def run(
        self,
        checkpoint: Path,
        *,
        progress: Progress,
        during: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        """In place: train the model, from the checkpoint on if there is one.

        Args:
            checkpoint: written atomically after every epoch. Everything random in an epoch is
                seeded by the job's seed and the epoch, so a resumed run repeats the same bits.
            progress: told of every step and epoch.
            during: called half-way; what it returns is kept in that epoch's metrics.

        Raises:
            CodebookError: if the loss becomes NaN or infinite.
            FileError: if the checkpoint is damaged or of another training.
        """
        if self.clustering is not None:
            _processes.check_same_plan(self.clustering.plan.fingerprint())
        if self.shard and _processes.count() > 1:
            self._run_sharded(checkpoint, progress, during)
            return
        optimizer = self._optimizer()
        state = _processes.in_first(
            lambda: load_checkpoint(checkpoint) if checkpoint.exists() else None
        )
        if state is not None:
            self._restore(state, checkpoint, optimizer)
            progress.epoch(self.name, self.history)
        network = parallel(self.model)
        steps = self.steps_per_epoch
        progress.job(self.name, self.epochs * steps, len(self.history) * steps)
        for epoch in range(len(self.history), self.epochs):
            began = time.monotonic()
            with one_batch():
                metrics = self._epoch(epoch, network, optimizer, progress)
            metrics["seconds"] = round(time.monotonic() - began, 3)
            metrics |= self._measure()
            if during is not None and epoch == (self.epochs - 1) // 2:
                metrics["during"] = during(self.model)
            self.history.append(metrics)
            self._save(checkpoint, optimizer)
            progress.epoch(self.name, self.history)
        progress.end()

    def _run_sharded(
        self, checkpoint: Path, progress: Progress, during: Callable[[nn.Module], Any] | None
    ) -> None:
        """Train copies that are cut over the processes; then the model holds what they became."""
        assert not isinstance(self.clustering, Peer)  # refused before
        model, clustering = sharded(self.model, self.clustering)
        job = replace(self, model=model, clustering=clustering, shard=False)

        def gathered() -> nn.Module:
            self.model.load_state_dict(whole(model.state_dict()))
            return self.model

        seen = None if during is None else lambda _: during(gathered())
        job.run(checkpoint, progress=progress, during=seen)
        gathered()
        if self.clustering and clustering:
            self.clustering.load_state_dict(clustering.state_dict())
        self.history = job.history

    def _optimizer(self) -> torch.optim.Optimizer:
        decay = self.weight_decay
        if isinstance(self.clustering, Clustering):
            groups = self.clustering.param_groups(
                lr=self.lr, weight_decay=decay, codebook_lr=self.codebook_lr
            )
        elif self.clustering is not None:
            groups = self.clustering.param_groups(lr=self.lr, weight_decay=decay)
        else:
            groups = [{"params": list(self.model.parameters()), "weight_decay": decay}]
        optimizer = OPTIMIZERS[self.optimizer](groups, self.lr)
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
        peer = self.clustering
        return peer.wrapped(optimizer) if isinstance(peer, Peer) else optimizer

    def _epoch(
        self,
        epoch: int,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
    ) -> dict[str, Any]:
        """Train one epoch and return its mean loss, penalty and training accuracy."""
        network.train()
        # Another seed in each process: dropout would drop the same of every share.
        torch.manual_seed(self.seed * 100_003 + epoch + 1_000_000_007 * _processes.rank())
        stream = training_batches(
            self.data, self.batch_size, self.augment, self.seed * 1_000_003 + epoch
        )
        seen, right, losses, penalties = 0, 0, 0.0, 0.0
        for number, (images, labels) in enumerate(stream):
            step = epoch * self.steps_per_epoch + number
            factor = learning_rate_factor(step, self.epochs * self.steps_per_epoch, self.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            loss, penalty, hits = self._step(step, network, optimizer, images, labels)
            seen += len(labels)
            right += hits
            losses += loss * len(labels)
            penalties += penalty * len(labels)
            progress.step({"loss": losses / seen, "penalty": penalties / seen})
        return {
            "epoch": epoch + 1,
            "loss": losses / seen,
            "penalty": penalties / seen,
            "train_accuracy": 100 * right / seen,
        }

    def _step(
        self,
        step: int,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
    ) -> tuple[float, float, int]:
        """Train on a batch, of which each process has a share.

        Returns:
            The batch's loss, the penalty, and how many images were classified right.
        """
        clustering, whole = self.clustering, len(labels)
        images, labels = _processes.share(images), _processes.share(labels)
        output = network(images)
        loss = shared_loss(output, labels, whole)
        penalty = clustering.loss() if clustering else loss.new_zeros(())
        right = int((output.detach().argmax(1) == labels).sum())
        mean, hits = _processes.add_up(float(loss.detach()) / _processes.count(), right)
        if not math.isfinite(mean + float(penalty.detach())):
            raise CodebookError(
                f"{self.name}: the loss is {mean} and the penalty"
                f" {float(penalty.detach())} at step {step}. Lower the learning rate"
                " (--lr) or the strength (--strength)."
            )
        optimizer.zero_grad(set_to_none=True)
        (loss + penalty).backward()
        optimizer.step()
        if clustering:
            clustering.step()
        return mean, float(penalty.detach()), int(hits)

    def _measure(self) -> dict[str, Any]:
        """Return the held-out accuracy and, with a clustering, the hardening gap, in points."""
        if self.clustering is None:
            return {"accuracy": accuracy(self.model, self.data), "hardening_gap": None}
        # Re-estimated on both sides, so that the gap is what snapping does and nothing else.
        now = reestimated_accuracy(self.model, self.data, self.batch_size, self.augment)
        with self.clustering.snapped():
            snapped = reestimated_accuracy(self.model, self.data, self.batch_size, self.augment)
        return {"accuracy": now, "hardening_gap": now - snapped}

    def _save(self, checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
        state = {  # in every process: parts are put together by all of them
            "model": whole(self.model.state_dict()),
            "optimizer": whole(optimizer.state_dict()),
            "clustering": self.clustering.state_dict() if self.clustering else None,
            "history": self.history,
        }
        _processes.in_first(lambda: save_checkpoint(checkpoint, state))

    def _restore(
        self, state: dict[str, Any], checkpoint: Path, optimizer: torch.optim.Optimizer
    ) -> None:
        try:
            if self.clustering:  # first: it refuses another plan's checkpoint in its own words
                self.clustering.load_state_dict(state["clustering"])
            load_model(self.model, state["model"])
            load_optimizer(optimizer, state["optimizer"])
            self.history = list(state["history"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise FileError(
                f"{checkpoint}: holds no such training as {self.name} ({type(error).__name__})."
                " Undo what changed in the config, or delete it to restart this part of the run."
            ) from error


def steps_per_epoch(data: ImageData, batch_size: int) -> int:
    """Return the optimizer steps in one epoch; a last batch of one image is left out."""
    full, rest = divmod(len(data.train_labels), batch_size)
    return full + (rest > 1)


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak learning rate: a linear rise, then half a cosine to 0.

    Args:
        step: counted from 0.
        steps: in the whole training.
        warmup: share of the steps that the rise takes.
    """
    rise = int(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1))) / 2
