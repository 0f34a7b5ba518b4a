"""A callback for the Trainer of Hugging Face's transformers."""

import os
from pathlib import Path
from typing import Any

import torch

from .._clustering import Clustering
from .._errors import FewbitsError, FileError, PlanError
from ._shared import add_pull, attach, measures, separate_codebooks

try:
    from transformers import Trainer, TrainerCallback
except ImportError as _error:
    raise FewbitsError("this callback needs: pip install 'fewbits[transformers]'") from _error

# What lies beside the Trainer's own files in each of its checkpoints.
STATE = "fewbits.pt"


class FewbitsCallback(TrainerCallback):
    """What `cluster` adds to a Trainer.

    Attributes:
        clustering: the `Clustering`.
        hardened: whether a training has reached its end and hardened the model.
    """

    def __init__(self, clustering: Clustering, *, harden: bool):
        """Use `cluster`, which also sees to the optimizer and to resuming."""
        self.clustering: Clustering = clustering
        self.harden: bool = harden
        self.hardened: bool = False
        self._resumed_from: Path | None = None
        self._penalty = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on where the checkpoint that the Trainer resumes from left off."""
        if self._resumed_from is not None:
            path = self._resumed_from / STATE
            self.clustering.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the pull."""
        self._penalty = add_pull(self.clustering)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the step."""
        self.clustering.step()

    def measured(self) -> dict[str, float]:
        """Return the last penalty and the codebooks' health, for a log."""
        return {"fewbits/penalty": self._penalty} | measures(self.clustering)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put our state into the checkpoint that was just written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            temporary = folder / f".{STATE}.tmp"
            torch.save(self.clustering.state_dict(), temporary)
            os.replace(temporary, folder / STATE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Harden at the end of a training that reached it."""
        if self.harden and state.global_step >= state.max_steps:
            self.clustering.harden()
            self.hardened = True


def cluster(
    trainer: Trainer,
    *,
    codebook_lr: float | None = None,
    harden: bool = True,
    **clustering: Any,
) -> FewbitsCallback:
    """In place: cluster the weights of a Trainer's model while `train` trains it.

    Call it before `train`. The model and its loss stay as they are: the penalty's gradient is
    added just before the optimizer's step, so accumulated batches, scaled losses and clipping
    leave the pull as strong as it is. Representatives get a parameter group without weight decay.
    Each checkpoint of the Trainer also holds `fewbits.pt`, from which `resume_from_checkpoint`
    goes on. Under `accelerate launch` every process does the same.

    Args:
        trainer: with its model and arguments, before `train`.
        codebook_lr: learning rate of the representatives; if not given the weights', but 0.002 at
            most.
        harden: whether the model is hardened when the last step is done.
        **clustering: what `fewbits.Clustering` takes besides the model: `bits`, `k` or `plan`,
            `regularizer`, `pull`, `init`, `snapped_forward`.

    Returns:
        The callback that was added; its `clustering` is the `Clustering`.

    Raises:
        PlanError: if the model cannot be clustered so, is clustered already, or would be made
            anew by `train`; from `train`, if it has hardened the model before.

    Examples:
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
        fewbits.integrations.transformers.cluster(trainer, bits=3)
        trainer.train()
        fewbits.save(model, "model.fewbits")
    """
    assert isinstance(trainer.model, torch.nn.Module)  # a Trainer has no other
    if trainer.model_init is not None:
        raise PlanError(
            "this Trainer makes its model anew when it trains (model_init), which would not be"
            " clustered. Give the Trainer a model instead."
        )
    callback = FewbitsCallback(attach(trainer.model, clustering), harden=harden)
    trainer.add_callback(callback)
    create, train, log = trainer.create_optimizer, trainer.train, trainer.log

    def create_optimizer(*arguments: Any, **named: Any) -> Any:
        # Before the scheduler is made, and a checkpoint's optimizer is read.
        optimizer = create(*arguments, **named)
        separate_codebooks([optimizer], callback.clustering, codebook_lr=codebook_lr)
        return optimizer

    def train_from(resume_from_checkpoint: Any = None, *arguments: Any, **named: Any) -> Any:
        if callback.hardened:
            raise PlanError(
                "this Trainer has hardened its model already; training on would undo that. To go"
                " on from the hardened model, make a new Trainer and cluster that."
            )
        callback._resumed_from = _folder(trainer, resume_from_checkpoint)
        return train(resume_from_checkpoint, *arguments, **named)

    def log_ours(logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        log(logs | callback.measured() if "loss" in logs else logs, *arguments, **named)

    trainer.create_optimizer = create_optimizer
    trainer.train = train_from
    trainer.log = log_ours
    return callback


def _folder(trainer: Trainer, resume: Any) -> Path | None:
    """Return the folder of the checkpoint that the Trainer will resume from, as it finds it.

    Raises:
        FileError: if that is of a run without clustering, whose weights the Trainer would load
            with a mere warning of missing codebooks.
    """
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(trainer.args.output_dir) if resume is True else resume
    if not found:
        return None
    if not (Path(found) / STATE).exists():
        raise FileError(
            f"{found}: the checkpoint is of a run without clustering ({STATE} is missing). Load its"
            " weights into the model first, and train without resume_from_checkpoint."
        )
    return Path(found)
