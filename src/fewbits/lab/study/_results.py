"""What a study has found so far, as one JSON object that tables and plots are made from."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import Config
from ._cells import Study


def gather_results(
    study: Study,
    done: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
    command: str,
) -> dict[str, Any]:
    """Return the results of the cells that are done, with all that they depend on.

    Args:
        study: the study.
        done: what was kept of each finished cell, by key.
        failed: why each failed cell did, by key.
        command: the command line that made them.

    Returns:
        name, title, command, commit, the number of cells, `common` settings and `axes`, those
        that differ between cells besides method, K and seed, with their `defaults`;
        `environments`, each once; `rows`, one per finished cell with its axes, measurements and
        history; `failed`, likewise with the error.
    """
    axes = study.axes
    rows, errors, environments = [], [], []
    for cell in study.cells:
        settings = cell.settings()
        about = {name: settings[name] for name in ("method", "k", "seed", *axes)}
        if cell.key in done:
            kept = done[cell.key]
            if kept["environment"] not in environments:
                environments.append(kept["environment"])
            rows.append(
                about
                | kept["row"]
                | {"float_bytes": kept["float_bytes"], "history": kept["history"]}
            )
        elif cell.key in failed:
            errors.append(about | {"error": failed[cell.key]})
    apart = ("method", "k", "seed", *axes)
    return {
        "name": study.name,
        "title": study.title,
        "command": command,
        "commit": _commit(),
        "cells": len(study.cells),
        "common": {n: _plain(v) for n, v in study.cells[0].settings().items() if n not in apart},
        "axes": axes,
        "defaults": {name: _plain(getattr(Config(), name)) for name in axes},
        "environments": environments,
        "rows": rows,
        "failed": errors,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _commit() -> str | None:
    """Return the commit of the source that runs, marked if files differ; None outside of git."""
    here = Path(__file__).parent
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True,
        )  # fmt: skip
        # An installed package may lie inside somebody else's checkout.
        known = subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name],
            cwd=here, capture_output=True, check=False,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip() if known.returncode == 0 else None
