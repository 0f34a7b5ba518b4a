"""The HTML report of a run, and the tables of its rows, from saved results only."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._errors import FileError
from .._file import write_atomically
from ._page import page
from ._plots import plots
from ._study import latex, rows_csv
from ._study import markdown as study_markdown
from ._study import text as study_text
from ._tables import comparison as comparison
from ._tables import markdown as markdown
from ._tables import text as text

__all__ = [
    "comparison", "markdown", "study_page", "study_text", "text", "write_report", "write_study",
]  # fmt: skip

_ROW = (
    "method k seed float_accuracy accuracy drop hardening_gap bits_fixed bits_entropy bytes ratio "
    "seconds"
).split()
_DETAILS = "command config environment data model float_bytes rows layers".split()
_LAYER = (
    "method k seed name shape weights stages usage distortion bits_entropy dead merged"
).split()
_EPOCH = "job method k seed epoch loss accuracy hardening_gap".split()


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder, from the results saved there.

    Reads `rows.json`, `details.json` and, where it exists, `metrics.jsonl`. An earlier report
    is replaced in one step: a reader sees the old page or the new one, never half of one.

    Args:
        run: the folder of a finished run.

    Returns:
        The path of the page.

    Raises:
        FileError: if a file is missing, is not JSON, lacks a key, or holds no results; if the
            page cannot be written.
        FewbitsError: if jinja2 is not installed.
    """
    rows = _load(run / "rows.json")
    details = _load(run / "details.json")
    metrics = _load_lines(run / "metrics.jsonl")
    if not rows:
        raise FileError(f"{run / 'rows.json'}: no rows. Let the run finish first.")
    _require(rows, _ROW, run / "rows.json")
    _require([details], _DETAILS, run / "details.json")
    _require(details["layers"], _LAYER, run / "details.json")
    _require(metrics, _EPOCH, run / "metrics.jsonl")
    target = run / "report.html"
    write_atomically(target, page(rows, details, metrics).encode())
    return target


def write_study(folder: Path, results: Mapping[str, Any]) -> None:
    """Write a study's results, tables and plots into a folder, each file in one step.

    Args:
        folder: made where it does not exist; files of the same names are replaced.
        results: what `fewbits.lab.study.gather_results` returns, with at least one row.

    Raises:
        FewbitsError: if matplotlib is not installed; the tables are then written already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"results.json": json.dumps(results, indent=1) + "\n", "rows.csv": rows_csv(results)}
    for name, content in (texts | {"table.tex": latex(results)}).items():
        write_atomically(folder / name, content.encode())
    drawn = plots(results)
    for name, (_, draw) in drawn.items():
        for suffix in ("svg", "pdf"):
            write_atomically(folder / f"{name}.{suffix}", draw(suffix))
    write_atomically(folder / "report.md", _page_with(results, drawn).encode())


def study_page(results: Mapping[str, Any]) -> str:
    """Return the page of a study in Markdown, with its plots as files beside it.

    Raises:
        FewbitsError: if matplotlib is not installed.
    """
    return _page_with(results, plots(results))


def _page_with(results: Mapping[str, Any], drawn: Mapping[str, tuple[str, Any]]) -> str:
    return study_markdown(results, {f"{name}.svg": about for name, (about, _) in drawn.items()})


def _load(path: Path) -> Any:
    """Read one JSON file, or say which file cannot be read and why."""
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}. Is this the folder of a run?") from error
    except ValueError as error:
        raise FileError(f"{path}: not JSON, {error}. Run again to write it anew.") from error


def _parse(content: str) -> Any:
    """Parse JSON; a NaN or infinity, which a diverged run may hold, counts as null."""
    return json.loads(content, parse_constant=lambda _: None)


def _load_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; a file that does not exist holds none."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(_parse(line))
        except ValueError as error:
            raise FileError(
                f"{path}: line {number} is not JSON. Remove the line or run again."
            ) from error
    return found


def _require(items: Iterable[Mapping[str, Any]], keys: Iterable[str], path: Path) -> None:
    """Refuse items that lack one of `keys`, before any page is made from them."""
    for item in items:
        missing = sorted(set(keys) - set(item)) if isinstance(item, Mapping) else sorted(keys)
        if missing:
            raise FileError(f"{path}: lacks {missing[0]!r}. Run again with this version.")
