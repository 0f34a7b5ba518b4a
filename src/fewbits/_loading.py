"""`load`: a file into a state dict, a dense model, or one that stays packed."""

import math
import os
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, overload

import torch
from torch import Tensor, nn

from . import _file
from ._errors import FileError, did_you_mean
from ._file import Progress, Reader, reading
from ._packed import PackedWeight, attach, is_convolution, spared, why_dense
from ._plan import unwrapped

Model = TypeVar("Model", bound=nn.Module)
Mode = Literal["dense", "compressed"]


@overload
def load(
    path: str | os.PathLike[str],
    *,
    into: None = None,
    mode: Mode = "dense",
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]: ...
@overload
def load(
    path: str | os.PathLike[str],
    *,
    into: Model,
    mode: Mode = "dense",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Model: ...
def load(
    path: str | os.PathLike[str],
    *,
    into: nn.Module | None = None,
    mode: Mode = "dense",
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor] | nn.Module:
    """Load what `save` wrote, bit for bit.

    Nothing of the file is executed. Every length, checksum and index is checked.

    Args:
        path: the file.
        into: a module whose state dict has the same names, shapes and types; its tensors are
            overwritten in place. All or nothing: the whole file is read and checked before the
            first of them is touched, and read again after.
        mode: "dense", or "compressed" for a module whose layers keep their weights packed, as
            `fewbits.compressed.compress` describes. Then one layer's weights are unpacked at a
            time, and the module may be on the meta device, so that it never takes more memory.
        threads: how many tensors to decode at a time; up to 4 if not given, 1 for "compressed".
        progress: called with an iterable and its length; returns what to iterate over instead.

    Returns:
        `into`, or without it the state dict; tied tensors are one tensor there.

    Raises:
        FileError: if the file cannot be read, is damaged, or does not fit the module; every
            difference is named. Also if there is no such mode, or no module to compress.
    """
    if mode not in get_args(Mode):
        near = did_you_mean(str(mode), get_args(Mode))
        raise FileError(f"mode is {mode!r}.{near} Use one of {', '.join(get_args(Mode))}.")
    if mode == "dense":
        return _file.load(path, into=into, threads=threads, progress=progress)
    if into is None:
        raise FileError("mode is 'compressed' without a model. Give one as into=.")
    with reading(Path(path)) as reader:
        _Loading(Path(path), reader, unwrapped(into)).run(progress)
    return into


class _Loading:
    """The steps of loading a file into a model that stays packed, one tensor at a time."""

    def __init__(self, path: Path, reader: Reader, model: nn.Module):
        self.path, self.reader, self.model = path, reader, model
        state = model.state_dict(keep_vars=True)
        self.targets = _file.find_targets(path, reader.header, state, meta=True)
        self.names: dict[int, list[str]] = {}  # of each parameter and buffer of the model
        self.dense: set[str] = set()  # what stays dense though it could be packed
        tensors = [*model.named_parameters(remove_duplicate=False),
                   *model.named_buffers(remove_duplicate=False)]  # fmt: skip
        for name, tensor in tensors:
            self.names.setdefault(id(tensor), []).append(name)
        stored = {id(tensor) for tensors in self.targets.values() for tensor in tensors}
        lost = sorted(name for name, t in tensors if t.is_meta and id(t) not in stored)
        if lost:
            raise FileError(
                f"{path}: has no values for {', '.join(lost)}, on the meta device in the model."
                " Build the model on a device with memory, or without them; nothing was changed."
            )

    @torch.no_grad()
    def run(self, progress: Progress | None) -> None:
        """Read and check everything, then read it again and put it into the model."""
        names = list(self.targets)
        twice = [*names, *names]
        wrapped = iter(progress(twice, len(twice)) if progress else twice)
        sizes = {name: self._size(name, self._read(name)) for name in islice(wrapped, len(names))}
        _file.check_tied(self.path, self.reader, self.targets)
        small = {name: size[0] for name, size in sizes.items() if size[0]}
        self.dense = spared(small, sum(size[1] for size in sizes.values()))
        done: set[int] = set()
        for _ in names:
            name = next(wrapped)
            ids = {id(tensor) for tensor in self.targets[name]}
            if not ids <= done:
                self._place(name, self._read(name))
            # A dense weight that nothing holds any more makes room for the next.
            del self.targets[name]
            done |= ids
        next(wrapped, None)  # so that a progress bar sees its end

    def _read(self, name: str) -> PackedWeight | Tensor:
        tensors = self.targets[name]
        if tensors[0].dim() >= 2 and tensors[0].is_floating_point() and self._fits(name):
            found = self.reader.indexed(name)
            if found is not None:
                device = tensors[0].device
                where = torch.device("cpu") if device.type == "meta" else device
                return PackedWeight(found, tensors[0].dtype, where)
        return self.reader.tensor(name)

    def _size(self, name: str, value: PackedWeight | Tensor) -> tuple[int, int]:
        """Return the dense bytes of a packed convolution, or 0, and the packed ones of any."""
        if isinstance(value, Tensor):
            return 0, 0
        names = [own for tensor in self.targets[name] for own in self.names[id(tensor)]]
        convolution = all(is_convolution(self._owner(own)) for own in names)
        dense = math.prod(value.shape) * value.codebook.element_size()
        return dense if convolution else 0, value.size_bytes

    def _fits(self, name: str) -> bool:
        """Whether every layer that holds a tensor of the file is to keep it packed."""
        names = [self.names.get(id(tensor), []) for tensor in self.targets[name]]
        return (
            name not in self.dense
            and all(names)
            and not any(
                why_dense(self._owner(own), own.rpartition(".")[2])
                for some in names
                for own in some
            )
        )

    def _owner(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])

    def _place(self, name: str, value: PackedWeight | Tensor) -> None:
        for tensor in {id(t): t for t in self.targets[name]}.values():
            if isinstance(value, Tensor) and not tensor.is_meta:
                tensor.copy_(value)
                continue
            for own in self.names[id(tensor)]:
                owner, attribute = self._owner(own), own.rpartition(".")[2]
                if isinstance(value, PackedWeight):
                    attach(owner, value)
                elif attribute in owner._parameters:
                    old = owner._parameters[attribute]
                    value = _parameter(value, old)
                    owner._parameters[attribute] = value
                else:
                    owner._buffers[attribute] = value


def _parameter(value: Tensor, old: Any) -> nn.Parameter:
    """Return a tensor as a parameter like the one before; the same one where it is one."""
    if isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value, requires_grad=old.requires_grad)
