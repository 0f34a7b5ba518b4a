"""A run stopped and resumed from saved state against the same run uninterrupted: equal bits."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import batch, parameter, same_state, train, two_layers
from torch import nn

import fewbits
from fewbits.regularizers import Nearest, Periodic, RateAware, SoftMin

RAMP = fewbits.schedules.cosine(0.0, 0.5, steps=60, start=10)
REGULARIZERS = [
    Nearest(1), Nearest(2), Periodic(), RateAware(0.3), RateAware(0.1, pin_zero=True),
    SoftMin(fewbits.schedules.linear(0.2, 0.02, steps=60)),
]  # fmt: skip
PULLS = [
    fewbits.Penalty(0.3),
    fewbits.Penalty(RAMP),
    fewbits.Proximal(0.05),
    fewbits.Proximal(RAMP),
]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "AdamW": torch.optim.AdamW,
}


class Run:
    """A model, its clustering and its optimizer."""

    def __init__(self, optimizer: str = "SGD", **settings: Any):
        self.model = two_layers()
        if "plan" not in settings:
            settings.setdefault("k", 6)
        self.clustering = fewbits.Clustering(self.model, **settings)
        groups = self.clustering.param_groups(lr=0.02, codebook_lr=0.01)
        self.optimizer = OPTIMIZERS[optimizer](groups)

    def train(self, steps: range) -> None:
        train(self.model, self.clustering, self.optimizer, steps)

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = (self.model, self.clustering, self.optimizer)
        torch.save([part.state_dict() for part in parts], file)
        return file

    def load(self, file: io.BytesIO, *, clustering_first: bool) -> None:
        file.seek(0)
        model, clustering, optimizer = torch.load(file, weights_only=True)
        if clustering_first:
            self.clustering.load_state_dict(clustering)
        self.model.load_state_dict(model)
        if not clustering_first:
            self.clustering.load_state_dict(clustering)
        self.optimizer.load_state_dict(optimizer)


@pytest.mark.parametrize("clustering_first", [False, True])
@pytest.mark.parametrize("snapped_forward", [False, True])
@pytest.mark.parametrize("pull", PULLS, ids=["penalty", "penalty ramp", "proximal", "prox ramp"])
@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=repr)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    regularizer, pull, snapped_forward, clustering_first
):
    settings = {"regularizer": regularizer, "pull": pull, "snapped_forward": snapped_forward}
    whole = Run(**settings)
    whole.train(range(27))
    file = whole.save()
    whole.train(range(27, 32))
    resumed = Run(**settings)
    parameter(resumed.model, "0.weight").data.mul_(3)  # whatever it held before
    resumed.load(file, clustering_first=clustering_first)
    assert torch.equal(resumed.clustering.loss(), resumed.clustering.loss())
    resumed.train(range(27, 32))
    assert same_state(resumed.model, whole.model)
    assert resumed.clustering.gap() == whole.clustering.gap()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resuming_before_the_start_and_across_a_look_at_the_codebooks(optimizer):
    settings: dict[str, Any] = {"optimizer": optimizer, "pull": fewbits.Penalty(RAMP)}
    whole, resumed = Run(**settings), Run(**settings)
    whole.train(range(5))
    resumed.load(whole.save(), clustering_first=True)
    for some in (whole, resumed):
        some.train(range(5, 52))
    assert same_state(resumed.model, whole.model)
    assert resumed.clustering.gap() == whole.clustering.gap()


def test_a_codebook_that_rests_is_still_known_to_rest_after_resuming():
    settings: dict[str, Any] = {"pull": fewbits.Penalty(0.0), "snapped_forward": False}
    whole, resumed = Run(**settings), Run(**settings)
    whole.train(range(47))
    resumed.load(whole.save(), clustering_first=False)
    resumed.train(range(47, 50))
    assert all(row.unmoved for row in resumed.clustering.gap().layers)


def test_saving_is_no_part_of_the_run():
    quiet, saved = Run(regularizer=RateAware()), Run(regularizer=RateAware())
    for step in range(6):
        quiet.train(range(step, step + 1))
        saved.train(range(step, step + 1))
        saved.save()
    assert same_state(quiet.model, saved.model)


def test_a_state_does_not_change_as_training_goes_on():
    run = Run(regularizer=RateAware())
    run.train(range(3))
    state = run.clustering.state_dict()
    before = [t.clone() for t in state["layers"]["0.weight"].values() if torch.is_tensor(t)]
    run.train(range(3, 6))
    after = [t for t in state["layers"]["0.weight"].values() if torch.is_tensor(t)]
    assert len(before) == 3
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(("settings", "message"), [
    ({"k": 4}, r"another plan: 0\.weight was shape \[16, 12\], k 6, .* is shape \[16, 12\], k 4"),
    ({"k": None, "overrides": {"2": None}}, r"another plan: 2\.weight was .*, is absent"),
    ({"k": None, "granularity": "channel"}, r"groups 1, axis 0, is .*groups 16, axis 0"),
])  # fmt: skip
def test_a_checkpoint_from_another_plan_is_refused_and_nothing_is_changed(settings, message):
    old = Run()
    old.train(range(3))
    if settings.pop("k"):
        new = Run(k=4)
    else:
        new = Run(plan=fewbits.plan(two_layers(), k=6, **settings))
    before = {name: tensor.clone() for name, tensor in new.model.state_dict().items()}
    with pytest.raises(
        fewbits.PlanError, match=message + r".*Attach with the plan it was made wit"
    ):
        new.clustering.load_state_dict(old.clustering.state_dict())
    assert new.clustering.steps == 0
    assert all(torch.equal(new.model.state_dict()[name], before[name]) for name in before)


def test_what_is_no_state_of_ours_is_refused():
    with pytest.raises(
        fewbits.PlanError, match=r"not a state of Clustering: layers, plan, variance missing"
    ):
        Run().clustering.load_state_dict({"steps": 3})


def test_a_plain_checkpoint_of_an_attached_model_holds_its_codebooks():
    run = Run()
    run.train(range(3))
    other = Run()
    other.model.load_state_dict(run.model.state_dict())
    inputs = batch(0)[0]
    assert torch.equal(other.model(inputs), run.model(inputs))
    for some in (run, other):
        some.clustering.harden()
    assert same_state(run.model, other.model)
    plain = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    plain.load_state_dict(run.model.state_dict())  # as strict as it can be
    assert torch.equal(parameter(plain, "0.weight"), parameter(run.model, "0.weight"))
