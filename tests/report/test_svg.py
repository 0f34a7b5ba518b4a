"""The drawings, against coordinates worked out by hand and properties of what they show."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
from fake_run import fake_run
from hypothesis import given
from hypothesis import strategies as st
from reading import read

from fewbits.report._panels import histogram, usage_bars
from fewbits.report._svg import Point, Series, chart, ticks


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


def marks(svg: str) -> list[tuple[float, float]]:
    """Places of the marks, in drawing order."""
    found = re.findall(r'class="mark(?: hollow)?" d="M(\S+) ([-\d.]+)m', svg)
    return [(float(x), float(y)) for x, y in found]


@given(xs=st.lists(st.sampled_from([1.0, 1.0001, 1.5, 3.9, 8.0]), min_size=1, max_size=8))
def test_marks_side_by_side_keep_their_height_and_never_cover_each_other(xs: list[float]) -> None:
    series = [Series(f"s{i}", (Point(x, 50.0 + i, "p"),), i) for i, x in enumerate(xs)]
    moved = marks(chart(series, title="t", x_label="x", y_label="y", beside=True))
    stacked = marks(chart(series, title="t", x_label="x", y_label="y"))
    assert [y for _, y in moved] == [y for _, y in stacked]
    places = sorted(x for x, _ in moved)
    # Coordinates are printed to 0.1, so that each may be off by 0.05.
    assert all(b - a >= 9.9 for a, b in itertools.pairwise(places))
    for (a, _), x in zip(moved, xs, strict=True):
        assert all(a > b for (b, _), other in zip(moved, xs, strict=True) if x > other + 0.1)


def test_marks_move_no_further_than_they_must() -> None:
    # Worked by hand: the axis is 86 to 546 wide, less 20 on each side for four series, and
    # shows 0.65 to 8.35, so 1 is at 106 + 0.35 / 7.7 * 420 and 8 as far from the other end.
    series = [Series(f"s{i}", (Point(x, 50.0, "p"),), i) for i, x in enumerate([1, 1, 1, 8])]
    svg = chart(series, title="t", x_label="x", y_label="y", beside=True)
    assert [x for x, _ in marks(svg)] == [115.1, 125.1, 135.1, 506.9]


def test_axis_that_doubles_gives_each_doubling_the_same_room() -> None:
    def chart_of(*xs: float) -> str:
        points = tuple(Point(x, 50.0, "p") for x in xs)
        return chart([Series("s", points)], title="t", x_label="x", y_label="y", doubling=True)

    places = [x for x, _ in marks(chart_of(0.5, 1, 2, 4, 8))]
    steps = [b - a for a, b in itertools.pairwise(places)]
    assert max(steps) - min(steps) <= 0.21  # each place is printed to 0.1
    assert all(f">{bits}</text>" in chart_of(1, 2, 4) for bits in ("1", "2", "4"))
    assert ">1.60</text>" in chart_of(1.5, 1.7)  # within a doubling
    assert ">1.95</text>" in chart_of(1.9, 2.1)  # about 2, which alone would say too little
    # Zero bits, as of K = 1, has no logarithm: an ordinary axis, on which 2 is in the middle.
    low, middle, high = (x for x, _ in marks(chart_of(0, 2, 4)))
    assert abs(low + high - 2 * middle) <= 0.21


def test_bars_of_few_values_say_their_share_and_many_are_one_shape() -> None:
    few = usage_bars([0.75, 0.25], [-0.5, 0.5], title="t")
    assert ">-0.5: 75.0% of the weights<" in few
    assert ">0.5: 25.0% of the weights<" in few
    # 66 of the 190 by 72 panel is the height of the largest share, a third of it of the other.
    assert "v-66h" in few and "v-22h" in few
    many = usage_bars([1 / 17] * 17, [], title="t")
    assert many.count("<path") == 2  # bars and axis
    assert "<input" not in many


MARK = r'<path class="(?:mark|mark hollow|dot|representative)" d="M(\S+) ([-\d.]+)[a-z]'
VALUE = (
    r'<label style="--x:([-\d.]+)%;--y:([-\d.]+)%"><input type="radio" name="value">'
    r"<span>([^<]+)</span></label>"
)


def test_a_value_lies_over_each_mark_in_one_group_a_drawing(tmp_path: Path) -> None:
    fake_run(tmp_path)
    html, page = read(tmp_path)
    forms = re.findall(r'<form class="plot".*?</form>', html)
    assert len(forms) == sum(tag == "form" for tag, _ in page.tags) > 10
    for form in forms:
        assert form.count('role="radiogroup" aria-label="Values of: ') == 1
        width, height = map(float, re.findall(r'viewBox="0 0 (\d+) (\d+)"', form)[0])
        values = [(float(x) * width, float(y) * height) for x, y, _ in re.findall(VALUE, form)]
        assert len(values) == form.count("<input")
        bars = form.count('class="bar"')
        values = values[:-1] if 'class="level"' in form else values  # the float line's
        marks = [(float(x) * 100, float(y) * 100) for x, y in re.findall(MARK, form)]
        assert len(values) == len(marks) + bars > 0
        for (x, y), (at, up) in zip(values, marks, strict=False):
            # Shares are printed to 0.1%, shapes start at most 6 units from their middle.
            assert abs(x - at) <= 0.15 * width and abs(y - up) <= 600 + 0.15 * height
    # Nothing that has marks is left without, but for those of the legends.
    assert not re.search(
        MARK, re.sub(r'<form class="plot".*?</form>|<svg class="swatch.*?</svg>', "", html)
    )


def test_values_say_the_numbers_of_the_run(tmp_path: Path) -> None:
    rows = fake_run(tmp_path, methods=("penalty",), ks=(4,), seeds=1)
    html, _ = read(tmp_path)
    said = [text for _, _, text in re.findall(VALUE, html)]
    row = next(r for r in rows if r["k"] == 4)
    assert f"penalty, k = 4: {row['accuracy']:.2f}% at {row['bits_entropy']:.2f} bits" in said
    assert f"float: {row['float_accuracy']:.2f}" in said
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        assert f"{line['job']}, epoch {line['epoch']}: {line['accuracy']:.4g}" in said
    for layer in json.loads((tmp_path / "details.json").read_text())["layers"]:
        for value, share in zip(
            layer["stages"][-1]["representatives"], layer["usage"], strict=True
        ):
            assert f"{value:.4g}" in said
            assert f"{value:.4g}: {share:.1%} of the weights" in said
