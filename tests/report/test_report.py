"""The report page, against the saved numbers that they are made from."""

import json
import math
import re
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_run import OWN, PEERS, fake_run

from fewbits._errors import FewbitsError, FileError
from fewbits.report import comparison, write_report
from fewbits.report._svg import Point, Series, chart, histogram, ticks, usage_bars

VOID = {"meta", "link", "br", "hr", "img", "input", "col", "wbr", "source"}


class Page(HTMLParser):
    """Reads a page, and refuses tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.table: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.table.append([])
        if tag in ("th", "td"):
            self.table[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("th", "td"):
            self.table[-1][-1] += data.strip()


def read(folder: Path) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


def edit(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "details.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_every_number_of_the_table_is_the_aggregate_of_its_rows(tmp_path: Path) -> None:
    rows = fake_run(tmp_path)
    _, page = read(tmp_path)
    lines = page.table[2:]  # below the heads and the float network
    assert len(lines) == len({(r["method"], r["k"]) for r in rows})
    for line in lines:
        group = [r for r in rows if (r["method"], str(r["k"])) == (line[0], line[1])]

        def spread(key: str, members: list[dict[str, Any]] = group) -> str:
            values = [r[key] for r in members if r[key] is not None]
            if not values:
                return "–"
            return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"

        def mean(key: str, members: list[dict[str, Any]] = group) -> float:
            return statistics.mean(r[key] for r in members)

        before = f"{mean('accuracy') - 0.4:.2f} ± {spread('accuracy').split('± ')[1]}"
        assert line[2:] == [
            spread("accuracy"),
            spread("drop"),
            before,
            spread("hardening_gap"),
            f"{mean('bits_fixed'):.2f}",
            f"{mean('bits_entropy'):.2f}",
            f"{mean('bytes'):,.0f}",
            f"{mean('ratio'):.1f}×",
            f"{mean('seconds'):.1f}",
            str(len(group)),
        ]


def test_float_network_is_counted_once_a_seed(tmp_path: Path) -> None:
    fake_run(tmp_path)
    _, page = read(tmp_path)
    values = [98.6, 98.7, 98.8]
    sd = statistics.stdev(values)
    assert page.table[1][:3] == ["float", "–", f"{statistics.mean(values):.2f} ± {sd:.2f}"]
    assert page.table[1][-1] == "3"


def test_best_is_written_as_a_word_on_the_page(tmp_path: Path) -> None:
    rows = fake_run(tmp_path)
    html, _ = read(tmp_path)
    best = sum(e["best"] for e in comparison(rows))
    assert html.count(">best</span>") == best > 0


@pytest.mark.parametrize("k", [1, 2, 4, 64, 65, 256])
def test_page_is_whole_for_any_number_of_values(tmp_path: Path, k: int) -> None:
    fake_run(tmp_path, methods=("penalty",), ks=(k,), seeds=1, layers=("weight",), epochs=1)
    html, page = read(tmp_path)
    values = "1 value per weight" if k == 1 else f"{k} values per weight"
    assert values in html
    drawn = sum("class" in a and a["class"] == "representative" for _, a in page.tags)
    assert drawn <= 2 * 64 and drawn >= 2 * min(k, 8)  # during and after
    assert sum(tag == "rect" for tag, _ in page.tags) == min(k, -(-k // -(-k // 64)))


@pytest.mark.parametrize("methods", [("kmeans",), ("penalty",), (*OWN, *PEERS)])
@pytest.mark.parametrize("metrics", ["kept", "empty", "missing"])
def test_page_is_whole_for_any_methods_and_metrics(
    tmp_path: Path, methods: tuple[str, ...], metrics: str
) -> None:
    fake_run(tmp_path, methods=methods, seeds=1 if len(methods) == 1 else 2)
    if metrics == "empty":
        (tmp_path / "metrics.jsonl").write_text("")
    if metrics == "missing":
        (tmp_path / "metrics.jsonl").unlink()
    html, _ = read(tmp_path)
    assert ("<h2>Training</h2>" in html) == (metrics == "kept")


def test_no_layers_and_null_accuracy_before_reestimation_leave_their_part_out(
    tmp_path: Path,
) -> None:
    rows = fake_run(tmp_path)
    edit(tmp_path, {"rows": [r | {"accuracy_before_reestimation": None} for r in rows]})
    edit(tmp_path, {"layers": []})
    html, _ = read(tmp_path)
    assert "<h2>Layers</h2>" not in html
    assert "before re-estimation" not in html


def test_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    fake_run(tmp_path)
    html, page = read(tmp_path)
    assert not re.findall(r"(?:https?:)?//[a-z]", html.replace("http://www.w3.org/2000/svg", ""))
    assert not re.search(r"url\(|@import", html)
    assert not {"script", "img", "link", "iframe", "object", "image", "use"} & {
        tag for tag, _ in page.tags
    }
    assert not [a for _, a in page.tags if {"src", "href", "xlink:href"} & a.keys()]


def test_hostile_names_are_shown_and_never_run(tmp_path: Path) -> None:
    hostile = "</title></style><script>alert('1')</script>\"onload=\"x"
    fake_run(tmp_path, methods=(hostile, "penalty"), ks=(2, 4), layers=(hostile,), epochs=2)
    edit(tmp_path, {"command": hostile, "config": {hostile: hostile}})
    edit(tmp_path, {"environment": {hostile: hostile}})
    edit(tmp_path, {"model": {"name": hostile, "parameters": 1}})
    edit(tmp_path, {"data": {"name": hostile, "train": 1, "test": 1, "classes": []}})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    changed = [json.loads(line) | {"job": hostile, "method": hostile} for line in lines]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, changed)))
    html, page = read(tmp_path)
    assert "<script" not in html and "</style><" not in html
    assert not [a for _, a in page.tags if "onload" in a]
    assert page.text.count(hostile) > 10


def coordinates(svg: str) -> list[float]:
    drawn = re.findall(r' (?:d|points|x|y|width|height|viewBox)="([^"]*)"', svg)
    words = [w for part in drawn for w in re.findall(r"[-\w.]+", re.sub(r"[a-zA-Z]", " ", part))]
    assert not re.search(r'="[^"]*\b(nan|inf)', svg, re.IGNORECASE)
    return [float(word) for word in words]


def test_coordinates_are_finite_and_inside_for_numbers_that_are_not(tmp_path: Path) -> None:
    fake_run(tmp_path)
    html, _ = read(tmp_path)
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert all(-80 <= c <= 570 for c in coordinates(svg))
    ugly = [math.nan, math.inf, -math.inf, 1e300, 5.0, 5.0]
    points = tuple(Point(float(i), y, "p", y) for i, y in enumerate(ugly))
    for kept in (points, points[-1:], ()):
        svg = chart([Series("s", kept)], title="t", x_label="x", y_label="y")
        assert all(-80 <= c <= 570 for c in coordinates(svg))
        assert bool(svg) == bool(kept)
    for bounds in ((0.0, 0.0), (1.0, 1.0), (-1e-30, 1e-30), (-1e20, 1e20)):
        middle = sum(bounds) / 2
        svg = histogram([9], bounds, span=bounds, representatives=[middle, math.nan], title="t")
        assert all(-80 <= c <= 200 for c in coordinates(svg))
    assert coordinates(usage_bars([], [], title="t")) and coordinates(
        histogram([], (0, 1), span=(0, 1), representatives=[], title="t")
    )


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.5, 8.5, [2, 4, 6, 8]),
        (97.1, 98.7, [97.5, 98, 98.5]),
        (-0.3, 0.3, [-0.2, 0, 0.2]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected
    assert all(tick == int(tick) for tick in ticks(low, high, whole=True))


def test_weights_and_representatives_share_one_scale() -> None:
    # Worked by hand: the panel is 190 wide with 4 spare on each side, so 0 of [-1, 1] is at 95
    # and the second of two bins reaches from 95 to 186, 66 high as the tallest.
    svg = histogram([0, 9], (-1, 1), span=(-1, 1), representatives=[0.0, 1.0], title="t")
    assert 'd="M95 72v-66H186V72z"' in svg
    assert 'd="M95 73' in svg and 'd="M186 73' in svg
    # The same span serves a stage whose weights lie closer together: 0.5 is at 140.5.
    svg = histogram([9], (0, 0.5), span=(-1, 1), representatives=[0.5], title="t")
    assert 'd="M95 72v-66H140.5V72z"' in svg and 'd="M140.5 73' in svg


def test_headline_states_the_smallest_own_file_that_loses_little(tmp_path: Path) -> None:
    rows = fake_run(tmp_path, methods=("kmeans", "penalty"), ks=(2, 4, 16), seeds=1)
    drops = {("penalty", 2): 5.0, ("penalty", 4): 0.3, ("penalty", 16): 0.0}
    for row in rows:
        row["drop"] = drops.get((row["method"], row["k"]), 0.2)
        row["accuracy"] = row["float_accuracy"] - row["drop"]
        row["ratio"] = {2: 20.0, 4: 14.12, 16: 8.0}[row["k"]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    html, page = read(tmp_path)
    said = "4 values per weight (2\u00a0bits): 98.3% against 98.6% float; a 14.1× smaller file"
    assert f"<h1>{said}</h1>" in html
    # A peer that does better at the same k is named beside it.
    assert "kmeans is more accurate, 98.40% against 98.30%" in page.text


def test_own_methods_come_first_and_only_the_first_is_open(tmp_path: Path) -> None:
    fake_run(tmp_path, methods=("kmeans", "penalty"), ks=(4, 16))
    html, _ = read(tmp_path)
    titles = re.findall(r"<details( open)?>\s*<summary><strong>(.*?)</strong>", html)
    assert titles == [
        (" open", "penalty, k = 4"),
        ("", "penalty, k = 16"),
        ("", "kmeans, k = 4"),
        ("", "kmeans, k = 16"),
    ]
    assert html.count("Warning: 2 dead") == 2 * 3


def test_drawings_and_table_are_named_for_assistive_software(tmp_path: Path) -> None:
    fake_run(tmp_path)
    _, page = read(tmp_path)
    for tag, attributes in page.tags:
        if tag == "svg" and attributes.get("aria-hidden") != "true":
            assert attributes["role"] == "img" and attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert {"lang": "en"} in [a for tag, a in page.tags if tag == "html"]


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colors_contrast_in_light_and_dark(tmp_path: Path) -> None:
    fake_run(tmp_path, methods=("penalty",), ks=(2,), seeds=1)
    html, _ = read(tmp_path)
    themes = [dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in html.split("@media")[:2]]
    for theme in themes:
        for name in theme.keys() - {"paper", "sheet", "rule"}:
            # WCAG 2.2: 4.5 for text; the series colors are lines, but pass it too.
            for ground in ("paper", "sheet"):
                both = sorted((luminance(theme[name]), luminance(theme[ground])))
                assert (both[1] + 0.05) / (both[0] + 0.05) >= 4.5, (name, ground)


def test_writing_twice_replaces_the_page_and_leaves_nothing_else(tmp_path: Path) -> None:
    fake_run(tmp_path, methods=("penalty",), ks=(2,))
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_bytes() == first
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"rows.json", "details.json", "metrics.jsonl", "report.html"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.json", None, "No such file"),
        ("rows.json", "[]", "no rows"),
        ("rows.json", "[{", "not JSON"),
        ("rows.json", '[{"method": "m"}]', "lacks 'accuracy'"),
        ("details.json", "{}", "lacks 'command'"),
        ("metrics.jsonl", '\n{"job"', "line 2 is not JSON"),
        ("metrics.jsonl", '{"job": "j"}', "lacks 'accuracy'"),
    ],
)
def test_broken_results_are_refused_by_name(
    tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    fake_run(tmp_path, methods=("penalty",), ks=(2,), seeds=1)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(FileError, match=said) as caught:
        write_report(tmp_path)
    assert name in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_page_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    fake_run(tmp_path, methods=("penalty",), ks=(2,), seeds=1)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(FileError, match="cannot be written"):
        write_report(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_missing_jinja2_is_said_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_run(tmp_path, methods=("penalty",), ks=(2,), seeds=1)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(FewbitsError, match=r"pip install 'fewbits\[cli\]'"):
        write_report(tmp_path)
