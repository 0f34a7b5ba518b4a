"""The headline and who beats whom, against rows made for the purpose and the statistics module."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from fake_run import fake_run
from reading import edit, read

from fewbits.report import comparison
from fewbits.report._verdict import headline


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "rows.json").write_text(json.dumps(rows))


def with_drops(rows: list[dict[str, Any]], drops: dict[tuple[str, int], float]) -> None:
    """Set the drop of each method and k, and the accuracy with it."""
    for row in rows:
        row["drop"] = drops[row["method"], row["k"]]
        row["accuracy"] = row["float_accuracy"] - row["drop"]
        row["ratio"] = {2: 20.0, 4: 14.12, 16: 8.0}[row["k"]]


def test_headline_states_the_smallest_own_file_that_loses_little(tmp_path: Path) -> None:
    rows = fake_run(tmp_path, methods=("uniform", "kmeans", "penalty"), ks=(2, 4, 16), seeds=1)
    drops = {("penalty", 2): 5.0, ("penalty", 4): 0.3, ("penalty", 16): 0.0}
    drops |= {(method, k): 0.2 for method in ("uniform", "kmeans") for k in (2, 4, 16)}
    with_drops(rows, drops | {("kmeans", 4): 2.5, ("uniform", 4): 3.5})
    write(tmp_path, rows)
    html, page = read(tmp_path)
    assert (
        "<h1>With 4 values per weight (2\u00a0bits), penalty reaches 98.3% on digits: "
        "2.2 points above kmeans, 0.3 points below the float network</h1>"
    ) in html
    assert "3 methods at k = 2, 4 and 16, one seed" in page.text
    assert "The best of the other methods at that k is kmeans." in page.text
    assert "14.1 times smaller" in page.text
    [row] = [r for r in rows if (r["method"], r["k"]) == ("penalty", 4)]
    assert f"{row['bytes']:,} bytes for the whole model" in page.text


def test_headline_of_a_lost_comparison_says_so(tmp_path: Path) -> None:
    rows = fake_run(tmp_path, methods=("kmeans", "penalty"), ks=(2,), seeds=1)
    with_drops(rows, {("kmeans", 2): 1.5, ("penalty", 2): 4.0})
    said = headline(comparison(rows), 98.6, "digits")
    assert said.endswith("2.5 points below kmeans, 4.0 points below the float network")
    write(tmp_path, rows)
    _, page = read(tmp_path)
    assert "the most accurate, as none loses at most 1 point" in page.text
    assert page.tables["duel"][1][-1] == "\u22122.50"  # with a minus sign


@pytest.mark.parametrize(
    ("methods", "drops", "said"),
    [
        (("penalty",), [1.0], "reaches 97.6% on digits: 1.0 point below the float network"),
        (("kmeans",), [-1.0], "reaches 99.6% on digits: 1.0 point above the float network"),
        (("penalty", "kmeans"), [0.2, 0.24], ": level with kmeans, 0.2 points below the float"),
        (("penalty", "proximal"), [0.5, 0.9], ": 0.4 points above proximal, 0.5 points below"),
        (("penalty", "kmeans", "proximal"), [0.2, 0.9, 0.3], ": 0.7 points above kmeans, 0.2 "),
        (("uniform", "kmeans"), [3.0, 2.0], "kmeans reaches 96.6% on digits: 1.0 point above uni"),
    ],
)
def test_headline_compares_with_whatever_is_there(
    tmp_path: Path, methods: tuple[str, ...], drops: list[float], said: str
) -> None:
    rows = fake_run(tmp_path, methods=methods, ks=(4,), seeds=1)
    with_drops(rows, {(m, 4): drop for m, drop in zip(methods, drops, strict=True)})
    assert said in headline(comparison(rows), 98.6, "digits")


def test_difference_is_that_of_the_same_seed_and_its_deviation(tmp_path: Path) -> None:
    rows = fake_run(tmp_path, methods=("kmeans", "uniform", "penalty", "proximal"), ks=(16, 2))
    _, page = read(tmp_path)
    heads, *lines = page.tables["duel"]
    assert [line[0] for line in lines] == ["2", "16"] and len(heads) == 4

    def accuracies(method: str, k: int) -> list[float]:
        return [r["accuracy"] for r in rows if (r["method"], r["k"]) == (method, k)]

    for k_text, own, other, difference in lines:
        k = int(k_text)
        winner = max(("penalty", "proximal"), key=lambda m: sum(accuracies(m, k)))
        rival = max(("kmeans", "uniform"), key=lambda m: sum(accuracies(m, k)))
        pairs = zip(accuracies(winner, k), accuracies(rival, k), strict=True)
        leads = [a - b for a, b in pairs]
        assert difference == f"{statistics.mean(leads):+.2f} ± {statistics.stdev(leads):.2f}"
        for method, cell in ((winner, own), (rival, other)):
            values = accuracies(method, k)
            spread = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
            assert cell == f"{method} {spread}"


def test_difference_leaves_out_seeds_that_one_method_lacks(tmp_path: Path) -> None:
    rows = fake_run(tmp_path, methods=("kmeans", "penalty"), ks=(4,))
    rows = [r for r in rows if (r["method"], r["seed"]) != ("kmeans", 1)]
    write(tmp_path, rows)
    _, page = read(tmp_path)
    of = {(r["method"], r["seed"]): r["accuracy"] for r in rows}
    leads = [of["penalty", seed] - of["kmeans", seed] for seed in (0, 2)]
    said = f"{statistics.mean(leads):+.2f} ± {statistics.stdev(leads):.2f}"
    assert page.tables["duel"][1][-1] == said


@pytest.mark.parametrize("methods", [("kmeans", "uniform"), ("penalty", "proximal")])
def test_no_duel_without_both_kinds(tmp_path: Path, methods: tuple[str, ...]) -> None:
    fake_run(tmp_path, methods=methods)
    _, page = read(tmp_path)
    assert "duel" not in page.tables


def test_methods_are_explained_where_the_run_explains_them(tmp_path: Path) -> None:
    fake_run(tmp_path, methods=("kmeans", "penalty"))
    edit(tmp_path, {"methods": {"kmeans": "k-means <after> training", "unused": "never run"}})
    html, page = read(tmp_path)
    assert "<dt>kmeans</dt><dd>k-means &lt;after&gt; training</dd>" in html
    assert "never run" not in page.text
