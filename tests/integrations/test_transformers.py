"""The Trainer's callback against the three lines written by hand, on a tiny BERT."""

import pytest
import torch
from torch import nn

import fewbits

transformers = pytest.importorskip("transformers", reason="needs fewbits[transformers]")
pytest.importorskip("accelerate", reason="needs fewbits[transformers]")
from fewbits.integrations.transformers import cluster  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STRENGTH = fewbits.schedules.cubic(0.0, 1.0, steps=8)
TOKENS = torch.randint(0, 40, (64, 7), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row.sum() % 2} for row in TOKENS]


def network(**settings) -> nn.Module:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def trainer(folder, model=None, **settings):
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 16, "num_train_epochs": 2,
        "learning_rate": 0.05, "weight_decay": 0.01, "optim": "sgd", "report_to": [],
        "disable_tqdm": True, "save_strategy": "no", "logging_steps": 4, "use_cpu": True,
        "lr_scheduler_type": "linear", "max_grad_norm": 0.0, "seed": 5,
    }  # fmt: skip
    return transformers.Trainer(
        model=network() if model is None else model,
        args=transformers.TrainingArguments(**(arguments | settings)),
        train_dataset=DATA,
    )


def equal(one: nn.Module, two: nn.Module) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def by_hand(pull, batches, divisor) -> nn.Module:
    """Train on batches, of which so many make a step, their losses divided by the second."""
    accumulate, share = divisor
    model = network().train()
    clustering = fewbits.Clustering(model, bits=1, pull=pull)
    own, forbidden = clustering.param_groups(lr=0)[1]["params"], ("bias", "LayerNorm")
    named = [(n, p) for n, p in model.named_parameters() if not any(p is o for o in own)]
    groups = [
        {"params": [p for n, p in named if not any(f in n for f in forbidden)]},
        {"params": [p for n, p in named if any(f in n for f in forbidden)], "weight_decay": 0.0},
        {"params": own, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, weight_decay=0.01)
    steps = len(batches) // accumulate
    for number, batch in enumerate(batches):
        step = number // accumulate
        for group, rate in zip(optimizer.param_groups, [0.05, 0.05, 0.002], strict=True):
            group["lr"] = rate * (1 - step / steps)
        (model(**batch).loss / share).backward()
        if (number + 1) % accumulate == 0:
            clustering.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            clustering.step()
    clustering.harden()
    return model


@pytest.mark.parametrize("pull", [fewbits.Penalty(STRENGTH), fewbits.Proximal(STRENGTH)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_gives_what_the_three_lines_give(tmp_path, pull, accumulate):
    run = trainer(tmp_path, gradient_accumulation_steps=accumulate)
    seen: list[dict] = []
    step = run.training_step

    def training_step(model, inputs, *rest):
        seen.append({name: value.clone() for name, value in inputs.items()})
        return step(model, inputs, *rest)

    run.training_step = training_step
    cluster(run, bits=1, pull=pull)
    run.train()
    # The Trainer leaves it to a model that takes further arguments of the loss to divide it.
    share = 1 if run.model_accepts_loss_kwargs else accumulate
    equal(by_hand(pull, seen, (accumulate, share)), run.model)
    weight = run.model.bert.encoder.layer[0].output.dense.weight
    assert len(weight.unique()) == 2


def test_a_resumed_training_gives_the_same_bits(tmp_path):
    pull = fewbits.Penalty(STRENGTH)
    whole = trainer(tmp_path / "a", save_strategy="steps", save_steps=3)
    cluster(whole, bits=1, pull=pull)
    whole.train()
    assert (tmp_path / "a/checkpoint-3/fewbits.pt").exists()
    resumed = trainer(tmp_path / "a", save_strategy="steps", save_steps=3)
    cluster(resumed, bits=1, pull=pull)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_representatives_have_a_group_without_weight_decay(tmp_path):
    run = trainer(tmp_path, num_train_epochs=1)
    callback = cluster(run, bits=1, codebook_lr=0.003, harden=False)
    own = callback.clustering.param_groups(lr=0)[1]["params"]
    run.train()
    optimizer = run.optimizer.optimizer
    (group,) = [g for g in optimizer.param_groups if any(p is own[0] for p in g["params"])]
    assert group["weight_decay"] == 0.0 and group["initial_lr"] == 0.003
    assert len(group["params"]) == len(own)


def test_penalty_and_health_are_logged(tmp_path):
    run = trainer(tmp_path)
    cluster(run, bits=1)
    run.train()
    logged = [entry for entry in run.state.log_history if "fewbits/penalty" in entry]
    assert [entry["step"] for entry in logged] == [4, 8]
    assert all("fewbits/distortion" in entry for entry in logged)


def test_a_training_that_was_stopped_is_not_hardened(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    run = trainer(tmp_path)
    callback = cluster(run, bits=1)
    run.add_callback(Stop())
    run.train()
    assert callback.clustering.steps == 3
    assert "weight_codebook" in "".join(run.model.state_dict())


def test_a_checkpoint_without_clustering_is_refused(tmp_path):
    plain = trainer(tmp_path, save_strategy="steps", save_steps=3)
    plain.train()
    run = trainer(tmp_path)
    cluster(run, bits=1)
    with pytest.raises(fewbits.FileError, match="a run without clustering"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_model_that_is_clustered_already_is_refused(tmp_path):
    run = trainer(tmp_path)
    cluster(run, bits=1)
    with pytest.raises(fewbits.PlanError, match="clustered already"):
        cluster(run, bits=1)


def test_tied_embeddings_are_clustered_once_and_stay_tied(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    data = [{"input_ids": row, "labels": row} for row in TOKENS[:32]]
    run = trainer(tmp_path, model, num_train_epochs=1)
    run.train_dataset = data
    callback = cluster(run, bits=1)
    names = [w.name for w in callback.clustering.plan.selected]
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names
    run.train()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(model.lm_head.weight.unique()) == 2
    fewbits.save(model, tmp_path / "gpt2.fewbits")
    fresh = transformers.GPT2LMHeadModel(config)
    fewbits.load(tmp_path / "gpt2.fewbits", into=fresh)
    equal(model, fresh)


def test_a_model_that_would_be_made_anew_is_refused(tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    run = transformers.Trainer(model_init=lambda: network(), args=arguments, train_dataset=DATA)
    with pytest.raises(fewbits.PlanError, match="makes its model anew"):
        cluster(run, bits=1)


def test_a_copy_that_is_trained_instead_is_noticed_before_training(tmp_path):
    run = trainer(tmp_path)
    cluster(run, bits=1)
    run.model = run.model_wrapped = network()
    with pytest.raises(fewbits.PlanError, match="in no optimizer .*weight_codebook first"):
        run.train()


def test_an_optimizer_that_was_made_before_is_refused(tmp_path):
    run = trainer(tmp_path)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    cluster(run, bits=1)
    with pytest.raises(fewbits.PlanError, match="of the codebooks are in no optimizer"):
        run.train()


def test_training_on_after_hardening_is_refused_and_a_new_trainer_goes_on(tmp_path):
    run = trainer(tmp_path, num_train_epochs=1)
    cluster(run, bits=1)
    run.train()
    with pytest.raises(fewbits.PlanError, match="has hardened its model already"):
        run.train()
    again = trainer(tmp_path, run.model, num_train_epochs=1)
    callback = cluster(again, bits=1)
    assert callback.clustering.gap().moving == 0.0  # it begins with the values that are there
    again.train()
    assert len(run.model.bert.encoder.layer[0].output.dense.weight.unique()) == 2


def test_a_checkpoint_of_a_clustered_run_is_noticed_without_the_callback(tmp_path):
    clustered = trainer(tmp_path, save_strategy="steps", save_steps=3)
    cluster(clustered, bits=1)
    clustered.train()
    with pytest.raises((ValueError, RuntimeError), match="param|codebook"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
