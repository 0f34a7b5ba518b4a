"""Small models, a training loop, and typed access to what `Clustering` puts on a layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fewbits


def parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that name itself, where the attribute may read as a snapped tensor."""
    return dict(module.named_parameters(remove_duplicate=False))[name]


def gradient(of: Tensor) -> Tensor:
    assert of.grad is not None
    return of.grad


def two_layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Input and target of one step for `two_layers`."""
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(size, 12, generator=generator)
    return inputs, inputs[:, :4].square()


def sgd(clustering: fewbits.Clustering, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(clustering.param_groups(lr=lr, weight_decay=1e-4), momentum=0.9)


def train(
    model: Callable[[Tensor], Tensor],
    clustering: fewbits.Clustering,
    optimizer: torch.optim.Optimizer,
    steps: range,
) -> None:
    for step in steps:
        inputs, target = batch(step)
        loss = nn.functional.mse_loss(model(inputs), target) + clustering.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clustering.step()


def compiled(model: nn.Module) -> nn.Module:
    """`torch.compile` with everything but the code generator, which would take a C++ compiler."""
    wrapped = torch.compile(model, backend="aot_eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


def distinct(weight: Tensor) -> int:
    return len(weight.detach().unique())


def same_state(model: nn.Module, other: nn.Module) -> bool:
    """Whether two state dicts have the same names and are bit for bit equal."""
    mine, theirs = model.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)
