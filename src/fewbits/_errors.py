"""The errors fewbits raises, and the nearest-name hint they carry."""

import difflib
import re
from collections.abc import Iterable


class FewbitsError(Exception):
    """Base of every error that fewbits raises on purpose.

    The message is one line that says what is wrong, where, and what to do.
    """


class PlanError(FewbitsError):
    """A rule, a number of values, or a model that cannot be planned as asked."""


class CodebookError(FewbitsError):
    """Weights or representatives that cannot be used: not finite, collapsed, wrong shape."""


class FileError(FewbitsError):
    """A file, folder, image, checkpoint or config that cannot be read or must not be written."""


def refused_by_the_machine(error: BaseException) -> str | None:
    """Return one line on an error that is the machine's and no bug: memory, disk, rights.

    Args:
        error: whatever was raised.

    Returns:
        what happened and what to do, or None for other errors.
    """
    said = next(iter(str(error).splitlines()), "")
    # torch has an exception of its own for GPUs only, and its allocators word it differently.
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    refused = isinstance(error, RuntimeError) and re.search(
        r"can't allocate memory|not enough memory|failed to allocate", said, re.IGNORECASE
    )
    if memory or refused:
        return (
            f"out of memory{f' ({printable(said, 200)})' if said else ''}. Lower --batch-size or"
            " --width, or give it more memory; what is finished is kept."
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}. Free space, or choose a folder that can be written to."
    return None


def printable(text: str, most: int = 500) -> str:
    """Return text from a stranger as one line: what would steer a terminal is spelled out.

    Args:
        text: anything.
        most: characters that are kept.
    """
    cut = text if len(text) <= most else text[:most] + " …"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """Return " Did you mean …?" with the known names nearest to `name`, or nothing.

    Args:
        name: what the user wrote.
        known: what would have been accepted.
        most: how many names to offer at most.

    Returns:
        A sentence with a leading space, or the empty string where nothing is near.
    """
    near = difflib.get_close_matches(name, sorted(set(known)), n=most, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
