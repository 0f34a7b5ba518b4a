"""Tables as Jupyter shows them."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """Return an HTML table: the first column to the left, the others to the right.

    Args:
        head: names of the columns.
        rows: a cell a column; everything is escaped.
        notes: lines below the table.
    """
    from html import escape  # here and below: `import fewbits` loads no more than it needs

    def line(cells: Sequence[str], kind: str) -> str:
        sides = ("left", *["right"] * (len(cells) - 1))
        found = (
            f'<{kind} style="text-align:{side}">{escape(cell)}</{kind}>'
            for side, cell in zip(sides, cells, strict=True)
        )
        return f"<tr>{''.join(found)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    below = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>{below}"


def folded(title: str, lines: Sequence[str]) -> str:
    """Return lines that show when their title is clicked; nothing where there are none."""
    if not lines:
        return ""
    from html import escape

    items = "".join(f"<div>{escape(line)}</div>" for line in lines)
    return f"<details><summary>{escape(title)}</summary>{items}</details>"
