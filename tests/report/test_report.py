"""The report page, against the saved numbers that they are made from."""

import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_run import OWN, PEERS, fake_run
from reading import edit, read

from fewbits._errors import FewbitsError, FileError
from fewbits.report import comparison, write_report


def test_every_number_of_the_table_is_the_aggregate_of_its_rows(tmp_path: Path) -> None:
    rows = fake_run(tmp_path)
    _, page = read(tmp_path)
    # Below the heads and the float network; a line of one cell heads a k.
    lines = [line for line in page.tables["comparison"][2:] if len(line) > 1]
    assert len(lines) == len({(r["method"], r["k"]) for r in rows})
    previous = (0, 0.0)
    for line in lines:
        group = [r for r in rows if (r["method"], str(r["k"])) == (line[0], line[1])]

        def spread(key: str, members: list[dict[str, Any]] = group) -> str:
            values = [r[key] for r in members if r[key] is not None]
            if not values:
                return "–"
            return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"

        def mean(key: str, members: list[dict[str, Any]] = group) -> float:
            return statistics.mean(r[key] for r in members)

        rank = (int(line[1]), -mean("accuracy"))
        assert rank >= previous, "by k, then the most accurate first"
        previous = rank
        before = f"{mean('accuracy') - 0.4:.2f} ± {spread('accuracy').split('± ')[1]}"
        assert [cell.removeprefix("best ") for cell in line[2:]] == [
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
    assert page.tables["comparison"][1][:3] == [
        "float",
        "–",
        f"{statistics.mean(values):.2f} ± {sd:.2f}",
    ]
    assert page.tables["comparison"][1][-1] == "3"


def test_best_is_written_as_a_word_on_the_page(tmp_path: Path) -> None:
    rows = fake_run(tmp_path)
    html, _ = read(tmp_path)
    best = sum(e["best"] for e in comparison(rows))
    assert html.count(">best</span>") == best > 0
    assert "“best” marks" in html
    fake_run(tmp_path, methods=("penalty",))
    alone, _ = read(tmp_path)
    assert "best</span>" not in alone and "“best” marks" not in alone


def test_results_near_float_get_a_chart_of_their_own_where_others_are_far(tmp_path: Path) -> None:
    rows = fake_run(tmp_path, methods=("kmeans", "penalty"), ks=(2, 4), seeds=1)
    for lowest, charts in ((95.0, 1), (60.0, 2)):
        for row in rows:
            far = (row["method"], row["k"]) == ("kmeans", 2)
            row["accuracy"] = lowest if far else 98.0
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        html, page = read(tmp_path)
        assert html.count('aria-label="Accuracy against bits per weight.') == charts
        assert ("Within 4 points of float; 1 lower result is left out" in page.text) == (charts > 1)


@pytest.mark.parametrize("k", [1, 2, 4, 64, 65, 256])
def test_page_is_whole_for_any_number_of_values(tmp_path: Path, k: int) -> None:
    fake_run(tmp_path, methods=("penalty",), ks=(k,), seeds=1, layers=("weight",), epochs=1)
    html, page = read(tmp_path)
    values = "1 value per weight" if k == 1 else f"{k} values per weight"
    assert values in html
    drawn = [a.get("class") for _, a in page.tags]
    assert 2 * min(k, 8) <= drawn.count("representative") <= 2 * 64  # during and after
    bars = [a["d"] or "" for _, a in page.tags if a.get("class") == "bar"]
    assert "".join(bars).count("M") == -(-k // -(-k // 64))  # of as many values each as needed
    assert len(bars) == (k if k <= 16 else 1)


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


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
@pytest.mark.parametrize("count", [1, 100])
def test_numbers_that_are_missing_are_dashes_and_left_out_of_drawings(
    tmp_path: Path, value: float | None, count: int
) -> None:
    rows = fake_run(tmp_path, methods=("penalty", "kmeans"), ks=(4,), layers=("a", "b"))
    measured = "accuracy drop hardening_gap bits_fixed bits_entropy bytes ratio seconds".split()
    for row in rows[:count]:
        row |= dict.fromkeys(measured, value)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    layers = json.loads((tmp_path / "details.json").read_text())["layers"]
    for layer in layers[:count]:
        layer |= {"distortion": value, "bits_entropy": value}
        layer["stages"][0] |= {"low": value, "high": value}
    edit(tmp_path, {"layers": layers})
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines[-count:]:
        line |= {"loss": value, "accuracy": value, "hardening_gap": value}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    html, page = read(tmp_path)
    assert not re.search(r"\b([Nn]a[Nn]|inf|None)\b", page.text)
    assert ("penalty has no measured accuracy on digits" in page.text) == (count == 100)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html, re.IGNORECASE)
    of = {line[0]: line for line in page.tables["comparison"]}
    if count == 1:  # one of three seeds: the mean and deviation are those of the others
        accuracies = [r["accuracy"] for r in rows[1:] if r["method"] == "penalty"]
        said = f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}"
        assert of["penalty"][2].removeprefix("best ") == said
    else:
        assert of["penalty"][2] == "–"


def test_page_of_a_large_network_stays_small_and_mostly_folded(tmp_path: Path) -> None:
    names = tuple(f"features.{i}.weight" for i in range(16))
    methods, ks = (*OWN, *PEERS, "entropy"), (2, 4, 16)
    fake_run(tmp_path, methods=methods, ks=ks, layers=names[:1], epochs=30)
    layers = json.loads((tmp_path / "details.json").read_text())["layers"]
    edit(tmp_path, {"layers": [layer | {"name": n} for layer in layers for n in names]})
    html, page = read(tmp_path)
    assert len(html) < 4e6  # bytes: opens at once, and can be mailed
    folds = [a for tag, a in page.tags if tag == "details" and "class" not in a]
    assert len(folds) == 18 and sum("open" in a for a in folds) == 1
    assert html.count("<summary>8 more layers</summary>") == 18
    assert html.count('<section class="layer">') == 18 * 16


def test_page_says_command_data_seeds_and_environment(tmp_path: Path) -> None:
    fake_run(tmp_path)
    edit(tmp_path, {"config": {"k": [2, 4], "rules": {"a": 3}, "subset": None}})
    html, page = read(tmp_path)
    assert "fewbits compare --data digits --model convnet --k 2 --k 4 --k 16" in page.text
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert (facts["training examples"], facts["test examples"]) == ("1,437", "360")
    assert (facts["name"], facts["seeds"], facts["torch"]) == ("digits", "0, 1, 2", "2.13.0")
    assert (facts["k"], facts["rules"], facts["subset"]) == ("2, 4", "a: 3", "none")


def test_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    fake_run(tmp_path)
    html, page = read(tmp_path)
    assert not re.findall(r"(?:https?:)?//[a-z]", html.replace("http://www.w3.org/2000/svg", ""))
    assert not re.search(r"url\(|@import", html)
    assert not {"script", "img", "link", "iframe", "object", "image", "use"} & {
        tag for tag, _ in page.tags
    }
    assert not [a for _, a in page.tags if {"src", "href", "xlink:href", "action"} & a.keys()]
    # Enter on a radio button submits its form, which would load the page anew.
    assert "default-src 'none'" in html and "form-action 'none'" in html


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


def test_layers_are_in_order_of_k_and_only_those_of_the_headline_are_open(tmp_path: Path) -> None:
    rows = fake_run(tmp_path, methods=("kmeans", "penalty"), ks=(4, 16))
    for row in rows:
        row["drop"] = 0.5 if row["k"] == 16 else 3.0
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    html, _ = read(tmp_path)
    titles = re.findall(r"<details( open)?>\s*<summary><strong>(.*?)</strong>", html)
    assert titles == [
        ("", "penalty, k = 4"),
        ("", "kmeans, k = 4"),
        (" open", "penalty, k = 16"),
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
            assert attributes["scope"] in ("row", "col", "rowgroup")
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
    with pytest.raises(FileError, match="is a folder"):
        write_report(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_missing_jinja2_is_said_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_run(tmp_path, methods=("penalty",), ks=(2,), seeds=1)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(FewbitsError, match=r"pip install 'fewbits\[cli\]'"):
        write_report(tmp_path)
