"""Check many architectures: attach, train two steps, harden, save, load, compare.

    python benchmarks/zoo.py                    # all whose packages are installed, as a table
    python benchmarks/zoo.py bert gpt2 lstm     # some by name

Networks are made from configurations, small where the library lets one choose, with random
weights: nothing is downloaded. Ends with exit code 1 if an architecture fails.
"""

import importlib.util
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewbits

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        source: the package it is from.
        build: makes the network.
        loss: a scalar to train on, from the network.
    """

    source: str
    build: Callable[[], nn.Module]
    loss: Loss


def _image(size: int) -> Loss:
    return lambda model: model(torch.randn(2, 3, size, size)).square().mean()


def _tokens(**more: Any) -> Loss:
    def loss(model: nn.Module) -> Tensor:
        tokens = torch.randint(0, 60, (2, 12))
        return model(input_ids=tokens, **(more or {"labels": tokens})).loss

    return loss


# -- torch alone ------------------------------------------------------------------------------


class _Recurrent(nn.Module):
    """Embedding, recurrent layer, linear layer."""

    def __init__(self, kind: Callable[..., nn.Module]):
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(60, 16), kind(16, 32, batch_first=True)
        self.head = nn.Linear(32, 60)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(tokens))[0])


class _UNet(nn.Module):
    """The shape of a diffusion network: down, attention, up with skips, a time embedding."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.enter = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 2 * channels)
        self.attention = nn.MultiheadAttention(2 * channels, 2, batch_first=True)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.leave = nn.Conv2d(2 * channels, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        time = self.time(torch.ones(len(images), 1))[:, :, None, None]
        top = self.enter(images) + time
        low = self.norm(self.down(top))
        flat = low.flatten(2).transpose(1, 2)
        low = low + self.attention(flat, flat, flat)[0].transpose(1, 2).reshape(low.shape)
        return self.leave(torch.cat([top, self.up(low)], 1))


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(60, 16), encoder, nn.Linear(16, 60))


def _torch_alone() -> dict[str, Entry]:
    def words(model: nn.Module) -> Tensor:
        return model(torch.randint(0, 60, (2, 12))).square().mean()

    return {
        "lstm": Entry("torch", lambda: _Recurrent(nn.LSTM), words),
        "gru": Entry("torch", lambda: _Recurrent(nn.GRU), words),
        "transformer encoder": Entry("torch", _transformer, words),
        "diffusion unet": Entry("torch", _UNet, _image(16)),
    }


# -- packages ---------------------------------------------------------------------------------


def _torchvision() -> dict[str, Entry]:
    from torchvision import models  # pyright: ignore[reportMissingImports]

    names = (
        "resnet18", "resnet50", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "swin_t",
        "densenet121", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5",
    )  # fmt: skip

    def entry(name: str) -> Entry:
        def build() -> nn.Module:
            return models.get_model(name, weights=None, num_classes=10)

        return Entry("torchvision", build, _image(64))

    found = {name: entry(name) for name in names}
    small = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2}
    sizes = {"hidden_dim": 32, "mlp_dim": 64, "num_classes": 10}
    found["vision transformer"] = Entry(
        "torchvision", lambda: models.VisionTransformer(**small, **sizes), _image(32)
    )
    return found


def _timm() -> dict[str, Entry]:
    import timm  # pyright: ignore[reportMissingImports]

    names = (
        "resnet10t", "mobilenetv4_conv_small", "efficientvit_b0", "convnext_atto",
        "convnextv2_atto",
        "mixer_s32_224", "repvgg_a0", "edgenext_xx_small", "ghostnet_050", "hardcorenas_a",
        "vit_tiny_patch16_224", "swin_s3_tiny_224", "mobileone_s0", "fastvit_t8",
    )  # fmt: skip

    def entry(name: str) -> Entry:
        def build() -> nn.Module:
            return timm.create_model(name, pretrained=False, num_classes=10)

        return Entry("timm", build, _image(224))

    return {name: entry(name) for name in names}


def _transformers() -> dict[str, Entry]:
    import transformers

    t: Any = transformers  # whose configurations take more than they are declared to
    small: dict[str, Any] = {
        "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 32,
    }  # fmt: skip
    few: dict[str, Any] = {
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    found = {
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**small)),
        "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**small)),
        "albert": lambda: t.AlbertForMaskedLM(t.AlbertConfig(**small, embedding_size=8)),
        "electra": lambda: t.ElectraForMaskedLM(t.ElectraConfig(**small, embedding_size=8)),
        "deberta-v2": lambda: t.DebertaV2ForMaskedLM(t.DebertaV2Config(**small)),
        "distilbert": lambda: t.DistilBertForMaskedLM(
            t.DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        ),
        "gpt-neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**small)),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(
                vocab_size=60,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                ffn_dim=32,
                max_position_embeddings=32,
                word_embed_proj_dim=16,
            )  # fmt: skip
        ),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**small, **few)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**small, **few)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**small, **few)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**small, **few, head_dim=8)),
        "mamba": lambda: t.MambaForCausalLM(
            t.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, state_size=4)
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=60,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                decoder_start_token_id=0,
            )  # fmt: skip
        ),
    }
    entries = {name: Entry("transformers", build, _tokens()) for name, build in found.items()}
    entries["vit"] = Entry("transformers", lambda: _vit(t), _pixels)
    entries["swin"] = Entry("transformers", lambda: _swin(t), _pixels)
    entries["segformer"] = Entry("transformers", lambda: _segformer(t), _pixels)
    entries["whisper"] = Entry("transformers", lambda: _whisper(t), _speech)
    entries["clip"] = Entry("transformers", lambda: _clip(t), _pairs)
    return entries


def _vit(t: Any) -> nn.Module:
    return t.ViTForImageClassification(
        t.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
        )  # fmt: skip
    )


def _swin(t: Any) -> nn.Module:
    config = t.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    )
    return t.SwinForImageClassification(config)


def _segformer(t: Any) -> nn.Module:
    config = t.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2],
        sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2],
    )  # fmt: skip
    return t.SegformerForImageClassification(config)


def _whisper(t: Any) -> nn.Module:
    config = t.WhisperConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8,
        max_source_positions=20, max_target_positions=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return t.WhisperForConditionalGeneration(config)


def _clip(t: Any) -> nn.Module:
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32,
    }  # fmt: skip
    text = sizes | {"vocab_size": 60, "max_position_embeddings": 32, "eos_token_id": 2}
    image = sizes | {"image_size": 32, "patch_size": 8}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=image, projection_dim=8))


def _pixels(model: nn.Module) -> Tensor:
    return model(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss


def _speech(model: nn.Module) -> Tensor:
    labels = torch.randint(3, 60, (2, 12))
    return model(input_features=torch.randn(2, 8, 40), labels=labels).loss


def _pairs(model: nn.Module) -> Tensor:
    tokens, pixels = torch.randint(3, 60, (2, 12)), torch.randn(2, 3, 32, 32)
    return model(input_ids=tokens, pixel_values=pixels, return_loss=True).loss


_PACKAGES: dict[str, Callable[[], dict[str, Entry]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}


def entries() -> dict[str, Entry]:
    """Return the architectures whose packages are installed here."""
    found = _torch_alone()
    for package, make in _PACKAGES.items():
        if importlib.util.find_spec(package) is not None:
            found |= make()
    return found


def check(entry: Entry) -> dict[str, Any]:
    """Take one architecture all the way, and return a row of the table.

    Raises:
        AssertionError: if the loaded network is not the hardened one.
    """
    began = time.monotonic()
    torch.manual_seed(0)
    model = entry.build().train()
    names = list(model.state_dict())
    clustering = fewbits.Clustering(model, bits=2)
    optimizer = torch.optim.SGD(clustering.param_groups(lr=1e-3), momentum=0.9)
    for _ in range(2):
        (entry.loss(model) + clustering.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        clustering.step()
    clustering.harden()
    assert list(model.state_dict()) == names, "the state dict has other names than before"
    for planned in clustering.plan.selected:
        distinct = len(model.get_parameter(planned.name).unique())
        assert distinct <= 4, f"{planned.name} has {distinct} values"
    fresh = entry.build()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fewbits"
        fewbits.save(model, path)
        size = path.stat().st_size
        fewbits.load(path, into=fresh)
    for (name, value), other in zip(
        model.state_dict().items(), fresh.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), f"{name} differs after loading"
    outputs = []
    for network in (model, fresh):
        torch.manual_seed(1)
        with torch.no_grad():
            outputs.append(entry.loss(network.eval()))
    assert torch.equal(*outputs), "the loaded network computes something else"
    plan = clustering.plan
    clustered = sum(w.weights for w in plan.selected)
    every = sum(parameter.numel() for parameter in model.parameters())
    reasons = Counter(s.reason.partition(" (")[0] for s in plan.skipped)
    return {
        "weights": every,
        "clustered": clustered / every,
        "tensors": len(plan.selected),
        "left alone": ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3)),
        "ratio": fewbits.summary(fresh).float_bytes / size,
        "seconds": time.monotonic() - began,
    }


def main(wanted: list[str]) -> int:
    """Check the architectures, print the table, and return the exit code."""
    found = entries()
    unknown = sorted(set(wanted) - set(found))
    if unknown:
        print(f"not here: {', '.join(unknown)}. Known: {', '.join(found)}", file=sys.stderr)
        return 2
    print("| architecture | from | parameters | clustered | tensors | left alone | ratio |")
    print("|---|---|---:|---:|---:|---|---:|")
    failed = 0
    for name in wanted or found:
        try:
            row = check(found[name])
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"| {name} | {found[name].source} | FAILED | | | | |", flush=True)
            continue
        print(
            f"| {name} | {found[name].source} | {row['weights']:,} | {row['clustered']:.1%} |"
            f" {row['tensors']} | {row['left alone']} | {row['ratio']:.1f}× |",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
