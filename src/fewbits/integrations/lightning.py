"""A callback for Lightning: attaches, pulls, takes the steps, hardens at the end of `fit`."""

from typing import Any

from .._clustering import Clustering
from .._errors import FewbitsError, PlanError
from ._shared import add_pull, attach, measures, separate_codebooks

try:
    import lightning.pytorch as pl
except ImportError as _error:
    raise FewbitsError("this callback needs: pip install 'fewbits[lightning]'") from _error


class FewbitsCallback(pl.Callback):
    """Cluster a LightningModule's weights while `Trainer.fit` trains it.

    Nothing else changes: the module keeps its `training_step` and `configure_optimizers`. The
    penalty's gradient is added just before the optimizer's step, so accumulated batches, scaled
    losses and clipping leave the pull as strong as it is. Representatives get a parameter group
    without weight decay. Checkpoints hold what a resumed run needs. With automatic optimization
    only; one optimizer has all clustered weights.

    Args:
        codebook_lr: learning rate of the representatives; if not given the weights', but 0.002 at
            most.
        harden: whether the model is hardened at the end of a `fit` that ran to its end.
        submodule: name of the part of the LightningModule to cluster; all of it if not given.
        **clustering: what `fewbits.Clustering` takes besides the model: `bits`, `k` or `plan`,
            `regularizer`, `pull`, `init`, `snapped_forward`.

    Attributes:
        clustering: the `Clustering`, from the beginning of `fit` on.

    Raises:
        PlanError: at the beginning of `fit`, if the model cannot be clustered so, was clustered
            or hardened before, or optimizes by hand.

    Examples:
        trainer = Trainer(max_epochs=30, callbacks=[FewbitsCallback(bits=2)])
        trainer.fit(module, loader)
        fewbits.save(module, "module.fewbits")
    """

    def __init__(
        self,
        *,
        codebook_lr: float | None = None,
        harden: bool = True,
        submodule: str = "",
        **clustering: Any,
    ):
        """Keep the arguments; attaching happens at the beginning of `fit`."""
        self.codebook_lr: float | None = codebook_lr
        self.harden: bool = harden
        self.submodule: str = submodule
        self._arguments = clustering
        self.clustering: Clustering | None = None
        self._hardened = self._stepped = False
        self._penalty = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Attach, before Lightning makes the optimizers."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise PlanError(
                f"{type(pl_module).__name__} optimizes by hand. Write the three lines of"
                " fewbits.Clustering into its training_step instead of this callback."
            )
        if self._hardened:
            raise PlanError(
                "this callback has hardened its model already; training on would undo that."
                " Use a new FewbitsCallback."
            )
        if self.clustering is None:
            model = pl_module.get_submodule(self.submodule)
            self.clustering = attach(model, self._arguments)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the representatives their parameter group, before a checkpoint is restored."""
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        separate_codebooks(
            trainer.optimizers,
            self._attached(),
            codebook_lr=self.codebook_lr,
            schedulers=schedulers,
        )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Add the pull."""
        self._penalty = add_pull(self._attached())
        self._stepped = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take the step, where the optimizer has."""
        if self._stepped:
            self._stepped = False
            self._attached().step()
            pl_module.log("fewbits/penalty", self._penalty)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the codebooks' health."""
        pl_module.log_dict(measures(self._attached()))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Harden, unless the training was interrupted."""
        if self.harden and not trainer.interrupted:
            self._attached().harden()
            self._hardened = True

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps besides the model's own state dict."""
        if self.clustering is None or self._hardened:
            return {"hardened": self._hardened}
        return {"hardened": False, "clustering": self.clustering.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint left off."""
        if self.clustering is None:
            return  # as in validate or test
        if "clustering" not in state_dict:
            raise PlanError(
                "the checkpoint is of a hardened model: there is nothing to resume."
                " Load its weights into a fresh model and start a new fit."
            )
        self.clustering.load_state_dict(state_dict["clustering"])

    def _attached(self) -> Clustering:
        assert self.clustering is not None  # setup comes first
        return self.clustering
