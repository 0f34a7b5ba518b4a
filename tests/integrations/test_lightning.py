"""The Lightning callback against the three lines written by hand."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fewbits

pl = pytest.importorskip("lightning.pytorch", reason="needs fewbits[lightning]")
from fewbits.integrations.lightning import FewbitsCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.`"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*GPU available"),
]

STRENGTH = fewbits.schedules.cubic(0.0, 1.0, steps=8)
DATA = TensorDataset(
    torch.randn(64, 6, generator=torch.Generator().manual_seed(0)),
    torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(1)),
)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


class Module(pl.LightningModule):
    """A module as a user writes it, knowing nothing of fewbits."""

    net: nn.Sequential

    def __init__(self, schedule: bool = False):
        super().__init__()
        self.net, self.schedule = network(), schedule

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        if not self.schedule:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: 0.5**e)]


def trainer(callback, folder, epochs=2, **settings):
    return pl.Trainer(
        max_epochs=epochs, callbacks=[callback], default_root_dir=folder, accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip


def loader():
    return DataLoader(DATA, batch_size=16)


def by_hand(pull, epochs=2, schedule=False, accumulate=1) -> nn.Sequential:
    model = network()
    clustering = fewbits.Clustering(model, bits=1, pull=pull)
    groups = clustering.param_groups(lr=0.1, weight_decay=0.01)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    rates = [0.1, 0.002]  # of weights and representatives
    for epoch in range(epochs):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5**epoch if schedule else rate
        for number, (inputs, labels) in enumerate(loader(), start=1):
            (cross_entropy(model(inputs), labels) / accumulate).backward()
            if number % accumulate == 0:
                clustering.loss().backward()
                optimizer.step()
                optimizer.zero_grad()
                clustering.step()
    clustering.harden()
    return model


def equal(one: nn.Module, two: nn.Module) -> None:
    # The same sums, the task's and the penalty's gradient added in another order.
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("pull", [fewbits.Penalty(STRENGTH), fewbits.Proximal(STRENGTH)])
def test_a_fit_gives_what_the_three_lines_give(tmp_path, pull, schedule):
    module = Module(schedule)
    trainer(FewbitsCallback(bits=1, pull=pull), tmp_path).fit(module, loader())
    equal(by_hand(pull, schedule=schedule), module.net)
    assert len(module.get_parameter("net.0.weight").unique()) == 2


def test_accumulated_batches_leave_the_pull_as_strong_as_it_is(tmp_path):
    module, pull = Module(), fewbits.Penalty(STRENGTH)
    trainer(FewbitsCallback(bits=1, pull=pull), tmp_path, accumulate_grad_batches=2).fit(
        module, loader()
    )
    equal(by_hand(pull, accumulate=2), module.net)


def test_a_resumed_fit_gives_the_same_bits(tmp_path):
    pull = fewbits.Penalty(STRENGTH)
    whole = Module(True)
    trainer(FewbitsCallback(bits=1, pull=pull), tmp_path / "a", epochs=4).fit(whole, loader())
    first = trainer(FewbitsCallback(bits=1, pull=pull, harden=False), tmp_path / "b")
    first.fit(Module(True), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module(True)
    trainer(FewbitsCallback(bits=1, pull=pull), tmp_path / "b", epochs=4).fit(
        resumed, loader(), ckpt_path=tmp_path / "half.ckpt"
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_representatives_have_a_group_without_weight_decay(tmp_path):
    callback = FewbitsCallback(bits=1, codebook_lr=0.003, harden=False)
    run = trainer(callback, tmp_path, epochs=1)
    run.fit(Module(True), loader())
    model, own = run.optimizers[0].param_groups
    assert (model["weight_decay"], own["weight_decay"]) == (0.01, 0.0)
    assert [p.shape for p in own["params"]] == [(2,), (2,)]
    assert own["initial_lr"] == 0.003
    assert own["lr"] == pytest.approx(0.003 * 0.5)  # as the schedule has it after an epoch
    assert len(model["params"]) == 4


def test_only_the_named_submodule_is_clustered(tmp_path):
    class Two(Module):
        head: nn.Linear

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 3)

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.head(self.net(batch[0])), batch[1])

    module = Two()
    trainer(FewbitsCallback(bits=1, submodule="net"), tmp_path, epochs=1).fit(module, loader())
    assert len(module.get_parameter("net.0.weight").unique()) == 2
    assert len(module.head.weight.unique()) == 9


def test_what_is_logged_can_be_read_by_any_logger(tmp_path):
    callback = FewbitsCallback(bits=1)
    run = trainer(callback, tmp_path, epochs=1)
    run.fit(Module(), loader())
    logged = run.callback_metrics
    assert set(logged) == {
        "fewbits/penalty", "fewbits/moving", "fewbits/distortion", "fewbits/dead"
    }  # fmt: skip


def test_manual_optimization_is_refused_with_the_remedy(tmp_path):
    class Manual(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(fewbits.PlanError, match="three lines"):
        trainer(FewbitsCallback(bits=1), tmp_path).fit(Manual(), loader())


def test_an_optimizer_without_the_codebooks_is_refused(tmp_path):
    class Partial(Module):
        def configure_optimizers(self):
            named = self.named_parameters()
            return torch.optim.SGD([p for n, p in named if "codebook" not in n], lr=0.1)

    with pytest.raises(fewbits.PlanError, match="2 of the codebooks are in no optimizer"):
        trainer(FewbitsCallback(bits=1), tmp_path).fit(Partial(), loader())


def test_a_model_that_is_clustered_or_hardened_already_is_refused(tmp_path):
    module = Module()
    fewbits.Clustering(module, bits=1)
    with pytest.raises(fewbits.PlanError, match="clustered already"):
        trainer(FewbitsCallback(bits=1), tmp_path).fit(module, loader())
    callback, module = FewbitsCallback(bits=1), Module()
    trainer(callback, tmp_path, epochs=1).fit(module, loader())
    with pytest.raises(fewbits.PlanError, match="has hardened its model already"):
        trainer(callback, tmp_path, epochs=1).fit(module, loader())


def test_a_module_that_trains_a_copy_is_noticed_at_the_first_step(tmp_path):
    class Copying(Module):
        copy: nn.Sequential

        def on_fit_start(self):
            self.copy = network()

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.copy(batch[0]), batch[1])

    with pytest.raises(fewbits.PlanError, match="another copy"):
        trainer(FewbitsCallback(bits=1), tmp_path).fit(Copying(), loader())


def test_a_checkpoint_without_clustering_is_refused_before_training(tmp_path):
    plain = pl.Trainer(
        max_epochs=1, default_root_dir=tmp_path, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    plain.fit(Module(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(RuntimeError, match="codebook"):
        trainer(FewbitsCallback(bits=1), tmp_path, epochs=2).fit(
            Module(), loader(), ckpt_path=tmp_path / "plain.ckpt"
        )


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_a_clustered_fit_is_noticed_without_the_callback(tmp_path):
    run = trainer(FewbitsCallback(bits=1, harden=False), tmp_path, epochs=1)
    run.fit(Module(), loader())
    run.save_checkpoint(tmp_path / "clustered.ckpt")
    plain = pl.Trainer(
        max_epochs=2, default_root_dir=tmp_path, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="net.0.weight_codebook"):
        plain.fit(Module(), loader(), ckpt_path=tmp_path / "clustered.ckpt")
