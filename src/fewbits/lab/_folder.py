"""The run folder: what lies where, written so that a kill never leaves half a file."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save
from torch import Tensor

from .._errors import FileError
from .._file import TEMPORARY, fill_atomically, write_atomically

# What a run's folder holds; config.toml is last, so that a half-deleted run still is one.
_CONTENTS = (
    "jobs", "models", "tensorboard", "metrics.jsonl", "rows.json", "details.json", "report.html",
    "config.toml",
)  # fmt: skip
_FIRST_WORD = "# fewbits "
# Held by the process that works in a folder; the system lets go of it when that process dies.
_LOCK = ".lock"
# As `fill_atomically` names what it has not finished.
_HALF_WRITTEN = re.compile(rf"\..+\.\d+-\d+{re.escape(TEMPORARY)}")


def fingerprint(values: Mapping[str, Any], digits: int = 8) -> str:
    """Return hexadecimal digits that the values together decide, in whatever order they are."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:digits]


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        FileError: if the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise FileError(f"{path}: is not JSON ({error}). Delete it to make it anew.") from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain values atomically, for `load_checkpoint`."""

    def fill(file: BinaryIO) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's way to say that the disk is full
            file.flush()  # says so in the system's words, where something is left to be written
            raise OSError(str(error).partition("\n")[0]) from error

    fill_atomically(path, fill)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote; no code in the file is run.

    Raises:
        FileError: if it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise FileError(
            f"{path}: the checkpoint is damaged ({type(error).__name__})."
            " Delete it to restart this part of the run."
        ) from error


def save_state(path: Path, state: dict[str, Tensor]) -> None:
    """Save a state dict as safetensors, atomically; tied tensors are written once each name."""
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
    write_atomically(path, save(tensors))


def load_state(path: Path) -> dict[str, Tensor]:
    """Load what `save_state` wrote.

    Raises:
        FileError: if it cannot be read.
    """
    try:
        return load_file(path)
    except Exception as error:
        raise FileError(
            f"{path}: the model cannot be read ({error}). Delete it to restart."
        ) from error


def is_vacant(folder: Path) -> bool:
    """Whether a folder is missing, empty, or holds no more than a run that just begins there."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(
        f.name == _LOCK or _HALF_WRITTEN.fullmatch(f.name) for f in folder.iterdir()
    )


def check(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that a new run must not take.

    Args:
        folder: where the run would be.
        overwrite: whether a run that is there already may be deleted.

    Raises:
        FileError: if it is a file, holds a run and may not be overwritten, or holds something
            else than a run.
    """
    if is_vacant(folder):
        return
    if not overwrite:
        raise FileError(
            f"{folder}: exists already. Choose another --out, go on with --resume {folder},"
            " or replace it with --overwrite."
        )
    try:
        ours = (folder / "config.toml").read_text().startswith(_FIRST_WORD)
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:  # many programs have a config.toml
        raise FileError(
            f"{folder}: holds no run (no config.toml of fewbits), so it is not overwritten."
            " Choose another --out."
        )


@contextmanager
def held(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder while working in it, so that no other process does; it is made if missing.

    Args:
        folder: of a run or a cell.
        wait: whether to wait for another process that holds it, instead of refusing.

    Raises:
        FileError: if another process holds it, or it cannot be written to.
    """
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise FileError(
            f"{folder}: another process is at work here. Wait until it has ended, or choose"
            " another --out."
        ) from None
    except OSError as error:
        raise FileError(
            f"{folder}: cannot be written to ({error.strerror}). Choose another --out."
        ) from error
    try:
        yield
    finally:
        lock.release()


def create(folder: Path, config: str, command: str) -> None:
    """Make a run folder with its config in it.

    Of a run that is there, which `check` has allowed, the files of a run are deleted, others not.

    Args:
        folder: where.
        config: TOML text.
        command: the command line, "fewbits …", kept as the config's first line.

    Raises:
        FileError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        for path in (folder / name for name in _CONTENTS):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(
            f"{folder}: cannot be made ({error.strerror}). Choose another --out."
        ) from error
    first = " ".join(command.splitlines())
    write_atomically(folder / "config.toml", f"# {first}\n{config}".encode())


def restarted(folder: Path, config: str) -> bool:
    """Whether torchrun has started this anew, after a process ended, with the same config.

    Args:
        folder: of the run.
        config: TOML text.
    """
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return False
    path = folder / "config.toml"
    return path.exists() and path.read_text().partition("\n")[2] == config


def sweep(folder: Path, name: str = "*") -> None:
    """Delete the half-written files that a killed run left in its folder.

    Args:
        folder: where, folders within it too.
        name: a glob on the names that the files would have had.
    """
    for path in folder.rglob(f".{name}{TEMPORARY}"):
        if _HALF_WRITTEN.fullmatch(path.name):
            path.unlink(missing_ok=True)


def command_of(folder: Path) -> str:
    """Return the command line that made a run, from its config's first line."""
    first = (folder / "config.toml").read_text().partition("\n")[0]
    return first[2:] if first.startswith("# ") else f"fewbits compare --resume {folder}"
