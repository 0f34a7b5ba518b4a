"""The jobs of a run folder: what is finished, and what one that finishes leaves."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import _processes
from .._file import write_atomically
from ._folder import read_json, save_state, write_json
from ._recorder import Recorder
from .progress import Progress
from .training import Job


@dataclass(frozen=True)
class Jobs:
    """Jobs by name in a folder.

    Attributes:
        folder: the run's.
        progress: told of every step and epoch.
    """

    folder: Path
    progress: Progress

    def path(self, name: str) -> Path:
        """Return the folder of a job."""
        return self.folder / "jobs" / name

    def model_path(self, name: str) -> Path:
        """Return where the network of a finished job lies."""
        return self.folder / "models" / f"{name}.safetensors"

    def finished(self, name: str) -> dict[str, Any] | None:
        """Return the result of a job, or None if it has not finished."""
        path = self.path(name) / "result.json"

        def read() -> dict[str, Any] | None:
            both = path.exists() and self.model_path(name).exists()
            return read_json(path) if both else None

        return _processes.in_first(read)

    def train(self, job: Job, during: Any = None) -> None:
        """In place: train a job's network, from its checkpoint on if there is one."""
        recorder = Progress()
        if _processes.rank() == 0:
            recorder = Recorder(self.folder, job.name, self.write_metrics, self.progress)
        job.run(self.path(job.name) / "checkpoint.pt", progress=recorder, during=during)

    def finish(
        self, name: str, model: nn.Module, history: list[dict[str, Any]], result: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the model, then the result that declares it finished, then drop the checkpoint."""
        result = result | {"name": name, "history": history}

        def write() -> None:
            save_state(self.model_path(name), model.state_dict())
            write_json(self.path(name) / "result.json", result)
            (self.path(name) / "checkpoint.pt").unlink(missing_ok=True)

        _processes.in_first(write)
        return result

    def write_metrics(self) -> None:
        """Write metrics.jsonl: one line per finished epoch of every job."""
        lines = []
        for path in sorted((self.folder / "jobs").glob("*/history.json"), key=_age):
            name = path.parent.name
            head, _, seed = name.rpartition("-seed")
            method, _, k = head.rpartition("-k")
            about = {"job": name, "method": method or "float", "k": int(k) if method else None}
            about["seed"] = int(seed)
            for epoch in read_json(path):
                kept = {key: value for key, value in epoch.items() if key != "during"}
                lines.append(json.dumps(about | kept) + "\n")
        write_atomically(self.folder / "metrics.jsonl", "".join(lines).encode())


def _age(path: Path) -> tuple[float, str]:
    return path.stat().st_mtime, str(path)
