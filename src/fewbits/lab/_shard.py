"""A network cut over the processes by FSDP2: each holds parts of weights and momenta."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _processes
from .._clustering import Clustering
from .._errors import PlanError
from .._sharded import is_sharded
from .._stack import stackable
from .config import Config
from .methods import METHODS, REGULARIZERS

# A layer of fewer parameters is gathered together with the rest of the network: an exchange takes
# tens of microseconds however little it carries.
LEAST = 1 << 14
# Layers whose forward is what reads their weights; attention reads those of its output itself.
_LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
_READ_BY_OTHERS = nn.modules.linear.NonDynamicallyQuantizableLinear


def check(config: Config) -> None:
    """Refuse what does not train on parts of weights, before any work.

    Args:
        config: of the run.

    Raises:
        PlanError: with the remedy.
    """
    if "ignored_params" not in _fully_shard_settings():
        raise PlanError(f"--shard needs torch 2.7 or newer; this is {torch.__version__}.")
    for name in config.methods:
        if METHODS[name].peer:
            raise PlanError(
                f"{name} trains whole weights only. Leave it out, or leave out --shard: each"
                " process then holds the whole network."
            )
        if METHODS[name].attach and not stackable(REGULARIZERS[config.regularizer](config.rate)):
            raise PlanError(
                f"regularizer {config.regularizer!r} does not work with --shard. Use nearest-2 or"
                " nearest-1, or leave out --shard."
            )


def _fully_shard_settings() -> Mapping[str, Any]:
    from torch.distributed.fsdp import fully_shard

    return inspect.signature(fully_shard).parameters


def sharded(model: nn.Module, clustering: Clustering | None) -> tuple[nn.Module, Clustering | None]:
    """Return copies of both, of whose weights each process holds a part; the originals stay.

    Args:
        model: the same in every process.
        clustering: attached to it, if there is one.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, clustering = copy.deepcopy((model, clustering))
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (_processes.count(),))
    settings: dict[str, Any] = {"mesh": mesh}
    if clustering is not None:
        settings["ignored_params"] = clustering.codebooks()
    tied = _tied(model)
    for module in list(model.modules()):
        own = list(module.parameters(recurse=False))
        if (
            isinstance(module, _LAYERS)
            and not isinstance(module, _READ_BY_OTHERS)
            and sum(p.numel() for p in own) >= LEAST
            and tied.isdisjoint(map(id, own))
        ):
            fully_shard(module, **settings)
    fully_shard(model, **settings)
    return model, clustering


def _tied(model: nn.Module) -> set[int]:
    """Return which parameters several layers have."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def whole(state: Any) -> Any:
    """Return a state with every tensor whole, on the CPU where it was cut.

    To be called by all processes together. Where nothing is cut, it is the state itself.

    Args:
        state: of a model or an optimizer.
    """
    if isinstance(state, Tensor) and is_sharded(state):
        return state.full_tensor().cpu()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(state, Mapping):
        found = {name: whole(value) for name, value in state.items()}
        return state if all(found[name] is value for name, value in state.items()) else found
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """In place: load a whole state into an optimizer, cut as its parameters are.

    Args:
        optimizer: over the same parameters as the one whose state it was.
        state: of which each process has all.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(map(is_sharded, parameters)):
        cut = {
            number: {name: _like(value, parameters[number]) for name, value in of_one.items()}
            for number, of_one in state["state"].items()
        }
        state = {**state, "state": cut}
    optimizer.load_state_dict(dict(state))


def load_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """In place: load a whole state into a model, cut as the model is."""
    if any(map(is_sharded, model.parameters())):
        own = model.state_dict()
        state = {name: _like(value, own.get(name)) for name, value in state.items()}
    model.load_state_dict(state)


def _like(value: Any, other: Any) -> Any:
    """Return a tensor cut as another one of the same shape is; anything else as it is."""
    cut = isinstance(value, Tensor) and isinstance(other, Tensor) and is_sharded(other)
    if not cut or value.shape != other.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    placed: Any = other
    return distribute_tensor(value.to(placed.device), placed.device_mesh, placed.placements)
