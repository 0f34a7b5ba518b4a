"""What both callbacks do, alone or under torchrun: run as `torchrun loops.py FOLDER`.

Each process takes its share of the same batches, and leaves its network in the folder.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fewbits
from fewbits.integrations.lightning import FewbitsCallback
from fewbits.integrations.transformers import cluster

BATCH = 16  # over all processes
PULL = fewbits.Penalty(fewbits.schedules.cubic(0.0, 1.0, steps=8))
INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 40, (64, 7), generator=torch.Generator().manual_seed(0))

State = dict[str, torch.Tensor]


class Module(pl.LightningModule):
    net: nn.Sequential

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def by_lightning(folder: Path, world: int, k: int = 2) -> list[State]:
    """Fit, and return the module's state just before and after it is hardened."""
    states = []

    class Watching(FewbitsCallback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            states.append({n: t.clone() for n, t in pl_module.state_dict().items()})
            super().on_train_end(trainer, pl_module)

    module = Module()
    data = TensorDataset(INPUTS, LABELS)
    sampler = DistributedSampler(data, shuffle=False) if world > 1 else None
    strategy: Any = {"strategy": "ddp", "devices": world} if world > 1 else {}
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[Watching(k=k, pull=PULL)], default_root_dir=folder,
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False, **strategy,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=BATCH // world, sampler=sampler))
    return [*states, module.state_dict()]


def by_transformers(folder: Path, world: int, k: int = 2) -> list[State]:
    """Train, and return the model's state just before and after it is hardened."""
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH // world, num_train_epochs=2,
        learning_rate=0.05, optim="sgd", report_to=[], disable_tqdm=True, save_strategy="steps",
        save_steps=4, use_cpu=True, max_grad_norm=0.0, seed=5,
        ddp_backend="gloo" if world > 1 else None,
        # It doubles the loss of a model that averages over its own examples, as this one does.
        average_tokens_across_devices=False,
    )  # fmt: skip
    data: Any = [{"input_ids": row, "labels": row.sum() % 2} for row in TOKENS]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    callback = cluster(trainer, k=k, pull=PULL, harden=False)
    trainer.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    callback.clustering.harden()
    return [before, model.state_dict()]


def refused(act: Any) -> str:
    """Run what is refused, and return the message."""
    try:
        act()
    except fewbits.PlanError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    torch.save(
        {
            "transformers": by_transformers(folder / "trainer", world),
            "lightning": by_lightning(folder, world),
            "other plan": [
                refused(lambda: by_transformers(folder / "other", world, k=2 + rank)),
                refused(lambda: by_lightning(folder, world, k=2 + rank)),
            ],
        },
        folder / f"{rank}.pt",
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
