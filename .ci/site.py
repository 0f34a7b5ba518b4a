"""What mkdocs does to the pages besides its own work: formulas, and links that leave docs/."""

import re
from typing import Any

from latex2mathml.converter import convert

_MATH = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TAG = re.compile(r"\\tag\{(\d+)\}")
_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn formulas to MathML, which browsers draw themselves; undo links to what is no page."""
    depth = page.file.src_uri.count("/")

    def link(match: re.Match[str]) -> str:
        return match[1] if match[2].count("../") > depth else match[0]

    return _LINK.sub(link, _MATH.sub(_formula, markdown))


def _formula(match: re.Match[str]) -> str:
    """Return a formula as a block with its number beside it."""
    number = _TAG.search(match[1])
    shown = convert(_TAG.sub("", match[1]).strip(), display="block").replace("\n", " ")
    beside = f'<span class="number">({number[1]})</span>' if number else ""
    return f'<div class="formula">{shown}{beside}</div>\n'
