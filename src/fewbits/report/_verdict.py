"""Who won, and by how much: the sentences and the small table at the top of the page."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._tables import COLUMNS, cell, mean_and_sd, number

Entry = Mapping[str, Any]
# A network that loses more than this is seldom wanted however small its file is.
_HEADLINE_DROP = 1.0
_ACCURACY = COLUMNS[0]


def is_own(entry: Entry) -> bool:
    """Tell fewbits' trained methods: only they harden, so only they have a gap."""
    return entry["hardening_gap"] is not None


def values_per_weight(k: int | None) -> str:
    """Print a number of values and the bits that it takes at a fixed width."""
    if k is None:
        return "unshared values"
    bits = f"{math.log2(k):.3g}"
    return f"{k} value{'s' * (k != 1)} per weight ({bits}\u00a0bit{'s' * (bits != '1')})"


def chosen(entries: Sequence[Entry]) -> Entry:
    """Choose the result of the headline by the rule that `lead` states.

    Args:
        entries: `comparison` of the rows, at least one.

    Returns:
        Among fewbits' own methods, or all where there are none: the smallest file that loses
        little, else the most accurate.
    """
    own = [e for e in entries if is_own(e)] or list(entries)
    close = [e for e in own if e["drop"] is not None and e["drop"] <= _HEADLINE_DROP]
    if close:
        return max(close, key=lambda e: (e["ratio"] or 0.0, _accuracy(e)))
    return max(own, key=_accuracy)


def headline(entries: Sequence[Entry], float_accuracy: float | None, data: str) -> str:
    """State the chosen result, and its lead over the best rival and over the float network.

    Args:
        entries: `comparison` of the rows, at least one.
        float_accuracy: of the float network, in percent.
        data: the name of the data.

    Returns:
        A sentence without a full stop.
    """
    won = chosen(entries)
    rival = _rival(won, entries)
    reached = "has no measured accuracy"
    if won["accuracy"] is not None:
        reached = f"reaches {won['accuracy']:.1f}%"
    said = f"With {values_per_weight(won['k'])}, {won['method']} {reached} on {data}"
    leads = [(rival["accuracy"], rival["method"])] if rival else []
    leads.append((float_accuracy, "the float network"))
    known = [(level, name) for level, name in leads if None not in (level, won["accuracy"])]
    parts = [_against(won["accuracy"] - level, name) for level, name in known]
    return f"{said}: {', '.join(parts)}" if parts else said


def lead(rows: Sequence[Entry], entries: Sequence[Entry]) -> str:
    """Say what was compared, and by which rule the headline was chosen.

    Args:
        rows: the content of `rows.json`.
        entries: `comparison` of them.

    Returns:
        Whole sentences.
    """
    methods = len({e["method"] for e in entries})
    ks = sorted({e["k"] for e in entries if e["k"] is not None})
    seeds = len({row["seed"] for row in rows})
    said = f"Compared: {methods} method{'s' * (methods != 1)}"
    if ks:
        said += f" at k = {_listed(ks)}"
    said += f", {f'{seeds} seeds each' if seeds > 1 else 'one seed'}. "
    won = chosen(entries)
    rule = f"the smallest file that loses at most {_HEADLINE_DROP:g} point"
    if won["drop"] is None or won["drop"] > _HEADLINE_DROP:
        rule = f"the most accurate, as none loses at most {_HEADLINE_DROP:g} point"
    if len(entries) > 1:
        among = "the methods trained by fewbits" if is_own(won) else "all methods"
        said += f"The headline quotes, among {among}, {rule}. "
    rival = _rival(won, entries)
    if rival and is_own(won) and not is_own(rival):
        said += f"The best of the other methods at that k is {rival['method']}. "
    ratio = won["ratio"]
    if ratio:
        size = f"{ratio:.1f} times smaller" if ratio >= 1 else f"{1 / ratio:.1f} times larger"
        said += (
            f"Its file is {size} than the float network's: {number(won['bytes'], ',.0f')} bytes "
            "for the whole model."
        )
    return said.strip()


def duels(rows: Sequence[Entry], entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Set the best method trained by fewbits against the best other method at each k.

    Args:
        rows: the content of `rows.json`.
        entries: `comparison` of them.

    Returns:
        One dict per k at which both kinds are there, ascending: `k`, `own`, `other` (entries),
        `own_accuracy`, `other_accuracy` (printed), `mean` and `sd` of the difference of the
        same seed's accuracies in points (None where undefined) and `difference`, printed.
    """
    found: list[dict[str, Any]] = []
    for k in sorted({e["k"] for e in entries if e["k"] is not None}):
        own = best(e for e in entries if e["k"] == k and is_own(e))
        other = best(e for e in entries if e["k"] == k and not is_own(e))
        if own is None or other is None:
            continue
        mean, sd = _paired(rows, k, own["method"], other["method"])
        spread = "" if sd is None else f" ± {sd:.2f}"
        found.append(
            {
                "k": k,
                "own": own,
                "other": other,
                "own_accuracy": cell(own, _ACCURACY),
                "other_accuracy": cell(other, _ACCURACY),
                "mean": mean,
                "sd": sd,
                "difference": number(mean, "+z.2f", spread),
            }
        )
    return found


def best(entries: Iterable[Entry]) -> Entry | None:
    """Find the most accurate entry; None where there is none with an accuracy."""
    return max((e for e in entries if e["accuracy"] is not None), key=_accuracy, default=None)


def _accuracy(entry: Entry) -> float:
    return -math.inf if entry["accuracy"] is None else entry["accuracy"]


def _rival(won: Entry, entries: Sequence[Entry]) -> Entry | None:
    """Find whom to measure the winner against: the best of the other kind, else of its own."""
    others = [e for e in entries if e["k"] == won["k"] and e is not won]
    return best(e for e in others if not is_own(e)) or best(others)


def _against(lead: float, name: str) -> str:
    """Print a lead in points, such as "0.8 points above kmeans"."""
    if abs(lead) < 0.05:  # 0.0 at the decimals of the headline
        return f"level with {name}"
    size = f"{abs(lead):.1f}"
    return f"{size} point{'s' * (size != '1.0')} {'above' if lead > 0 else 'below'} {name}"


def _listed(ks: Sequence[int]) -> str:
    """Print numbers as a list in a sentence."""
    return " and ".join(filter(None, [", ".join(map(str, ks[:-1])), str(ks[-1])]))


def _paired(
    rows: Iterable[Entry], k: int, own: str, other: str
) -> tuple[float | None, float | None]:
    """Average the difference in accuracy over the seeds that both methods have."""
    of: dict[tuple[str, int], float] = {
        (row["method"], row["seed"]): row["accuracy"]
        for row in rows
        if row["k"] == k and row["accuracy"] is not None
    }
    seeds = [seed for method, seed in of if method == own and (other, seed) in of]
    return mean_and_sd([of[own, seed] - of[other, seed] for seed in seeds])
